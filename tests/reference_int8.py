"""The integer oracle: TFLite's int8 rules from their definitions, in Python integers and fractions. Slow and obvious.

Imports nothing of ours. Sources: gemmlowp fixedpoint.h (SaturatingRoundingDoublingHighMul, RoundingDivideByPOT,
exp_on_negative_values, one_over_one_plus_x_for_x_in_0_1), TFLite quantization_util.cc (QuantizeMultiplier) and
reference/softmax.h, ruy's pack and kernel rounding, XNNPACK's qs8 requantization and vadd.
"""

import functools
import math
from fractions import Fraction

import numpy as np


def floor_half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def half_away(x: Fraction) -> int:
    return floor_half_up(x) if x >= 0 else -floor_half_up(-x)


def half_even(x: Fraction) -> int:
    return round(x)


def int32(x: int) -> int:
    return int(np.uint32(x % 2**32).view(np.int32)) if isinstance(x, int) else int32(int(x))


@functools.cache
def multiplier(real: float) -> tuple[int, int]:
    """(q31, shift) with real ~ q31 / 2**31 * 2**shift."""
    if real == 0:
        return 0, 0
    exact, shift = Fraction(real), 0
    while exact >= 1:
        exact, shift = exact / 2, shift + 1
    while exact < Fraction(1, 2):
        exact, shift = exact * 2, shift - 1
    q31 = half_away(exact * 2**31)
    if q31 == 2**31:
        q31, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (q31, shift)


def high_mul(a: int, b: int) -> int:
    """Doubling high product of two int32: a sign-dependent nudge, then C's truncating division."""
    if a == b == -(2**31):
        return 2**31 - 1
    product = a * b
    return math.trunc(Fraction(product + (2**30 if product >= 0 else 1 - 2**30), 2**31))


@functools.cache
def requantize(rule: str, acc: int, real: float) -> int:
    """An int32 accumulator times a real multiplier, as ``rule`` rounds it."""
    q31, shift = multiplier(real)
    if rule == "double":
        return half_away(Fraction(high_mul(int32(acc * 2 ** max(shift, 0)), q31), 2 ** max(-shift, 0)))
    if rule == "ruy":
        return floor_half_up(Fraction(high_mul(int32(acc * 2 ** max(shift, 0)), q31), 2 ** max(-shift, 0)))
    if rule == "single":
        return floor_half_up(Fraction(acc * q31, 2 ** (31 - shift)))
    if rule == "float64":
        return half_away(Fraction(float(acc) * real))
    if rule == "float_rne":
        return half_even(Fraction(float(np.float32(acc) * np.float32(real))))
    raise KeyError(rule)


def code(value: int, zero_point: int) -> int:
    return min(max(value + zero_point, -128), 127)


def mul(rule, a, qa, b, qb, qo, precision=np.float32):
    real = float(precision(np.float32(qa[0])) * precision(np.float32(qb[0])) / precision(np.float32(qo[0])))
    if rule == "float_rne" and not 1 / 65536 <= real < 256:  # XNNPACK's range; beyond it TFLite's kernels run
        rule = "double"
    return code(requantize(rule, (a - qa[1]) * (b - qb[1]), real), qo[1])


@functools.cache
def xnn_multipliers(ra: float, rb: float) -> tuple[int, int, int]:
    """(ma, mb, k) with ra ~ ma / 2**k and rb ~ mb / 2**k, the larger of 21 bits."""
    ra, rb, k = Fraction(ra), Fraction(rb), 20
    while max(ra, rb) * 2**k >= 2**21:
        k -= 1
    while max(ra, rb) * Fraction(2) ** k < 2**20:
        k += 1
    return half_even(ra * Fraction(2) ** k), half_even(rb * Fraction(2) ** k), k


def add(rule, a, qa, b, qb, qo):
    sa, sb, so = (np.float32(q[0]) for q in (qa, qb, qo))
    if rule == "xnn_add" and not all(1 / 1024 <= s / so < 256 for s in (sa, sb)):
        rule = "double"
    if rule == "xnn_add":
        ma, mb, k = xnn_multipliers(float(sa / so), float(sb / so))
        return code(floor_half_up(Fraction(ma * (a - qa[1]) + mb * (b - qb[1])) / Fraction(2) ** k), qo[1])
    twice = 2.0 * float(max(sa, sb))
    left = requantize(rule, (a - qa[1]) << 20, float(sa) / twice) + requantize(
        rule, (b - qb[1]) << 20, float(sb) / twice
    )
    return code(requantize(rule, left, twice / (2**20 * float(so))), qo[1])


# -- softmax -----------------------------------------------------------------------------------------------------------


def divide_by_pot(x: int, exponent: int) -> int:
    return half_away(Fraction(x, 2**exponent))


def q31(real_digits: str) -> int:
    """A decimal constant as Q0.31."""
    return half_away(Fraction(real_digits) * 2**31)


EXP_MINUS_EIGHTH = q31("0.88249690258459540286489214322905")
EXP_OF_MINUS = {  # 2**e -> exp(-2**e)
    -2: q31("0.77880078307140486824517026697832"),
    -1: q31("0.60653065971263342360379953499118"),
    0: q31("0.36787944117144232159552377016146"),
    1: q31("0.13533528323661269189399949497248"),
    2: q31("0.01831563888873418029371802127324"),
    3: q31("0.00033546262790251183882138912578"),
    4: q31("0.00000011253517471925911451377518"),
}


def gemmlowp_exp(a: int) -> int:
    """exp of a Q5.26 at or below 0, in Q0.31."""
    if a == 0:
        return 2**31 - 1
    in_quarter = a % 2**24 - 2**24  # in [-1/4, 0)
    x = in_quarter * 2**5 + 2**28  # Q0.31, around -1/8
    x2 = high_mul(x, x)
    x3, x4 = high_mul(x2, x), high_mul(x2, x2)
    series = divide_by_pot(high_mul(divide_by_pot(x4, 2) + x3, q31("0.33333333333333333333")) + x2, 1)
    result = EXP_MINUS_EIGHTH + high_mul(EXP_MINUS_EIGHTH, x + series)
    rest = in_quarter - a
    for e, factor in EXP_OF_MINUS.items():
        if (rest // 2 ** (26 + e)) % 2:
            result = high_mul(result, factor)
    return result


def softmax_fixed(row, scale: float) -> list[int]:
    q, shift = multiplier(min(float(np.float32(scale)) * 2**26, 2.0**31 - 1))
    limit = -math.floor(Fraction(31 * 2**26) / Fraction(2) ** shift)
    top = max(row)
    e = {c: gemmlowp_exp(high_mul(int32((c - top) * 2**shift), q)) for c in set(row) if c - top >= limit}
    total = sum(divide_by_pot(e[c], 12) for c in row if c in e)  # Q12.19
    leading = 32 - total.bit_length()
    x_plus = int32(total * 2**leading - 2**31)  # Q0.31 of total normalised to 1 + x
    half = half_away(Fraction(x_plus + 2**31 - 1, 2))
    x = half_away(Fraction(48, 17) * 2**29) + high_mul(half, half_away(Fraction(-32, 17) * 2**29))
    for _ in range(3):
        x += min(max(high_mul(x, 2**29 - high_mul(half, x)) * 4, -(2**31)), 2**31 - 1)
    reciprocal = min(x * 2, 2**31 - 1)
    return [
        min(divide_by_pot(high_mul(reciprocal, e[c]), 12 - leading + 31 - 8) - 128, 127) if c in e else -128
        for c in row
    ]


def softmax_lut_f32(row, table) -> list[int]:
    """``table[d]`` is expf(-scale * d) in float32."""
    top, total = max(row), np.float32(0)
    for c in row:
        total = np.float32(total + table[top - c])
    inverse = np.float32(1) / np.float32(total * np.float32(1 / 256))
    return [min(half_away(Fraction(float(np.float32(table[top - c] * inverse)))) - 128, 127) for c in row]


def softmax_lut_u16(row, table) -> list[int]:
    top = max(row)
    wide = [min(int(float(t) * 65535 + 0.5), 65535) for t in table]
    total = sum(wide[top - c] for c in row)
    inverse = float(np.float32(1) / np.float32(np.float32(total) * np.float32(1 / 256)))
    return [min(requantize("double", wide[top - c], inverse) - 128, 127) for c in row]
