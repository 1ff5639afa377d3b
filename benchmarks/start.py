"""From nothing to the first result: layers by a library of kernels that `make libraries` made, as a bundle, compiled
when called (from a warm cache), in LiteRT and in onnxruntime; and what of it is NumPy's own import.

    python -m benchmarks.start
    python -m benchmarks.start --compiled                    and what a first call costs where nothing is cached
    python -m benchmarks.start --python .venv/bin/python     processes of that environment; this one makes the files

Every form runs in processes of its own, in turn; the first process of each fills the caches and is not counted. All of
one format must give the same result: int8 the same bytes. Seconds count from the first import on; the memory is the
largest resident size, Python's included. What the first call costs where nothing is cached follows, for each kind of
layer, with the lines of LLVM's language that its kernel was translated from; then the same from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

import edgeattn
import quant
from benchmarks import peers
from benchmarks.costs import installed_in
from edgeattn.runtime import prebuilt, processor
from quant.export.targets import host_target

WIDTH, HEADS, LENGTH = 128, 4, 64
ROUNDS = 7
KINDS = {"float32": "float32", "dynamic": "dynamic int8", "int8": "static int8"}  # in fresh.py: in words


class Form(NamedTuple):
    """A way to the first result: a file in FOLDER, and what reads it, `path`, and `data` to `y`.

    `format`: whose input and result it takes and gives; `module`: what has to be there.
    """

    file: str
    format: str
    work: str
    module: str = "numpy"
    settings: dict[str, str] = {}


LOAD = "import edgeattn\ny = edgeattn.load(path)(numpy.load(data))"
LOAD_CODES = "import edgeattn\ny = edgeattn.load(path).run_int8(numpy.load(data))"
LITERT = """
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(path)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], numpy.load(data))
interpreter.invoke()
y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
"""
ONNX = """
import onnxruntime
y, = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": numpy.load(data)})
"""
WITH_LIBRARY, JIT = {"EDGEATTN_JIT": "0"}, {"EDGEATTN_JIT": "1"}
FORMS = {
    "NumPy alone": Form("static.safetensors", "", "y = numpy.load(data)"),
    "library, static int8": Form("static.safetensors", "int8", LOAD_CODES, settings=WITH_LIBRARY),
    "library, dynamic int8": Form("dynamic.safetensors", "dynamic", LOAD, settings=WITH_LIBRARY),
    "library, float32": Form("float32.safetensors", "float32", LOAD, settings=WITH_LIBRARY),
    "bundle, static int8": Form("attention.so", "int8", LOAD_CODES.replace("edgeattn.load", "edgeattn.bundle.load")
                                .replace("import edgeattn", "import edgeattn.bundle")),
    "compiled when called": Form("static.safetensors", "int8", LOAD_CODES, "numba", JIT),
    "LiteRT, static int8": Form("attention.tflite", "int8", LITERT, "ai_edge_litert"),
    "onnxruntime, float32": Form("attention.onnx", "float32", ONNX, "onnxruntime"),
}
PROCESS = """
import sys, time
wall, processor = time.perf_counter(), time.process_time()
path, data, expected = sys.argv[1:]
import numpy
{work}
wall, processor = time.perf_counter() - wall, time.process_time() - processor
import json
with open("/proc/self/status") as status:
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
expected = numpy.load(expected)
off = float(numpy.abs(numpy.subtract(y, expected, dtype=numpy.float32)).max())
print(json.dumps(dict(wall=wall, processor=processor, mib=resident, off=off)))
"""
ALLOWED = {"": 0.0, "int8": 0.0, "dynamic": 0.0, "float32": 1e-4}  # how far results may be from ours here


def forms(python: str = sys.executable) -> list[str]:
    """Those that can run in an environment: a library is not always there, nor are peers."""
    library, _ = prebuilt.find(prebuilt.FOLDER, platform.machine(), processor.flags(), processor.parts(), None)
    modules = {form.module for form in FORMS.values()}
    told = subprocess.run([python, "-c", "import sys\nfrom importlib.util import find_spec\n"
                           "print(*[name for name in sys.argv[1:] if find_spec(name)])", *modules],
                          capture_output=True, text=True, check=True).stdout.split()
    made = {"onnxruntime": "onnx"}  # what writes the file, here
    return [name for name, form in FORMS.items() if form.module in told
            and find_spec(made.get(form.module, "numpy")) and (form.settings != WITH_LIBRARY or library is not None)]


def make_files(folder: Path) -> None:
    """Write one layer in every form, inputs x-FORMAT.npy and results y-FORMAT.npy."""
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for _ in range(4)]
    bias = dict.fromkeys(("q_bias", "k_bias", "v_bias", "out_bias"), np.zeros(WIDTH, np.float32))
    layer = edgeattn.MultiHeadAttention(HEADS, *weights, **bias)
    x = rng.standard_normal((4, 1, LENGTH, WIDTH)).astype(np.float32)
    static, dynamic = quant.quantize(layer, quant.calibrate(layer, x)), quant.quantize(layer, scheme="dynamic")
    for name, each in {"static": static, "dynamic": dynamic, "float32": layer}.items():
        edgeattn.save(each, folder / f"{name}.safetensors")
    quant.export(static, folder / "attention.so", target=host_target())
    quant.export(static, folder / "attention.tflite", sequence_length=LENGTH)
    if find_spec("onnx"):
        from onnx import TensorProto

        value = {"x": (TensorProto.FLOAT, [1, LENGTH, WIDTH])}, {"y": (TensorProto.FLOAT, [1, LENGTH, WIDTH])}
        (folder / "attention.onnx").write_bytes(
            peers.onnx_model(peers.mha_nodes(layer), *value, peers.mha_constants(layer)))
    codes = static.quantize_input(x[0])
    for name, given, result in (("", codes, codes), ("int8", codes, static.run_int8(codes)),
                                ("dynamic", x[0], dynamic(x[0])), ("float32", x[0], layer(x[0]))):
        np.save(folder / f"x-{name}.npy", given)
        np.save(folder / f"y-{name}.npy", result)


def measure(folder: Path, rounds: int = ROUNDS, python: str = sys.executable) -> dict[str, dict]:
    """form -> least "wall" and "processor" in seconds, median "mib", "bytes" of its file, "off": of its result.

    Raises
    ------
    RuntimeError
        When a form fails, or gives another result than it gave here.
    """
    runs = {name: [] for name in forms(python)}
    # Bytecode of the sources is written, as it is where a package is installed.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        for name in runs:
            form = FORMS[name]
            done = subprocess.run([python, "-c", PROCESS.format(work=form.work), folder / form.file,
                                   folder / f"x-{form.format}.npy", folder / f"y-{form.format}.npy"],
                                  capture_output=True, text=True, env=settings | form.settings)
            if done.returncode:
                raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            if number:
                runs[name].append(json.loads(done.stdout))
            if number and runs[name][-1]["off"] > ALLOWED[form.format]:
                raise RuntimeError(f"{name} gave a different result: off by {runs[name][-1]['off']}")
    return {name: {"wall": min(run["wall"] for run in some), "processor": min(run["processor"] for run in some),
                   "mib": statistics.median(run["mib"] for run in some), "off": max(run["off"] for run in some),
                   "bytes": (folder / FORMS[name].file).stat().st_size} for name, some in runs.items()}


def first_calls(kinds: Iterable[str] = KINDS) -> dict[str, tuple[dict, dict]]:
    """kind -> what ``fresh.first`` gives for a first call with nothing cached, and for the next process's."""
    with tempfile.TemporaryDirectory() as folder:
        run = installed_in(Path(folder))
        run("compiled")  # writes the bytecode of the sources
        return {kind: (run("first", kind), run("first", kind)) for kind in kinds}


def main() -> None:
    """Print one table, or two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="whose processes to measure; default: this one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compiled", action="store_true", help="also what a first call costs with nothing cached")
    given = parser.parse_args()
    print(f"layer {WIDTH}/{HEADS}/{LENGTH}, target {host_target()}, least of {given.rounds} processes")
    print(f"{'':24}{'first result, s':>16}{'of CPU time':>13}{'above NumPy':>13}{'resident, MiB':>15}{'file, KiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        table = measure(Path(folder), given.rounds, given.python)
    for form, found in table.items():
        print(f"{form:24}{found['wall']:16.3f}{found['processor']:13.3f}"
              f"{found['processor'] - table['NumPy alone']['processor']:13.3f}{found['mib']:15.0f}"
              f"{found['bytes'] / 1024:11.0f}")
    missing = [name for name in FORMS if name not in table]
    if missing:
        print(f"not there: {', '.join(missing)} (make libraries; ai-edge-litert, onnxruntime and onnx)")
    if not given.compiled:
        return
    print(f"\n{'first call of a layer':22}{'compiled: s of CPU':>20}{'MiB':>6}{'lines':>8}"
          f"{'from the cache: s':>20}{'MiB':>6}")
    for kind, (compiled, cached) in first_calls().items():
        print(f"{KINDS[kind]:22}{compiled['processor']:20.1f}{compiled['mib']:6.0f}{compiled['lines']:8}"
              f"{cached['processor']:20.2f}{cached['mib']:6.0f}")


if __name__ == "__main__":
    main()
