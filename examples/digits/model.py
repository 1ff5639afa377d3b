"""A small vision Transformer for 8x8 digits: a whole encoder of edgeattn's between two linear maps.

The way of an image:

    image (8, 8) -> 16 patches of 2x2 pixels -> linear + position                   (B, 16, width)
    edgeattn.TransformerEncoder: two layers, the norms before attention and feed-forward, and one at the end
    mean over the 16 patches -> linear                                              (B, 10) logits
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

import edgeattn
from edgeattn.executors.numpy import NumpyOps

WEIGHTS = Path(__file__).with_name("digits.safetensors")
ONE_HEAD_WEIGHTS = Path(__file__).with_name("digits_one_head.safetensors")

PATCH = 2  # pixels along one side of a patch
GRID = 8 // PATCH  # patches along one side of the image
NUM_PATCHES = GRID * GRID
NUM_LAYERS = 2


def patches(images: np.ndarray) -> np.ndarray:
    """Cut images (B, 8, 8) into patches (B, 16, 4), row by row."""
    batch = images.shape[0]
    rows_and_columns = images.reshape(batch, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4)
    return rows_and_columns.reshape(batch, NUM_PATCHES, PATCH * PATCH)


class DigitsModel:
    """The trained model.

    Parameters
    ----------
    path : Path
        A .safetensors file written by train.py.

    Attributes
    ----------
    encoder : edgeattn.TransformerEncoder
    metadata : dict of str to str
        What train.py noted: num_heads, test_correct, test_total.
    """

    def __init__(self, path: Path = WEIGHTS):
        with safe_open(path, framework="numpy") as file:
            self.metadata = file.metadata()
            names = ("embed.weight", "embed.bias", "position", "head.weight", "head.bias")
            self.embed_weight, self.embed_bias, self.position, self.head_weight, self.head_bias = map(
                file.get_tensor, names
            )
        self.encoder = edgeattn.TransformerEncoder.from_torch(
            path, self.num_heads, activation="gelu", norm_first=True, prefix="encoder."
        )

    @property
    def num_heads(self) -> int:
        """Heads of every attention layer, as trained."""
        return int(self.metadata["num_heads"])

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Images (B, 8, 8) to patch vectors (B, 16, width)."""
        return patches(images) @ self.embed_weight.T + self.embed_bias + self.position

    def predict(self, images: np.ndarray, encoder: Callable | None = None) -> np.ndarray:
        """The digit with the highest score, (B,); by `encoder` in place of the trained one."""
        encoded = (encoder or self.encoder)(self.embed(images))
        return (encoded.mean(axis=1) @ self.head_weight.T + self.head_bias).argmax(axis=-1)

    def attention_layers(self) -> list[edgeattn.MultiHeadAttention]:
        """The attention of each layer, in float32."""
        return [layer.attention for layer in self.encoder.layers]

    def attention_inputs(self, images: np.ndarray) -> list[np.ndarray]:
        """What each attention layer receives for these images: per layer (B, 16, width).

        These are the real activations that calibration wants to see.
        """
        x, record = self.embed(images), {}
        with self.encoder.prepared(x.shape[:2]) as sequences:
            self.encoder.forward(NumpyOps(record), x.reshape(-1, x.shape[2]), sequences)
        return [record[f"layers.{i}.norm1"].reshape(x.shape) for i in range(len(self.encoder.layers))]


class WithAttention:
    """An encoder with other attention layers.

    Parameters
    ----------
    encoder : edgeattn.TransformerEncoder
        Whose layers have their norms first.
    attention : sequence of callable
        One per layer, (B, L, E) to (B, L, E).
    """

    def __init__(self, encoder: edgeattn.TransformerEncoder, attention: Sequence[Callable]):
        self.encoder, self.attention = encoder, attention

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Encode x (B, L, E)."""
        return self.run(x)[0]

    def run(self, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """(x encoded, what each attention layer received)."""
        inputs = []
        for layer, attend in zip(self.encoder.layers, self.attention, strict=True):
            inputs.append(layer.norm1(x))
            x = x + attend(inputs[-1])
            x = x + layer.feed_forward(layer.norm2(x))
        return self.encoder.norm(x), inputs
