"""A feed-forward in static int8 as the chain of TFLite operators that it is, by the rules of `reference_int8`.

Rows become codes by QUANTIZE; FULLY_CONNECTED, the activation's table and MUL follow; DEQUANTIZE, residual and norm.
"""
import math
from typing import NamedTuple

import numpy as np
import reference_encoder_int8
import reference_int8 as tflite

F = np.float32


class Linear(NamedTuple):
    """weight int8 (outputs, inputs), scale float32 (outputs,), bias int32 (outputs,) or None."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


class Rules(NamedTuple):
    """Of FULLY_CONNECTED and MUL, and in which precision MUL multiplies scales."""

    fully_connected: str
    mul: str
    precision: type


def quantize(x, q):
    """QUANTIZE as XNNPACK computes it."""
    codes = np.rint(x * (F(1) / F(q[0]))) + F(q[1])
    return np.clip(codes, -128, 127).astype(np.int64)


def widen(x, q, more):
    """Columns behind those of x, each what the range leaves of the column that `more` says, as real numbers."""
    for source in more:
        rest = x[:, source] - (quantize(x[:, source], q) - q[1]).astype(F) * F(q[0])
        x = np.concatenate([x, rest[:, None]], axis=1)
    return x


def fully_connected(rules, x, x_q, linear, y_q):
    """Codes (rows, outputs)."""
    s, w, y = F(x_q[0]), np.asarray(linear.scale, F), F(y_q[0])
    if rules.fully_connected == "float_rne":
        real = (s * w / y).astype(float)
    else:
        real = float(s) * w.astype(float) / float(y)
    total = (x - x_q[1]) @ linear.weight.T.astype(np.int64)
    total = total if linear.bias is None else total + linear.bias
    return np.array([[tflite.code(tflite.requantize(rules.fully_connected, int(acc), m), y_q[1])
                      for acc, m in zip(row, real.tolist(), strict=True)] for row in total]).reshape(total.shape)


def function(kind, x):
    """An activation of a number, in double precision."""
    if kind == "gelu":
        return 0.5 * x * math.erfc(-x / math.sqrt(2))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "silu":
        return x / (1 + math.exp(-x)) if x > -700 else 0.0
    raise KeyError(kind)


def activation(kind, x, x_q, y_q):
    """Codes of the activation, by a table of all codes; a ReLU is fused into what comes before: a bound of codes."""
    if kind == "relu":
        return np.maximum(x, y_q[1])
    inverse = F(1) / F(y_q[0])

    def entry(code):
        value = F(function(kind, float(F(x_q[0]) * F(code - x_q[1]))))
        return tflite.code(tflite.half_away(tflite.Fraction(float(value * inverse))), y_q[1])

    table = np.array([entry(code) for code in range(-128, 128)])
    return table[x + 128]


def codes(rules, kind, x, linear1, gate, linear2, q):
    """The codes of the result from those of the input; q: (scale, zero point) of tensors by name."""
    active = "activation" if kind == "relu" else "linear1" if gate is None else "gate"
    a = fully_connected(rules, x, q["input"], linear1 if gate is None else gate, q[active])
    a = activation(kind, a, q[active], q["activation"])
    if gate is not None:
        h, operands = fully_connected(rules, x, q["input"], linear1, q["linear1"]), (q["activation"], q["linear1"])
        a = np.array([tflite.mul(rules.mul, int(i), operands[0], int(j), operands[1], q["gated"], rules.precision)
                      for i, j in zip(a.flat, h.flat, strict=True)]).reshape(a.shape)
    return fully_connected(rules, a, q["activation" if gate is None else "gated"], linear2, q["linear2"])


def rows(codes, q, more):
    """The real numbers of codes, to which those of further channels are added: (the channel, the code of nothing)."""
    width = codes.shape[1] - len(more)
    y = (codes[:, :width].astype(F) - F(q[1])) * F(q[0])
    for k, (channel, none) in enumerate(more):
        y[:, channel] += (codes[:, width + k] - none).astype(F) * F(q[0])
    return y


def feed_forward(rules, kind, x, residual, linear1, gate, linear2, q, more_inputs=(), more_outputs=(), normed=None,
                 norm_first=False):
    """float32 rows of float32 rows; normed: (kind, weight, bias, eps)."""
    norm = reference_encoder_int8.exact_norm
    y = norm(*normed, x) if normed and norm_first else x
    read = quantize(widen(y, q["input"], more_inputs), q["input"])
    y = rows(codes(rules, kind, read, linear1, gate, linear2, q), q["linear2"], more_outputs)
    y[np.isnan(x).any(axis=1)] = np.nan
    y = y if residual is None else y + residual
    return norm(*normed, y) if normed and not norm_first else y
