"""A small vision Transformer for 8x8 digits in plain NumPy, with the attention layers left pluggable.

    image (8, 8) -> 16 patches of 2x2 pixels -> linear + position    (B, 16, width)
    twice:  x = x + attention(norm(x))                         <- any callable, (B, L, E) to (B, L, E)
            x = x + mlp(norm(x))
    norm -> mean over the 16 patches -> linear                       (B, 10) logits

Everything but the attention stays float32, so what `run.py` measures is what quantizing the attention costs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np
from safetensors import safe_open

import edgeattn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
ONE_HEAD_WEIGHTS = Path(__file__).with_name("digits_one_head.safetensors")

PATCH = 2  # pixels along one side of a patch
GRID = 8 // PATCH  # patches along one side of the image
NUM_PATCHES = GRID * GRID
NUM_LAYERS = 2
NORM_EPSILON = 1e-5  # torch.nn.LayerNorm's default

Attention = Callable[[np.ndarray], np.ndarray]


def patches(images: np.ndarray) -> np.ndarray:
    """Cut images (B, 8, 8) into patches (B, 16, 4), row by row."""
    batch = images.shape[0]
    rows_and_columns = images.reshape(batch, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4)
    return rows_and_columns.reshape(batch, NUM_PATCHES, PATCH * PATCH)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Bring every row to mean 0 and variance 1, then scale and shift it."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + NORM_EPSILON) * weight + bias


@numba.vectorize(["float32(float32)"])
def gelu(x):
    """Gaussian error linear unit x * Phi(x), Phi exact, as torch.nn.GELU() computes it."""
    return 0.5 * x * (1.0 + math.erf(x * math.sqrt(0.5)))


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return x @ weight.T + bias, the weight stored (out, in) as torch does."""
    return x @ weight.T + bias


class DigitsModel:
    """The trained model; `attention` below is always one callable per layer.

    Parameters
    ----------
    path : Path
        A .safetensors file written by train.py.

    Attributes
    ----------
    weights : dict of str to ndarray
        Every tensor of the file, by name.
    metadata : dict of str to str
        What train.py noted: num_heads, test_correct, test_total.
    """

    def __init__(self, path: Path = WEIGHTS):
        self.path = path
        with safe_open(path, framework="numpy") as file:
            self.metadata = file.metadata()
            names = file.keys()
            self.weights = {name: file.get_tensor(name) for name in names}

    @property
    def num_heads(self) -> int:
        """Heads of every attention layer, as trained."""
        return int(self.metadata["num_heads"])

    def attention_layers(self) -> list[edgeattn.MultiHeadAttention]:
        """The trained attention layers in float32, read from the file by their torch names."""
        prefixes = [f"layers.{i}.attention." for i in range(NUM_LAYERS)]
        return [
            edgeattn.MultiHeadAttention.from_torch(self.path, num_heads=self.num_heads, prefix=prefix)
            for prefix in prefixes
        ]

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Images (B, 8, 8) to patch vectors (B, 16, width)."""
        w = self.weights
        return linear(patches(images), w["embed.weight"], w["embed.bias"]) + w["position"]

    def logits(self, images: np.ndarray, attention: Sequence[Attention]) -> np.ndarray:
        """Scores (B, 10), one per digit."""
        return self._forward(images, attention)[0]

    def predict(self, images: np.ndarray, attention: Sequence[Attention]) -> np.ndarray:
        """The digit with the highest score, (B,)."""
        return self.logits(images, attention).argmax(axis=-1)

    def attention_inputs(self, images: np.ndarray, attention: Sequence[Attention]) -> list[np.ndarray]:
        """What each attention layer receives for these images: per layer (B, 16, width).

        These are the real activations that calibration wants to see.
        """
        return self._forward(images, attention)[1]

    def _forward(self, images, attention):
        w = self.weights
        inputs = []
        x = self.embed(images)
        for i, attend in enumerate(attention):
            layer = f"layers.{i}."
            normed = layer_norm(x, w[layer + "norm_attention.weight"], w[layer + "norm_attention.bias"])
            inputs.append(normed)
            x = x + attend(normed)
            hidden = layer_norm(x, w[layer + "norm_mlp.weight"], w[layer + "norm_mlp.bias"])
            hidden = gelu(linear(hidden, w[layer + "mlp.0.weight"], w[layer + "mlp.0.bias"]))
            x = x + linear(hidden, w[layer + "mlp.2.weight"], w[layer + "mlp.2.bias"])
        x = layer_norm(x, w["norm.weight"], w["norm.bias"]).mean(axis=1)
        return linear(x, w["head.weight"], w["head.bias"]), inputs
