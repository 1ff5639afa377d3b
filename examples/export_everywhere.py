"""One int8 layer in every form, and whether all compute the same bytes: python examples/export_everywhere.py

The first attention layer of the trained digits encoder, quantized on training images, is written as .safetensors,
.tflite, C, a bundle with its kernels compiled and .onnx, into out/everywhere. Each file is run here, on what the layer
sees of the test images: the .tflite in every interpreter there is, the C by the compiler of this machine, the .onnx by
onnx's own evaluator. Printed: one table, how many output codes differ from those of `run_int8` under the arithmetic
that the file is run with. ONNX has no word for TFLite's roundings: its codes are near, not equal.
"""

import argparse
import ctypes
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import edgeattn
import quant
from edgeattn import bundle, messages
from quant.runtimes import RUNTIMES
from quant.tables import console, fill, short, table

sys.path.insert(0, str(Path(__file__).parent / "digits"))
from data import load_digits_split
from model import NUM_PATCHES, DigitsModel

OUT = Path(__file__).resolve().parents[1] / "out" / "everywhere"
IMAGES = 100
NEAR = None  # equal to no arithmetic


def forms(layer, codes, out):
    """(file, run by, arithmetic, how to get output codes or why there are none) for each form and what runs it."""
    path = out / "attention.safetensors"
    edgeattn.save(layer, path)
    yield path, "edgeattn", "tflm", lambda: edgeattn.load(path).run_int8(codes)

    tflite = quant.export(layer, out / "attention.tflite", sequence_length=NUM_PATCHES)
    for name, runtime in RUNTIMES.items():
        yield tflite, name, name, runtime.available() or (lambda runtime=runtime: in_interpreter(
            runtime.session(tflite), codes))

    c = quant.export(layer, out / "attention.c", sequence_length=NUM_PATCHES)
    compiler = shutil.which("cc") or shutil.which("gcc")
    yield c, "cc", "tflm", (lambda: in_c(compiler, c, codes)) if compiler else "none here: apt install gcc"

    try:
        so = quant.export(layer, out / "everywhere.so", target="native")
        yield so, "edgeattn.bundle", "tflm", lambda: bundle.load(so).run_int8(codes)
    except RuntimeError as error:
        yield out / "everywhere.so", "edgeattn.bundle", "tflm", str(error)

    onnx = quant.export(layer, out / "attention.onnx", opset=20)
    yield onnx, "onnx", NEAR, lambda: in_onnx(onnx, layer, codes)


def in_interpreter(session, codes):
    """The graph takes one image at a time, as a device would."""
    return np.concatenate([session.run(image)[0] for image in codes[:, np.newaxis]])


def in_c(compiler, source, codes):
    """Compile a library of the exported C and call it."""
    library = source.with_name("attention-c.so")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    size = 1 << 20  # the header's ATTENTION_SCRATCH_BYTES and more
    attend = ctypes.CDLL(str(library)).attention_s8
    scratch, results = np.zeros(size // 4, np.int32), np.empty_like(codes)
    for image, result in zip(codes, results, strict=True):
        status = attend(*(ctypes.c_void_p(x.ctypes.data) for x in (image, result, scratch)), ctypes.c_size_t(size))
        if status:
            raise RuntimeError(f"attention_s8 gave {status}")
    return results


def in_onnx(path, layer, codes):
    """Reals in and out, by the evaluator of the package onnx; their codes."""
    from onnx.reference import ReferenceEvaluator

    query, output = layer.tensors["query_input"], layer.tensors["output"]
    result, = ReferenceEvaluator(str(path)).run(None, {"input": query.dequantize(codes)})
    return output.quantize(result)


def main() -> int:
    parser = argparse.ArgumentParser(description="One int8 layer in every form.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the files (default: out/everywhere)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    messages.show()
    began = time.perf_counter()
    digits, model = load_digits_split(), DigitsModel()
    layer = model.attention_layers()[0]
    calibration = quant.calibrate(layer, [model.attention_inputs(digits.train_images[:256])[0]])
    int8 = quant.quantize(layer, calibration, arithmetic="tflm")
    codes = int8.quantize_input(model.attention_inputs(digits.test_images[:IMAGES])[0])

    shown = table("file", "run by", "bytes", "codes", "differ", text=2)
    notes, differing, furthest = [], 0, 0
    for path, runner, arithmetic, run in forms(int8, codes, out):
        if isinstance(run, str):
            notes.append(f"not run: {path.name} by {runner}: {run}")
            continue
        got = run()
        ours = int8.with_arithmetic("tflm" if arithmetic is NEAR else arithmetic).run_int8(codes)
        steps = np.abs(got.astype(int) - ours)
        different = np.count_nonzero(steps)
        if arithmetic is NEAR:
            furthest = int(steps.max())
        else:
            differing += different
        shown.add_row(path.name, runner, f"{path.stat().st_size:,}", f"{got.size:,}",
                      f"{different:,}" if different else "none")
    console().print(shown)
    for note in notes:
        print(fill(note))
    print(f"of the .onnx by {furthest} steps at most")
    print(f"wrote {short(out)}")
    print(f"{'Done' if differing == 0 and furthest <= 2 else 'FAILED'} in {time.perf_counter() - began:.1f} s.")
    return 0 if differing == 0 and furthest <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
