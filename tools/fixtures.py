"""Write tests/fixtures/VERSION: small files as this release writes them, and what they give.

    python tools/fixtures.py

Once for a release; tests/files/test_fixtures.py reads those of every release. Numbers are random and seeded.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np

import edgeattn
import quant

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "fixtures" / edgeattn.__version__
E, H, HIDDEN, TOKENS = 16, 2, 24, 7


def encoder(rng: np.random.Generator) -> edgeattn.TransformerEncoder:
    """One layer, of random numbers."""
    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)

    def vector(size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    attention = edgeattn.MultiHeadAttention(H, *(matrix(E, E) for _ in range(4)), q_bias=vector(E), out_bias=vector(E))
    feed_forward = edgeattn.FeedForward(edgeattn.Linear(matrix(HIDDEN, E), vector(HIDDEN)),
                                        edgeattn.Linear(matrix(E, HIDDEN), vector(E)))
    norms = (edgeattn.LayerNorm(np.ones(E, np.float32), vector(E)) for _ in range(2))
    return edgeattn.TransformerEncoder([edgeattn.TransformerEncoderLayer(attention, feed_forward, *norms)])


def main() -> None:
    """Write them, in place of what is there."""
    rng = np.random.default_rng(0)
    model, x = encoder(rng), rng.standard_normal((2, TOKENS, E)).astype(np.float32)
    layer = model.layers[0].attention
    calls = [x, {"query": x, "is_causal": True}]
    calibration, of_model = quant.calibrate(layer, calls), quant.calibrate(model, [x])
    ids = rng.integers(0, 20, (2, TOKENS))
    embedding = edgeattn.layers.Embedding(rng.standard_normal((20, E)).astype(np.float32),
                                          rng.standard_normal((TOKENS, E)).astype(np.float32))
    text = edgeattn.TextEncoder(embedding, model)
    made = {"attention-float32": layer, "attention-static": quant.quantize(layer, calibration),
            "attention-dynamic": quant.quantize(layer, scheme="dynamic"), "encoder-float32": model,
            "encoder-static": quant.quantize(model, of_model),
            "encoder-dynamic": quant.quantize(model, scheme="dynamic"),
            "text-dynamic": quant.quantize(text, scheme="dynamic")}
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    results = {}
    for name, each in made.items():
        edgeattn.save(each, FOLDER / f"{name}.safetensors")
        results[name] = each(ids if name.startswith("text") else x)
    quant.export(made["attention-static"], FOLDER / "attention-static.tflite", batch=2, sequence_length=TOKENS)
    results["tflite"] = made["attention-static"].run_int8(made["attention-static"].quantize_input(x))
    for name, each in (("calibration", calibration), ("calibration-model", of_model)):
        path = FOLDER / f"{name}.safetensors"
        each.save(path)
        # histograms, most of them zeros
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
        path.unlink()
    np.savez(FOLDER / "results.npz", x=x, ids=ids, **results)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER.relative_to(ROOT)}: {len(list(FOLDER.iterdir()))} files, {size:,} bytes")


if __name__ == "__main__":
    main()
