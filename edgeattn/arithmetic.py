"""The integer arithmetic of the TFLite kernel sets: rounding rules, softmax rules, and the table of sets made of them.

An int8 tensor stands for ``real = scale * (code - zero_point)``. Between two int8 tensors lies an int32 accumulator
and a *requantization*: multiply by a real number below one, round to an integer. TFLite's runtimes differ in how they
round, by one code on at most 0.33 % of the elements of an operator, and by up to ten codes at the end of an attention
layer. So equality is only ever equality with a *named* set, and the sets are a table of rules here, not branches in
kernels.

The rules are plain functions without branches. The same text runs on Python integers, broadcasts over NumPy int64
arrays, and is what Numba compiles; ``register_jitable`` only tells Numba that it may, and leaves the function as it is.

Q-formats: ``Qm.n`` is a signed integer with ``m`` integer and ``n`` fractional bits; ``q31`` is Q0.31 in [1/2, 1).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgeattn.runtime.compiler import register_jitable

INT32_MAX = 2**31 - 1
CODE_MIN, CODE_MAX = -128, 127  # of int8
PROBABILITY_SCALE, PROBABILITY_ZERO_POINT = np.float32(1 / 256), -128  # every TFLite int8 softmax writes these


# -- fixed-point primitives (gemmlowp, fixedpoint.h, named as there) -------------------------------------------------


@register_jitable
def wrap_int32(x):
    """The int32 that two's complement leaves of ``x``."""
    return ((x + 2**31) & 0xFFFFFFFF) - 2**31


@register_jitable
def saturating_rounding_doubling_high_mul(a, b):
    """``round(a * b / 2**31)``, halves up: the Q0.31 product of two int32.

    gemmlowp adds a nudge by sign and divides with truncation; for every pair but (min, min), which no multiplier here
    reaches, that is this one shift.
    """
    return (a * b + 2**30) >> 31


@register_jitable
def rounding_divide_by_pot(x, exponent):
    """``round(x / 2**exponent)``, halves away from zero."""
    half = (1 << exponent) >> 1
    return (x + half - ((x < 0) & (half > 0))) >> exponent


@register_jitable
def round_half_away(x):
    """C's ``round``: float to the nearest integral float, halves away from zero, exact for every float64."""
    whole = np.trunc(x)
    return whole + np.trunc(2 * (x - whole))


def quantize_multiplier(real: float) -> tuple[int, int]:
    """A real multiplier as ``q31 * 2**(shift - 31)`` (TFLite ``QuantizeMultiplier``).

    Returns
    -------
    q31 : int
        Q0.31 in [2**30, 2**31), or 0.
    shift : int
        Power of two, at least -31.
    """
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    q31 = math.floor(fraction * 2**31 + 0.5)
    if q31 == 2**31:
        q31, shift = q31 // 2, shift + 1
    if shift < -31:
        return 0, 0
    return q31, shift


# -- requantization rules: int32 accumulator -> integer, before the zero point and the clamp -------------------------
# One signature for all, so that a kernel takes the rule as an argument: q31 and shift are ``quantize_multiplier`` of
# the real multiplier, and ``real`` is that multiplier in float64, rounded to float32 first where the rule computes so.


@register_jitable
def double(acc, q31, shift, real):
    """gemmlowp's two roundings: the doubling high product, then halves away from zero."""
    left, right = (shift + abs(shift)) >> 1, (abs(shift) - shift) >> 1
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(wrap_int32(acc << left), q31), right)


def ruy(acc, q31, shift, real):
    """ruy's kernels: the doubling high product, then halves up."""
    left, right = (shift + abs(shift)) >> 1, (abs(shift) - shift) >> 1
    high = saturating_rounding_doubling_high_mul(wrap_int32(acc << left), q31)
    return (high + ((1 << right) >> 1)) >> right


def single(acc, q31, shift, real):
    """TFLITE_SINGLE_ROUNDING: one rounding of the 64-bit product, halves up."""
    return (acc * q31 + (1 << (30 - shift))) >> (31 - shift)


def float64(acc, q31, shift, real):
    """LiteRT's reference fully connected: float64 product, halves away from zero. An integral float64."""
    return round_half_away(acc * real)


def float_rne(acc, q31, shift, real):
    """XNNPACK: float32 product, halves to even. An integral float32."""
    return np.rint(np.float32(acc) * np.float32(real))


REQUANTIZE: dict[str, Callable] = {rule.__name__: rule for rule in (double, ruy, single, float64, float_rne)}


def fully_connected_multiplier(rule: str, input_scale, weight_scale, output_scale) -> np.ndarray:
    """Real multipliers of a per-channel FULLY_CONNECTED, (channels,) float64."""
    x, w, y = np.float32(input_scale), np.asarray(weight_scale, np.float32), np.float32(output_scale)
    if rule == "float_rne":
        return (x * w / y).astype(np.float64)
    return np.float64(x) * w.astype(np.float64) / np.float64(y)


def batch_matmul_multiplier(rule: str, precision, lhs_scale, rhs_scale, output_scale) -> np.ndarray:
    """Real multiplier of a BATCH_MATMUL, (1,) float64. ``precision``: in which the scales are multiplied."""
    product = precision(np.float32(lhs_scale)) * precision(np.float32(rhs_scale))
    y = np.float32(output_scale)
    return np.array([product / y if rule == "float_rne" else np.float64(product) / np.float64(y)], np.float64)


def mul_multiplier(precision, lhs_scale, rhs_scale, output_scale) -> np.ndarray:
    """Real multiplier of a MUL, (1,) float64. ``precision``: of the whole computation."""
    lhs, rhs, y = (precision(np.float32(scale)) for scale in (lhs_scale, rhs_scale, output_scale))
    return np.array([lhs * rhs / y], np.float64)


def fixed_point(real) -> tuple[np.ndarray, np.ndarray]:
    """``quantize_multiplier`` of each entry: int32 q31 and int32 shift."""
    pairs = [quantize_multiplier(float(value)) for value in np.ravel(real)]
    return np.array([q for q, _ in pairs], np.int32), np.array([s for _, s in pairs], np.int32)


def to_code(value, zero_point):
    """Add the zero point and clamp to int8."""
    return np.clip(value + zero_point, CODE_MIN, CODE_MAX).astype(np.int8)


# -- elementwise operators on codes; used to tabulate, so NumPy speed is enough --------------------------------------


# XNNPACK takes a MUL of such a multiplier, an ADD of such ratios of its inputs' scales to the output's, below 2**8; all
# others LiteRT's own kernels compute.
_XNNPACK_FROM = {"float_rne": 2.0**-16, "xnn_add": 2.0**-10}


def elementwise_rule(rule: str, *multipliers) -> str:
    """The rule that a MUL or ADD of these multipliers is computed by in a kernel set that has ``rule`` for it."""
    lowest = _XNNPACK_FROM.get(rule)
    return rule if lowest is None or all(lowest <= each < 256 for each in multipliers) else "double"


def mul_codes(rule: str, precision, lhs, lhs_q, rhs, rhs_q, output_q) -> np.ndarray:
    """MUL of two int8 arrays. ``*_q`` are (scale, zero_point) pairs; ``precision`` as in ``mul_multiplier``."""
    real = mul_multiplier(precision, lhs_q[0], rhs_q[0], output_q[0])
    rule = elementwise_rule(rule, real[0])
    q31, shift = quantize_multiplier(float(real[0]))
    acc = (np.asarray(lhs, np.int64) - lhs_q[1]) * (np.asarray(rhs, np.int64) - rhs_q[1])
    return to_code(REQUANTIZE[rule](acc, q31, shift, real[0]), output_q[1])


def add_codes(rule: str, lhs, lhs_q, rhs, rhs_q, output_q) -> np.ndarray:
    """ADD of two int8 arrays, by XNNPACK's 20-bit multipliers (``xnn_add``) or TFLite's (a requantization rule)."""
    lhs, rhs = np.asarray(lhs, np.int64), np.asarray(rhs, np.int64)
    s1, s2, so = np.float32(lhs_q[0]), np.float32(rhs_q[0]), np.float32(output_q[0])
    r1, r2 = s1 / so, s2 / so
    rule = elementwise_rule(rule, r1, r2)
    if rule == "xnn_add":
        # the larger multiplier lies in [2**20, 2**21); one rounding at the end, halves up
        k = 20 - (math.frexp(float(max(r1, r2)))[1] - 1)
        m1, m2 = (int(np.rint(np.float64(r) * 2.0**k)) for r in (r1, r2))
        acc = m1 * (lhs - lhs_q[1]) + m2 * (rhs - rhs_q[1])
        return to_code((acc + (1 << (k - 1))) >> k, output_q[1])
    requantize = REQUANTIZE[rule]
    twice = np.float64(np.float32(2) * max(s1, s2))

    def scaled(value, real):
        q31, shift = quantize_multiplier(float(real))
        return requantize(value, q31, shift, real)

    total = scaled((lhs - lhs_q[1]) << 20, np.float64(s1) / twice) + scaled(
        (rhs - rhs_q[1]) << 20, np.float64(s2) / twice
    )
    return to_code(scaled(total, twice / (2.0**20 * np.float64(so))), output_q[1])


def convert_codes(rule: str, codes, input_q, output_q) -> np.ndarray:
    """QUANTIZE of an int8 array: the same numbers in another quantization. ``*_q`` are (scale, zero_point) pairs.

    XNNPACK's multiplier has 8 bits behind the point (``xnn_convert``) and one rounding, halves up; what is outside its
    range ruy's rule computes. The others are requantization rules.
    """
    ratio = np.float32(input_q[0]) / np.float32(output_q[0])
    acc = np.asarray(codes, np.int64) - input_q[1]
    if rule == "xnn_convert":
        if 2.0**-8 <= ratio <= 2.0**7:
            return to_code((acc * int(np.rint(np.float32(256) * ratio)) + 128) >> 8, output_q[1])
        rule = "ruy"
    real = np.float64(np.float32(input_q[0])) / np.float64(np.float32(output_q[0]))
    return to_code(REQUANTIZE[rule](acc, *quantize_multiplier(float(real)), real), output_q[1])


def _gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x * math.sqrt(0.5))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(0.5 * x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}


def activation_table(name: str, input_q, output_q) -> np.ndarray:
    """int8 (256,): of code c, at c + 128, the activation. ``*_q`` are (scale, zero_point) pairs.

    TFLite's LUTPopulate, the same in every kernel set, for a function of ACTIVATIONS. "relu" has one tensor, for it is
    fused into the operator before: it bounds that one's codes.
    """
    codes = np.arange(CODE_MIN, CODE_MAX + 1)
    if name == "relu":
        return np.maximum(codes, output_q[1]).astype(np.int8)
    reals = np.float32(input_q[0]) * (codes - input_q[1]).astype(np.float32)
    with np.errstate(over="ignore"):
        values = np.array([ACTIVATIONS[name](float(x)) for x in reals]).astype(np.float32)
        scaled = round_half_away(values * (np.float32(1) / np.float32(output_q[0])))
    return to_code(scaled, output_q[1])


# -- softmax: every rule is a table of exp(-scale * d), d = row maximum - code, a sum, and a normalisation -----------
# Weights and probabilities are functions of numbers, and of arrays element by element.


@functools.cache
def _libm_expf() -> Callable[[float], float]:
    """``expf`` of the C library, which the runtimes call too; elsewhere the rounded float64 exponential."""
    try:
        expf = ctypes.CDLL("libm.so.6").expf  # as glibc calls it: to look for it takes three processes
    except OSError:
        from ctypes.util import find_library

        library = find_library("m")
        if library is None:
            return math.exp
        expf = ctypes.CDLL(library).expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    return expf


def _exp_table(step: np.float32) -> np.ndarray:
    """``expf(step * d)`` for d = 0..255, float32; the product is rounded to float32 first, as the runtimes do."""
    expf = _libm_expf()
    with np.errstate(over="ignore"):
        steps = np.float32(step) * np.arange(256, dtype=np.float32)
    return np.array([expf(each) for each in steps.tolist()], np.float32)


def lut_f32_table(scale) -> np.ndarray:
    """float32 exponentials of the 256 differences, float32."""
    return _exp_table(-np.float32(scale))


def lut_f32_weight(e):
    """A float32 exponential as a term of the sum."""
    return e


def lut_f32_probability(e, total):
    """Halves away from zero of ``e * (1 / (total / 256))``, all in float32; 0..256."""
    inverse = np.float32(1) / np.float32(np.float32(total) * np.float32(1 / 256))
    scaled = np.float32(e) * inverse
    whole = np.trunc(scaled)
    return np.int64(whole + np.trunc(np.float32(2) * (scaled - whole)))


def lut_u16_table(scale) -> np.ndarray:
    """Exponentials in Q0.16, as int32."""
    table = np.trunc(_exp_table(-np.float32(scale)).astype(np.float64) * 65535 + 0.5)
    return np.minimum(table, 65535).astype(np.int32)


def lut_u16_weight(e):
    """A Q0.16 exponential as a term of the integer sum."""
    return e


def lut_u16_probability(e, total):
    """``e / (total / 256)`` through a fixed-point reciprocal and the ``double`` rule."""
    inverse = np.float64(np.float32(1) / np.float32(np.float32(total) * np.float32(1 / 256)))
    fraction, shift = np.frexp(inverse)
    q31 = np.int64(fraction * 2147483648.0 + 0.5)
    carry = q31 >> 31
    return double(np.int64(e), q31 >> carry, np.int64(shift) + carry, 0.0)


FIXED_DIFFERENCE_BITS = 26  # scaled differences are Q5.26
FIXED_SUM_BITS = 19  # sums are Q12.19
EXP_MINUS_ONE_EIGHTH = 1895147668  # Q0.31
ONE_THIRD = 715827883  # Q0.31
EXP_MINUS_POWERS_OF_TWO = (  # exponent e -> exp(-2**e) in Q0.31
    (-2, 1672461947),
    (-1, 1302514674),
    (0, 790015084),
    (1, 290630308),
    (2, 39332535),
    (3, 720401),
    (4, 242),
)
FORTY_EIGHT_OVER_SEVENTEEN = 1515870810  # Q2.29
MINUS_THIRTY_TWO_OVER_SEVENTEEN = -1010580540  # Q2.29


def _exp_on_minus_quarter_to_zero(a: int) -> int:
    """exp of a Q0.31 in [-1/4, 0): Taylor to the fourth order around -1/8."""
    mul, divide = saturating_rounding_doubling_high_mul, rounding_divide_by_pot
    x = a + 2**28
    x2 = mul(x, x)
    x3, x4 = mul(x2, x), mul(x2, x2)
    tail = divide(mul(divide(x4, 2) + x3, ONE_THIRD) + x2, 1)
    return EXP_MINUS_ONE_EIGHTH + mul(EXP_MINUS_ONE_EIGHTH, x + tail)


def _exp_on_negative(a: int) -> int:
    """exp of a non-positive Q5.26, in Q0.31: the last quarter by series, the rest by its binary digits."""
    if a == 0:
        return INT32_MAX
    quarter = 1 << (FIXED_DIFFERENCE_BITS - 2)
    modulo = (a & (quarter - 1)) - quarter
    result = _exp_on_minus_quarter_to_zero(modulo << 5)
    remainder = modulo - a
    for exponent, factor in EXP_MINUS_POWERS_OF_TWO:
        if remainder >> (FIXED_DIFFERENCE_BITS + exponent) & 1:
            result = saturating_rounding_doubling_high_mul(result, factor)
    return result


def fixed_table(scale) -> np.ndarray:
    """gemmlowp's exponentials of the 256 differences in Q0.31, int32; 0 beyond the representable difference."""
    real = min(float(np.float32(scale)) * 2**FIXED_DIFFERENCE_BITS, 2.0**31 - 1)
    q31, shift = quantize_multiplier(real)
    smallest = -math.floor(31 * 2**FIXED_DIFFERENCE_BITS / 2**shift)
    mul = saturating_rounding_doubling_high_mul
    return np.array(
        [_exp_on_negative(mul(wrap_int32(-d << shift), q31)) if -d >= smallest else 0 for d in range(256)], np.int32
    )


def fixed_weight(e):
    """An exponential in Q0.31 as a term of the Q12.19 sum."""
    return rounding_divide_by_pot(e, 31 - FIXED_SUM_BITS)


def fixed_probability(e, total):
    """``e / total`` by gemmlowp's Newton reciprocal; ``e`` Q0.31, ``total`` Q12.19 above zero.

    From a sum of 512 on, where the runtimes abort, no probability reaches half a code: all are 0.
    """
    mul = saturating_rounding_doubling_high_mul
    total = np.minimum(np.int64(total), INT32_MAX)
    zeros = 32 - np.int64(np.frexp(np.float64(total))[1])  # 32 - bit length; exact in float64
    fraction = (total << zeros) - 2**31  # 1 + fraction is total, normalised to [1, 2), Q0.31
    half_denominator = (fraction + INT32_MAX + 1) >> 1
    x = FORTY_EIGHT_OVER_SEVENTEEN + mul(half_denominator, MINUS_THIRTY_TWO_OVER_SEVENTEEN)
    for _ in range(3):
        x = x + (mul(x, 2**29 - mul(half_denominator, x)) << 2)
    reciprocal = np.minimum(x << 1, INT32_MAX)
    return rounding_divide_by_pot(mul(reciprocal, np.int64(e)), 12 - zeros + 31 - 8)


class SoftmaxRule(NamedTuple):
    """How one kernel set computes an int8 softmax row.

    ``d = max(row) - code``; ``e = table(scale)[d]``; ``total`` is the sum of ``weight(e)`` in key order, in the type of
    ``zero``; the output code is ``min(probability(e, total), 255) - 128``.
    """

    table: Callable
    weight: Callable
    probability: Callable
    zero: np.generic


SOFTMAX: dict[str, SoftmaxRule] = {
    "lut_f32": SoftmaxRule(lut_f32_table, lut_f32_weight, lut_f32_probability, np.float32(0)),
    "lut_u16": SoftmaxRule(lut_u16_table, lut_u16_weight, lut_u16_probability, np.int64(0)),
    "fixed": SoftmaxRule(fixed_table, fixed_weight, fixed_probability, np.int64(0)),
}


# -- the kernel sets -------------------------------------------------------------------------------------------------


class KernelSet(NamedTuple):
    """The rules one TFLite runtime computes an attention layer with; fields from ``fully_connected`` on name them."""

    name: str
    runtime: str
    precision: type  # in which BATCH_MATMUL and MUL multiply the scales of their inputs
    fully_connected: str
    batch_matmul: str
    batch_matmul_asymmetric: str  # the right operand has a zero point other than 0
    mul: str
    add: str
    softmax: str
    convert: str  # QUANTIZE of codes


# fmt: off
KERNEL_SETS: dict[str, KernelSet] = {row.name: row for row in (
    KernelSet("litert", "ai-edge-litert >= 2.1.3, default resolver (XNNPACK), x86-64", np.float32,
              "float_rne", "float_rne", "double", "float_rne", "xnn_add", "lut_f32", "xnn_convert"),
    KernelSet("litert-arm", "ai-edge-litert >= 2.1.3, default resolver (XNNPACK), aarch64", np.float32,
              "float_rne", "float_rne", "double", "float_rne", "xnn_add", "lut_u16", "xnn_convert"),
    KernelSet("litert-builtin", "ai-edge-litert, BUILTIN_WITHOUT_DEFAULT_DELEGATES, x86-64", np.float32,
              "ruy", "double", "double", "double", "double", "lut_f32", "ruy"),
    KernelSet("litert-reference", "ai-edge-litert, BUILTIN_REF, x86-64 and aarch64", np.float32,
              "float64", "double", "double", "double", "double", "fixed", "double"),
    KernelSet("tflite-runtime", "tflite-runtime 2.14, default resolver, x86-64", np.float32,
              "ruy", "ruy", "ruy", "double", "double", "lut_f32", "double"),
    KernelSet("tflm", "TFLite Micro, and CMSIS-NN, which promises equality with it", np.float64,
              "double", "double", "double", "double", "double", "fixed", "double"),
)}
# fmt: on


def kernel_set(name: str) -> KernelSet:
    """The row of KERNEL_SETS called ``name``.

    Raises
    ------
    ValueError
        When there is none; the message lists those there are.
    """
    if not isinstance(name, str) or name not in KERNEL_SETS:
        raise ValueError(f"arithmetic must be one of {', '.join(map(repr, KERNEL_SETS))}; got {name!r}")
    return KERNEL_SETS[name]
