"""Sequences that differ in length: the rows of their tokens, and back, and their masks, run by run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.types import Float32s, Shape

    Run = tuple[int, int, int]


def runs_of(lengths: list[int]) -> list[Run]:
    """(first, last, length) of sequences of the same length beside each other; those of length 0 have no rows."""
    runs, first = [], 0
    for length, group in itertools.groupby(lengths):
        last = first + len(list(group))
        if length:
            runs.append((first, last, length))
        first = last
    return runs


def gathered(x: NDArray[Any], runs: Sequence[Run]) -> NDArray[Any]:
    """The tokens of x (B, L, ...) side by side, (tokens, ...); without those behind the length of each sequence."""
    parts = [x[first:last, :length].reshape(-1, *x.shape[2:]) for first, last, length in runs]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def spread(rows: Float32s, runs: Sequence[Run], shape: Shape) -> Float32s:
    """(B, L, E) of what `gathered` gave, (tokens, E); zeros where there are no tokens."""
    found, at, done = np.empty(shape, np.float32), 0, 0
    for first, last, length in runs:
        found[done:first] = 0  # sequences of no tokens
        size = (last - first) * length
        found[first:last, :length] = rows[at:at + size].reshape(last - first, length, shape[2])
        found[first:last, length:] = 0
        at, done = at + size, last
    found[done:] = 0
    return found


def part_of_mask(mask: Mask, first: int, last: int, length: int) -> Mask:
    """`mask` for the first `length` tokens of the batch entries from `first` on."""
    if mask.keep is None and mask.bias is None:
        return mask._replace(shape=(last - first, mask.shape[1], length, length))

    def cut(array: NDArray[Any] | None) -> NDArray[Any] | None:
        return array if array is None or len(array) == 1 else array[first:last]

    mask = mask._replace(shape=(last - first, *mask.shape[1:]), keep=cut(mask.keep), bias=cut(mask.bias))
    return mask.part((0, length), (0, length))
