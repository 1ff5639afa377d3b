"""Exponentials for float32 softmax, on vectors."""
import numpy as np

from edgeattn.jit import inlined

from .simd import bits_of, float_of_bits, fma, fraction, larger, scale_by_power, select, splat

# 2**r on [0, 1] with c0 = 1, minimax in relative error: at most 8.8e-8 before rounding.
EXP2 = (np.float32(0.69315135), np.float32(0.24016438), np.float32(0.055799916), np.float32(0.009017042),
        np.float32(0.0018671312))
_C1, _C2, _C3, _C4, _C5 = EXP2
_LOWEST = np.float32(-126.0)  # 2**-126 is the smallest normal float32
_ONE = np.float32(1)
_TWO = np.float32(2)
_HALF = np.float32(0.5)
LOG2_E = np.float32(1.4426950408889634)
_TWO_LOG2_E = np.float32(2 * 1.4426950408889634)


@inlined
def exp2_within(t):
    """2**t per lane for t in [-126, 127)."""
    r = fraction(t)
    p = fma(splat(_C5), r, splat(_C4))
    p = fma(p, r, splat(_C3))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_C1))
    p = fma(p, r, splat(_ONE))
    return scale_by_power(p, t)


@inlined
def exp2(t):
    """2**t per lane for t < 127; t below -126 counts as -126 and a NaN stays."""
    return exp2_within(larger(splat(_LOWEST), t))


@inlined
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
