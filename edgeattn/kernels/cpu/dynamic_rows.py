"""Rows to bytes that are quantized at run time, and what is computed of them.

Their products with int8 weights are in dynamic_products.py; what is done with these is in linear_dynamic.py and, GROUP
hidden features at a time, in feed_forward_dynamic.py.

    input      s = max|x| / 127 of a token, q = rint(x / s)
    hidden     of a token and GROUP features: lo = min(0, min h), hi = max(0, max h), s = (hi - lo) / 255,
               z = rint(-lo / s), q = clamp(rint(h / s) + z, 0, 255) - z
    product    sum of s (q c), group by group, times the scale of an output channel, + bias, + x_J V_J
    columns    J: a few features of the input that bytes would round too coarsely: q = 0 there, V are their weights
    channels   an output channel that one byte a weight would round too coarsely has a second one, added last

Quotients are products with a reciprocal, s (q c) and the rest multiply-adds.  The float operations are the same in the
same order under every instruction set: where they can multiply and add with one rounding, results are equal bit for
bit, in any batch and on any number of threads.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, task

from .dynamic import COLUMNS_APART, inverse_of, join_row, largest_of_row, scale_of
from .int8_operands import FLIP
from .matmul import round_up
from .norm import NO_NORM, normalize_row, read_row
from .simd import (
    ADDS_FIRST,
    AS_WORDS,
    LANES,
    OFFSET,
    VIRTUAL_LANES,
    bits_of,
    first_lane,
    float_of_bits,
    join_bytes,
    load,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    select,
    shift_right_logical,
    splat,
    store,
    wide_splat,
)
from .word_products import split_row

DEPTH = 64  # what rows of bytes are padded to: whole numbers of vectors of bytes for every instruction set
WORDS = 2 if AS_WORDS else 1  # elements that four bytes of a row take in scratch
BLOCK = 32 if AS_WORDS and not ADDS_FIRST else 64  # rows that pass together
# The records of kernels. Of weights: positions in elements of 32 bits. `w`: bytes, `c`: sums of an output channel's,
# and where ADDS_FIRST, group by group, minus its own products behind them, `s`: scales, `b`: biases, `v`: (J, columns)
# of the features `j` that are apart, whose number is `apart`; `low`: the channels, `lows` of them, that have a second
# one, behind the others. `groups4`: groups of four bytes of an input row. `columns`: channels and second ones. Of
# scratch: first what belongs to some rows together, among it ROWS_OF, then what a thread needs for itself.
ROWS_OF = "at_bytes at_scale at_minus at_own at_apart at_sums"
_ZERO = np.float32(0)
_SIGN = np.int32(-2147483648)
_EVEN_BYTES, _EIGHT = np.int32(0x00FF00FF), np.int32(8)
_INFINITY, _NAN, _LARGEST_FLOAT = np.float32(np.inf), np.float32(np.nan), np.float32(3.4028235e38)
_LEVELS, _PER_LEVEL = np.float32(255), np.float32(1 / 255)


class Codes(NamedTuple):
    """Where rows of groups4 groups of bytes are; of each row its scale, what c is times, minus its own products."""

    at: int
    groups4: int
    at_scale: int
    at_minus: int
    at_own: int


class Memory(NamedTuple):
    """The scratch, and weights, by the kinds of their elements."""

    f: object
    i: object
    u: object
    weights: object
    factors: object


@inline
def memory_of(scratch, weights):
    """Memory from the addresses of the scratch and of the weights."""
    return Memory(pointer_to(scratch, np.float32), pointer_to(scratch, np.int32), pointer_to(scratch, np.uint32),
                  pointer_to(weights, np.int32), pointer_to(weights, np.float32))


@inline
def take_apart(m, at, j, first, width, apart, kept):
    """Move the features j (apart,) that lie in first .. first + width from a row at `at` to kept, leaving zeros."""
    for k in range(apart):
        column = np.int64(m.weights[j + k]) - first
        if 0 <= column < width:
            m.f[kept + k] = m.f[at + column]
            m.f[at + column] = _ZERO


@inline
def place_of_codes(at_row, groups4, out, r, alone):
    """Where a row at at_row becomes bytes: as row r of those at `out` or, where ADDS_FIRST, in its own place.

    alone: whether it is the only one, which stays bytes where ADDS_FIRST.
    """
    return at_row if ADDS_FIRST and not alone else out + r * groups4 * WORDS


@inline
def split_codes(m, at, groups4, out, r, alone, at_own):
    """Four bytes an element (groups4,) to 16-bit numbers, as products take row r of `out`, where AS_WORDS."""
    if ADDS_FIRST:
        if not alone:
            split_row(m.i, at, groups4, m.i, out, r, at_own)
    elif AS_WORDS:
        for i in range(at, at + groups4, LANES):
            four = load(m.i, i)
            store(m.i, i, four & splat(_EVEN_BYTES))
            store(m.i, i + groups4, shift_right_logical(four, splat(_EIGHT)) & splat(_EVEN_BYTES))


@inline
def quantize_row(m, at, groups4, out, r, alone, at_scale, at_minus, at_own):
    """A row, which changes, to bytes, row r of those at `out`, symmetric: bytes, scale, and what the sum of a channel's
    weights times is added to products.
    """
    largest = float_of_bits(splat(largest_of_row(m.f, at, 4 * groups4)))
    m.f[at_scale] = first_lane(scale_of(largest))
    m.i[at_minus] = np.int32(-OFFSET)
    to = place_of_codes(at, groups4, out, r, alone)
    join_row(m.f, at, 4 * groups4, inverse_of(largest), FLIP, m.i, to)
    split_codes(m, to, groups4, out, r, alone, at_own)


@inline
def quantize_range(m, at, width, out, r, alone, at_scale, at_minus, at_own):
    """A row to bytes with a zero point; otherwise as quantize_row. width a multiple of DEPTH."""
    to = place_of_codes(at, width // 4, out, r, alone)
    high = splat(np.int32(0))
    low = high
    for e in range(0, width, LANES):  # as integers: a NaN is larger than all numbers
        bits = bits_of(load(m.f, at + e))
        high, low = maximum(bits, high), maximum(bits ^ splat(_SIGN), low)
    below = float_of_bits(splat(max_lanes(low)))
    extent = float_of_bits(splat(max_lanes(high))) + below
    m.f[at_scale] = first_lane(select(extent < splat(_INFINITY), extent * splat(_PER_LEVEL), splat(_NAN)))
    inverse = splat(_LEVELS) / extent
    inverse = select(inverse < splat(_LARGEST_FLOAT), inverse, splat(_LARGEST_FLOAT))
    zero = round_to_int(below * inverse)
    m.i[at_minus] = np.int32(128 - OFFSET) - first_lane(zero)
    shift = zero - splat(np.int32(128))
    for e in range(0, width, 4 * LANES):
        i = at + e
        c0 = round_to_int(load(m.f, i) * inverse) + shift
        c1 = round_to_int(load(m.f, i + LANES) * inverse) + shift
        c2 = round_to_int(load(m.f, i + 2 * LANES) * inverse) + shift
        c3 = round_to_int(load(m.f, i + 3 * LANES) * inverse) + shift
        store(m.i, to + e // 4, join_bytes(c0, c1, c2, c3) ^ splat(FLIP))
    split_codes(m, to, width // 4, out, r, alone, at_own)


@task
def quantize_input(m, p, a, row, base, r, alone, own, norm, at_norm, j, apart):
    """Row `row` of x, or its norm, as row r of the bytes at base, the only one if `alone`; own: room for a row."""
    at = own + p.at_row
    read_row(pointer_to(a.x, np.float32), row * p.width, p.width, m.f, at)
    store(m.f, at + round_up(p.width, VIRTUAL_LANES), wide_splat(_ZERO))
    if norm != NO_NORM:
        normalize_row(m.f, at, p.width, norm, m.factors, at_norm)
    take_apart(m, at, j, 0, p.width, apart, base + p.at_apart + r * COLUMNS_APART)
    quantize_row(m, at, p.groups4, base + p.at_bytes, r, alone, base + p.at_scale + r, base + p.at_minus + r,
                 base + p.at_own + r)


@inline
def codes_of_rows(p, base):
    """The Codes of the rows at base."""
    return Codes(base + p.at_bytes, p.groups4, base + p.at_scale, base + p.at_minus, base + p.at_own)
