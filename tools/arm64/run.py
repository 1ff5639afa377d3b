"""Run the part of the test suite that may differ on ARM64, once per CPU, under the emulator.

    python tools/arm64/run.py .arm64              every CPU; 14 minutes on two idle cores
    python tools/arm64/run.py .arm64 --short      one CPU, a few dozen tests
    python tools/arm64/run.py .arm64 --cpu cortex-a53 -- -k softmax
    python tools/arm64/run.py .arm64 --wheel      the wheel alone
    python tools/arm64/run.py .arm64 --wheel --dist dist      ... that was built before

What follows ``--`` goes to pytest. Kernels are compiled anew whenever a source changes, which is most of the time.
Then, but for ``--short``, a wheel with these CPUs' libraries is built here, installed as on a board, and called on each
CPU without Numba, by the Python of each Debian there is an environment of: tests/call_hashes.py must print there what
it prints here, but for float32 attention, whose last bits follow from the length of vectors and must be the same on all
of them; tests/embeddings.py what tests/embeddings.sha256 holds. At last a Zero 2 W runs out of the box: its processor,
nothing that can be written to, and so much memory in all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from build import ROOT, Progress, SetupError, clean_environment, pip_install

# A whole layer kernel takes the emulator one to three minutes to compile, so what is chosen are the tests of what
# depends on the CPU: its instructions, its LiteRT, its threads, its cache. Argument checks are the same everywhere.
# What LiteRT's own kernels give on the emulated A72 is not to be believed (docs/deployment.md): left out there.
LITERT = "tests/quantized/test_parity.py::test_layers_equal_the_runtime"
BUNDLE = "tests/test_bundle.py::test_"
EVERYWHERE = (
    "tests/kernels/cpu/test_arm64.py",
    f"{BUNDLE}codes_are_those_of_the_kernels",
    f"{BUNDLE}a_bundle_for_a_newer_processor_is_refused",
    f"{BUNDLE}what_cannot_run_here_is_refused_before_it_is_loaded",
    LITERT,
)
SHORT = (*EVERYWHERE, f"--deselect={LITERT}[litert-reference", "tests/kernels/cpu/test_simd.py")
# A53 and A72 have the same instructions, and A76 has those for bytes besides: each is tested in full on one of them,
# in parts that take two cores the same time.
FULL = {
    "cortex-a76": (
        *EVERYWHERE,
        "tests/kernels/cpu/test_simd.py",
        f"{BUNDLE}floats_are_those_of_the_kernels_compiled_here[dynamic]",
        "tests/kernels/cpu/test_kernels_int8.py::test_vector_rule_equals_the_rule_on_python_integers",
        "tests/kernels/cpu/test_kernels_int8.py::test_linear_equals_integer_products",
        "tests/test_functional.py::test_as_accurate_as_plain_float32",
        "tests/test_laws.py::test_law[function with probabilities-nothing_leaks_from_behind_a_mask]",
        "tests/files/test_storage.py::test_what_was_saved_is_loaded",
        "tests/files/test_tflite_reader.py::test_reads_a_path",
    ),
    "cortex-a72": (
        *EVERYWHERE,
        f"--deselect={LITERT}[litert-arm",
        f"{BUNDLE}floats_are_those_of_the_kernels_compiled_here[float32]",
        "tests/kernels/cpu/test_kernels_float32.py::test_float_layer",
        "tests/layers/test_layers.py::test_as_accurate_as_plain_float32",
        "tests/test_threads.py::test_two_threads_give_the_same_bits",
        "tests/test_threads.py::test_concurrent_callers",
        "tests/test_threads.py::test_a_forked_child_computes",
    ),
    "cortex-a53": (
        *SHORT,
        "tests/runtime/test_jit.py::test_second_process_reads_the_cache",
        "tests/runtime/test_jit.py::test_edit_in_another_module_recompiles",
        "tests/runtime/test_jit.py::test_code_of_other_types_is_not_run",
        "tests/files/test_storage.py::test_a_static_layer_round_trips_to_the_same_state",
    ),
}
SHORT_CPU = "cortex-a76"  # the one with an instruction set that the others lack
LAYERS = {True: 8, False: 20}  # of the 200 that test_parity.py compares where that takes seconds

EXPORT = ("import sys, test_bundle; from pathlib import Path; "
          "test_bundle.export_all(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])")


def processes(folder: Path, cpu: str, tests: tuple[str, ...], layers: int, extra: list[str]) -> Iterator[Popen]:
    """Start, each when the one before has ended: the compiler of a CPU's bundles, here; pytest there."""
    bundles = folder / "bundles" / cpu
    shutil.rmtree(bundles, ignore_errors=True)  # of other sources, it may be; what was compiled is kept elsewhere
    bundles.mkdir(parents=True)
    python_path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    pytest = [folder / cpu / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-v",
              "--durations=10", f"--layers={layers}", *tests, *extra]
    floats = re.findall(rf"{BUNDLE}floats\S+\[(\w+)\]", " ".join(tests))
    there = {"NUMBA_CACHE_DIR": str(folder / "numba" / cpu), "PYTHONDONTWRITEBYTECODE": "1",
             "TEST_BUNDLES": str(bundles)}
    if tests is SHORT:  # a layer's kernel takes two minutes to compile there
        there["TEST_PARITY_KERNELS"] = str(bundles / "static-litert.so")
    for command, settings in (([sys.executable, "-c", EXPORT, bundles, cpu, *floats], {"PYTHONPATH": python_path}),
                              (pytest, there)):
        environment = {**clean_environment(), **settings}
        with log_of(folder, cpu).open("a", encoding="utf-8") as log:
            yield Popen([str(part) for part in command], cwd=ROOT, env=environment, stdin=DEVNULL, stdout=log,
                        stderr=STDOUT)


def log_of(folder: Path, cpu: str) -> Path:
    """Return the file that receives what pytest says about a CPU."""
    return folder / f"{cpu}.log"


def summary(log: Path) -> str:
    """Return pytest's last line without its frame, as "60 passed, 8 skipped in 211.92s (0:03:31)"."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.strip("= ") for line in lines if re.fullmatch(r"=+ .* in [\d.]+s\b.*=+", line)]
    return found[-1] if found else f"ended without a result; see {os.path.relpath(log)}"


def percentage(log: Path) -> str:
    """Return how far pytest is, as "42%"."""
    found = re.findall(r"\[ *(\d+%)\]", log.read_text(encoding="utf-8", errors="replace"))
    return found[-1] if found else "compiling"


def run(folder: Path, cpus: list[str], tests: dict[str, tuple[str, ...]], layers: int, extra: list[str]) -> int:
    """Test on every CPU, as many at a time as this machine has cores; return how many failed."""
    waiting, rest, running, failed, results = list(cpus), {}, {}, [], {}
    at_once = len(os.sched_getaffinity(0))
    step = Progress("tests under emulation")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                cpu = waiting.pop(0)
                log_of(folder, cpu).unlink(missing_ok=True)
                rest[cpu] = processes(folder, cpu, tests[cpu], layers, extra)
                running[cpu] = next(rest[cpu])
            time.sleep(0.5)
            step.update(", ".join(f"{cpu} {percentage(log_of(folder, cpu))}" for cpu in running))
            for cpu in [cpu for cpu, process in running.items() if process.poll() is not None]:
                status = running.pop(cpu).returncode
                following = None if status else next(rest[cpu], None)
                if following:
                    running[cpu] = following
                    continue
                results[cpu] = summary(log_of(folder, cpu))
                if status:
                    failed.append(cpu)
    finally:
        for process in running.values():
            process.terminate()
    step.done(f"{len(cpus) - len(failed)} passed, {len(failed)} failed")
    for cpu in failed:
        print(f"\n---- {cpu}\n{log_of(folder, cpu).read_text(encoding='utf-8', errors='replace')[-6000:]}")
    for cpu in cpus:
        print(f"  {'FAILED' if cpu in failed else 'passed'}  {cpu}: {results[cpu]}")
    return len(failed)


# -- the wheel -------------------------------------------------------------------------------------

CALLS, EMBEDDINGS = ROOT / "tests" / "call_hashes.py", ROOT / "tests" / "embeddings.py"
WITHOUT_NUMBA = ("import runpy, sys; sys.modules.update(dict.fromkeys(('numba', 'llvmlite', 'safetensors'))); "
                 "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
                 "runpy.run_path(sys.argv[0], run_name='__main__')")
MAKE_MODELS = ("import sys, embeddings, edgeattn, quant; from benchmarks.minilm import random_model; "
               "embeddings.save(sys.argv[1]); "
               "edgeattn.save(quant.quantize(random_model(), scheme='dynamic'), sys.argv[1] + '/minilm.safetensors')")
SUITES = "", "trixie"  # folders of environments: of this machine's Debian, and of another (tools/arm64/build.py)
ZERO_CPU = "cortex-a53"
ZERO_MEMORY = 128 * 2**20
# What a Zero 2 W does first: it reads a layer and calls it, then an int8 encoder of MiniLM's sizes; the most it took.
ZERO = """
import sys, numpy, edgeattn
layer = edgeattn.load(sys.argv[1] + "/calls/static-96.safetensors")
assert numpy.isfinite(layer(numpy.ones((1, 70, 96), numpy.float32))).all()
with open("/proc/self/status") as file:
    print("of a layer", *(line.split()[1] for line in file if line.startswith("VmHWM")))
model = edgeattn.load(sys.argv[1] + "/models/minilm.safetensors")
assert numpy.isfinite(model(numpy.arange(1000, 1032)[None])).all()
with open("/proc/self/status") as file:
    print("with the encoder", *(line.split()[1] for line in file if line.startswith("VmHWM")))
try:
    open(sys.argv[1] + "/written", "w")
except OSError as error:
    print(error.strerror)
"""


def said(command: list, folder: Path, **settings: str) -> list[str]:
    """The lines that a program prints, run in a folder.

    Raises
    ------
    SetupError
        With its last words where it fails.
    """
    done = subprocess.run([str(part) for part in command], cwd=folder, env={**clean_environment(), **settings},
                          stdin=DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError("\n".join([f"{command[0]} ended with {done.returncode}:",
                                    *(done.stdout + done.stderr).strip().splitlines()[-12:]]))
    return done.stdout.strip().splitlines()


def install_wheel(folder: Path, cpus: list[str], dist: Path | None = None) -> Path:
    """Install a wheel as on a board, one of `dist` or a new one with the libraries of some CPUs; where it is."""
    site = folder / "wheel"
    shutil.rmtree(site, ignore_errors=True)
    if dist is None:
        dist = folder / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        said([sys.executable, ROOT / "tools" / "wheel.py", *cpus, "--out", dist], folder)
    wheel, = dist.glob("*_aarch64.whl")
    options = ["--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--no-index", "--no-deps"]
    pip_install(Path(sys.executable), ["--target", str(site), *options, str(wheel)], f"installing {wheel.name}",
                folder / "setup.log")
    return site


def call_wheel(folder: Path, cpus: list[str], dist: Path | None) -> int:
    """Call every kernel of a wheel on every CPU; return how often the results are not those of this machine.

    What follows from the lanes of a vector, of which this machine's may have more, is compared with the first CPU's.
    """
    step, began = Progress("every kernel for " + ", ".join(cpus)), time.monotonic()
    python_path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    models = folder / "models"
    models.mkdir(exist_ok=True)
    try:
        site = install_wheel(folder, cpus, dist)
        step.done(f"compiled here in {time.monotonic() - began:.0f} s")
        here = said([sys.executable, CALLS, folder / "calls"], folder, **python_path)
        said([sys.executable, "-c", MAKE_MODELS, models], folder, **python_path)
    except SetupError as error:
        print(error)
        return len(cpus)
    expected = {line for line in here[1:] if not line.endswith("lanes)")}
    expected |= set((ROOT / "tests" / "embeddings.sha256").read_text(encoding="utf-8").splitlines())
    failed, by_lanes = 0, None
    settings = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    for cpu, suite in ((cpu, suite) for cpu in cpus for suite in SUITES):
        python = folder / suite / cpu / "bin" / "python"
        if not python.exists():
            print(f"  not run {cpu}, {suite}: python tools/arm64/build.py {folder / suite} {suite}")
            continue
        start = [python, "-c", WITHOUT_NUMBA]
        try:
            version, = said([python, "-c", "import numpy, platform as p; print(p.python_version(), numpy.__version__)"],
                            folder, **settings)
            kernels, *found = said([*start, CALLS, folder / "calls"], folder, **settings)
            found += said([*start, EMBEDDINGS, models], folder, **settings)
        except SetupError as error:
            problem = str(error)
        else:
            by_lanes = by_lanes or {line for line in found if line.endswith("lanes)")}
            problem = "\n".join(sorted((expected | by_lanes) ^ set(found)))
            if kernels != f"# kernels: {cpu}":
                problem = f"used {kernels}"
        failed += bool(problem)
        says = problem or f"Python and NumPy {version}: " + next(line for line in found if line.startswith("all:"))
        print(f"  {'FAILED' if problem else 'passed'}  {cpu}, from the wheel and without Numba, {says}", flush=True)
    return failed + (ZERO_CPU in cpus and not run_zero(folder, site))


def run_zero(folder: Path, site: Path) -> bool:
    """Whether a Zero 2 W runs from the wheel alone, the emulator's memory counted too; said where it cannot be."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.resident import forget, limited_group

    told = f"a Zero 2 W with a read-only root and {ZERO_MEMORY / 2**20:.0f} MiB, emulator and all"
    suite = next(suite for suite in reversed(SUITES) if (folder / suite / ZERO_CPU / "bin" / "python").exists())
    group = limited_group(ZERO_MEMORY)
    if group is None:
        print(f"  not run {told}: no control group can be made here (not root?)")
        return True
    forget(folder / "models" / "minilm.safetensors")  # so that its pages count here
    inside = f"echo $$ > {group}/cgroup.procs && mount -o remount,bind,ro / && exec \"$@\""
    try:
        python = folder / suite / ZERO_CPU / "bin" / "python"
        found = said(["unshare", "--mount", "sh", "-c", inside, "sh", python, "-c", ZERO, folder], folder,
                     PYTHONPATH=str(site), HOME="/nonexistent")
    except SetupError as error:
        print(f"  FAILED  {told}: {error}")
        return False
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
    fits = found[-1:] == ["Read-only file system"]
    print(f"  {'passed' if fits else 'FAILED'}  {told}; KiB at most: {', '.join(found)}")
    return fits


def main() -> int:
    """Read the command line and run; return 1 when a test failed on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="What follows -- goes to pytest.")
    add = parser.add_argument
    add("folder", type=Path, help="where tools/arm64/build.py built")
    add("--short", action="store_true", help=f"{SHORT_CPU} alone, a few dozen tests")
    add("--wheel", action="store_true", help="the wheel alone")
    add("--dist", type=Path, help="a folder with a wheel for aarch64; without, one is built")
    add("--cpu", action="append", choices=list(FULL), help="this CPU alone; may be repeated")
    # argparse gives what follows "--" to no list that comes after an option.
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    cpus = arguments.cpu or ([SHORT_CPU] if arguments.short else list(FULL))
    tests = dict.fromkeys(FULL, SHORT) if arguments.short else FULL
    folder = arguments.folder.absolute()
    missing = [cpu for cpu in cpus if not (folder / cpu / "bin" / "python").exists()]
    if missing:
        print(f"{folder} has no {', '.join(missing)}: build it first with python tools/arm64/build.py", file=sys.stderr)
        return 2
    failed = 0 if arguments.wheel else run(folder, cpus, tests, LAYERS[arguments.short], given[end + 1:])
    if not arguments.short:
        failed += call_wheel(folder, cpus, arguments.dist)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
