"""Rows of the tokens of sequences that differ in length, and back, run by run: see `encoder.runs_of`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.types import Float32s, Shape

    Run = tuple[int, int, int]


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
