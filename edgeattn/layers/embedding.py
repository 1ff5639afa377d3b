"""What an encoder's layers begin with: a vector for each token of a text, or for each patch of an image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edgeattn.layers.linear import Linear, check_linear, parameter
from edgeattn.layers.norm import LayerNorm
from edgeattn.layers.state import Stored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.ops import Ops, T
    from edgeattn.types import Float32s

_LARGEST_SIZE = 2**24
_NEAR = 1 << 16  # bytes of rows that are embedded at a time
_CUBIC = -0.75  # the free parameter of the bicubic kernel, torch's choice


class Embedding(Stored):
    """A token's vector, plus that of its position and of its type; then a norm and a linear map.

    Parameters
    ----------
    token_weight : (V, E) float array
    position_weight : (P, E) float array, optional
        The embedding of each position; none where attention has the positions.
    type_weight : (types, E) float array, optional
        Of token types, segments.
    norm : LayerNorm, optional
    projection : Linear, optional
        From E features to those of the encoder.
    padding_id : int, optional
        Positions are numbered as RoBERTa's: the first token's is padding_id + 1, and tokens of this number have no
        place of their own. Unless given, the first token's is 0.
    """

    def __init__(self, token_weight: ArrayLike, position_weight: ArrayLike | None = None,
                 type_weight: ArrayLike | None = None, *, norm: LayerNorm | None = None,
                 projection: Linear | None = None, padding_id: int | None = None):
        self.token_weight = parameter("token_weight", token_weight, "(tokens, features)")
        tables = {"position_weight": position_weight, "type_weight": type_weight}
        self.position_weight, self.type_weight = (
            None if table is None else parameter(name, table, "(entries, features)") for name, table in tables.items())
        if norm is not None and not isinstance(norm, LayerNorm):
            raise TypeError(f"norm must be an edgeattn.LayerNorm, got {type(norm).__name__}")
        check_linear("projection", projection, optional=True)
        self.norm, self.projection, self.padding_id = norm, projection, padding_id
        if padding_id is not None and not (type(padding_id) is int and 0 <= padding_id < len(self.token_weight)):
            raise ValueError(f"padding_id must be one of the {len(self.token_weight)} tokens, got {padding_id!r:.100}")
        width = self.token_weight.shape[1]
        for name in (*tables, "norm", "projection"):
            part = getattr(self, name)
            features = part.shape[1] if isinstance(part, np.ndarray) else width if part is None else part.inputs
            if features != width:
                raise ValueError(f"{name} must be of E = {width} features, those of token_weight, got {features}")
        self.embed_dim = width if projection is None else projection.outputs

    def __repr__(self) -> str:
        return (f"Embedding(tokens={len(self.token_weight)}, positions={self.longest}, embed_dim={self.embed_dim}, "
                f"norm={self.norm!r})")

    @property
    def longest(self) -> int | None:
        """The number of tokens that there are positions for; None where they have no end."""
        if self.position_weight is None:
            return None
        return len(self.position_weight) - (0 if self.padding_id is None else self.padding_id + 1)

    def positions(self, ids: NDArray[np.int64], first: int = 0) -> NDArray[np.int64]:
        """The rows of `position_weight` for ids (B, L), before which there were `first` tokens."""
        if self.padding_id is None:
            return np.arange(first, first + ids.shape[1])[None].repeat(len(ids), axis=0)
        real = ids != self.padding_id
        rows: NDArray[np.int64] = self.padding_id + real * (np.cumsum(real, axis=1) + first)
        return rows

    def forward(self, ops: Ops[T], ids: NDArray[np.int64], positions: NDArray[np.int64], types: NDArray[np.int64],
                name: str = "") -> T:
        """Ids, positions and types (tokens,) -> (tokens, E)."""
        x = ops.embed(self.token_weight, ids, name + "tokens")
        if self.type_weight is not None:
            x = ops.add(x, ops.embed(self.type_weight, types, name + "types"), name + "typed")
        if self.position_weight is not None:
            x = ops.add(x, ops.embed(self.position_weight, positions, name + "positions"), name + "placed")
        if self.norm is not None:
            x = self.norm.forward(ops, x, name + "norm")
        return x if self.projection is None else ops.linear(x, self.projection, name + "projection")

    def computed(self, ids: NDArray[np.int64], positions: NDArray[np.int64], types: NDArray[np.int64]) -> Float32s:
        """`forward` by compiled kernels, some rows at a time: what lies between stays in the processor's caches."""
        from edgeattn.executors.compiled import CompiledOps

        some, ops = max(_NEAR // max(4 * self.token_weight.shape[1], 1), 1), CompiledOps()
        if len(ids) <= some:
            return self.forward(ops, ids, positions, types)
        rows = np.empty((len(ids), self.embed_dim), np.float32)
        for at in range(0, len(ids), some):
            part = slice(at, at + some)
            rows[part] = self.forward(ops, ids[part], positions[part], types[part])
        return rows


class PatchEmbedding(Stored):
    """A linear map of each patch of an image, plus the embedding of its place; before them tokens that are no patch.

    Such a token is a row of zeros: its embedding, less the bias of the map, is part of its place's.

    Parameters
    ----------
    projection : Linear
        From the channels * height * width values of a patch to E features.
    position_weight : (first tokens + rows * columns, E) float array
    patch_size, stride : (int, int)
        (height, width) of a patch, and from one patch to the next.
    image_size : (int, int)
        (height, width) of the images that `position_weight` is for; for others it is interpolated.
    norm : LayerNorm, optional
        Of what the layers are given, as in CLIP.
    """

    def __init__(self, projection: Linear, position_weight: ArrayLike, *, patch_size: Sequence[int],
                 image_size: Sequence[int], stride: Sequence[int] | None = None, norm: LayerNorm | None = None):
        check_linear("projection", projection)
        if norm is not None and not isinstance(norm, LayerNorm):
            raise TypeError(f"norm must be an edgeattn.LayerNorm, got {type(norm).__name__}")
        if norm is not None and norm.inputs != projection.outputs:
            raise ValueError(f"norm must be of E = {projection.outputs} features, got {norm}")
        self.norm = norm
        self.projection = projection
        self.position_weight = parameter("position_weight", position_weight, "(places, features)")
        self.patch_size, self.image_size = _pair("patch_size", patch_size), _pair("image_size", image_size)
        self.stride = self.patch_size if stride is None else _pair("stride", stride)
        self.channels, rest = divmod(projection.inputs, math.prod(self.patch_size))
        if rest or not self.channels:
            raise ValueError(f"projection must have inputs for whole channels of patches of {self.patch_size}, got "
                             f"{projection}")
        if any(whole < part for whole, part in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"image_size must have room for a patch of {self.patch_size}, got {self.image_size}")
        self.embed_dim = projection.outputs
        rows, columns = self.grid(*self.image_size)
        self.first_tokens = len(self.position_weight) - rows * columns
        if self.first_tokens < 0 or self.position_weight.shape[1] != self.embed_dim:
            raise ValueError(f"position_weight must have a row of {self.embed_dim} features for each of {rows} * "
                             f"{columns} patches at least, got shape {self.position_weight.shape}")

    def __repr__(self) -> str:
        return (f"PatchEmbedding(channels={self.channels}, image_size={self.image_size}, "
                f"patch_size={self.patch_size}, embed_dim={self.embed_dim})")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        rows, columns = ((size - patch) // stride + 1 for size, patch, stride
                         in zip((height, width), self.patch_size, self.stride, strict=True))
        return rows, columns

    def patches(self, pixels: Float32s) -> Float32s:
        """Pixels (B, C, height, width) -> (B * (first tokens + patches), C * patch height * patch width)."""
        windows: Float32s = sliding_window_view(pixels, self.patch_size, axis=(2, 3))  # type: ignore[call-overload]
        windows = windows[:, :, :: self.stride[0], :: self.stride[1]].transpose(0, 2, 3, 1, 4, 5)
        flat = windows.reshape(len(pixels), math.prod(windows.shape[1:3]), self.projection.inputs)
        rows = np.zeros((len(pixels), self.first_tokens + flat.shape[1], flat.shape[2]), np.float32)
        rows[:, self.first_tokens :] = flat
        return rows.reshape(-1, flat.shape[2])

    def places(self, height: int, width: int) -> Float32s:
        """`position_weight` for images of this size."""
        (rows, columns), (old_rows, old_columns) = self.grid(height, width), self.grid(*self.image_size)
        if (rows, columns) == (old_rows, old_columns):
            return self.position_weight
        first, table = np.split(self.position_weight, [self.first_tokens])
        table = np.einsum("yr,xc,rce->yxe", _bicubic(old_rows, rows), _bicubic(old_columns, columns),
                          table.reshape(old_rows, old_columns, -1))
        return np.concatenate((first, table.reshape(rows * columns, -1).astype(np.float32)))

    def forward(self, ops: Ops[T], patches: T, places: Float32s, images: int, name: str = "") -> T:
        """Rows of `patches` and the table of `places` -> (tokens, E)."""
        order = np.tile(np.arange(len(places)), images)
        x = ops.add(ops.linear(patches, self.projection, name + "patches"),
                    ops.embed(places, order, name + "places"), name + "placed")
        return x if self.norm is None else self.norm.forward(ops, x, name + "norm")


def _pair(name: str, sizes: Any) -> tuple[int, int]:
    """(height, width), checked."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or not all(
            type(size) is int and 1 <= size <= _LARGEST_SIZE for size in sizes):
        raise ValueError(f"{name} must be (height, width), two positive integers, got {sizes!r:.100}")
    return sizes[0], sizes[1]


def _bicubic(old: int, new: int) -> NDArray[np.float64]:
    """(new, old) weights of an interpolation as torch's, mode="bicubic", align_corners=False."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(place - first - tap)
        near = ((_CUBIC + 2) * d - (_CUBIC + 3)) * d * d + 1
        far = _CUBIC * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return weights
