"""Rotary position embedding: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array, count, flag, float_array, number, result_dtype
from edgeattn.hints import hinted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Flag, Float32s, Floats, Real, Shape


def apply_rotary_embedding(
    x: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    *,
    position_ids: ArrayLike | None = None,
    interleaved: Flag = False,
    rotary_embedding_dim: SupportsIndex = 0,
    num_heads: SupportsIndex | None = None,
) -> Floats:
    """Turn each pair of features (a, b) of a head into (a cos - b sin, a sin + b cos).

    The operator RotaryEmbedding of ONNX, opset 23. Su et al., "RoFormer: Enhanced Transformer with Rotary
    Position Embedding" (2021), section 3.2.2.

    Parameters
    ----------
    x : (B, H, L, D) or (B, L, H * D) float16, float32 or float64 array
        Queries or keys, after their projection. All dtypes are computed in float32.
    cos, sin : (positions, R / 2) or (B, L, R / 2) float array
        With `position_ids` one row per position, without them the rows of the tokens themselves; B may then be 1.
        R is `rotary_embedding_dim`, or D where that is 0. See `rotary_cache`.
    position_ids : (B, L) int array, optional
        The row of `cos` and `sin` that belongs to each token.
    interleaved : bool
        Pairs are features (0, 1), (2, 3), ... instead of (0, R / 2), (1, R / 2 + 1), ... ONNX and this function
        take halves unless told otherwise; FlashAttention and GPT-J take neighbours.
    rotary_embedding_dim : int
        R, the number of leading features of each head that are turned, even; 0 = all of them.
    num_heads : int, optional
        H, needed for a (B, L, H * D) `x` and for nothing else.

    Returns
    -------
    array of the shape and dtype of `x`
        Features from R on are those of `x`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    x = float_array("x", x)
    cos, sin = float_array("cos", cos), float_array("sin", sin)
    interleaved = flag("interleaved", interleaved)
    num_heads = _check_shape(x, num_heads)
    heads = _by_heads(x, num_heads)
    turned = _turned_features(heads.shape[-1], rotary_embedding_dim)
    cos, sin = _rows(cos, sin, position_ids, heads.shape, turned // 2)

    result = np.empty(x.shape, result_dtype(x))
    target = _by_heads(result, num_heads)
    target[..., turned:] = heads[..., turned:]
    if interleaved:
        first, second = slice(0, turned, 2), slice(1, turned, 2)
    else:
        first, second = slice(0, turned // 2), slice(turned // 2, turned)
    # Infinities and NaN are data here, not a reason to warn.
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = (heads[..., part].astype(np.float32) for part in (first, second))
        target[..., first] = a * cos - b * sin
        target[..., second] = a * sin + b * cos
    return result


def rotary_cache(
    positions: SupportsIndex, rotary_embedding_dim: SupportsIndex, *, base: Real = 10000.0
) -> tuple[Float32s, Float32s]:
    """Cosines and sines for `apply_rotary_embedding`.

    The angle of pair i at position p is p * base^(-2 i / R), worked out in float64.

    Parameters
    ----------
    positions : int
        Positions 0 to positions - 1 get a row.
    rotary_embedding_dim : int
        R, even: the head size D, or the part of it that is turned.
    base : float
        Called theta too, greater than 0.

    Returns
    -------
    cos, sin : (positions, R / 2) float32 array

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    positions = count("positions", positions)
    turned = count("rotary_embedding_dim", rotary_embedding_dim)
    if turned % 2:
        raise ValueError(f"rotary_embedding_dim must be even, got {turned}")
    base = number("base", base)
    if base <= 0:
        raise ValueError(f"base must be greater than 0, got {base}")
    frequencies = base ** (-np.arange(0, turned, 2) / turned)
    angles = np.outer(np.arange(positions), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class RotaryEmbedding:
    """Rotary embedding of the queries and keys of a `MultiHeadAttention(..., rotary=...)`.

    The token at position p is turned by the angles p * base^(-2 i / R) of `rotary_cache`; a query's position is that
    among the keys, which a cache knows.

    Parameters
    ----------
    rotary_embedding_dim : int
        R, even: the head size D, or the number of leading features of each head that are turned.
    base : float
        Called theta too, greater than 0.
    interleaved : bool
        Pairs are neighbours instead of halves, as in `apply_rotary_embedding`.
    offset : int
        Position of the first key, at least 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    @hinted
    def __init__(self, rotary_embedding_dim: SupportsIndex, *, base: Real = 10000.0, interleaved: Flag = False,
                 offset: SupportsIndex = 0):
        self._table = rotary_cache(1, rotary_embedding_dim, base=base)
        self._by_features: Float32s | None = None
        self.rotary_embedding_dim, self.base = count("rotary_embedding_dim", rotary_embedding_dim), float(base)
        self.interleaved = flag("interleaved", interleaved)
        self.offset = count("offset", operator.index(offset) + 1) - 1

    def turn(self, x: Float32s, position: int) -> Float32s:
        """X (B, H, L, D), whose first token stands at `position`, turned."""
        first = self.offset + position
        last = first + x.shape[2]
        table = self._table  # another thread may put a shorter one there
        if last > len(table[0]):  # twice as long, so that a sequence that grows makes few of them
            self._table = table = rotary_cache(2 * last, self.rotary_embedding_dim, base=self.base)
        cos, sin = (each[None, first:last] for each in table)
        return apply_rotary_embedding(
            x, cos, sin, interleaved=self.interleaved, rotary_embedding_dim=self.rotary_embedding_dim)

    def by_features(self, positions: int) -> Float32s:
        """Cosines, then sines, (R, at least so many positions): of keys from the first on, as kernels read them."""
        table = self._by_features
        if table is None or table.shape[1] < positions:
            pair = rotary_cache(self.offset + 2 * positions, self.rotary_embedding_dim, base=self.base)
            table = np.concatenate([np.ascontiguousarray(each[self.offset :].T) for each in pair])
            self._by_features = table
        return table

    def __repr__(self) -> str:
        return (f"RotaryEmbedding({self.rotary_embedding_dim}, base={self.base}, interleaved={self.interleaved}, "
                f"offset={self.offset})")


def _check_shape(x: Floats, num_heads: SupportsIndex | None) -> int:
    """H of the given or derived heads."""
    if x.ndim == 4:
        if num_heads not in (None, x.shape[1]):
            raise ValueError(f"num_heads must be left out for a (B, H, L, D) x, got {num_heads} for {x.shape}")
        return int(x.shape[1])
    if x.ndim != 3:
        raise ValueError(f"x must be (B, H, L, D) or (B, L, H * D), got shape {x.shape}")
    if num_heads is None:
        raise ValueError(
            f"num_heads is needed for a (B, L, H * D) x, got shape {x.shape}; "
            "for one batch entry (H, L, D) pass x[numpy.newaxis]"
        )
    heads = count("num_heads", num_heads)
    if x.shape[2] % heads:
        raise ValueError(f"num_heads must divide the last axis of x {x.shape}, got {num_heads}")
    return heads


def _by_heads(array: Floats, num_heads: int) -> Floats:
    """View of an array as (B, L, H, D)."""
    if array.ndim == 4:
        return array.swapaxes(1, 2)
    return array.reshape(*array.shape[:2], num_heads, array.shape[2] // num_heads)


def _turned_features(head_dim: int, rotary_embedding_dim: SupportsIndex) -> int:
    """R as an even number of at most D."""
    if isinstance(rotary_embedding_dim, (int, np.integer)) and rotary_embedding_dim == 0:
        if head_dim % 2:
            raise ValueError(f"the head size D must be even, got {head_dim}; pass rotary_embedding_dim to turn a part")
        return head_dim
    turned = count("rotary_embedding_dim", rotary_embedding_dim)
    if turned % 2 or turned > head_dim:
        raise ValueError(f"rotary_embedding_dim must be even and at most D = {head_dim}, got {turned}")
    return turned


def _rows(
    cos: Floats, sin: Floats, position_ids: ArrayLike | None, heads_shape: Shape, pairs: int
) -> Iterable[Float32s]:
    """Cosines and sines as float32 arrays that broadcast to (B, L, H, pairs)."""
    batch, length = heads_shape[:2]
    if position_ids is None:
        for name, table in (("cos", cos), ("sin", sin)):
            if table.ndim != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (length, pairs):
                raise ValueError(
                    f"{name} must be (B, L, R / 2) = {(batch, length, pairs)} without position_ids, got shape "
                    f"{table.shape}; with a (positions, R / 2) table pass position_ids"
                )
    else:
        for name, table in (("cos", cos), ("sin", sin)):
            if table.ndim != 2 or table.shape[1] != pairs:
                raise ValueError(
                    f"{name} must be (positions, R / 2) = (any, {pairs}) with position_ids, got shape {table.shape}"
                )
        if cos.shape != sin.shape:
            raise ValueError(f"cos and sin must have as many rows, got shapes {cos.shape} and {sin.shape}")
        positions = _positions(position_ids, (batch, length), len(cos))
        cos, sin = cos[positions], sin[positions]
    with np.errstate(over="ignore"):
        return (table.astype(np.float32)[:, :, np.newaxis] for table in (cos, sin))


def _positions(position_ids: ArrayLike, shape: Shape, rows: int) -> NDArray[Any]:
    positions = as_array("position_ids", position_ids)
    if positions.dtype.kind not in "iu":
        raise TypeError(f"position_ids must be an integer array, got dtype {positions.dtype}")
    if positions.shape != shape:
        raise ValueError(f"position_ids must be (B, L) = {shape}, got shape {positions.shape}")
    # NumPy would count a negative one from the end, which is another position's angle.
    if positions.size and not (positions.min() >= 0 and positions.max() < rows):
        raise ValueError(
            f"position_ids must be within 0 and {rows - 1}, the rows of cos and sin, got "
            f"{positions.min()} to {positions.max()}"
        )
    return positions
