"""Attention with the rounding of one precision, in NumPy: how far off a good kernel of that precision is.

From it follows what benchmarks.cuda allows, for each shape and its numbers: twice the error of the plain form, both
against float64. Nothing here is of edgeattn.
"""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "tf32", "float16", "int8")


def tf32(x):
    """Rounded to 11 bits, ties away from zero, as cvt.rna does."""
    digits, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.copysign(np.floor(np.abs(digits) * 2**11 + 0.5), digits), exponent - 11)


def float16(x):
    """Rounded to float16."""
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def int8(x, axis=-1):
    """Rounded to steps of 1/127 of the largest along an axis."""
    step = np.maximum(np.abs(x).max(axis, keepdims=True), 1e-12) / 127
    return np.rint(x / step) * step


def plain(q, k, v, causal, precision):
    """Of one head: softmax(q k^T / sqrt(D)) v, operands and probabilities rounded, all else in float64.

    float32 is computed in float32; int8 has a range for every row of q, k and probabilities and for every column of v.
    The result of float16 is rounded as well: the arrays are of that type.
    """
    if precision == "int8":
        q, k, v, rounded = int8(q), int8(k), int8(v, 0), int8
    else:
        rounded = {"float32": np.float32, "tf32": tf32, "float16": float16}[precision]
        q, k, v = rounded(q), rounded(k), rounded(v)
    scores = q @ k.T * q.dtype.type(q.shape[-1] ** -0.5)
    if causal:
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    result = rounded(weights) @ v / total
    return float16(result) if precision == "float16" else result


def off(got, want):
    """The largest error, by the root mean square of the exact answer."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.sqrt(np.square(want).mean()))


def allowed(q, k, v, want, causal, precision):
    """The most that a kernel of a precision may be `off` on arrays (B, H, L, D) float32; `want` is the exact answer."""
    found = np.empty_like(want)
    for b, h in np.ndindex(q.shape[:2]):
        found[b, h] = plain(q[b, h], k[b, h], v[b, h], causal, precision)
    return 2 * off(found, want)
