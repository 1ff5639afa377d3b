"""Float32 numbers in digits that are bytes with a sign, so that they can meet stored bytes, and their products again.

Three digits to the base 256 have at least 22 bits and a sign of the largest number of a row, nearly what float32 holds
of it.  Each digit is a row of bytes; sums of products are integers, whatever their order.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .int8_operands import add_digit_sum, less_digit_sum, store_digit_sum
from .simd import (
    LANES,
    bits_of,
    first_lane,
    float_of_bits,
    fma,
    gather_byte,
    load,
    max_lanes,
    maximum,
    round_to_int,
    splat,
    store,
    sum_lanes,
    to_float,
)

CHUNK = 4 * LANES  # bytes of a vector
DIGITS = 3
_BASE, _SQUARE = np.float32(256), np.float32(65536)
_BIAS = np.int32(0x808080)
_MOST = np.float32(0x7f7f7f)  # three digits of 127
_FINE, _COARSE = np.int32((1 << 20) - 1), np.int32(-1 << 20)  # all but three bits of a mantissa, and the rest
_SMALLEST = np.finfo(np.float32).tiny
_ZERO, _ONE = np.float32(0), np.float32(1)


@inline
def largest_of(private, at, size):
    """The largest magnitude in private[at : at + size], and zero, or NaN where a number is not finite."""
    best, poison = splat(_ZERO), splat(_ZERO)
    for i in range(0, size, LANES):
        v = load(private, at + i)
        best = maximum(maximum(v, splat(_ZERO) - v), best)
        poison = fma(v, splat(_ZERO), poison)
    return max_lanes(best), sum_lanes(poison)


@inline
def digits_of(private, at, inverse):
    """Numbers over a unit to whole ones, and those to three digits that are bytes with a sign."""
    return (round_to_int(load(private, at) * inverse) + splat(_BIAS)) ^ splat(_BIAS)


@inline
def write_digits(private, at, size, largest, rows, corrections):
    """The three digits of private[at : at + size], lowest first, as Rows of four bytes; what a unit of them is worth.

    private[at + i] = unit * sum over r of 256 ** r * byte i of row r, none larger than `largest`; size a multiple of
    CHUNK.  corrections: Part, of each row what its sums are too large by where the other operand's bytes are kept with
    their highest bit flipped.
    """
    # _MOST units or a little less are the largest number; a unit of few bits makes the products with it nearly exact
    fine = bits_of(splat(largest / _MOST))
    unit = maximum(float_of_bits((fine + splat(_FINE)) & splat(_COARSE)), splat(_SMALLEST))
    inverse = splat(_ONE) / unit
    sums0, sums1, sums2 = splat(np.int32(0)), splat(np.int32(0)), splat(np.int32(0))
    for i in range(0, size, CHUNK):
        x0 = digits_of(private, at + i, inverse)
        x1 = digits_of(private, at + i + LANES, inverse)
        x2 = digits_of(private, at + i + 2 * LANES, inverse)
        x3 = digits_of(private, at + i + 3 * LANES, inverse)
        digit0 = gather_byte(x0, x1, x2, x3, 0)
        digit1 = gather_byte(x0, x1, x2, x3, 1)
        digit2 = gather_byte(x0, x1, x2, x3, 2)
        store(rows.data, rows.at + i // 4, digit0)
        store(rows.data, rows.at + rows.step + i // 4, digit1)
        store(rows.data, rows.at + 2 * rows.step + i // 4, digit2)
        sums0 = add_digit_sum(sums0, digit0)
        sums1 = add_digit_sum(sums1, digit1)
        sums2 = add_digit_sum(sums2, digit2)
    store_digit_sum(sums0, corrections.data, corrections.at)
    store_digit_sum(sums1, corrections.data, corrections.at + 1)
    store_digit_sum(sums2, corrections.data, corrections.at + 2)
    return first_lane(unit)


@inline
def join_digits(sums, at, row, corrections):
    """The LANES numbers whose digits' sums lie at `at`, rows `row` apart, lowest first; corrections: Part."""
    low, middle, high = load(sums, at), load(sums, at + row), load(sums, at + 2 * row)
    low = less_digit_sum(low, corrections.data, corrections.at)
    middle = less_digit_sum(middle, corrections.data, corrections.at + 1)
    high = less_digit_sum(high, corrections.data, corrections.at + 2)
    return fma(to_float(high), splat(_SQUARE), fma(to_float(middle), splat(_BASE), to_float(low)))
