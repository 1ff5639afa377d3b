"""Rows to bytes that are quantized at run time, and their products with int8 weights.

What linear layers and feed-forwards do with them, GROUP hidden features at a time, is in feed_forward_dynamic.py.

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
from .int8_views import Groups
from .matmul import multiply, multiply_ahead, multiply_in_chains, pace_ahead, round_up
from .norm import NO_NORM, normalize_row, read_row
from .one_row import multiply_row
from .simd import (
    ADDS_FIRST,
    AS_WORDS,
    COLUMNS,
    LANES,
    OFFSET,
    ROWS,
    VIRTUAL_LANES,
    WIDTH,
    bits_of,
    first_lane,
    float_of_bits,
    fma,
    join_bytes,
    load,
    max_lanes,
    maximum,
    outer_product,
    outer_product_of_words,
    pointer_to,
    round_to_int,
    select,
    shift_right_logical,
    splat,
    store,
    tile_accumulate,
    tile_add_columns,
    tile_add_down,
    tile_add_outer,
    tile_map,
    tile_of_products,
    tile_scale,
    tile_store,
    wide_splat,
)
from .word_products import Words, product_of_words, split_row

DEPTH = 64  # what rows of bytes are padded to: whole numbers of vectors of bytes for every instruction set
WORDS = 2 if AS_WORDS else 1  # elements that four bytes of a row take in scratch
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


class Panels(NamedTuple):
    """Where panels of weights are, the channels' sums, and how far behind those minus their own products."""

    at: int
    at_c: int
    own_step: int


class Sums(NamedTuple):
    """Where products go, as float32: rows from `at` on, `row` apart; begun: they are added to what is there.

    finished: they are not, and become y s + b + x_J V_J: where the scales, biases and V, rows `v_step` apart, of these
    channels are, how many features are `apart`, and where x_J of the first row is.
    """

    at: int
    row: int
    begun: bool
    finished: bool
    at_s: int
    at_b: int
    at_v: int
    v_step: int
    apart: int
    at_apart: int


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


# --- rows to bytes -----------------------------------------------------------------------------------------------

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


# --- products ----------------------------------------------------------------------------------------------------

@inline
def scale_and_add(y, factors, at, behind):
    """y times a scale, plus the bias `behind` it."""
    return fma(y, load(factors, at), load(factors, at + behind))


@inline
def finish_tile(tile, t, f, m, x, out):
    """The products of rows from t on and channels from f on, times each row's scale, as `out` says."""
    to = out.at + t * out.row + f
    if out.begun:
        tile_accumulate(tile, m.f, x.at_scale + t, m.f, to, out.row)
    elif out.finished:
        y = tile_map(tile_scale(tile, m.f, x.at_scale + t), scale_and_add, m.factors, out.at_s + f, LANES,
                     out.at_b - out.at_s)
        for k in range(out.apart):
            y = outer_product(y, m.f, out.at_apart + t * COLUMNS_APART + k, COLUMNS_APART, m.factors,
                              out.at_v + k * out.v_step + f)
        tile_store(y, m.f, to, out.row, LANES)
    else:
        tile_store(tile_scale(tile, m.f, x.at_scale + t), m.f, to, out.row, LANES)


@inline
def multiply_tile(tile, t, f, m, x, w, out, at_next, pace):
    """A tile, plus x w^T, finished; of weights from at_next on, `pace` elements for each depth are brought near."""
    groups4 = x.groups4
    at_x, at_w = x.at + t * groups4 * WORDS, w.at + f * groups4
    if AS_WORDS:
        for k in range(groups4):
            tile = outer_product_of_words(tile, m.i, at_x + k, WORDS * groups4, groups4, m.weights, at_w + k * WIDTH)
    elif pace > 0:
        tile = multiply_ahead(tile, m.u, at_x, groups4, 1, m.weights, at_w, groups4, at_next, pace,
                              WIDTH // 2)
    else:
        tile = multiply(tile, m.u, at_x, groups4, 1, m.weights, at_w, groups4)
    finish_tile(tile, t, f, m, x, out)


@inline
def multiply_tile_of_row(tile, t, f, m, x, w, out):
    """multiply_tile() of one row."""
    if AS_WORDS:
        multiply_tile(tile, t, f, m, x, w, out, 0, 0)
    else:
        tile = multiply_in_chains(tile, m.u, x.at + t * x.groups4, 1, m.weights, w.at + f * x.groups4, x.groups4)
        finish_tile(tile, t, f, m, x, out)


@inline
def product_of_bytes(m, x, rows, w, features, out):
    """product_rows() of bytes, or of words as they are."""
    at_minus, at_c, pace = x.at_minus, w.at_c, pace_ahead(rows, ROWS)
    for f in range(0, features, WIDTH):
        t, at_next = 0, w.at + (f + WIDTH) * x.groups4
        while t < rows:
            left = rows - t
            if left >= ROWS:
                tile = tile_of_products(ROWS, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, pace)
                at_next += pace * x.groups4
                t += ROWS
            elif left >= 4:
                tile = tile_of_products(4, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 4
            elif left == 3:
                tile = tile_of_products(3, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 3
            elif left == 2:
                tile = tile_of_products(2, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile(tile, t, f, m, x, w, out, at_next, 0)
                t += 2
            else:
                tile = tile_of_products(1, COLUMNS, m.i, at_minus + t, m.weights, at_c + f)
                multiply_tile_of_row(tile, t, f, m, x, w, out)
                t += 1


@inline
def start_sums(tile, t, f, m, x, w, out):
    """What a tile of zeros is before products are added."""
    tile = tile_add_outer(tile, m.i, x.at_minus + t, m.weights, w.at_c + f)
    return tile_add_columns(tile_add_down(tile, m.i, x.at_own + t), m.weights, w.at_c + w.own_step + f)


@inline
def finish_sums(tile, rows, t, f, m, x, w, out):
    """finish_tile(), as product_of_words calls it."""
    finish_tile(tile, t, f, m, x, out)


@task
def product_rows(m, x, rows, w, features, out, at_wide):
    """out (rows, features) = scale (x w^T + minus c), or what `out` says.

    x: Codes; w: Panels (features / WIDTH, groups4, WIDTH); c (features,): sums of w; out: Sums; at_wide: room for words
    """
    if ADDS_FIRST:
        if rows == 1:
            for f in range(0, features, WIDTH):
                tile = tile_of_products(1, COLUMNS, m.i, x.at_minus, m.weights, w.at_c + f)
                tile = multiply_row(tile, Groups(m.u, x.at, 0, 1), m.weights, w.at + f * x.groups4, x.groups4)
                finish_tile(tile, 0, f, m, x, out)
            return
        product_of_words(start_sums, finish_sums, (m, x, w, out), Words(m.i, x.at, x.groups4, at_wide), rows,
                         m.weights, w.at, features)
    else:
        product_of_bytes(m, x, rows, w, features, out)


@task
def scale_rows(m, at, row_step, rows, features, at_s, at_b, at_v, v_step, apart, at_apart):
    """y = y s + b, then + x_J V_J for each J; y (rows, features) at `at`."""
    for r in range(rows):
        here, kept = at + r * row_step, at_apart + r * COLUMNS_APART
        for f in range(0, features, LANES):
            y = fma(load(m.f, here + f), load(m.factors, at_s + f), load(m.factors, at_b + f))
            for k in range(apart):
                y = fma(splat(m.f[kept + k]), load(m.factors, at_v + k * v_step + f), y)
            store(m.f, here + f, y)


@inline
def add_second(m, at, out_up, low, lows):
    """Add to channels `low` (lows,) of a row at `at` what their second ones, behind out_up channels, hold."""
    for k in range(lows):
        channel = np.int64(m.weights[low + k])
        m.f[at + channel] = m.f[at + channel] + m.f[at + out_up + k]
