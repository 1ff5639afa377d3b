"""How an int32 accumulator becomes an output code, and a table value a probability, as functions that kernels call.

The rules and what they mean stand in edgeattn/arithmetic.py. Every requantization rule takes (accumulator, first,
second) with the two int32 that `planes` makes of its real multiplier, and gives the value before zero point and clamp.
"""
import numpy as np

from edgeattn.arithmetic import fixed_point
from edgeattn.kernels.cuda.language import device, float32, float64, int32, int64
from edgeattn.kernels.cuda.ptx import (
    add,
    bits_of,
    divide,
    double_of_words,
    float_of_bits,
    leading_zeros,
    multiply,
    multiply_f64,
    nearest,
    select_f,
    select_i,
    times_wide,
    to_float,
    truncate,
    truncate_f64,
)

_LARGEST = 2**31 - 1


@device
def doubling_high(x, q):
    """gemmlowp's SaturatingRoundingDoublingHighMul for q > 0, as int64: (x q + 2**30) >> 31."""
    return (times_wide(x, q) + int64(1 << 30)) >> int64(31)


@device
def divide_by_power(v, exponent):
    """gemmlowp's RoundingDivideByPOT: v / 2**exponent, ties away from zero, exponent in 0..31."""
    mask = int32((int32(1) << exponent) - 1)
    threshold = int32((mask >> 1) + select_i(v < 0, int32(1), int32(0)))
    return int32((v >> exponent) + select_i(int32(v & mask) > threshold, int32(1), int32(0)))


@device
def positive(x):
    """x, at least 0."""
    return select_i(x > 0, x, int32(0))


@device
def float_rne(accumulator, first, second):
    """rint_even(float32(acc) * m); `first` holds the bits of the float32 m."""
    return nearest(multiply(to_float(accumulator), float_of_bits(first)))


@device
def double(accumulator, first, second):
    """Doubling high product, then division with ties away from zero; q31 and shift."""
    shifted = int32(accumulator << positive(second))
    return divide_by_power(int32(doubling_high(shifted, first)), positive(int32(0 - second)))


@device
def ruy(accumulator, first, second):
    """Doubling high product, then a shift with ties toward +infinity; q31 and shift."""
    shifted = int32(accumulator << positive(second))
    right = int64(positive(int32(0 - second)))
    return int32((doubling_high(shifted, first) + ((int64(1) << right) >> int64(1))) >> right)


@device
def float64_rule(accumulator, first, second):
    """round_half_away(float64(acc) * m); low and high word of the float64 m."""
    product = multiply_f64(float64(accumulator), double_of_words(first, second))
    whole = truncate_f64(product)
    rest = product - whole
    up = select_i(rest >= float64(0.5), int32(1), int32(0))
    down = select_i(rest <= float64(-0.5), int32(1), int32(0))
    return int32(int32(whole) + up - down)


RULES = {"float_rne": float_rne, "double": double, "ruy": ruy, "float64": float64_rule}


def planes(rule, multipliers):
    """The two int32 per multiplier that `rule` reads, (2, n); multipliers (n,) in the precision of the kernel set."""
    if rule == "float_rne":
        bits = np.asarray(multipliers, np.float32).view(np.int32)
        return np.stack([bits, np.zeros_like(bits)])
    if rule == "float64":
        return np.ascontiguousarray(np.asarray(multipliers, np.float64).view(np.int32).reshape(-1, 2).T)
    return np.stack(fixed_point(multipliers))


@device
def clamp_code(v, zero_point):
    """v + zero_point within int8; v may be anything an int32 is."""
    v = select_i(v > 512, int32(512), v)
    v = int32(select_i(v < -512, int32(-512), v) + zero_point)
    v = select_i(v > 127, int32(127), v)
    return select_i(v < -128, int32(-128), v)


# -- softmax: each rule's term of the sum, what it makes of the sum, and a probability 0..255 ------------------------
# A table entry is an int32: the bits of a float32 for lut_f32. `prepare` gives two int32 that `probability` reads.

_HALF_ROUNDED_DOWN = float(np.float32(0.49999997))  # the float32 below one half: rounds halves up, never 0.49999997


@device
def lut_f32_prepare(total):
    """The bits of 1 / (sum / 256), 0 for an empty row; the sum by its bits."""
    total = float_of_bits(total)
    inverse = divide(float32(1.0), multiply(total, float32(0.00390625)))
    return bits_of(select_f(total == float32(0.0), float32(0.0), inverse)), int32(0)


@device
def lut_f32_probability(e, first, second):
    """round_half_away(e / (sum / 256)), at most 255."""
    p = truncate(add(multiply(float_of_bits(e), float_of_bits(first)), float32(_HALF_ROUNDED_DOWN)))
    return select_i(p > 255, int32(255), p)


@device
def keep_whole(e):
    """A term of an integer sum that is the value itself."""
    return e


@device
def keep_twelve_less(e):
    """A Q0.31 value as a term of a Q12.19 sum."""
    return divide_by_power(e, int32(12))


@device
def lut_u16_prepare(total):
    """Q0.31 multiplier and right shift of 1 / (sum / 256)."""
    bits = bits_of(divide(float32(1.0), multiply(to_float(total), float32(0.00390625))))
    q = int32(int32(int32(bits & 0x7FFFFF) | 0x800000) << 7)
    right = positive(int32(126 - (bits >> 23)))
    return q, select_i(right > 31, int32(31), right)


@device
def fixed_prepare(total):
    """gemmlowp GetReciprocal of a Q12.19 sum: Q0.31 scale, right shift, scale * 2**-shift = 1 / total."""
    zeros = leading_zeros(total)
    x = (int64(total) << int64(zeros)) - int64(1 << 31)
    half = (x + int64(1 << 31)) >> int64(1)  # Q0.31: (x + 1) / 2 rounded
    r = int64(1515870810) + ((half * int64(-1010580540) + int64(1 << 30)) >> int64(31))  # Q2.29: 48/17 - 32/17 half
    for _ in range(3):
        product = (half * r + int64(1 << 30)) >> int64(31)
        r = r + ((r * (int64(1 << 29) - product) + int64(1 << 30)) >> int64(31)) * int64(4)
    scale = r * int64(2)
    right = int32(35 - zeros)
    return (select_i(scale > int64(_LARGEST), int32(_LARGEST), int32(scale)),
            select_i(right > 31, int32(31), right))


@device
def integer_probability(e, first, second):
    """e times the reciprocal of the sum, at most 255."""
    p = divide_by_power(int32(doubling_high(e, first)), second)
    return select_i(p > 255, int32(255), p)


# rule -> (in key order as float32?, term, prepare, probability)
SOFTMAX = {
    "lut_f32": (True, keep_whole, lut_f32_prepare, lut_f32_probability),
    "lut_u16": (False, keep_whole, lut_u16_prepare, integer_probability),
    "fixed": (False, keep_twelve_less, fixed_prepare, integer_probability),
}
