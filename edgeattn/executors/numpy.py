"""Layers computed with NumPy in float32, step by step; every intermediate can be kept by its name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.executors.unfused import attend
from edgeattn.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.ops import Activation, Norm, Pooling, Sequences
    from edgeattn.types import Float32s

_POOL: dict[Pooling, Callable[[Float32s], Float32s]] = {
    "mean": lambda rows: rows.mean(axis=0), "max": lambda rows: rows.max(axis=0),
    "cls": lambda rows: rows[0], "last": lambda rows: rows[-1]}
# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, highest power first: what Eigen's generic_fast_erf_float has.
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)


class Recorder:
    """Keeps intermediates by their names.

    Parameters
    ----------
    record : dict, optional
        Takes them.
    names : collection of str, optional
        What is kept: everything unless given.
    """

    def __init__(self, record: dict[str, Any] | None = None, names: Collection[str] | None = None):
        self.record, self.names = record, names

    def keeps(self, name: str) -> bool:
        """Whether what has that name is kept."""
        return self.record is not None and (self.names is None or name in self.names)

    def _keep(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        if self.record is not None and self.keeps(name):
            self.record[name] = x
        return x


class NumpyOps(Recorder, Ops["Float32s"]):
    """`edgeattn.ops.Ops` upon float32 arrays.

    Of attention it keeps "query", "key", "value" (B, H, length, size), "scores" (scaled), "masked_scores",
    "probabilities" (B, H, L, S) and "context" (B, H, L, Dv); of several groups of sequences "0.scores", "1.scores", ...
    """

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        y = x @ linear.weight.T
        return self._keep(name, y if linear.bias is None else y + linear.bias)

    def attention(self, q: Float32s, k: Float32s, v: Float32s, layer: Any, sequences: Sequences, name: str
                  ) -> Float32s:
        """The heads side by side, group by group of equally long sequences."""
        lead = q.shape[:-1]
        if len(lead) > 1:
            q, k, v = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (q, k, v))
        held = 0 if sequences.cache is None else sequences.cache.length
        results, row, token = [], 0, 0
        for i, mask in enumerate(sequences.masks):
            batch, heads, queries, keys = mask.shape
            rows, tokens = slice(row, row + batch * queries), slice(token, token + batch * (keys - held))
            row, token = rows.stop, tokens.stop
            q_heads = split_heads(q[rows], batch, queries, heads)
            k_heads, v_heads = (split_heads(x[tokens], batch, keys - held, layer.num_kv_heads) for x in (k, v))
            q_heads, k_heads = layer.placed(q_heads, k_heads, mask)
            part = name if len(sequences.masks) == 1 else f"{name}{i}."
            context = self._attend(q_heads, k_heads, v_heads, layer, layer.biased(mask), sequences, part)
            results.append(merge_heads(context))
        merged = results[0] if len(results) == 1 else np.concatenate(results)
        return merged if len(lead) == 1 else merged.reshape(*lead, merged.shape[1])

    def _attend(self, q: Float32s, k: Float32s, v: Float32s, layer: Any, mask: Mask, sequences: Sequences, name: str
                ) -> Float32s:
        """q (B, H, L, D), k (B, Hkv, n, D), v (B, Hkv, n, Dv) of one group -> (B, H, L, Dv)."""
        if sequences.cache is not None:
            raise ValueError("sequences must have no cache for NumpyOps, given all keys; CompiledOps takes one")
        if layer.extra_keys:
            k, v = (np.concatenate(pair, axis=2) for pair in zip((k, v), added_keys(layer, len(k)), strict=True))
            mask = mask.with_keys(layer.extra_keys)
        repeats = layer.num_heads // layer.num_kv_heads
        q = self._keep(name + "query", q)
        k, v = (self._keep(name + part, x.repeat(repeats, axis=1)) for part, x in (("key", k), ("value", v)))
        return attend(self, q, k, v, layer, (mask.without_slopes(), sequences.softcap), name)

    def scores(self, q: Float32s, k: Float32s, layer: Any, name: str) -> Float32s:
        """q k^T, scaled."""
        return self._keep(name, q @ k.swapaxes(-1, -2) * np.float32(layer.scale))

    def masked(self, scores: Float32s, layer: Any, mask: tuple[Mask, float], name: str) -> Float32s:
        """-inf where a key is not permitted; `mask`: without slopes, and the softcap."""
        (bias, permitted), softcap = (mask[0].bias, mask[0].permitted()), np.float32(mask[1])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        return self._keep(name, scores if permitted is None else np.where(permitted, scores, -np.inf))

    def softmax(self, scores: Float32s, name: str) -> Float32s:
        """Zeros in a row of -inf."""
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        e = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = e.sum(-1, keepdims=True)
        return self._keep(name, e / np.where(total > 0, total, 1))

    def context(self, probabilities: Float32s, v: Float32s, name: str) -> Float32s:
        """Probabilities v."""
        return self._keep(name, probabilities @ v)

    def layer_norm(self, x: Float32s, norm: Norm, name: str) -> Float32s:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        return self._keep(name, norm.rows(x))

    def rms_norm(self, x: Float32s, norm: Norm, name: str) -> Float32s:
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
        with np.errstate(invalid="ignore"):  # NaN of what is not finite
            return self._keep(name, a * b)

    def static(self, x: Float32s, layer: Any, sequences: Sequences | None, name: str) -> Float32s:
        """A layer upon codes, by the integer rules of its kernel set."""
        rows: Float32s = layer.numpy_rows(self, x, sequences, name)
        return rows

    def embed(self, table: Float32s, ids: NDArray[Any], name: str) -> Float32s:
        """Rows of a table."""
        return self._keep(name, np.asarray(table).take(ids, axis=0))

    def pool(self, x: Float32s, lengths: Sequence[int], kind: Pooling, name: str) -> Float32s:
        """One row per sequence."""
        ends = np.cumsum(lengths)
        rows = [_POOL[kind](x[end - length : end]) for length, end in zip(lengths, ends, strict=True)]
        return self._keep(name, np.stack(rows))


def split_heads(x: NDArray[Any], batch: int, length: int, heads: int) -> NDArray[Any]:
    """Rows (B * length, H * size) -> (B, H, length, size)."""
    return x.reshape(batch, length, heads, x.shape[-1] // heads).swapaxes(1, 2)


def merge_heads(x: NDArray[Any]) -> NDArray[Any]:
    """(B, H, length, size) -> (B * length, H * size)"""
    batch, heads, length, size = x.shape
    return x.swapaxes(1, 2).reshape(batch * length, heads * size)


def added_keys(layer: Any, batch: int) -> tuple[Float32s, Float32s]:
    """Key and value (B, Hkv, extra_keys, size) of `bias_k` and `bias_v`, then zeros."""
    def array(bias: Float32s | None, size: int) -> Float32s:
        keys = np.zeros((batch, layer.num_kv_heads, layer.extra_keys, size), np.float32)
        if bias is not None:
            keys[:, :, 0] = bias.reshape(layer.num_kv_heads, size)
        return keys

    return array(layer.bias_k, layer.head_dim), array(layer.bias_v, layer.value_dim)


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
