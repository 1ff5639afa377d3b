"""Layers computed with NumPy in float32, step by step; every intermediate can be kept by its name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.layers.steps import attend_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.layers import MultiHeadAttention
    from edgeattn.layers.linear import Linear
    from edgeattn.layers.norm import LayerNorm, RMSNorm
    from edgeattn.ops import Activation, Pooling, Sequences
    from edgeattn.types import Float32s

_POOL: dict[Pooling, Callable[[Float32s], Float32s]] = {
    "mean": lambda rows: rows.mean(axis=0), "max": lambda rows: rows.max(axis=0),
    "cls": lambda rows: rows[0], "last": lambda rows: rows[-1]}
# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, highest power first: what Eigen's generic_fast_erf_float has.
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)


class NumpyOps:
    """`edgeattn.ops.Ops` upon float32 arrays.

    Parameters
    ----------
    record : dict, optional
        Takes every intermediate under its name, and of attention NAME.weights too, one array (B, H, L, S) for each
        group of sequences.
    """

    def __init__(self, record: dict[str, Any] | None = None):
        self.record = record

    def linear(self, x: Float32s, linear: Linear, name: str) -> Float32s:
        """x weight^T + bias."""
        y = x @ linear.weight.T
        return self._keep(name, y if linear.bias is None else y + linear.bias)

    def attention(self, q: Float32s, k: Float32s, v: Float32s, layer: MultiHeadAttention, sequences: Sequences,
                  name: str) -> Float32s:
        """The heads side by side."""
        parts, weights, row, token = [], [], 0, 0
        held = 0 if sequences.cache is None else sequences.cache.length
        for mask in sequences.masks:
            batch, _, queries, keys = mask.shape
            rows, tokens = slice(row, row + batch * queries), slice(token, token + batch * (keys - held))
            row, token = rows.stop, tokens.stop
            heads, seen = attend_rows(layer, q[rows], k[tokens], v[tokens], mask, sequences,
                                      need_weights=self.record is not None)
            parts.append(heads)
            weights.append(seen)
        if self.record is not None:
            self.record[name + ".weights"] = weights
        return self._keep(name, parts[0] if len(parts) == 1 else np.concatenate(parts))

    def layer_norm(self, x: Float32s, norm: LayerNorm, name: str) -> Float32s:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        return self._keep(name, norm.rows(x))

    def rms_norm(self, x: Float32s, norm: RMSNorm, name: str) -> Float32s:
        """x / sqrt(mean(x^2) + eps) * weight."""
        return self._keep(name, norm.rows(x))

    def activation(self, x: Float32s, kind: Activation, name: str) -> Float32s:
        """Element by element."""
        with np.errstate(over="ignore"):  # of what becomes 0
            return self._keep(name, _ACTIVATE[kind](x))

    def add(self, a: Float32s, b: Float32s, name: str) -> Float32s:
        """The sum."""
        return self._keep(name, a + b)

    def multiply(self, a: Float32s, b: Float32s, name: str) -> Float32s:
        """The product."""
        return self._keep(name, a * b)

    def embed(self, table: Float32s, ids: NDArray[Any], name: str) -> Float32s:
        """Rows of a table."""
        return self._keep(name, table[ids])

    def pool(self, x: Float32s, lengths: Sequence[int], kind: Pooling, name: str) -> Float32s:
        """One row per sequence."""
        ends = np.cumsum(lengths)
        rows = [_POOL[kind](x[end - length : end]) for length, end in zip(lengths, ends, strict=True)]
        return self._keep(name, np.stack(rows))

    def _keep(self, name: str, x: Float32s) -> Float32s:
        if self.record is not None:
            self.record[name] = x
        return x


def _erf(x: Float32s) -> Float32s:
    x = np.clip(x, -4, 4)
    return x * _polynomial(_ERF_P, x * x) / _polynomial(_ERF_Q, x * x)


def _polynomial(coefficients: Sequence[float], x: Float32s) -> Float32s:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += np.float32(coefficient)
    return total


def _sigmoid(x: Float32s) -> Float32s:
    return 1 / (1 + np.exp(-x))


_ACTIVATE: dict[Activation, Callable[[Float32s], Float32s]] = {
    "gelu": lambda x: np.float32(0.5) * x * (1 + _erf(x * np.float32(math.sqrt(0.5)))),
    "gelu_tanh": lambda x: np.float32(0.5) * x * (
        1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
}
