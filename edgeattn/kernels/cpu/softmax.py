"""Exponentials for float32 softmax, on vectors."""
import numpy as np

from edgeattn.runtime.compiler import inline

from .simd import bits_of, float_of_bits, fma, fraction, maximum, scale_by_power, select, splat, to_float

# 2**r on [0, 1] with c0 = 1, minimax in relative error: at most 1.4e-8 before rounding.
EXP2 = (np.float32(0.69314706), np.float32(0.24022931), np.float32(0.055485282), np.float32(0.009675452),
        np.float32(0.0012467846), np.float32(0.00021612916))
_C1, _C2, _C3, _C4, _C5, _C6 = EXP2
# 2**r on [-1/2, 1/2] to the second power only, at most 1.73e-3: less than half of the 256 steps that it becomes anyway.
_B0, _B1, _B2 = np.float32(1.0004431380), np.float32(0.7034480138), np.float32(0.2384289159)
# log2(1 + r) on [0, 1], minimax in absolute error: at most 1.1e-4.
_L1, _L2, _L3, _L4 = (np.float32(1.439014713548267), np.float32(-0.6799443458292148), np.float32(0.32559606724538315),
                      np.float32(-0.0847687653054377))
# 1.5 * 2**23 + 127: adding it leaves the nearest integer, as the exponent of a float32, in the low bits.
_ROUND = np.float32(12583039.0)
# What is less than 2**-110 of a row's largest weight adds nothing to it in float32, and counts as nothing: less still,
# times a small value, is no normal float32, and each product that gives such a one costs some processors a hundred
# times as much.
_LOWEST = np.float32(-110.0)
_LEAST = np.float32(2.0**-110)
_ONE = np.float32(1)
_TWO = np.float32(2)
LOG2_E = np.float32(1.4426950408889634)
LARGEST_MASK = np.float32(2.3e38)  # times log2(e) it is finite still: only -inf hides a key
_TWO_LOG2_E = np.float32(2 * 1.4426950408889634)


@inline
def exp2_within(t):
    """2**t per lane for t in [-126, 127)."""
    r = fraction(t)
    p = fma(splat(_C6), r, splat(_C5))
    p = fma(p, r, splat(_C4))
    p = fma(p, r, splat(_C3))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_C1))
    p = fma(p, r, splat(_ONE))
    return scale_by_power(p, t)


@inline
def exp2(t):
    """2**t - 2**-110 per lane for t < 127: 2**t in float32 for t above -86, 0 for t below -110; a NaN stays."""
    return exp2_within(maximum(splat(_LOWEST), t)) - splat(_LEAST)


@inline
def exp2_roughly(t):
    """2**t per lane to a five-hundredth; t below -110 counts as -110 and a NaN stays.

    A product with the power of two, for an addition to the exponent would make a number of a NaN full of ones.
    """
    t = maximum(splat(_LOWEST), t)
    shifted = t + splat(_ROUND)
    r = t - (shifted - splat(_ROUND))
    p = fma(splat(_B2), r, splat(_B1))
    p = fma(p, r, splat(_B0))
    return p * float_of_bits(bits_of(shifted) << splat(np.int32(23)))


@inline
def log2_roughly(x):
    """log2(x) per lane to a ten-thousandth, x positive, normal and finite."""
    bits = bits_of(x)
    exponent = to_float((bits >> splat(np.int32(23))) - splat(np.int32(127)))
    r = float_of_bits((bits & splat(np.int32(0x007FFFFF))) | splat(np.int32(0x3F800000))) - splat(_ONE)
    p = fma(splat(_L4), r, splat(_L3))
    p = fma(p, r, splat(_L2))
    p = fma(p, r, splat(_L1))
    return fma(p, r, exponent)


@inline
def tanh(z):
    """tanh per lane: an odd polynomial below 0.625, else 1 - 2 / (exp(2 |z|) + 1); coefficients of Cephes tanhf."""
    sign = bits_of(z) & splat(np.int32(-2147483648))
    size = float_of_bits(bits_of(z) ^ sign)
    square = z * z
    p = fma(splat(np.float32(-5.70498872745e-3)), square, splat(np.float32(2.06390887954e-2)))
    p = fma(p, square, splat(np.float32(-5.37397155531e-2)))
    p = fma(p, square, splat(np.float32(1.33314422036e-1)))
    p = fma(p, square, splat(np.float32(-3.33332819422e-1)))
    small = fma(p * square, z, z)
    capped = select(size > splat(np.float32(20)), splat(np.float32(20)), size)
    large = splat(_ONE) - splat(_TWO) / (exp2(capped * splat(_TWO_LOG2_E)) + splat(_ONE))
    large = float_of_bits(bits_of(large) | sign)
    return select(size < splat(np.float32(0.625)), small, large)


@inline
def masked_score(score, mask):
    """score + mask, float64, rounded where float32 can hold it: there, a huge mask leaves all keys of a row alike."""
    added = score + np.float64(mask)
    rounded = np.float64(np.float32(added))
    return rounded if mask != 0 and abs(rounded) < np.inf else added
