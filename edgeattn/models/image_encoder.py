"""Encoders of images and spectrograms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array, flag, float_array, result_dtype, to_float32, write_result
from edgeattn.device import Placeable
from edgeattn.files import checkpoints
from edgeattn.files.paths import named
from edgeattn.hints import hinted
from edgeattn.layers.embedding import PatchEmbedding
from edgeattn.layers.encoder import TransformerEncoder
from edgeattn.layers.linear import Linear
from edgeattn.layers.norm import norm_of
from edgeattn.layers.state import Stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import Self

    from edgeattn.ops import Ops, Sequences, T
    from edgeattn.types import Arithmetic, Flag, Float32s, Floats, OnnxModel, OnnxScheme, Path


class ImageEncoder(Placeable, Stored):
    """Patches of images, and an encoder's layers.

    Parameters
    ----------
    embedding : PatchEmbedding
        Of patches of pixels, and of their places.
    encoder : TransformerEncoder
    spectrogram : bool
        Whether it takes (B, frames, bins) instead of (B, C, height, width).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    def __init__(self, embedding: PatchEmbedding, encoder: TransformerEncoder, *, spectrogram: Flag = False):
        if not isinstance(embedding, PatchEmbedding) or not isinstance(encoder, TransformerEncoder):
            raise TypeError("embedding must be an edgeattn.layers.PatchEmbedding and encoder an "
                            f"edgeattn.TransformerEncoder, got {type(embedding).__name__} and {type(encoder).__name__}")
        if embedding.embed_dim != encoder.embed_dim:
            raise ValueError(f"embedding must give the encoder's E = {encoder.embed_dim}, got {embedding.embed_dim}")
        self.embedding, self.encoder, self.spectrogram = embedding, encoder, flag("spectrogram", spectrogram)

    @classmethod
    @hinted
    def from_onnx(cls, path_or_model: Path | OnnxModel, *, scheme: OnnxScheme = "float32",
                  arithmetic: Arithmetic | None = None) -> Self:
        """The image encoder of an ONNX model: ViT, DeiT and the like, whose patches a Conv makes.

        The layers are found as `TransformerEncoder.from_onnx` finds them; what is behind them is left out.

        Parameters
        ----------
        path_or_model : path or onnx.ModelProto
            Needs the onnx package.
        scheme, arithmetic : {"float32", "static"}, str
            As of `TransformerEncoder.from_onnx`; the embedding is float32 in both.

        Returns
        -------
        ImageEncoder

        Raises
        ------
        ImportError
            Where the package onnx is missing.
        ValueError
            Naming the file, and the node where something else stands than in an image encoder.
        """
        with named(path_or_model):
            found = checkpoints.onnx_image(path_or_model, checkpoints.kernel_set_of(scheme, arithmetic))
            patch = found.weight.shape[2:]
            norm: Any = norm_of(found.norm)
            return cls(PatchEmbedding(Linear(found.weight.reshape(len(found.weight), -1), found.bias), found.places,
                                      patch_size=patch, stride=found.stride, image_size=found.image_size, norm=norm),
                       TransformerEncoder.from_found(found.encoder))

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.encoder.embed_dim

    def forward(self, ops: Ops[T], patches: T, places: Float32s, images: int, sequences: Sequence[Sequences],
                name: str = "") -> T:
        """Rows of patches -> rows of tokens (tokens, E)."""
        x = self.embedding.forward(ops, patches, places, images, name + "embedding.")
        return self.encoder.forward(ops, x, sequences, name + "encoder.")

    def __call__(self, pixels: ArrayLike) -> Floats:
        """The last hidden state: of the class token, of other tokens that are no patch, of each patch row by row.

        Parameters
        ----------
        pixels : (B, C, height, width) float array, or (B, frames, bins) for a spectrogram
            Scaled and normalized as the model's preprocessor_config.json says. For another size than the model's own
            the embeddings of places are interpolated, as in transformers.

        Returns
        -------
        (B, tokens, E) array
            Of the dtype of `pixels`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        from edgeattn.executors.compiled import CompiledOps

        array = as_array("pixels", pixels)
        if array.dtype.kind in "biu":
            raise TypeError("pixels must be a float16, float32 or float64 array, scaled and normalized as the model's "
                            f"preprocessor_config.json says, got dtype {array.dtype}")
        array = float_array("pixels", array)
        axes = "(B, frames, bins)" if self.spectrogram else "(B, C, height, width)"
        if array.ndim != axes.count(",") + 1:
            raise ValueError(f"pixels must be {axes}, got shape {array.shape}")
        images = to_float32(array.swapaxes(1, 2)[:, None] if self.spectrogram else array)
        embedding, (count, channels, *size) = self.embedding, images.shape
        fits = tuple(size) == embedding.image_size if self.spectrogram else all(
            whole >= patch and whole % patch == 0 for whole, patch in zip(size, embedding.patch_size, strict=True))
        if channels != embedding.channels or not fits:
            wanted = embedding.image_size[::-1] if self.spectrogram else (
                f"{embedding.channels} channels, height and width multiples of {embedding.patch_size}")
            raise ValueError(f"pixels must be {axes} with {wanted}, got shape {array.shape}; resize or pad it")
        places = embedding.places(*size)
        with self.encoder.prepared((count, len(places))) as sequences:
            rows = self.forward(CompiledOps(), embedding.patches(images), places, count, sequences) if count else (
                np.zeros((0, self.embed_dim), np.float32))
        return write_result(rows.reshape(count, len(places), self.embed_dim), None, result_dtype(array))

    def __repr__(self) -> str:
        return f"ImageEncoder(images of {self.embedding.image_size}, {self.encoder})"
