"""Quantizing at run time: what layers and functions share, as are key_mean.py and attend_dynamic.py.

Letters as in attend_lanes.py; sizes with a 4 count groups of four bytes.  Tokens are lanes: what is quantized is
(features, W) in float32, and every token of every head gets a scale of its own.

    scores        w = k_scale q_scale (k q) + log2(v_scale), in units of log 2
    probabilities p = 254 * 2**(w - max(w)), the largest of every KEY_BLOCK keys 254 whatever the values' scales are
    context       sum of round(p + d) v / sum of p / v_scale, of each block; then the blocks by 2**max(w)

What is added before rounding, d, is between -1/2 and 1/2, different for the keys of a block and 0 for a p of SMALL or
more: many small weights of a block lose or gain nothing together, large ones go to the nearest byte.  The divisor is
not rounded: where a key of much weight has a small value, as sinks have, its p is small, too coarse to count with.

Logarithms and scales of values are relative to a power of two near those of their head, for values of any size.

The float operations are the same in the same order under every instruction set: where they can multiply and add with
one rounding, results are equal bit for bit.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .int8_operands import LANE_FLIP, store_lane_term, sum_codes
from .simd import (
    LANES,
    WIDTH,
    bits_of,
    broadcast,
    first_lane,
    float_of_bits,
    join_bytes,
    load,
    max_lanes,
    maximum,
    pack_bytes,
    round_to_int,
    select,
    splat,
    store,
    store_bytes,
    transpose_block,
)
from .softmax import exp2_within, log2_roughly

TOKENS = 32  # tokens that are quantized at a time: whole blocks of W for every instruction set
BLOCKS = TOKENS // WIDTH
STEP = 4 * LANES  # bytes that are joined at a time
COLUMNS_APART = 4  # features of an input that may be apart from the bytes
_ZERO = np.float32(0)
_ONE = np.float32(1)
_NAN = np.float32(np.nan)
_INFINITY = np.float32(np.inf)
_LARGEST = np.float32(127)
_LARGEST_FLOAT = np.float32(3.4028235e38)
_LOG2_LARGEST = np.float32(np.log2(127))
_SMALLEST_VALUE = np.float32(127 * 2.0**-60)  # values have a scale of 2**-60 at least, in units of their head,
_SMALLEST_SIZE = np.float32(127 * 2.0**-126)  # and one whose inverse is a float32 too
_SMALLEST_UNIT, _EXPONENT = np.float32(2.0**-80), np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inline
def maximum_bits(v, best):
    """max(|v|, best) as bits of float32, where NaN is largest and then infinity."""
    return maximum(bits_of(v) & splat(_MAGNITUDE), best)


@inline
def scale_of(largest):
    """The scale of a token whose largest magnitude is `largest`; NaN where that is not finite."""
    return select(largest < splat(_INFINITY), largest * splat(np.float32(1 / 127)), splat(_NAN))


@inline
def inverse_of(largest):
    """What a token is multiplied by to become codes within +-127."""
    inverse = splat(_LARGEST) / largest
    return select(inverse < splat(_LARGEST_FLOAT), inverse, splat(_LARGEST_FLOAT))


@inline
def join_row(x, at, depth, inverse, flip, out, at_out):
    """`depth` numbers, a multiple of STEP, as bytes."""
    for e in range(0, depth, STEP):
        c0 = round_to_int(load(x, at + e) * inverse)
        c1 = round_to_int(load(x, at + e + LANES) * inverse)
        c2 = round_to_int(load(x, at + e + 2 * LANES) * inverse)
        c3 = round_to_int(load(x, at + e + 3 * LANES) * inverse)
        store(out, at_out + e // 4, join_bytes(c0, c1, c2, c3) ^ splat(flip))


@inline
def largest_of_row(x, at, depth):
    """Bits of the largest magnitude of `depth` numbers, a multiple of STEP."""
    nothing = splat(np.int32(0))
    b0, b1, b2, b3 = nothing, nothing, nothing, nothing
    for e in range(0, depth, STEP):
        b0 = maximum_bits(load(x, at + e), b0)
        b1 = maximum_bits(load(x, at + e + LANES), b1)
        b2 = maximum_bits(load(x, at + e + 2 * LANES), b2)
        b3 = maximum_bits(load(x, at + e + 3 * LANES), b3)
    return max_lanes(maximum(maximum(b0, b1), maximum(b2, b3)))


@inline
def copy_tail(x, at, whole, E, tail, at_tail):
    """tail (STEP,) = x[whole:E] and zeros."""
    for i in range(STEP):
        tail[at_tail + i] = x[at + whole + i] if whole + i < E else _ZERO


@inline
def depth_groups(E):
    """Groups of four bytes that E numbers of a token take, E counted up to a multiple of STEP."""
    return (E + STEP - 1) // STEP * (STEP // 4)


@inline
def quantize_rows(x, E, tokens, rows, flip, out, scales, own, at_inverse, at_tail):
    """`tokens` rows of x to bytes (tokens, depth_groups(E)) in the order of `join_bytes`, and scales (rows,), others 0.

    x, out, scales: Parts; rows a multiple of LANES; own: Scratch, inverse (rows,), tail (STEP,)
    """
    E4 = depth_groups(E)
    whole = E // STEP * STEP
    for t in range(tokens):
        bits = largest_of_row(x.data, x.at + t * E, whole)
        if whole < E:
            copy_tail(x.data, x.at + t * E, whole, E, own.float32, at_tail)
            bits = max(bits, largest_of_row(own.float32, at_tail, STEP))
        own.int32[at_inverse + t] = bits
    for t in range(tokens, rows):
        own.int32[at_inverse + t] = np.int32(0)
    for t in range(0, rows, LANES):
        largest = load(own.float32, at_inverse + t)
        store(scales.data, scales.at + t, scale_of(largest))
        store(own.float32, at_inverse + t, inverse_of(largest))
    for t in range(tokens):
        inverse = broadcast(own.float32, at_inverse + t)
        join_row(x.data, x.at + t * E, whole, inverse, flip, out.data, out.at + t * E4)
        if whole < E:
            copy_tail(x.data, x.at + t * E, whole, E, own.float32, at_tail)
            join_row(own.float32, at_tail, STEP, inverse, flip, out.data, out.at + t * E4 + whole // 4)


@inline
def turn(source, at, rows, columns, count, target, at_target):
    """target (columns, rows) = source (rows, columns)^T, 32-bit elements, both multiples of LANES; `count` columns."""
    for j in range(0, count, LANES):
        for i in range(0, rows, LANES):
            transpose_block(source, at + i * columns + j, columns, target, at_target + j * rows + i, rows)


@inline
def largest_rows(x, at, rows):
    """Largest magnitude per lane of x (rows, W), rows a multiple of 4; NaN where there is one."""
    nothing = splat(np.int32(0))
    b0, b1, b2, b3 = nothing, nothing, nothing, nothing
    for i in range(at, at + rows * WIDTH, 4 * WIDTH):
        b0 = maximum_bits(load(x, i), b0)
        b1 = maximum_bits(load(x, i + WIDTH), b1)
        b2 = maximum_bits(load(x, i + 2 * WIDTH), b2)
        b3 = maximum_bits(load(x, i + 3 * WIDTH), b3)
    return float_of_bits(maximum(maximum(b0, b1), maximum(b2, b3)))


@inline
def pack_rows(x, at, rows, inverse, flip, out, at_out):
    """x (rows, W) times `inverse` as bytes, four rows to a lane: out (rows / 4, W); `sum_codes` per lane."""
    total = splat(np.int32(0))
    for d in range(0, rows, 4):
        i = at + d * WIDTH
        c0 = round_to_int(load(x, i) * inverse)
        c1 = round_to_int(load(x, i + WIDTH) * inverse)
        c2 = round_to_int(load(x, i + 2 * WIDTH) * inverse)
        c3 = round_to_int(load(x, i + 3 * WIDTH) * inverse)
        total = sum_codes(total, c0, c1, c2, c3)
        store(out, at_out + d // 4 * WIDTH, pack_bytes(c0, c1, c2, c3, np.int32(0)) ^ splat(flip))
    return total


# Of the W lanes of what follows `count` hold tokens: only the vectors with such lanes are looked at.

@inline
def quantize_queries(x, rows, count, out, scales):
    """x (rows, W) to bytes (rows / 4, W), plus LANE_SHIFT, and the scale of each lane; all of them Parts."""
    for c in range(0, count, LANES):
        largest = largest_rows(x.data, x.at + c, rows)
        store(scales.data, scales.at + c, scale_of(largest))
        pack_rows(x.data, x.at + c, rows, inverse_of(largest), LANE_FLIP, out.data, out.at + c)


@inline
def quantize_keys(x, rows, count, out, scales, terms):
    """x (rows, W) to bytes (rows / 4, W), the scale of each lane, and what LANE_SHIFT adds to a product, negated."""
    for c in range(0, count, LANES):
        largest = largest_rows(x.data, x.at + c, rows)
        store(scales.data, scales.at + c, scale_of(largest))
        total = pack_rows(x.data, x.at + c, rows, inverse_of(largest), np.int32(0), out.data, out.at + c)
        store_lane_term(total, terms.data, terms.at + c)


@inline
def unit_of(sizes, at, seen, at_seen, tokens):
    """The power of two up to which the largest of some tokens' sizes that are seen, and finite, goes; 1 of none.

    What their head's values are measured in: not below _SMALLEST_UNIT, which leaves a quotient by a sum a float32.
    """
    best = _ZERO
    for s in range(tokens):
        size = sizes[at + s]
        if seen[at_seen + s] != 0 and best < size < _INFINITY:
            best = size
    unit = float_of_bits(bits_of(splat(best)) & splat(_EXPONENT))
    unit = select(unit < splat(_SMALLEST_UNIT), splat(_SMALLEST_UNIT), unit)
    return first_lane(unit) if best > _ZERO else _ONE


@inline
def keep_scale_of_value(largest, unit, logs, inverses, c):
    """Of values whose largest magnitudes are `largest`, what `quantize_values` says, from the c-th of each on.

    Returns what they are multiplied by to become codes.
    """
    lowest = max(unit * _SMALLEST_VALUE, _SMALLEST_SIZE)
    size = select(largest > splat(lowest), largest, splat(lowest))
    size = select(size < splat(_LARGEST_FLOAT), size, splat(_LARGEST_FLOAT))
    log = log2_roughly(size) - splat(_LOG2_LARGEST)
    inverse = exp2_within(splat(_ZERO) - log)
    store(logs.data, logs.at + c, (log - log2_roughly(splat(unit))) + largest * splat(_ZERO))
    store(inverses.data, inverses.at + c, inverse * splat(unit))
    return inverse


@inline
def quantize_values(x, rows, count, unit, out, logs, inverses):
    """x (rows, W) to Rows of bytes, and the scale of each lane: its base-2 logarithm and inverse.

    Both in units of `unit`.  The logarithm is found roughly, the inverse from that exactly, the codes from the inverse:
    they fit one another.  A lane that is not finite gets a NaN for a logarithm, which shows in its scores, where masks
    are: it goes where it may be seen.
    """
    for c in range(0, count, LANES):
        inverse = keep_scale_of_value(largest_rows(x.data, x.at + c, rows), unit, logs, inverses, c)
        for d in range(rows):
            codes = round_to_int(load(x.data, x.at + d * WIDTH + c) * inverse)
            store_bytes(out.data, out.at + d * out.step + c, codes)


@inline
def keys_to_rows(packed, at, depth4, count, keys, at_keys, row):
    """keys (W, row): the bytes (depth4, W), one token after the other; depth4 a multiple of LANES."""
    for g in range(0, depth4, LANES):
        for c in range(0, count, LANES):
            transpose_block(packed, at + g * WIDTH + c, WIDTH, keys, at_keys + c * row + g, row)
