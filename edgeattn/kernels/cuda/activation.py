"""Activation functions of a feed-forward: the float operations of edgeattn/kernels/cpu/activation.py in their order."""
import math

from edgeattn.kernels.cuda.language import device, float32, int32
from edgeattn.kernels.cuda.ptx import bits_of, divide, float_of_bits, fma, maximum, multiply, select_f

_LOG2_E = 1.4426950408889634
_ROUND = 12583039.0  # 1.5 * 2**23 + 127: leaves the nearest integer, as an exponent, in the low bits
# 2**r on [-1/2, 1/2], highest power first.
_E1, _E2, _E3, _E4, _E5, _E6 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
                                2.402264791363012e-1, 6.931472028550421e-1)
# erfc(a / sqrt(2)) / 2 = exp(-a**2 / 2) p(t), t = 1 / (1 + 0.33 a); and a erfc(a / sqrt(2)) / 2 in powers of a.
_T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9 = (0.13159508, 0.13275863, 0.107841395, 0.13435107, -0.08584169, 0.26698178,
                                               -0.30417284, 0.14097567, -0.024489088)
_R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _R9, _R10 = (
    0.499744618, -0.397845698, 0.00168048373, 0.0521973447, 0.0281658077, -0.0375072873, 0.0148843628, -0.00296960346,
    0.000305005171, -1.28937498e-05)
_HALF_LOG2_E = -0.5 * _LOG2_E
_TANH_1 = -2 * math.sqrt(2 / math.pi) * _LOG2_E
_TANH_3 = -2 * math.sqrt(2 / math.pi) * 0.044715 * _LOG2_E


@device
def at_most(x, most):
    """The smaller of both, `most` for a NaN."""
    return select_f(x < float32(most), x, float32(most))


@device
def power_of_two(t):
    """2**t, t counting as no less than -126 and no more than 126."""
    t = at_most(maximum(t, float32(-126.0)), 126.0)
    shifted = t + float32(_ROUND)
    r = t - (shifted - float32(_ROUND))
    p = fma(float32(_E1), r, float32(_E2))
    p = fma(p, r, float32(_E3))
    p = fma(p, r, float32(_E4))
    p = fma(p, r, float32(_E5))
    p = fma(p, r, float32(_E6))
    p = fma(p, r, float32(1.0))
    return multiply(p, float_of_bits(int32(bits_of(shifted) << 23)))


@device
def identity(x):
    """x"""
    return x


@device
def relu(x):
    """max(x, 0)"""
    return maximum(x, float32(0.0))


@device
def gelu(x):
    """x Phi(x), as float32 has it."""
    a = at_most(maximum(x, -x), 12.0)
    t = divide(float32(1.0), fma(float32(0.33), a, float32(1.0)))
    p = fma(float32(_T9), t, float32(_T8))
    p = fma(p, t, float32(_T7))
    p = fma(p, t, float32(_T6))
    p = fma(p, t, float32(_T5))
    p = fma(p, t, float32(_T4))
    p = fma(p, t, float32(_T3))
    p = fma(p, t, float32(_T2))
    p = fma(p, t, float32(_T1))
    p = multiply(multiply(p, t), power_of_two(multiply(multiply(a, a), float32(_HALF_LOG2_E))))
    return fma(float32(0.0) - a, p, maximum(x, float32(0.0)))


@device
def gelu_roughly(x):
    """The same to 4.1e-5, for what becomes bytes."""
    a = at_most(maximum(x, -x), 4.5)
    p = fma(float32(_R10), a, float32(_R9))
    p = fma(p, a, float32(_R8))
    p = fma(p, a, float32(_R7))
    p = fma(p, a, float32(_R6))
    p = fma(p, a, float32(_R5))
    p = fma(p, a, float32(_R4))
    p = fma(p, a, float32(_R3))
    p = fma(p, a, float32(_R2))
    p = fma(p, a, float32(_R1))
    return fma(float32(0.0) - a, p, maximum(x, float32(0.0)))


@device
def gelu_tanh(x):
    """The approximation of GELU by tanh."""
    t = multiply(x, fma(multiply(x, x), float32(_TANH_3), float32(_TANH_1)))
    return divide(x, float32(1.0) + power_of_two(t))


@device
def silu(x):
    """x / (1 + exp(-x))"""
    return divide(x, float32(1.0) + power_of_two(multiply(x, float32(-_LOG2_E))))


ACTIVATIONS = {"identity": identity, "relu": relu, "gelu": gelu, "gelu_roughly": gelu_roughly, "gelu_tanh": gelu_tanh,
               "silu": silu}
