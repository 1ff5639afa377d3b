"""From nothing to the first result: one int8 layer as a bundle, by a library of kernels that `make libraries` made,
compiled when called (from a warm cache), in LiteRT.

    python -m benchmarks.start

Every form runs in processes of its own, in turn; the first process of each fills the caches and is not counted. All
must give the same bytes. Seconds count from the first import on; the memory is the largest resident size, Python's
included. What the first call costs where nothing is cached follows, for each kind of layer, with the lines of LLVM's
language that its kernel was translated from; then the same from the cache.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import edgeattn
import quant
from benchmarks.costs import installed_in
from edgeattn.runtime import prebuilt, processor
from quant.export.targets import host_target

WIDTH, HEADS, LENGTH = 128, 4, 64
ROUNDS = 7
KINDS = {"float32": "float32", "dynamic": "dynamic int8", "int8": "static int8"}  # in fresh.py: in words
# What each process runs between its clock readings: x is read from a file, y is the result.
LOADED = """
import edgeattn
y = edgeattn.load(path).run_int8(numpy.load(data))
"""
FORMS = {
    "bundle": ("attention.so", """
from edgeattn.bundle import load
y = load(path).run_int8(numpy.load(data))
"""),
    "library": ("attention.safetensors", LOADED),
    "compiled when called": ("attention.safetensors", LOADED),
    "LiteRT": ("attention.tflite", """
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(path)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], numpy.load(data))
interpreter.invoke()
y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
"""),
}
SETTINGS = {"library": {"EDGEATTN_JIT": "0"}, "compiled when called": {"EDGEATTN_JIT": "1"}}
PROCESS = """
import sys, time
wall, processor = time.perf_counter(), time.process_time()
path, data = sys.argv[1:]
import numpy
{work}
wall, processor = time.perf_counter() - wall, time.process_time() - processor
import json, zlib
with open("/proc/self/status") as status:
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
print(json.dumps(dict(wall=wall, processor=processor, mib=resident, crc=zlib.crc32(y.tobytes()))))
"""


def forms() -> list[str]:
    """Those that can run here: a library is not always there."""
    library, _ = prebuilt.find(prebuilt.FOLDER, platform.machine(), processor.flags(), processor.parts(), None)
    return [form for form in FORMS if form != "library" or library is not None]


def make_files(folder: Path) -> None:
    """Write one layer in every form, and an input."""
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for _ in range(4)]
    layer = edgeattn.MultiHeadAttention(HEADS, *weights)
    x = rng.standard_normal((4, 1, LENGTH, WIDTH)).astype(np.float32)
    static = quant.quantize(layer, quant.calibrate(layer, x))
    for name, _ in FORMS.values():
        options = {".tflite": {"sequence_length": LENGTH}, ".so": {"target": host_target()}}
        quant.export(static, folder / name, **options.get(Path(name).suffix, {}))
    np.save(folder / "x.npy", static.quantize_input(x[0]))


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, dict]:
    """form -> medians of "wall" and "processor" in seconds and of "mib", "bytes" of its file, "crc" of its result.

    Raises
    ------
    RuntimeError
        When a form fails, or gives other bytes than another.
    """
    runs = {form: [] for form in forms()}
    # Bytecode of the sources is written, as it is where a package is installed.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        for form in runs:
            name, work = FORMS[form]
            done = subprocess.run([sys.executable, "-c", PROCESS.format(work=work), folder / name, folder / "x.npy"],
                                  capture_output=True, text=True, env=settings | SETTINGS.get(form, {}))
            if done.returncode:
                raise RuntimeError(f"{form} failed: {done.stderr.strip().splitlines()[-1]}")
            if number:
                runs[form].append(json.loads(done.stdout))
    checksums = {run["crc"] for some in runs.values() for run in some}
    if len(checksums) != 1:
        raise RuntimeError(f"the forms gave {len(checksums)} different results")
    return {form: {key: statistics.median(run[key] for run in some) for key in some[0]}
            | {"bytes": (folder / FORMS[form][0]).stat().st_size} for form, some in runs.items()}


def first_calls(kinds: Iterable[str] = KINDS) -> dict[str, tuple[dict, dict]]:
    """kind -> what ``fresh.first`` gives for a first call with nothing cached, and for the next process's."""
    with tempfile.TemporaryDirectory() as folder:
        run = installed_in(Path(folder))
        run("compiled")  # writes the bytecode of the sources
        return {kind: (run("first", kind), run("first", kind)) for kind in kinds}


def main() -> None:
    """Print two tables."""
    print(f"int8 layer {WIDTH}/{HEADS}/{LENGTH}, target {host_target()}, medians of {ROUNDS} processes")
    print(f"{'':22}{'first result, s':>16}{'of processor time':>19}{'resident, MiB':>15}{'file, KiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        table = measure(Path(folder))
    if "library" not in table:
        print("no library of compiled kernels is here: make libraries")
    for form, found in table.items():
        print(f"{form:22}{found['wall']:16.3f}{found['processor']:19.3f}{found['mib']:15.0f}"
              f"{found['bytes'] / 1024:11.0f}")
    print(f"\n{'first call of a layer':22}{'compiled: s of CPU':>20}{'MiB':>6}{'lines':>8}"
          f"{'from the cache: s':>20}{'MiB':>6}")
    for kind, (compiled, cached) in first_calls().items():
        print(f"{KINDS[kind]:22}{compiled['processor']:20.1f}{compiled['mib']:6.0f}{compiled['lines']:8}"
              f"{cached['processor']:20.2f}{cached['mib']:6.0f}")


if __name__ == "__main__":
    main()
