"""Feed-forwards and linear layers of dynamic int8, operation by operation in NumPy; and in any precision, as formulas.

Every float32 operation stands for itself: `fma` is rounded once, all others one by one; integer sums are exact.
"""
from math import erf
from typing import NamedTuple

import numpy as np

F = np.float32
GROUP = 256  # hidden features that share a scale
LANES = 32  # of a sum along a row
LOG2_E = 1.4426950408889634
EXP2 = (6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3, 1.339887440266574e-3,
        1.535336188319500e-4)
GELU_TAIL = (0.499744618, -0.397845698, 0.00168048373, 0.0521973447, 0.0281658077, -0.0375072873, 0.0148843628,
             -0.00296960346, 0.000305005171, -1.28937498e-05)


class Weight(NamedTuple):
    """codes (outputs + second channels, inputs), a scale for each; where second ones go; inputs apart, their weights."""

    codes: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    columns: np.ndarray
    apart: np.ndarray


def fma(a, b, c):
    """a * b + c, rounded once: a product of two float32 is exact in float64."""
    a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
    return (a * b + c).astype(F)


# --- formulas, in the precision of x -----------------------------------------------------------------------------

def activation(kind, x):
    """The function by its definition."""
    t = x.dtype.type
    if kind is None:
        return x
    if kind == "relu":
        return np.maximum(x, t(0))
    if kind == "gelu":
        return t(0.5) * x * (t(1) + np.vectorize(erf, [x.dtype])(np.float64(x) / np.sqrt(2)))
    if kind == "gelu_tanh":
        return t(0.5) * x * (t(1) + np.tanh(t(np.sqrt(2 / np.pi)) * (x + t(0.044715) * x * x * x)))
    with np.errstate(over="ignore"):
        return x / (t(1) + np.exp(-x))


def norm(kind, weight, bias, eps, x):
    """Layer norm or RMS norm by its definition."""
    t = x.dtype.type
    d = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    y = d / np.sqrt((d * d).mean(-1, keepdims=True) + t(eps)) * weight.astype(t)
    return y if bias is None else y + bias.astype(t)


def linear(x, weight, bias):
    """x weight^T + bias"""
    y = x @ weight.T.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def feed_forward(x, residual, w1, b1, w2, b2, kind, gate, normed, norm_first):
    """out = norm(residual + w2 h + b2), or with the norm first; normed: (kind, weight, bias, eps) or None."""
    y = norm(*normed, x) if normed and norm_first else x
    h = linear(y, w1, b1)
    h = activation(kind, h) if gate is None else activation(kind, linear(y, *gate)) * h
    y = linear(h, w2, b2)
    y = y if residual is None else y + residual
    return norm(*normed, y) if normed and not norm_first else y


# --- dynamic int8, exactly ---------------------------------------------------------------------------------------

def exact_power_of_two(t):
    """2**t by a polynomial."""
    t = np.clip(t, F(-126), F(126))
    whole = np.rint(t)
    r = t - whole
    p = np.full_like(r, F(EXP2[5]))
    for c in (*EXP2[4::-1], 1.0):
        p = fma(p, r, F(c))
    return np.ldexp(p, whole.astype(int)).astype(F)


def exact_activation(kind, x):
    """The function as dynamic int8 computes it: GELU by a polynomial."""
    if kind is None:
        return x
    if kind == "relu":
        return np.maximum(x, F(0))
    if kind == "gelu":
        a = np.minimum(np.abs(x), F(4.5))
        p = np.full_like(a, F(GELU_TAIL[-1]))
        for c in GELU_TAIL[-2::-1]:
            p = fma(p, a, F(c))
        return fma(-a, p, np.maximum(x, F(0)))
    if kind == "gelu_tanh":
        s = -2 * np.sqrt(2 / np.pi) * LOG2_E
        t = x * fma(x * x, F(s * 0.044715), F(s))
    else:
        t = x * F(-LOG2_E)
    return x / (F(1) + exact_power_of_two(t))


def _sum(products, start):
    """start plus the sum along the last axis, by lanes; products: what is done to a lane's sum and LANES elements."""
    total = start
    for some in products:
        total = some(total)
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total


def exact_norm(kind, weight, bias, eps, y):
    """Layer norm or RMS norm with sums over 32 lanes, which are then folded by halves."""
    width = F(y.shape[-1])
    gap = [(0, 0)] * (y.ndim - 1) + [(0, -y.shape[-1] % LANES)]

    def blocks(v):
        v = np.pad(v, gap)
        return [v[..., i:i + LANES] for i in range(0, v.shape[-1], LANES)]

    nothing = np.zeros((*y.shape[:-1], LANES), F)
    if kind == "layer":
        y = y - _sum([lambda total, b=b: total + b for b in blocks(y)], nothing) / width
    variance = _sum([lambda total, b=b: fma(b, b, total) for b in blocks(y)], nothing) / width
    scaled = y * (F(1) / np.sqrt(variance + F(eps)))
    return fma(scaled, weight, F(0) if bias is None else bias)


def _inverse(levels, size):
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(F(levels) / size, np.finfo(F).max)


def quantize_symmetric(x):
    """(codes, scale) of every row."""
    largest = np.abs(x).max(-1, keepdims=True, initial=0)
    codes = np.rint(x * _inverse(127, largest)).astype(np.int64)
    return codes, largest * F(1 / 127)


def quantize_range(x):
    """(codes less their zero point, scale) of every row."""
    low, high = (np.maximum(v, F(0)).max(-1, keepdims=True, initial=0) for v in (-x, x))
    extent = high + low
    inverse = _inverse(255, extent)
    zero = np.rint(low * inverse).astype(np.int64)
    codes = np.clip(np.rint(x * inverse).astype(np.int64) + zero, 0, 255) - zero
    return codes, extent * F(1 / 255)


def _apart(x, columns):
    rest = x.copy()
    rest[..., columns] = 0
    return rest, x[..., columns]


def _finish(sums, weight, bias, kept):
    """Scale, bias, columns apart and second channels, of the sums over all groups."""
    outputs = len(weight.codes) - len(weight.low)
    y = fma(sums[..., :outputs], weight.scale[:outputs], F(0) if bias is None else bias)
    for k in range(len(weight.columns)):
        y = fma(kept[..., k:k + 1], weight.apart[:, k], y)
    second = fma(sums[..., outputs:], weight.scale[outputs:], F(0))
    for k, channel in enumerate(weight.low):
        y[..., channel] += second[..., k]
    return y


def exact_linear(x, weight, bias):
    """x weight^T + bias, a scale for each row."""
    rest, kept = _apart(x, weight.columns)
    codes, scale = quantize_symmetric(rest)
    return _finish((codes @ weight.codes.T.astype(np.int64)).astype(F) * scale, weight, bias, kept)


def exact_linear_of_hidden(h, weight, bias):
    """h weight^T + bias, a scale and a zero point for each row and GROUP features."""
    rest, kept = _apart(h, weight.columns)
    sums = np.zeros((*h.shape[:-1], len(weight.codes)), F)
    for g in range(0, h.shape[-1], GROUP):
        codes, scale = quantize_range(rest[..., g:g + GROUP])
        sums = fma((codes @ weight.codes[:, g:g + GROUP].T.astype(np.int64)).astype(F), scale, sums)
    return _finish(sums, weight, bias, kept)


def exact_linear_layer(x, residual, weight, bias, kind, normed):
    """norm(activation(x weight^T + bias) + residual)"""
    y = exact_activation(kind, exact_linear(x, weight, bias))
    y = y if residual is None else y + residual
    return exact_norm(*normed, y) if normed else y


def exact_feed_forward(x, residual, w1, b1, w2, b2, kind, gate, normed, norm_first):
    """As feed_forward, with Weights."""
    y = exact_norm(*normed, x) if normed and norm_first else x
    h = exact_linear(y, w1, b1)
    h = exact_activation(kind, h) if gate is None else h * exact_activation(kind, exact_linear(y, *gate))
    y = exact_linear_of_hidden(h, w2, b2)
    y = y if residual is None else y + residual
    return exact_norm(*normed, y) if normed and not norm_first else y
