"""Activation functions of a feed-forward, on vectors.

    relu       max(x, 0)
    gelu       x (1 + erf(x / sqrt(2))) / 2
    gelu_tanh  x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2
    silu       x / (1 + exp(-x))

The same float operations in the same order under every instruction set.  A NaN stays one.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, task

from .simd import (
    LANES,
    VIRTUAL_LANES,
    bits_of,
    float_of_bits,
    fma,
    in_step,
    load,
    maximum,
    smaller_float,
    splat_like,
    store,
    wide_load,
)

IDENTITY, RELU, GELU, GELU_TANH, SILU = range(5)
ACTIVATIONS = {None: IDENTITY, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU}

_ZERO, _ONE = np.float32(0), np.float32(1)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LOG2_E = 1.4426950408889634
# 2**r on [-1/2, 1/2]: Cephes exp2f, at most 1e-7 of the value.
_E1, _E2, _E3, _E4, _E5, _E6 = (np.float32(c) for c in (
    6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3, 1.339887440266574e-3,
    1.535336188319500e-4))
_ROUND = np.float32(12583039.0)  # 1.5 * 2**23 + 127: leaves the nearest integer, as an exponent, in the low bits
_LOWEST, _HIGHEST = np.float32(-126), np.float32(126)
# erfc(a / sqrt(2)) / 2 = exp(-a**2 / 2) p(t), t = 1 / (1 + 0.33 a), on [0, 9.5]: at most 1.4e-8 of the value.
TAIL = (0.13159508, 0.13275863, 0.107841395, 0.13435107, -0.08584169, 0.26698178, -0.30417284, 0.14097567,
        -0.024489088)
_T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9 = (np.float32(c) for c in TAIL)
_T_SLOPE, _T_TOP, _HALF_LOG2_E = np.float32(0.33), np.float32(12), np.float32(-0.5 * _LOG2_E)
# a erfc(a / sqrt(2)) / 2 on [0, 4.5] in powers of a: at most 4.1e-5, far below a step of 256 up to the largest.
ROUGH_TAIL = (0.499744618, -0.397845698, 0.00168048373, 0.0521973447, 0.0281658077, -0.0375072873, 0.0148843628,
              -0.00296960346, 0.000305005171, -1.28937498e-05)
_R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _R9, _R10 = (np.float32(c) for c in ROUGH_TAIL)
_R_TOP = np.float32(4.5)
_SILU = np.float32(-_LOG2_E)
_TANH_1 = np.float32(-2 * np.sqrt(2 / np.pi) * _LOG2_E)
_TANH_3 = np.float32(-2 * np.sqrt(2 / np.pi) * 0.044715 * _LOG2_E)


@inline
def power_of_two(t):
    """2**t, t counting as no less than -126 and no more than 126."""
    return power_within(smaller_float(splat_like(t, _HIGHEST), maximum(splat_like(t, _LOWEST), t)))


@inline
def power_within(t):
    """2**t for t in [-126, 126]; a NaN stays."""
    shifted = t + splat_like(t, _ROUND)
    r = t - (shifted - splat_like(t, _ROUND))
    p = in_step(fma(splat_like(t, _E6), r, splat_like(t, _E5)))
    p = in_step(fma(p, r, splat_like(t, _E4)))
    p = in_step(fma(p, r, splat_like(t, _E3)))
    p = in_step(fma(p, r, splat_like(t, _E2)))
    p = in_step(fma(p, r, splat_like(t, _E1)))
    p = in_step(fma(p, r, splat_like(t, _ONE)))
    return p * float_of_bits(bits_of(shifted) << splat_like(t, np.int32(23)))


@inline
def relu(x):
    """max(x, 0)"""
    return maximum(splat_like(x, _ZERO), x)


@inline
def gelu(x):
    """GELU as float32 has it: max(x, 0) - a erfc(a / sqrt(2)) / 2 with a = |x|."""
    a = smaller_float(splat_like(x, _T_TOP), float_of_bits(bits_of(x) & splat_like(x, _MAGNITUDE)))
    t = in_step(splat_like(x, _ONE) / fma(splat_like(x, _T_SLOPE), a, splat_like(x, _ONE)))
    power = power_within(a * a * splat_like(x, _HALF_LOG2_E))  # while the quotient is on its way
    p = in_step(fma(splat_like(x, _T9), t, splat_like(x, _T8)))
    p = in_step(fma(p, t, splat_like(x, _T7)))
    p = in_step(fma(p, t, splat_like(x, _T6)))
    p = in_step(fma(p, t, splat_like(x, _T5)))
    p = in_step(fma(p, t, splat_like(x, _T4)))
    p = in_step(fma(p, t, splat_like(x, _T3)))
    p = in_step(fma(p, t, splat_like(x, _T2)))
    p = in_step(fma(p, t, splat_like(x, _T1)))
    p = p * t
    return fma(splat_like(x, _ZERO) - a, p * power, relu(x))


@inline
def gelu_roughly(x):
    """GELU to 4.1e-5, for what becomes bytes: no division, no exponential."""
    a = smaller_float(splat_like(x, _R_TOP), float_of_bits(bits_of(x) & splat_like(x, _MAGNITUDE)))
    p = in_step(fma(splat_like(x, _R10), a, splat_like(x, _R9)))
    p = in_step(fma(p, a, splat_like(x, _R8)))
    p = in_step(fma(p, a, splat_like(x, _R7)))
    p = in_step(fma(p, a, splat_like(x, _R6)))
    p = in_step(fma(p, a, splat_like(x, _R5)))
    p = in_step(fma(p, a, splat_like(x, _R4)))
    p = in_step(fma(p, a, splat_like(x, _R3)))
    p = in_step(fma(p, a, splat_like(x, _R2)))
    p = in_step(fma(p, a, splat_like(x, _R1)))
    return fma(splat_like(x, _ZERO) - a, p, relu(x))


@inline
def gelu_tanh(x):
    """The approximation of GELU by tanh, as x / (1 + exp(-2 u))."""
    t = x * fma(x * x, splat_like(x, _TANH_3), splat_like(x, _TANH_1))
    return x / (splat_like(x, _ONE) + power_of_two(t))


@inline
def silu(x):
    """x / (1 + exp(-x))"""
    return x / (splat_like(x, _ONE) + power_of_two(x * splat_like(x, _SILU)))


@inline
def activate_row(function, x, first, width):
    """x = function(x), 32 numbers at a time: a polynomial of one of them waits for itself."""
    whole = width // VIRTUAL_LANES * VIRTUAL_LANES
    for i in range(first, first + whole, VIRTUAL_LANES):
        store(x, i, function(wide_load(x, i)))
    for i in range(first + whole, first + width, LANES):
        store(x, i, function(load(x, i)))


@task
def activate_rows(kind, rough, x, at, row_step, rows, width):
    """x = activation(x), rows of `width`, a multiple of LANES, in place; rough: where bytes are made of it."""
    for r in range(rows):
        first = at + r * row_step
        if kind == RELU:
            for i in range(first, first + width, LANES):
                store(x, i, relu(load(x, i)))
        elif kind == GELU and rough:
            activate_row(gelu_roughly, x, first, width)
        elif kind == GELU:
            activate_row(gelu, x, first, width)
        elif kind == GELU_TANH:
            activate_row(gelu_tanh, x, first, width)
        elif kind == SILU:
            activate_row(silu, x, first, width)


@inline
def add_to_rows(term, at_term, x, at, row_step, rows, width):
    """x += term (width,), every row"""
    for r in range(rows):
        for i in range(0, width, LANES):
            store(x, at + r * row_step + i, load(x, at + r * row_step + i) + load(term, at_term + i))


@inline
def multiply_rows(factor, at_factor, factor_step, x, at, row_step, rows, width):
    """x *= factor, rows by rows"""
    for r in range(rows):
        for i in range(0, width, LANES):
            here = at + r * row_step + i
            store(x, here, load(x, here) * load(factor, at_factor + r * factor_step + i))
