"""The main job on a real model: a float32 encoder to int8 to .tflite, the same bits in every interpreter.

    python examples/digits/run.py        (or: make run)

1. Loads the trained digits Transformer, a whole `edgeattn.TransformerEncoder`, and checks the accuracy in float32
   against the one noted when it was trained.
2. Calibrates its two attention layers on the activations of real training images.
3. Quantizes them (static int8) and its feed-forward networks (dynamic int8), and reports what that cost: of attention
   tensor by tensor, and of the whole encoder.
4. Compares the accuracy of the whole model before and after, on the test images.
5. Exports each attention layer to out/digits/*.tflite, runs the files in every TFLite interpreter found here on the
   activations of the int8 encoder, and counts the output bytes that differ from ours under the arithmetic of that name.

The exit status is 0 only when no byte differs and the float32 accuracy is the one noted at training.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from data import load_digits_split
from model import NUM_PATCHES, DigitsModel, WithAttention
from rich.progress import track

import quant
from edgeattn import messages
from quant.describe import describe_masks, describe_seen
from quant.report import cosines
from quant.runtimes import RUNTIMES
from quant.tables import console as new_console
from quant.tables import fill, short, table

OUT = Path(__file__).resolve().parents[2] / "out" / "digits"
CALIBRATION_IMAGES = 256
BATCH = 64


def batches(x):
    """Cut (N, L, E) along N into batches of at most BATCH."""
    return [x[start : start + BATCH] for start in range(0, len(x), BATCH)]


def run_one_by_one(runtime, path, codes, console):
    """The file's int8 output for every image; the graph takes one image at a time, as a device would."""
    session = runtime.session(path)
    images = track(
        codes[:, np.newaxis],
        f"{path.name} in {runtime.name}",
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
    return np.concatenate([session.run(image)[0] for image in images])


def compare_bytes(layer, path, codes, shown, console):
    """Compare the file's output bytes with ours in every interpreter; return (compared, differing)."""
    readers = {name: runtime for name, runtime in RUNTIMES.items() if runtime.available() is None}
    compared = differing = 0
    for name, runtime in readers.items():
        ours = layer.with_arithmetic(name).run_int8(codes)
        theirs = run_one_by_one(runtime, path, codes, console)
        if theirs.shape != ours.shape or theirs.dtype != np.int8:
            raise RuntimeError(f"{runtime.name} gave {theirs.dtype} {theirs.shape}, not int8 {ours.shape}")
        different = int((ours != theirs).sum())
        verdict = f"{different:,}" if different else "none"
        shown.add_row(path.stem, runtime.name, name, f"{ours.size:,}", verdict)
        compared += ours.size
        differing += different
    return compared, differing


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantize a trained digits Transformer.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the files (default: out/digits)")
    out = parser.parse_args().out
    messages.show()
    started = time.perf_counter()
    console = new_console()
    digits = load_digits_split()
    model = DigitsModel()
    total = len(digits.test_labels)

    console.rule("1. float32", align="left")
    encoder, attention = model.encoder, model.attention_layers()
    predicted = model.predict(digits.test_images)
    correct = int((predicted == digits.test_labels).sum())
    noted = int(model.metadata["test_correct"])
    hidden = encoder.layers[0].feed_forward.linear1.outputs
    sizes = f"width {encoder.embed_dim}, {model.num_heads} heads, hidden {hidden}"
    console.print(f"an encoder of {len(attention)} layers: {sizes}")
    console.print(f"test accuracy {correct / total:.2%}: {correct} of {total} right, at training {noted}\n")

    console.rule(f"2. calibrate on {CALIBRATION_IMAGES} training images", align="left")
    inputs = model.attention_inputs(digits.train_images[:CALIBRATION_IMAGES])
    calibrations = [quant.calibrate(layer, batches(x)) for layer, x in zip(attention, inputs, strict=True)]
    for i, (calibration, layer) in enumerate(zip(calibrations, attention, strict=True)):
        console.print(f"layer {i}: saw {describe_seen(calibration, layer)}")
    console.print(fill(f"masks: {describe_masks(calibrations[0])}") + "\n", markup=False)

    console.rule("3. quantize to int8: what it cost", align="left")
    quantized = [
        quant.quantize(layer, calibration, scheme="static")
        for layer, calibration in zip(attention, calibrations, strict=True)
    ]
    feed_forwards = quant.quantize(encoder, scheme="dynamic", attention="float32")
    int8 = WithAttention(feed_forwards, quantized)
    test_inputs = model.attention_inputs(digits.test_images)
    for i, (layer, layer_int8, x) in enumerate(zip(attention, quantized, test_inputs, strict=True)):
        report = quant.compare(layer, layer_int8, batches(x))
        console.print(f"attention of layer {i}, on the test images")
        console.print(report)
        for lint in report.lints:
            console.print(fill(f"note: {lint}"), markup=False)
    tokens = model.embed(digits.test_images)
    encoded, int8_inputs = int8.run(tokens)
    found = cosines(list(zip(encoder(tokens), encoded, strict=True)))
    console.print("the whole encoder, its attention and feed-forward networks in int8:")
    console.print(f"cosine of the results of an image: mean {found.mean:.5f}, least {found.minimum:.5f}\n")

    console.rule("4. accuracy before and after", align="left")
    predicted_int8 = model.predict(digits.test_images, int8)
    correct_int8 = int((predicted_int8 == digits.test_labels).sum())
    same = int((predicted == predicted_int8).sum())
    console.print(f"float32: {correct / total:.2%}, {correct} of {total} right")
    console.print(f"int8:    {correct_int8 / total:.2%}, {correct_int8} of {total} right")
    console.print(f"same answer as float32 on {same} of {total} images\n")

    console.rule("5. export to .tflite and run the files elsewhere", align="left")
    out.mkdir(parents=True, exist_ok=True)
    shown = table("file", "run by", "our arithmetic", "bytes", "differ", text=3)
    compared = differing = 0
    paths = [out / f"layer_{i}.tflite" for i in range(len(quantized))]
    for layer, x, path in zip(quantized, int8_inputs, paths, strict=True):  # x: what the int8 model itself sees
        quant.export(layer, path, batch=1, sequence_length=NUM_PATCHES)
        counts = compare_bytes(layer, path, layer.quantize_input(x), shown, console)
        compared, differing = compared + counts[0], differing + counts[1]
    console.print(shown)
    for name, runtime in RUNTIMES.items():
        reason = runtime.available()
        if reason is not None:
            console.print(fill(f"not run: {name} ({reason})"), markup=False)
    for path in paths:
        console.print(f"wrote {short(path)}: {path.stat().st_size:,} bytes", soft_wrap=True, markup=False)

    seconds = time.perf_counter() - started
    if compared == 0:
        console.print(f"FAILED, nothing compared: no TFLite interpreter is installed here. {seconds:.1f} s.")
        return 1
    if differing or correct != noted:
        console.print(f"{differing:,} of {compared:,} output bytes of the .tflite files differ from ours")
        console.print(f"FAILED after {seconds:.1f} s: {correct} images right in float32, {noted} at training")
        return 1
    console.print(f"all {compared:,} output bytes of the .tflite files equal ours")
    console.print(
        f"Done in {seconds:.1f} s: accuracy {correct / total:.2%} in float32, {correct_int8 / total:.2%} in int8."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
