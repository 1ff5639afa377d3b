"""Static int8 layers computed on codes with NumPy, step by step; every intermediate can be kept by its name.

A second implementation of the fused kernel's arithmetic on the rules of `edgeattn.arithmetic`, and equal to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MIN
from edgeattn.executors.numpy import Recorder, merge_heads, split_heads
from edgeattn.executors.unfused import attend
from edgeattn.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.executors.unfused import AttentionParts
    from edgeattn.ops import Activation, Sequences
    from edgeattn.types import Codes, Float32s, Floats, Shape

_SCORES_AT_ONCE = 1 << 20  # scores computed at a time: 8 MiB each, as the float64 of an exact product
_ABSENT = CODE_MIN - 1  # below every score: of a key that is not there
_PARTS = {"scores": np.int8(CODE_MIN), "masked_scores": np.int16(_ABSENT), "probabilities": np.int8(CODE_MIN)}


class Int8Ops(Recorder, Ops["NDArray[Any]"]):
    """`edgeattn.ops.Ops` upon the int8 codes of a static layer.

    Parameters
    ----------
    layer : StaticMultiHeadAttention
        Whose `tensors` say what the codes of an operation's result mean, by its name.
    record, names
        As those of `NumpyOps`; of "masked_scores" -129 is kept where a key is not there.
    """

    def __init__(self, layer: Any, record: dict[str, Any] | None = None, names: Collection[str] | None = None):
        super().__init__(record, names)
        self.layer = layer

    def quantize(self, x: Floats, name: str) -> Codes:
        """Codes of reals."""
        return self._keep(name, self.layer.tensors[name].quantize(x))

    def dequantize(self, x: Codes, name: str) -> Float32s:
        """The reals that the codes of the tensor of that name stand for."""
        reals: Float32s = self.layer.tensors[name].dequantize(x)
        return reals

    def linear(self, x: Codes, linear: Any, name: str) -> Codes:
        """x weight^T + bias."""
        total = _exact_product(x, self.layer.input_of(name).zero_point, linear.weight.T, 0)
        return self._requantized(total if linear.bias is None else total + linear.bias, name)

    def activation(self, x: Codes, kind: Activation, name: str) -> Codes:
        """By the layer's table; where it is a bound of codes alone, of those codes."""
        return self._keep(name, self.layer.table[x.astype(np.int64) + 128])

    def multiply(self, a: Codes, b: Codes, name: str) -> Codes:
        """The product of two tensors of the layer, which says of which."""
        kernel_set, t = self.layer.kernel_set, self.layer.tensors
        pairs = [(t[each].scale, t[each].zero_point) for each in (*self.layer.factors, name)]
        return self._keep(name, rules.mul_codes(kernel_set.mul, kernel_set.precision, a, pairs[0], b, *pairs[1:]))

    def attention(self, q: Codes, k: Codes, v: Codes, layer: Any, sequences: Sequences, name: str) -> Codes:
        """The heads side by side, some queries at a time."""
        (mask,), cache = sequences.masks, sequences.cache
        batch, heads, queries, keys = mask.shape
        tokens = keys - (0 if cache is None else cache.length)
        shape = (*q.shape[:-1], heads * layer.value_dim)
        q = self._keep(name + "query", split_heads(q, batch, queries, heads))
        k, v = (self._keep(name + part, split_heads(x, batch, tokens, heads)) for part, x in (("key", k), ("value", v)))
        q, k = (_looked_up(x, layer.projection_tables.get(part)) for part, x in (("query", q), ("key", k)))
        lut_index = layer.score_lut_index(mask.shape)
        context = np.empty((batch, heads, queries, layer.value_dim), np.int8)
        whole = {part: self._keep(name + part, np.full(mask.shape, absent))
                 for part, absent in _PARTS.items() if self.keeps(name + part)}
        for (begin, end), seen, k_seen, v_seen in _parts(k, v, mask.shape, sequences):
            some: dict[str, Any] = {}
            ops: AttentionParts[NDArray[Any]] = Int8Ops(layer, some, whole)
            own = slice(None), slice(None), slice(begin, end), slice(*seen)
            permitted = mask.part((begin, end), seen).permitted()
            context[:, :, begin:end] = attend(
                ops, q[:, :, begin:end], k_seen, v_seen, layer, (permitted, lut_index[own]), "")
            for part, array in whole.items():
                array[own] = some[part]
        return merge_heads(self._keep(name + "context", context)).reshape(shape)

    def scores(self, q: Codes, k: Codes, layer: Any, name: str) -> Codes:
        """q k^T: 1 / sqrt(D) lies in the scale of q."""
        return self._batch_matmul(q, "query", k.swapaxes(-1, -2), "key", name)

    def masked(self, scores: Codes, layer: Any, mask: Any, name: str) -> NDArray[np.int64]:
        """Codes of the scores after the layer's `score_ops`, -129 where `mask` lets a query not see the key.

        mask : permitted, bool or None, and lut_index as `score_map` has them.
        """
        permitted, lut_index = mask
        codes = layer.score_map[0][lut_index, scores.astype(np.int64) + 128].astype(np.int64)
        return self._keep(name, codes if permitted is None else np.where(permitted, codes, _ABSENT))

    def softmax(self, scores: NDArray[Any], name: str) -> Codes:
        """-128 for a key that is not there."""
        rule, table = rules.SOFTMAX[self.layer.kernel_set.softmax], self.layer.softmax_table
        table = table if table.dtype.kind == "f" else table.astype(np.int64)
        there = scores != _ABSENT
        top = scores.max(-1, keepdims=True, initial=_ABSENT)
        e = table[np.where(there, top - scores, 0)]
        # in key order, one after the other: where the sum is float32, the order shows
        terms = np.where(there, rule.weight(e), 0).astype(type(rule.zero))
        total = np.add.accumulate(terms, axis=-1)[..., -1:] if terms.shape[-1] else np.ones((*terms.shape[:-1], 1))
        codes = np.minimum(rule.probability(e, np.where(there.any(-1, keepdims=True), total, 1)), 255) - 128
        return self._keep(name, np.where(there, codes, CODE_MIN).astype(np.int8))

    def context(self, probabilities: Codes, v: Codes, name: str) -> Codes:
        """Probabilities v."""
        return self._batch_matmul(probabilities, "probabilities", v, "value", name)

    def _batch_matmul(self, a: Codes, a_name: str, b: Codes, b_name: str, name: str) -> Codes:
        t = self.layer.product_tensors
        return self._requantized(_exact_product(a, t[a_name].zero_point, b, t[b_name].zero_point), name)

    def _requantized(self, total: NDArray[np.int64], name: str) -> Codes:
        rule, q31, shift, real = self.layer.requantizations[name]
        return self._keep(name, rules.to_code(rule(total, q31, shift, real), self.layer.tensors[name].zero_point))


def _parts(k: Codes, v: Codes, shape: Shape, sequences: Sequences
           ) -> Iterator[tuple[tuple[int, int], tuple[int, int], Codes, Codes]]:
    """(first and last query, first and last key, keys and values) of what is computed at a time.

    With a cache `k` and `v` are appended to it, piece by piece.
    """
    cache, (batch, heads, queries, keys) = sequences.cache, shape
    for rows, tokens in sequences.pieces if cache is not None else [((0, queries), (0, keys))]:
        if cache is not None:
            cache.append_heads(k[:, :, slice(*tokens)], v[:, :, slice(*tokens)])
            k_seen, v_seen, _, _ = cache.views()
            tokens = cache.start, cache.length
        else:
            k_seen, v_seen = k, v
        step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * (tokens[1] - tokens[0])))
        for begin in range(*rows, step):
            yield (begin, min(begin + step, rows[1])), tokens, k_seen, v_seen


def _looked_up(x: Codes, table: Codes | None) -> Codes:
    """What a layer's `query_ops` or `key_ops` make of codes."""
    return x if table is None else table[x.astype(np.int64) + 128]


def _exact_product(a: Codes, a_zero_point: int, b: Codes, b_zero_point: int) -> NDArray[np.int64]:
    """Integer matrix product in float64, exact below 2**53, as int64."""
    return ((a.astype(np.float64) - a_zero_point) @ (b.astype(np.float64) - b_zero_point)).astype(np.int64)
