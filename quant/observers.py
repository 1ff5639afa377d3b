"""What calibration remembers of a tensor, and the rules that turn it into a range."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BINS = 2048  # of the histogram; even, so that two halves fold into one when its range doubles


@dataclass
class Statistics:
    """Minimum, maximum and histogram of everything seen, mergeable in any order with the same result.

    The histogram has BINS equal bins over [-2**exponent, 2**exponent). The range only ever doubles, and then pairs of
    bins become one exactly, so merging loses nothing.
    """

    minimum: float = np.inf
    maximum: float = -np.inf
    exponent: int = -126
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def update(self, values: np.ndarray) -> None:
        """Take in a float array of any shape; empty arrays change nothing."""
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0:
            return
        self.minimum, self.maximum = min(self.minimum, float(values.min())), max(self.maximum, float(values.max()))
        largest = max(abs(self.minimum), abs(self.maximum))
        self._widen(int(np.frexp(largest)[1]))  # largest < 2**exponent
        index = np.floor(values * (BINS / 2) / 2.0**self.exponent).astype(np.int64) + BINS // 2
        self.histogram += np.bincount(index, minlength=BINS)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both together."""
        merged = Statistics(min(self.minimum, other.minimum), max(self.maximum, other.maximum), self.exponent,
                            self.histogram.copy())
        merged._widen(other.exponent)
        copy = Statistics(exponent=other.exponent, histogram=other.histogram.copy())
        copy._widen(merged.exponent)
        merged.histogram += copy.histogram
        return merged

    def _widen(self, exponent: int) -> None:
        for _ in range(min(exponent - self.exponent, 12)):  # after 12 doublings everything lies in the middle pair
            pairs = self.histogram.reshape(-1, 2).sum(1)
            self.histogram = np.concatenate([np.zeros(BINS // 4, np.int64), pairs, np.zeros(BINS // 4, np.int64)])
        self.exponent = max(self.exponent, exponent)

    @property
    def count(self) -> int:
        return int(self.histogram.sum())

    def edges(self) -> np.ndarray:
        """The BINS + 1 bin boundaries."""
        return np.linspace(-1, 1, BINS + 1) * 2.0**self.exponent


def minmax(s: Statistics) -> tuple[float, float]:
    """Everything that was seen."""
    return s.minimum, s.maximum


def percentile(s: Statistics, tail: float = 1e-4) -> tuple[float, float]:
    """All but the fraction ``tail`` at either end."""
    cumulative = np.cumsum(s.histogram) / s.count
    edges = s.edges()
    low = edges[np.searchsorted(cumulative, tail, side="right")]
    high = edges[min(np.searchsorted(cumulative, 1 - tail, side="left") + 1, BINS)]
    return max(low, s.minimum), min(high, s.maximum)


def mse(s: Statistics) -> tuple[float, float]:
    """The fraction of the full range with the least mean squared error under 255 steps."""
    centres = (s.edges()[1:] + s.edges()[:-1]) / 2
    best, best_error = minmax(s), np.inf
    for fraction in np.linspace(0.3, 1, 71):
        low, high = s.minimum * fraction, s.maximum * fraction
        step = (high - low) / 255
        outside = centres - np.clip(centres, low, high)
        error = np.dot(s.histogram, np.where(outside == 0, step**2 / 12, outside**2))
        if error < best_error:
            best, best_error = (low, high), error
    return best


OBSERVERS = {"minmax": minmax, "percentile": percentile, "mse": mse}
