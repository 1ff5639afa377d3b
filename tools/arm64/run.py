"""Run the part of the test suite that may differ on ARM64, once per CPU, under the emulator.

    python tools/arm64/run.py .arm64              every CPU
    python tools/arm64/run.py .arm64 --short      one CPU, a few dozen tests
    python tools/arm64/run.py .arm64 --cpu cortex-a53 -- -k softmax
    python tools/arm64/run.py .arm64 --wheel      the wheel alone
    python tools/arm64/run.py .arm64 --wheel --dist dist      ... that was built before

What follows ``--`` goes to pytest. The emulator takes minutes to compile a kernel, so this machine compiles them, anew
whenever a source changes: libraries of all kernels, in a copy of the sources that lies in the environments' folder;
bundles; what tests of vectors call (tests/njit.py). Only tests of compiling compile there.
Then, but for ``--short``, a wheel with these CPUs' libraries is built here, installed as on a board, and called on each
CPU without Numba, by the Python of each Debian there is an environment of: tests/call_hashes.py must print there what
it prints here, but for float32 attention, whose last bits follow from the length of vectors and must be the same on all
of them; tests/embeddings.py what tests/embeddings.sha256 holds. At last a Zero 2 W runs out of the box: its processor,
nothing that can be written to, and so much memory in all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import NamedTuple

from build import ROOT, Progress, SetupError, clean_environment, pip_install
from wheel import copy_sources

# What is chosen are the tests of what depends on the CPU: its instructions, its LiteRT, its threads, its cache, and all
# that kernels give. Argument checks are the same everywhere.
LITERT = "tests/quantized/test_parity.py::test_layers_equal_the_runtime"
BUNDLE = "tests/test_bundle.py::test_"
FLOATS = f"{BUNDLE}floats_are_those_of_the_kernels_compiled_here"
INT8 = "tests/kernels/cpu/test_kernels_int8.py::test_"
STATIC = "tests/quantized/test_quantized.py::test_"
JIT = "tests/runtime/test_jit.py::test_"
# What looks at instructions: vectors, rules and products by themselves; bundles.
INSTRUCTIONS = (
    "tests/kernels/cpu/test_arm64.py",
    f"{BUNDLE}codes_are_those_of_the_kernels",
    f"{BUNDLE}a_bundle_for_a_newer_processor_is_refused",
    f"{BUNDLE}what_cannot_run_here_is_refused_before_it_is_loaded",
    "tests/kernels/cpu/test_simd.py",
)
SHORT = {"instructions": (*INSTRUCTIONS, LITERT, f"--deselect={LITERT}[litert-reference")}
RULES = f"{INT8}vector_rule_equals_the_rule_on_python_integers", f"{INT8}linear_equals_integer_products"
# What kernels give, on libraries.
LIBRARIES = (
    LITERT,
    # attention as functions and layers, masks, probabilities, caches
    "tests/test_functional.py",
    "tests/test_functional_dynamic.py",
    "tests/test_laws.py::test_law",
    "tests/test_alibi.py",
    "tests/test_long_rows.py",
    "tests/test_kv_cache.py",
    "tests/test_kv_cache_added_keys.py",
    "tests/layers/test_layers.py",
    "tests/kernels/cpu/test_kernels_float32.py::test_float_layer",
    "tests/kernels/cpu/test_decode.py",
    "tests/quantized/test_dynamic.py",
    f"{INT8}every_rule_set_equals_integer_arithmetic",
    f"{INT8}a_dropped_key_is_not_there",
    f"{STATIC}probabilities_come_with_the_same_bytes",
    "tests/quantized/test_static_caches.py",
    f"{STATIC}rows_of_many_equal_scores_are_what_the_rules_say",
    # feed-forwards, whole encoders, threads, files
    "tests/kernels/cpu/test_encoder_float32.py",
    "tests/kernels/cpu/test_encoder_dynamic.py",
    "tests/kernels/cpu/test_feed_forward_int8.py",
    "tests/models/test_encoder.py",
    "tests/quantized/test_whole_encoders.py",
    "tests/quantized/test_static_encoders.py",
    "tests/test_same_bytes.py::test_every_way_gives_the_same_bytes",
    "tests/test_same_bytes.py::test_any_number_of_threads_gives_the_same_bytes",
    "tests/test_threads.py::test_two_threads_give_the_same_bits",
    "tests/test_threads.py::test_concurrent_callers",
    "tests/test_threads.py::test_a_forked_child_computes",
    "tests/files/test_storage.py::test_what_was_saved_is_loaded",
    "tests/files/test_storage.py::test_a_static_layer_round_trips_to_the_same_state",
    "tests/files/test_tflite_reader.py::test_reads_a_path",
)
# Of these files, what is the same everywhere: refusals, and how much memory is taken, slow under emulation.
SAME_EVERYWHERE = (
    "tests/test_functional.py::test_bad_",
    "tests/layers/test_layers.py::test_bad_",
    "tests/models/test_encoder.py::test_errors_",
    "tests/quantized/test_static_encoders.py::test_bad_",
    "tests/quantized/test_whole_encoders.py::test_bad_",
    "tests/test_alibi.py::test_no_array_of_all_pairs",
    "tests/test_long_rows.py::test_strong_keys_take_no_weight_from_many_weak_ones[4096]",
    "tests/test_long_rows.py::test_strong_keys_take_no_weight_from_many_weak_ones[16384]",
)
LIBRARIES += tuple(f"--deselect={test}" for test in SAME_EVERYWHERE)
# What compiles there; and a whole layer's kernel, which gives what this machine compiled.
COMPILING = (f"{JIT}second_process_reads_the_cache", f"{JIT}edit_in_another_module_recompiles",
             f"{JIT}code_of_other_types_is_not_run")
# What LiteRT's own kernels give on the emulated A72 is not to be believed (docs/deployment.md): left out there.
FULL = {
    "cortex-a76": {"libraries": LIBRARIES, "instructions": (*INSTRUCTIONS, *RULES),
                   "compiling": (*COMPILING, f"{FLOATS}[dynamic]")},
    "cortex-a72": {"libraries": (*LIBRARIES, f"--deselect={LITERT}[litert-arm"),
                   "instructions": (*INSTRUCTIONS, *RULES), "compiling": (f"{FLOATS}[float32]",)},
    "cortex-a53": {"libraries": LIBRARIES, "instructions": (*INSTRUCTIONS, *RULES), "compiling": COMPILING},
}
PARTS = "libraries", "compiling", "instructions"  # what takes longest first
Tests = dict[str, dict[str, tuple[str, ...]]]  # of each CPU those of each part
SHORT_CPU = "cortex-a76"  # the one with an instruction set that the others lack
LAYERS = {True: 8, False: 20}  # of the 200 that test_parity.py compares where that takes seconds
NONE_OF_THESE = 5  # pytest's status where `extra` leaves out all

# Of the sources' copy, beside what a package is built from.
TESTED_WITH = "tests", "benchmarks", "examples", "tools", "docs"
EXPORT = ("import sys, test_bundle; from pathlib import Path; "
          "test_bundle.export_all(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])")
STAMP = "from edgeattn.runtime import sources; print(sources.stamp())"


class Job(NamedTuple):
    """Tests that one pytest runs on one CPU."""

    cpu: str
    part: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """What people read."""
        return f"{self.cpu}, {self.part}"


def compile_here(folder: Path, cpus: list[str], tests: Tests) -> Path:
    """Copy the sources, with libraries where tests run on them, and make each CPU's bundles; return the copy.

    Raises
    ------
    SetupError
        With what was said where that fails.
    """
    step, tree = Progress("kernels, compiled here"), folder / "tree"
    libraries = tree / "edgeattn" / "libraries"
    shutil.rmtree(tree, ignore_errors=True)
    copy_sources(tree)
    for name in TESTED_WITH:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}

    def bundles(cpu: str) -> None:
        made = folder / "bundles" / cpu
        shutil.rmtree(made, ignore_errors=True)  # of other sources, it may be; what was compiled is kept elsewhere
        made.mkdir(parents=True)
        floats = re.findall(rf"{re.escape(FLOATS)}\[(\w+)\]", " ".join(sum(tests[cpu].values(), ())))
        said([sys.executable, "-c", EXPORT, made, cpu, *floats], folder, **environment)

    try:
        if any("libraries" in tests[cpu] for cpu in cpus):
            said([sys.executable, "-m", "quant.export.kernels", libraries, *cpus], folder, **environment)
            there, = said([sys.executable, "-c", STAMP], tree)
            if json.loads((libraries / "libraries.json").read_text(encoding="utf-8"))["stamp"] != there:
                raise SetupError("sources of kernels were edited while they were compiled: run it again")
            step.update("libraries")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(bundles, cpus))
    except SetupError:
        step.done("failed")
        raise
    step.done("a library and bundles for each CPU" if libraries.exists() else "bundles")
    return tree


def start(folder: Path, tree: Path, job: Job, layers: int, extra: list[str]) -> Popen:
    """Start pytest there."""
    bundles = folder / "bundles" / job.cpu
    command = [folder / job.cpu / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-v",
               "--durations=10", f"--layers={layers}", *job.tests, *extra]
    environment = {**clean_environment(), "EDGEATTN_JIT": "0" if job.part == "libraries" else "1",
                   "NUMBA_CACHE_DIR": str(folder / "numba" / job.cpu), "TEST_BUNDLES": str(bundles),
                   "TEST_COMPILER": sys.executable, "TEST_TARGET": job.cpu}
    if job.part != "libraries" and LITERT in job.tests:
        environment["TEST_PARITY_KERNELS"] = str(bundles / "static-litert.so")
    with log_of(folder, job).open("w", encoding="utf-8") as log:
        return Popen([str(each) for each in command], cwd=tree, env=environment, stdin=DEVNULL, stdout=log,
                     stderr=STDOUT)


def log_of(folder: Path, job: Job) -> Path:
    """Return the file that receives what pytest says."""
    return folder / f"{job.cpu}-{job.part}.log"


def summary(log: Path) -> str:
    """Return pytest's last line without its frame, as "60 passed, 8 skipped in 211.92s (0:03:31)"."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.strip("= ") for line in lines if re.fullmatch(r"=+ .* in [\d.]+s\b.*=+", line)]
    return found[-1] if found else f"ended without a result; see {os.path.relpath(log)}"


def percentage(log: Path) -> str:
    """Return how far pytest is, as "42%"."""
    found = re.findall(r"\[ *(\d+%)\]", log.read_text(encoding="utf-8", errors="replace"))
    return found[-1] if found else "begun"


def run(folder: Path, cpus: list[str], tests: Tests, layers: int, extra: list[str]) -> int:
    """Test on every CPU, as many jobs at a time as this machine has cores; return how many failed."""
    try:
        tree = compile_here(folder, cpus, tests)
    except SetupError as error:
        print(error)
        return len(cpus)
    jobs = [Job(cpu, part, chosen) for cpu in cpus for part, chosen in tests[cpu].items()]
    jobs.sort(key=lambda job: PARTS.index(job.part))
    waiting, running, failed = list(jobs), {}, []
    at_once = len(os.sched_getaffinity(0))
    step = Progress("tests under emulation")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = start(folder, tree, job, layers, extra)
            time.sleep(0.5)
            step.update("; ".join(f"{job.name} {percentage(log_of(folder, job))}" for job in running))
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if running.pop(job).returncode not in (0, NONE_OF_THESE if extra else 0):
                    failed.append(job)
    finally:
        for process in running.values():
            process.terminate()
    step.done(f"{len(jobs) - len(failed)} passed, {len(failed)} failed")
    for job in failed:
        print(f"\n---- {job.name}\n{log_of(folder, job).read_text(encoding='utf-8', errors='replace')[-6000:]}")
    for job in jobs:
        print(f"  {'FAILED' if job in failed else 'passed'}  {job.name}: {summary(log_of(folder, job))}")
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
