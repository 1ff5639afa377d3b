"""A static layer's steps one by one, on codes in NumPy: for the probabilities, and to look at.

A second implementation of the fused kernel's arithmetic on the rules of ``edgeattn.arithmetic``, and equal to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.quantized.score_ops import fit_mask

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.quantized.static import StaticMultiHeadAttention
    from edgeattn.types import Bools, Codes

    Requantization: TypeAlias = tuple[Callable[..., Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

_SCORES_AT_ONCE = 1 << 20  # scores held at a time: 8 MiB each, as the float64 of an exact product


def requantizations(layer: StaticMultiHeadAttention) -> dict[str, Requantization]:
    """How accumulators become codes, by the tensor's name: (rule, q31, shift, real multiplier)."""
    given = layer._kernel_parameters()
    found = {name: (given["project_rule"], real) for name, (_, real, _) in given["linears"].items()}
    found |= {name: (given[rule], np.array([given[name]]))
              for name, rule in (("scores", "score_rule"), ("context", "context_rule"))}
    return {name: (rules.REQUANTIZE[rule], *(a.astype(np.int64) for a in rules.fixed_point(real)), real)
            for name, (rule, real) in found.items()}


def project(layer: StaticMultiHeadAttention, name: str, x: Codes) -> Codes:
    """int8 codes (..., inputs) through the linear layer called ``name``: codes (..., outputs)."""
    linear = layer.linears[name]
    acc = _exact_product(x, layer.input_of(name).zero_point, linear.weight.T, 0)
    return _requantize(layer, name, acc if linear.bias is None else acc + linear.bias)


def heads(layer: StaticMultiHeadAttention, x: Codes) -> Codes:
    """(B, length, H * size) -> (B, H, length, size)."""
    return x.reshape(*x.shape[:2], layer.num_heads, x.shape[2] // layer.num_heads).swapaxes(1, 2)


def scores(layer: StaticMultiHeadAttention, query: Codes, key: Codes) -> Codes:
    """Codes (B, H, L, S) of query (B, H, L, D) and key (B, H, S, D)."""
    return _batch_matmul(layer, query, "query", key.swapaxes(-1, -2), "key", "scores")


def probabilities(layer: StaticMultiHeadAttention, scores: Codes, permitted: Bools, lut_index: NDArray[np.uint8]
                  ) -> Codes:
    """Codes of the softmax over the permitted keys, after the layer's ``score_ops``; others -128. All (B, H, L, S).

    lut_index : of the positions, as in ``score_map``
    """
    score_luts, _, _ = layer.score_map
    codes = score_luts[lut_index, scores.astype(np.int64) + 128].astype(np.int64)
    rule = rules.SOFTMAX[layer.kernel_set.softmax]
    table = layer._softmax_table
    table = table if table.dtype.kind == "f" else table.astype(np.int64)
    top = np.where(permitted, codes, -129).max(-1, keepdims=True, initial=-129)
    e = table[np.where(permitted, top - codes, 0)]
    # in key order, one after the other: where the sum is float32, the order shows
    terms = np.where(permitted, rule.weight(e), 0).astype(type(rule.zero))
    total = np.add.accumulate(terms, axis=-1)[..., -1:] if terms.shape[-1] else np.ones((*terms.shape[:-1], 1))
    codes = np.minimum(rule.probability(e, np.where(permitted.any(-1, keepdims=True), total, 1)), 255) - 128
    return np.where(permitted, codes, -128).astype(np.int8)


def context(layer: StaticMultiHeadAttention, probabilities: Codes, value: Codes) -> Codes:
    """Codes (B, H, L, Dv) of probabilities (B, H, L, S) and value (B, H, S, Dv)."""
    return _batch_matmul(layer, probabilities, "probabilities", value, "value", "context")


def attend(layer: StaticMultiHeadAttention, query: Codes, key: Codes, value: Codes, mask: Mask, out: Codes,
           weights: Codes | None = None) -> None:
    """All of it between the projections, some queries at a time.

    query (B, H, L, D), key (B, H, S, D), value (B, H, S, Dv): codes; mask: Mask of shape (B, H, L, S).
    out (B, H, L, Dv) and, where wanted, weights (B, H, L, S) take the codes of the context and the probabilities.
    """
    B, H, L, S = mask.shape
    lut_index = fit_mask(layer.score_map[1], mask.shape)
    step = max(1, _SCORES_AT_ONCE // max(1, B * H * S))
    for begin in range(0, L, step):
        rows = slice(begin, min(begin + step, L))
        part = mask.part((rows.start, rows.stop), (0, S))
        permitted = part.permitted()
        permitted = np.broadcast_to(True if permitted is None else permitted, part.shape)
        codes = probabilities(layer, scores(layer, query[:, :, rows], key), permitted, lut_index[:, :, rows])
        out[:, :, rows] = context(layer, codes, value)
        if weights is not None:
            weights[:, :, rows] = codes


def _batch_matmul(layer: StaticMultiHeadAttention, lhs: Codes, lhs_name: str, rhs: Codes, rhs_name: str, output: str
                  ) -> Codes:
    t = layer.tensors
    return _requantize(layer, output, _exact_product(lhs, t[lhs_name].zero_point, rhs, t[rhs_name].zero_point))


def _exact_product(lhs: Codes, lhs_zero_point: int, rhs: Codes, rhs_zero_point: int) -> NDArray[np.int64]:
    """Integer matrix product in float64, exact below 2**53, as int64."""
    return ((lhs.astype(np.float64) - lhs_zero_point) @ (rhs.astype(np.float64) - rhs_zero_point)).astype(np.int64)


def _requantize(layer: StaticMultiHeadAttention, name: str, acc: NDArray[np.int64]) -> Codes:
    rule, q31, shift, real = layer._requantizations[name]
    codes: Codes = rules.to_code(rule(acc, q31, shift, real), layer.tensors[name].zero_point)
    return codes
