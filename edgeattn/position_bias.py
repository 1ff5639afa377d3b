"""Biases of scores that depend on where a query and a key stand: T5's buckets, Swin's tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import count, flag, float_array, to_float32
from edgeattn.hints import hinted

if TYPE_CHECKING:
    from typing import SupportsIndex

    from numpy.typing import ArrayLike

    from edgeattn.types import Flag, Float32s


_LARGEST_KEPT = 1 << 22  # elements


class RelativePositionBias:
    """T5's bias: a number for each head and bucket of distances. For `MultiHeadAttention(..., position_bias=...)`.

    Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1. T5 itself does not scale its scores:
    give its q_weight times sqrt(D).

    Parameters
    ----------
    table : (buckets, H) float array
        relative_attention_bias.weight of T5 and MPNet.
    bidirectional : bool
        Half of the buckets are for keys after the query, as in encoders; otherwise these share the first one.
    max_distance : int
        From which on all distances share the last bucket.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    @hinted
    def __init__(self, table: ArrayLike, *, bidirectional: Flag = True, max_distance: SupportsIndex = 128):
        array = float_array("table", table)
        self.bidirectional = flag("bidirectional", bidirectional)
        self.max_distance = count("max_distance", max_distance)
        buckets = (len(array) // 2 if self.bidirectional else len(array)) if array.ndim == 2 else 0
        if buckets < 2 or self.max_distance <= buckets // 2:
            raise ValueError(f"table must be (buckets, H), with buckets for fewer than max_distance = "
                             f"{self.max_distance} distances, at least 2 in each direction, got shape {array.shape}")
        self.table = np.array(to_float32(array))
        self.table.flags.writeable = False
        self._last: tuple[int, Float32s] | None = None  # what `rows` gave: layers of an encoder ask for the same

    @property
    def num_heads(self) -> int:
        """H."""
        return int(self.table.shape[1])

    def rows(self, position: int, queries: int, keys: int) -> Float32s:
        """(H, L, S) of queries from `position` on to keys from 0 on."""
        last = self._last
        if last is None or last[0] != position or last[1].shape[1] < queries or last[1].shape[2] < keys:
            last = position, self._made(position, queries, keys)
            self._last = last if last[1].size <= _LARGEST_KEPT else None
        return last[1][:, :queries, :keys]

    def _made(self, position: int, queries: int, keys: int) -> Float32s:
        distance = np.arange(keys) - np.arange(position, position + queries)[:, None]
        buckets = len(self.table)
        after = np.zeros(distance.shape, np.int64)
        if self.bidirectional:
            buckets //= 2
            after = (distance > 0) * buckets
        distance = np.abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        exact = buckets // 2
        # in float32, as T5 has it: where a logarithm is next to an integer, that decides
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        ratio /= np.float32(math.log(self.max_distance / exact))
        far = exact + (ratio * np.float32(buckets - exact)).astype(int)
        bucket = after + np.where(distance < exact, distance, np.minimum(far, buckets - 1))
        return np.ascontiguousarray(self.table[bucket].transpose(2, 0, 1))

    def __repr__(self) -> str:
        return (f"RelativePositionBias(table {self.table.shape}, bidirectional={self.bidirectional}, "
                f"max_distance={self.max_distance})")


class ConstantPositionBias:
    """A bias (H, L, S) as it is, of the queries and keys from position 0 on."""

    def __init__(self, array: ArrayLike):
        given = float_array("position_bias", array)
        if given.ndim != 3:
            raise ValueError(f"position_bias must be (H, L, S), or a RelativePositionBias, got shape {given.shape}")
        self.array = np.array(to_float32(given))
        self.array.flags.writeable = False

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.array)

    def rows(self, position: int, queries: int, keys: int) -> Float32s:
        """(H, L, S) of queries from `position` on to keys from 0 on."""
        _, most_queries, most_keys = self.array.shape
        if position + queries > most_queries or keys > most_keys:
            raise ValueError(f"position_bias is for {most_queries} queries and {most_keys} keys, got queries up to "
                             f"position {position + queries} and {keys} keys")
        return self.array[:, position : position + queries, :keys]


def swin_position_bias(table: ArrayLike, window_size: tuple[SupportsIndex, SupportsIndex]) -> Float32s:
    """A Swin Transformer's table as the bias of its windows.

    Liu et al., "Swin Transformer" (2021), section 3.2.

    Parameters
    ----------
    table : ((2 * height - 1) * (2 * width - 1), H) float array
        relative_position_bias_table.
    window_size : (int, int)
        (height, width) of a window, whose tokens lie row by row.

    Returns
    -------
    (H, height * width, height * width) float32 array
        For `MultiHeadAttention(..., position_bias=...)`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    height, width = (count("window_size", size) for size in window_size)
    array = float_array("table", table)
    if array.ndim != 2 or len(array) != (2 * height - 1) * (2 * width - 1):
        raise ValueError(f"table must be ((2 * height - 1) * (2 * width - 1), H) = "
                         f"({(2 * height - 1) * (2 * width - 1)}, H), got shape {array.shape}")
    y, x = np.divmod(np.arange(height * width), width)
    index = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    return np.ascontiguousarray(to_float32(array)[index].transpose(2, 0, 1))
