"""Exported encoders in LiteRT beside what litert-torch and ai-edge-quantizer make of the same weights.

    python -m benchmarks.exported FOLDER           # writes the files that FOLDER lacks, checks them, times them in turn

An encoder of all-MiniLM-L6-v2's sizes with random weights, an attention mask as an input of every file. Each file runs
in ai-edge-litert with its default kernels. Files are written once, so that a second run only times.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import edgeattn
import quant
from benchmarks.encoder_peers import Common, _litert_file
from benchmarks.minilm import WIDTH, random_model
from benchmarks.timing import interleave

LENGTHS = (16, 64, 128)
OURS = ("float32", "hybrid", "static")


def write(folder: Path, length: int, layers: int) -> dict[str, Path]:
    """The files of a length."""
    paths = {f"edgeattn {kind}": folder / f"ours.{kind}.{layers}x{length}.tflite" for kind in OURS}
    peers = {f"litert-torch {kind}": folder / f"{layers}x{length}" / f"1x{length}x{WIDTH}.{kind}.tflite"
             for kind in ("float32", "int8")}
    if not all(path.exists() for path in (*paths.values(), *peers.values())):
        from benchmarks.encoder_torch import Encoder

        encoder = edgeattn.TransformerEncoder([with_norms(layer) for layer in random_model().encoder.layers[:layers]])
        batches = [example(length, seed) for seed in range(4)]
        made = {"float32": encoder, "hybrid": quant.quantize(encoder, scheme="dynamic"),
                "static": quant.quantize(encoder, quant.calibrate(encoder, batches), room_for_masks=True)}
        for kind, each in made.items():
            quant.export(each, paths[f"edgeattn {kind}"], sequence_length=length, padding=True)
        inner = folder / f"{layers}x{length}"
        inner.mkdir(exist_ok=True)
        common = Common(encoder, Encoder(encoder).eval(), inner / "none", [], inner)
        for kind in ("float32", "int8"):
            _litert_file(common, (1, length, WIDTH), np.dtype(np.float32), kind)
    return paths | peers


def with_norms(layer: edgeattn.TransformerEncoderLayer) -> edgeattn.TransformerEncoderLayer:
    """The layer with weights in its norms other than 1: those a converter would leave out."""
    random = np.random.default_rng(3)
    norms = (edgeattn.LayerNorm(1 + 0.1 * random.standard_normal(WIDTH), 0.1 * random.standard_normal(WIDTH), 1e-12)
             for _ in range(2))
    return edgeattn.TransformerEncoderLayer(layer.attention, layer.feed_forward, *norms)


def example(length: int, seed: int) -> np.ndarray:
    """Rows of a text, as an embedding gives them."""
    return np.random.default_rng(seed).standard_normal((1, length, WIDTH), np.float32)


def session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A call of a file."""
    from ai_edge_litert.interpreter import Interpreter

    made = Interpreter(str(path), num_threads=threads)
    made.allocate_tensors()
    inputs: dict[Any, Any] = {each["dtype"]: each for each in made.get_input_details()}
    tokens = inputs[np.int32]
    at, out = inputs[np.float32]["index"], made.get_output_details()[0]["index"]

    def call(x: np.ndarray) -> np.ndarray:
        made.set_tensor(tokens["index"], np.ones(tokens["shape"], np.int32))
        made.set_tensor(at, x)
        made.invoke()
        found: np.ndarray = made.get_tensor(out)
        return found

    return call


def main() -> None:
    """Write, check and time."""
    parser = argparse.ArgumentParser(description="Exported encoders in LiteRT beside ai-edge-quantizer's.")
    parser.add_argument("folder", type=Path, help="where the files are, or are to be written")
    parser.add_argument("--layers", type=int, default=2, help="of 6 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="of each length (default: %(default)s)")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(f"milliseconds, {chosen.layers} layers of {WIDTH}, {chosen.threads} thread(s); cosine to float32")
    for length in LENGTHS:
        calls = {name: session(path, chosen.threads)
                 for name, path in write(chosen.folder, length, chosen.layers).items()}
        x = example(length, 9)
        wanted = calls["litert-torch float32"](x).ravel()
        cosine = {name: float(call(x).ravel() @ wanted / np.linalg.norm(call(x)) / np.linalg.norm(wanted))
                  for name, call in calls.items()}
        if min(cosine.values()) < 0.99:
            raise SystemExit(f"a file computes something else: cosines to float32 are {cosine}")
        timed = {name: functools.partial(call, x) for name, call in calls.items()}
        times = interleave(timed, seconds=chosen.seconds, threads=chosen.threads)
        for name, rounds in times.items():
            print(f"{length:4} tokens  {name:22} {1e3 * np.median(rounds):8.3f}  {cosine[name]:.5f}", flush=True)


if __name__ == "__main__":
    main()
