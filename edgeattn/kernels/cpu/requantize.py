"""The rules that turn an int32 accumulator into an output code, on vectors.

Every rule takes (accumulator, parameters, at, plane): two planes of int32 parameters, one value per lane, `plane`
elements apart.  It returns the scaled value before the zero point is added and the result clamped, both of which
packing does.  The scalar forms and what they mean stand in edgeattn/arithmetic.py.
"""
import numpy as np

from edgeattn.arithmetic import quantize_multiplier
from edgeattn.runtime.compiler import inline

from .simd import (
    double_of_bits,
    float_of_bits,
    load,
    maximum,
    narrow,
    round_to_int,
    select,
    smaller,
    splat,
    tile_map,
    to_double,
    to_float,
    truncate,
    truncate_double,
    widen,
)

_FAR, _FAR_BELOW = np.int32(1 << 12), np.int32(-1 << 12)  # beyond every code, whatever the zero point
_HALF_STEP = np.int64(1 << 30)
_LOW_WORD = np.int64(0xFFFFFFFF)


@inline
def doubling_high(a, q):
    """gemmlowp's SaturatingRoundingDoublingHighMul for q > 0, as int64: (a q + 2**30) >> 31.

    The original adds 1 - 2**30 to a negative product and divides toward zero, which is the same number.
    """
    return (widen(a) * widen(q) + splat(_HALF_STEP)) >> splat(np.int64(31))


@inline
def divide_by_power(v, exponent):
    """gemmlowp's RoundingDivideByPOT: v / 2**exponent, ties away from zero, exponent in 0..31, per lane."""
    one = splat(np.int32(1))
    mask = (one << exponent) - one
    threshold = (mask >> one) + select(v < splat(np.int32(0)), one, splat(np.int32(0)))
    return (v >> exponent) + select((v & mask) > threshold, one, splat(np.int32(0)))


@inline
def float_rne(accumulator, parameters, at, plane):
    """rint_even(float32(acc) * m); plane 0 holds the bits of the float32 m."""
    return round_to_int(to_float(accumulator) * float_of_bits(load(parameters, at)))


@inline
def double(accumulator, parameters, at, plane):
    """Doubling high product, then division with ties away from zero; plane 0 holds q31, plane 1 the shift."""
    q, shift = load(parameters, at), load(parameters, at + plane)
    none = splat(np.int32(0))
    shifted = accumulator << maximum(shift, none)
    return divide_by_power(narrow(doubling_high(shifted, q)), maximum(none - shift, none))


@inline
def ruy(accumulator, parameters, at, plane):
    """Doubling high product, then a shift with ties toward +infinity; planes as in `double`."""
    q, shift = load(parameters, at), load(parameters, at + plane)
    none = splat(np.int32(0))
    shifted = accumulator << maximum(shift, none)
    right = widen(maximum(none - shift, none))
    one = splat(np.int64(1))
    return narrow((doubling_high(shifted, q) + ((one << right) >> one)) >> right)


@inline
def float64(accumulator, parameters, at, plane):
    """round_half_away(float64(acc) * m); the planes hold the low and high words of the float64 m."""
    low, high = widen(load(parameters, at)), widen(load(parameters, at + plane))
    m = double_of_bits((high << splat(np.int64(32))) | (low & splat(_LOW_WORD)))
    product = to_double(accumulator) * m
    whole = truncate_double(product)
    rest = product - whole
    one, none = splat(np.int32(1)), splat(np.int32(0))
    up = select(rest >= splat(np.float64(0.5)), one, none)
    down = select(rest <= splat(np.float64(-0.5)), one, none)
    return truncate(whole) + up - down


@inline
def bounded_codes(scaled, zero_point):
    """scaled + zero_point, clamped to -128 .. 127."""
    near = smaller(maximum(scaled, splat(_FAR_BELOW)), splat(_FAR)) + splat(zero_point)
    return smaller(maximum(near, splat(np.int32(-128))), splat(np.int32(127)))


RULES = {"float_rne": float_rne, "double": double, "ruy": ruy, "float64": float64}
NUMBERS = {name: number for number, name in enumerate(RULES)}  # what a kernel knows a rule by
_FLOAT_RNE, _DOUBLE, _RUY = (NUMBERS[name] for name in ("float_rne", "double", "ruy"))


@inline
def requantize(accumulator, rule, parameters, at, plane):
    """A vector, by the rule of that number."""
    if rule == _FLOAT_RNE:
        return float_rne(accumulator, parameters, at, plane)
    if rule == _DOUBLE:
        return double(accumulator, parameters, at, plane)
    if rule == _RUY:
        return ruy(accumulator, parameters, at, plane)
    return float64(accumulator, parameters, at, plane)


@inline
def requantize_tile(tile, rule, parameters, at, step, plane):
    """The same of a tile, each column of vectors by the parameters `step` elements on from the last one's."""
    if rule == _FLOAT_RNE:
        return tile_map(tile, float_rne, parameters, at, step, plane)
    if rule == _DOUBLE:
        return tile_map(tile, double, parameters, at, step, plane)
    if rule == _RUY:
        return tile_map(tile, ruy, parameters, at, step, plane)
    return tile_map(tile, float64, parameters, at, step, plane)


def encode(rule, multipliers):
    """Parameter planes (2, n) int32 of `rule` for `multipliers` (n,).

    `multipliers` must come in the precision the kernel set prescribes: float32 for float_rne, float64 otherwise.
    """
    planes = np.zeros((2, len(multipliers)), np.int32)
    if rule == "float_rne":
        planes[0] = np.asarray(multipliers, np.float32).view(np.int32)
    elif rule == "float64":
        planes[:] = np.asarray(multipliers, np.float64).view(np.int32).reshape(-1, 2).T
    else:
        for i, m in enumerate(multipliers):
            planes[:, i] = quantize_multiplier(float(m))
    return planes
