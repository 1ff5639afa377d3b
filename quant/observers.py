"""What calibration remembers of a tensor, and the rules that turn it into a range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgeattn.types import Floats

BINS = 2048  # of the histogram; even, so that two halves fold into one when its range doubles
SMALLEST_EXPONENT = -126  # of a normal float32: below it nothing needs finer bins
FRACTIONS = np.linspace(1, 0.02, 99)  # of the full range that `mse` tries, the whole first
DOUBLINGS = 12  # more than log2(BINS): after so many everything lies in the two middle bins


@dataclass(eq=False)
class Statistics:
    """Minimum, maximum and histogram of everything seen, mergeable in any order with the same result.

    The histogram has BINS equal bins over [-2**exponent, 2**exponent). The range only ever doubles, and then pairs of
    bins become one exactly, so merging loses nothing.
    """

    minimum: float = np.inf
    maximum: float = -np.inf
    exponent: int = SMALLEST_EXPONENT
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def update(self, values: Floats) -> None:
        """Take in a finite float32 array of any shape; empty arrays change nothing."""
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0:
            return
        least, most = float(values.min()) + 0.0, float(values.max()) + 0.0  # -0 is 0, whichever came first
        self.minimum, self.maximum = min(self.minimum, least), max(self.maximum, most)
        largest = max(abs(self.minimum), abs(self.maximum))
        if largest > 0:  # zeros fit every range, and must not widen it
            self._widen(int(np.frexp(largest)[1]))  # largest < 2**exponent
        index = np.floor(values * (BINS / 2) / 2.0**self.exponent).astype(np.int64) + BINS // 2
        self.histogram += np.bincount(index, minlength=BINS)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both together."""
        merged, folded = (Statistics(exponent=s.exponent, histogram=s.histogram.copy()) for s in (self, other))
        merged._widen(folded.exponent)
        folded._widen(merged.exponent)
        merged.histogram += folded.histogram
        merged.minimum = min(self.minimum, other.minimum)
        merged.maximum = max(self.maximum, other.maximum)
        return merged

    def _widen(self, exponent: int) -> None:
        for _ in range(min(exponent - self.exponent, DOUBLINGS)):
            pairs = self.histogram.reshape(-1, 2).sum(1)
            self.histogram = np.concatenate([np.zeros(BINS // 4, np.int64), pairs, np.zeros(BINS // 4, np.int64)])
        self.exponent = max(self.exponent, exponent)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self.histogram.sum())

    def edges(self) -> NDArray[np.float64]:
        """The BINS + 1 bin boundaries."""
        return np.linspace(-1, 1, BINS + 1) * 2.0**self.exponent


# An observer takes Statistics of at least one value and whether the range shall be symmetric, as int8 stores keys and
# values; it returns (low, high) with low <= 0 <= high, since an int8 tensor always holds 0.

def minmax(s: Statistics, symmetric: bool = False) -> tuple[float, float]:
    """Everything that was seen."""
    return span(s.minimum, s.maximum, symmetric)


def percentile(s: Statistics, symmetric: bool = False, tail: float = 1e-4) -> tuple[float, float]:
    """All but the fraction ``tail`` at either end, to the width of a bin."""
    cumulative = np.cumsum(s.histogram) / s.count
    edges = s.edges()
    low = float(edges[np.searchsorted(cumulative, tail, side="right")])
    high = float(edges[np.searchsorted(cumulative, 1 - tail, side="left") + 1])
    return span(max(low, s.minimum), min(high, s.maximum), symmetric)


def mse(s: Statistics, symmetric: bool = False) -> tuple[float, float]:
    """Fractions of the full range, at either end, with the least mean squared error.

    That is step**2 / 12 for what lies inside, and the squared distance for what lies outside.
    """
    edges = s.edges()
    seen = s.histogram > 0
    centres = np.clip((edges[1:] + edges[:-1]) / 2, s.minimum, s.maximum)[seen]
    share = s.histogram[seen] / s.count
    low, high = minmax(s, symmetric)
    lows, highs = (end * FRACTIONS for end in (low, high))
    below, above = np.maximum(lows[:, None] - centres, 0), np.maximum(centres - highs[:, None], 0)
    # axes from here on: fraction of the low end, fraction of the high end
    outside = (below**2 @ share)[:, None] + above**2 @ share
    inside = 1 - ((below > 0) @ share)[:, None] - (above > 0) @ share
    step = (highs - lows[:, None]) / (254 if symmetric else 255)
    error = outside + inside * step**2 / 12
    if symmetric:
        best = np.argmin(np.diagonal(error))
        return float(lows[best]), float(highs[best])
    i, j = np.unravel_index(np.argmin(error), error.shape)
    return float(lows[i]), float(highs[j])


def span(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """(low, high), or where it shall be symmetric as far at either end, 0 within."""
    low, high = min(low, 0.0), max(high, 0.0)
    reach = max(-low, high)
    return (-reach, reach) if symmetric else (low, high)


OBSERVERS: dict[str, Callable[[Statistics, bool], tuple[float, float]]] = {
    "minmax": minmax, "percentile": percentile, "mse": mse}
