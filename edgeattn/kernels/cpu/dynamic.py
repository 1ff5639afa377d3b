"""Quantizing at run time, and attention of one head over the bytes: what layers and functions share.

Letters as in fused.py; sizes with a 4 count groups of four bytes.  Tokens are lanes: what is quantized is (features, W)
in float32, and every token of every head gets a scale of its own.

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

from edgeattn.runtime.jit import inline

from .fused import mask_scores
from .matmul import MATRIX, MATRIX_DEPTH, lane_product
from .simd import (
    LANES,
    OFFSET,
    WIDTH,
    bits_of,
    broadcast,
    dot_bytes,
    first_lane,
    float_of_bits,
    fma,
    join_bytes,
    lane_index,
    load,
    max_lanes,
    maximum,
    pack_bytes,
    round_to_int,
    select,
    splat,
    store,
    store_bytes,
    sum_lanes,
    tile_get,
    tile_load,
    tile_map,
    tile_row_sums,
    to_float,
    transpose_block,
)
from .softmax import exp2, exp2_roughly, exp2_within, log2_roughly

TOKENS = 32  # tokens that are quantized at a time: whole blocks of W for every instruction set
BLOCKS = TOKENS // WIDTH
KEY_BLOCK = 256  # keys whose scores are kept at a time, counted from the first one on
STEP = 4 * LANES  # bytes that are joined at a time
SHIFT = 0 if MATRIX else OFFSET  # what is added to the signed bytes in lanes before a product
FLIP = np.int32(-2139062144) if SHIFT else np.int32(0)  # four bytes plus SHIFT
_PROBABILITY_FLIP = np.int32(-2139062144) if OFFSET else np.int32(0)
_ONES = np.int32(0x01010101)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_NAN = np.float32(np.nan)
_INFINITY = np.float32(np.inf)
_LARGEST = np.float32(127)
_LARGEST_FLOAT = np.float32(3.4028235e38)
_LOG2_LARGEST = np.float32(np.log2(127))
_LOG2_TOP = np.float32(np.log2(254))  # a half more, and what exp2_roughly is off, still rounds to a byte
SMALL = np.float32(3.5)
_LEVEL = np.float32(-128)  # from 0 .. 255 to bytes with a sign
_GOLDEN = np.int32(-1640531527)  # 2**32 times the golden ratio's fraction: steps of it fall evenly, each some apart too
_TO_FRACTION = np.float32(2.0**-32)
_NO_WEIGHT = np.float32(-5000)  # what a mask lowers by as much has no weight beside anything that it does not
_SMALLEST = np.float32(1e-30)  # its reciprocal is a float32 too
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
def quantize_rows(x, at, E, tokens, rows, flip, out, at_out, scales, at_scales, private, private_f, at_inverse,
                  at_tail):
    """`tokens` rows of x to bytes (rows, depth_groups(E)) in the order of `join_bytes`, and their scales; others are 0.

    rows a multiple of LANES; scales (rows,); private: inverse (rows,), tail (STEP,)
    """
    E4 = depth_groups(E)
    whole = E // STEP * STEP
    for t in range(tokens):
        bits = largest_of_row(x, at + t * E, whole)
        if whole < E:
            copy_tail(x, at + t * E, whole, E, private_f, at_tail)
            bits = max(bits, largest_of_row(private_f, at_tail, STEP))
        private[at_inverse + t] = bits
    for t in range(tokens, rows):
        private[at_inverse + t] = np.int32(0)
    for t in range(0, rows, LANES):
        largest = load(private_f, at_inverse + t)
        store(scales, at_scales + t, scale_of(largest))
        store(private_f, at_inverse + t, inverse_of(largest))
    for t in range(tokens):
        inverse = broadcast(private_f, at_inverse + t)
        join_row(x, at + t * E, whole, inverse, flip, out, at_out + t * E4)
        if whole < E:
            copy_tail(x, at + t * E, whole, E, private_f, at_tail)
            join_row(private_f, at_tail, STEP, inverse, flip, out, at_out + t * E4 + whole // 4)
    for i in range(at_out + tokens * E4, at_out + rows * E4, LANES):
        store(out, i, splat(flip))


@inline
def turn(source, at, rows, columns, target, at_target):
    """target (columns, rows) = source (rows, columns)^T, 32-bit elements, both multiples of LANES."""
    for j in range(0, columns, LANES):
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
    """x (rows, W) times `inverse` as bytes, four rows to a lane: out (rows / 4, W); the sum of the codes per lane."""
    total = splat(np.int32(0))
    for d in range(0, rows, 4):
        i = at + d * WIDTH
        c0 = round_to_int(load(x, i) * inverse)
        c1 = round_to_int(load(x, i + WIDTH) * inverse)
        c2 = round_to_int(load(x, i + 2 * WIDTH) * inverse)
        c3 = round_to_int(load(x, i + 3 * WIDTH) * inverse)
        if SHIFT:
            total = total + ((c0 + c1) + (c2 + c3))
        store(out, at_out + d // 4 * WIDTH, pack_bytes(c0, c1, c2, c3, np.int32(0)) ^ splat(flip))
    return total


@inline
def quantize_queries(x, at, rows, out, at_out, scales, at_scales):
    """x (rows, W) to bytes (rows / 4, W), plus SHIFT, and the scale of each lane."""
    for c in range(0, WIDTH, LANES):
        largest = largest_rows(x, at + c, rows)
        store(scales, at_scales + c, scale_of(largest))
        pack_rows(x, at + c, rows, inverse_of(largest), FLIP, out, at_out + c)


@inline
def quantize_keys(x, at, rows, out, at_out, scales, at_scales, terms, at_terms):
    """x (rows, W) to bytes (rows / 4, W), the scale of each lane, and what SHIFT adds to a product with it, negated."""
    for c in range(0, WIDTH, LANES):
        largest = largest_rows(x, at + c, rows)
        store(scales, at_scales + c, scale_of(largest))
        total = pack_rows(x, at + c, rows, inverse_of(largest), np.int32(0), out, at_out + c)
        if SHIFT:
            store(terms, at_terms + c, total * splat(np.int32(-SHIFT)))


@inline
def unit_of(sizes, at, seen, at_seen):
    """The power of two up to which the largest of a block's sizes (TOKENS,) that are seen, and finite, goes; 1 of none.

    What their head's values are measured in: not below _SMALLEST_UNIT, which leaves a quotient by a sum a float32.
    """
    best = _ZERO
    for s in range(TOKENS):
        size = sizes[at + s]
        if seen[at_seen + s] != 0 and best < size < _INFINITY:
            best = size
    unit = float_of_bits(bits_of(splat(best)) & splat(_EXPONENT))
    unit = select(unit < splat(_SMALLEST_UNIT), splat(_SMALLEST_UNIT), unit)
    return first_lane(unit) if best > _ZERO else _ONE


@inline
def quantize_values(x, at, rows, unit, out, at_out, row_bytes, logs, at_logs, inverses, at_inverses):
    """x (rows, W) to rows of bytes, row_bytes apart, and the scale of each lane: its base-2 logarithm and inverse.

    Both in units of `unit`.  The logarithm is found roughly, the inverse from that exactly, the codes from the inverse:
    they fit one another.  A lane that is not finite gets a NaN for a logarithm, which shows in its scores, where masks
    are: it goes where it may be seen.
    """
    lowest = max(unit * _SMALLEST_VALUE, _SMALLEST_SIZE)
    for c in range(0, WIDTH, LANES):
        largest = largest_rows(x, at + c, rows)
        size = select(largest > splat(lowest), largest, splat(lowest))
        size = select(size < splat(_LARGEST_FLOAT), size, splat(_LARGEST_FLOAT))
        log = log2_roughly(size) - splat(_LOG2_LARGEST)
        inverse = exp2_within(splat(_ZERO) - log)
        store(logs, at_logs + c, (log - log2_roughly(splat(unit))) + largest * splat(_ZERO))
        store(inverses, at_inverses + c, inverse * splat(unit))
        for d in range(rows):
            codes = round_to_int(load(x, at + d * WIDTH + c) * inverse)
            store_bytes(out, at_out + d * row_bytes + c, codes)


@inline
def mark_seen(seen, at, first, keys, keep, at_keep, keep_head, keep_row, keep_key, bias, at_bias, bias_head, bias_row,
              bias_key, heads, queries, band, low_edge, high_edge):
    """seen (TOKENS,) = whether any query of any head may see key first + s of `keys`; how many are seen."""
    there, count = 0, 0
    masked = keep.size > 0 or bias.size > 0
    for s in range(TOKENS):
        key = first + s
        is_there = key < keys and (not band or low_edge <= key <= queries - 1 + high_edge)
        there += is_there
        seen[at + s] = is_there and not masked
    if not masked:
        return there
    for h in range(heads if keep_head != 0 or bias_head != 0 else 1):
        for q in range(queries if keep_row != 0 or bias_row != 0 else 1):
            for s in range(min(TOKENS, keys - first)):
                key = first + s
                if seen[at + s] != 0 or band and not (low_edge <= key <= queries - 1 + high_edge):
                    continue
                if keep.size > 0 and keep[at_keep + h * keep_head + q * keep_row + key * keep_key] == 0:
                    continue
                if bias.size > 0 and not (bias[at_bias + h * bias_head + q * bias_row + key * bias_key] > _NO_WEIGHT):
                    continue
                seen[at + s] = 1
                count += 1
            if count == there:
                return count
    return count


@inline
def choose_block(seen, at, keys, keep, at_keep, keep_head, keep_row, keep_key, bias, at_bias, bias_head, bias_row,
                 bias_key, heads, queries, band, low_edge, high_edge):
    """The block of TOKENS keys whose mean is left out, and seen (TOKENS,): which of its keys `mark_seen` marks.

    The first of whose keys at least a quarter is seen; where there is none, the one with the most.
    """
    best, most, blocks = 0, -1, (keys + TOKENS - 1) // TOKENS
    for i in range(blocks + 1):
        block = i if i < blocks else best  # once more, where the last one was not the best
        count = mark_seen(seen, at, block * TOKENS, keys, keep, at_keep, keep_head, keep_row, keep_key, bias, at_bias,
                          bias_head, bias_row, bias_key, heads, queries, band, low_edge, high_edge)
        if count > most:
            best, most = block, count
        if 4 * count >= TOKENS:
            break
    return best


@inline
def weigh_tokens(weights, at, seen, at_seen):
    """weights (TOKENS,), magnitudes of a block's keys, to their parts in a mean: alike in units of those magnitudes.

    So that a large one does not outweigh all others; none for what no query sees, and for what is not finite.
    """
    total = _ZERO
    for s in range(TOKENS):
        weight, size = _ZERO, weights[at + s]
        if seen[at_seen + s] != 0 and _SMALLEST < size < _INFINITY:
            weight = _ONE / size
        weights[at + s] = weight
        total += weight
    for s in range(TOKENS):
        weights[at + s] /= max(total, _SMALLEST)


@inline
def weigh(v, weights, at, plane):
    """v times weights[at:], 0 where the weight is 0 whatever v is there."""
    w = load(weights, at)
    return select(w > splat(_ZERO), v * w, splat(_ZERO))


@inline
def token_sums(values, at, block_step, j, at_weight):
    """Of LANES rows, the weighted sums over the tokens from j LANES on, LANES of them."""
    b, c = j * LANES // WIDTH, j * LANES % WIDTH
    tile = tile_load(LANES, 1, values, at + b * block_step + c, WIDTH, 0)
    return tile_get(tile_row_sums(tile_map(tile, weigh, values, at_weight + j * LANES, 0, 0)), 0, 0)


@inline
def pair_sums(values, at, block_step, j, at_weight):
    """`token_sums` of j and of j + 1."""
    return token_sums(values, at, block_step, j, at_weight) + token_sums(values, at, block_step, j + 1, at_weight)


@inline
def subtract_mean(values, at, block_step, rows, at_weight, shared, at_mean):
    """values (blocks, rows, W) minus their weighted mean over all tokens, which is left, negative, in shared[at_mean:].

    The sums are trees of neighbours, the same for every number of lanes.
    """
    for d in range(0, rows, LANES):
        here = at + d * WIDTH
        total = pair_sums(values, here, block_step, 0, at_weight)
        if TOKENS // LANES >= 4:
            total = total + pair_sums(values, here, block_step, 2, at_weight)
        if TOKENS // LANES == 8:
            total = total + (pair_sums(values, here, block_step, 4, at_weight)
                             + pair_sums(values, here, block_step, 6, at_weight))
        store(shared, at_mean + d, splat(_ZERO) - total)
    for b in range(BLOCKS):
        for d in range(rows):
            minus = broadcast(shared, at_mean + d)
            for c in range(0, WIDTH, LANES):
                i = at + b * block_step + d * WIDTH + c
                store(values, i, load(values, i) + minus)


@inline
def keys_to_rows(packed, at, depth4, keys, at_keys, row):
    """keys (W, row): the bytes (depth4, W), one token after the other; depth4 a multiple of LANES."""
    for g in range(0, depth4, LANES):
        for c in range(0, WIDTH, LANES):
            transpose_block(packed, at + g * WIDTH + c, WIDTH, keys, at_keys + c * row + g, row)


@inline
def score(products, at, terms, at_term, scales, at_scale, q_scale, logs, at_log):
    """Four-byte products of one key with LANES queries, as scores."""
    x = load(products, at)
    if SHIFT:
        x = x + broadcast(terms, at_term)
    return fma(to_float(x) * broadcast(scales, at_scale), q_scale, broadcast(logs, at_log))


@inline
def fill_dither(dither, at, keys):
    """dither (KEY_BLOCK,): what is added to the small probabilities of `keys` or more of a block's keys, and _LEVEL."""
    for s in range(0, min(KEY_BLOCK, keys), LANES):
        steps = (lane_index() + splat(np.int32(s))) * splat(_GOLDEN)
        store(dither, at + s, fma(to_float(steps), splat(_TO_FRACTION), splat(_LEVEL)))


@inline
def probability(scores, at, base, masked):
    """254 times the exponential of LANES scores; exactly 0 for those of -inf where there are such."""
    w = load(scores, at)
    p = exp2_roughly(w - base)
    if masked:
        p = select(w == splat(-_INFINITY), splat(_ZERO), p)
    return p


@inline
def probability_code(p, dither, at):
    """A probability of one key as a byte, less 128."""
    return round_to_int(p + select(p < splat(SMALL), broadcast(dither, at), splat(_LEVEL)))


@inline
def add_bias(scores, at, keys, logs, at_log, masks, at_mask):
    """Float mask to scores (keys, W), in place, which lose the logarithm of the values' scale for that.

    A mask may be so large that a score is lost in the sum, but then it is lost for all keys of a row alike.
    """
    for s in range(keys):
        log = broadcast(logs, at_log + s)
        for c in range(0, WIDTH, LANES):
            i = s * WIDTH + c
            m = load(masks, at_mask + i)
            v = (load(scores, at + i) - log) + m
            store(scores, at + i, select(m == splat(-_INFINITY), m, v))


@inline
def largest_score(scores, at, keys):
    """The largest of LANES queries' scores with `keys` keys, -inf where there is none."""
    m = splat(-_INFINITY)
    for s in range(keys):
        m = maximum(load(scores, at + s * WIDTH), m)
    return m


@inline
def center_scores(scores, at, keys, logs, at_log):
    """The scores of `add_bias` less their largest, which is returned, and with the logarithm of the values' scale."""
    m = largest_score(scores, at, keys)
    top = select(m == splat(-_INFINITY), splat(_ZERO), m)
    for s in range(keys):
        v = load(scores, at + s * WIDTH)
        w = (v - top) + broadcast(logs, at_log + s)
        store(scores, at + s * WIDTH, select(v == splat(-_INFINITY), v, w))
    return top


@inline
def value_total(v, at, groups):
    """128 times the sum of the bytes in `groups` groups: what is missing where probabilities are bytes minus 128."""
    sums = splat(np.int32(0))
    whole = groups // LANES * LANES
    for g in range(0, whole, LANES):
        sums = dot_bytes(sums, splat(_ONES), load(v, at + g))
    total = sum_lanes(sums)
    for g in range(whole, groups):
        for j in range(4):
            total += np.int32(np.int8(v[at + g] >> np.int32(8 * j)))
    return np.int32(128 * total)


@inline
def attend_bytes(q, at_q, depth4, q_scales, at_q_scale, k, at_k, k_row, k_terms, at_term, k_scales, at_k_scale,
                 v, at_v, v_row, v_logs, at_log, v_inverses, at_inverse, unit, first, last, rows, scratch, scratch_u,
                 scratch_f, at_scores, at_p, at_stats, at_dither, out, at_out, q0, band, low_edge, high_edge,
                 full_from, full_to, masks, at_masks, has_mask, has_bias):
    """Attention of one head for W queries over the keys first..last, `first` a multiple of 4: out (rows, W).

    q        uint32: bytes (depth4, W), plus SHIFT, depth4 a multiple of MATRIX_DEPTH; q_scales (W,), in units of log 2
    k        int32: bytes, rows k_row apart; k_terms, k_scales per key
    v        int32: bytes, a row of keys per value feature, v_row apart; v_logs, v_inverses per key, relative to unit
    scratch  scores (KEY_BLOCK or `rows`, and ROW_STEP, W), p (KEY_BLOCK / 4, W), stats (6, W), dither (KEY_BLOCK,)
    masks    (last - first, W), as fill_mask writes them

    Blocks begin at multiples of KEY_BLOCK, wherever `first` is: what a query gets does not depend on its neighbours.
    stats: of the block with the largest score so far that score, in two parts, of which the second is 0 without a
    float mask; the divisor in units of that block; and the same of the block at hand.
    """
    masked = band or has_mask
    at_top, at_total, at_new_top = at_stats, at_stats + WIDTH, at_stats + 2 * WIDTH
    at_shift, at_new_shift, at_factor = at_stats + 3 * WIDTH, at_stats + 4 * WIDTH, at_stats + 5 * WIDTH
    for i in range(0, WIDTH, LANES):
        store(scratch_f, at_new_shift + i, splat(_ZERO))
    if first >= last:
        for i in range(at_out, at_out + rows * WIDTH, LANES):
            store(out, i, splat(_ZERO))
    s0, keys = first, 0
    while s0 < last:
        keys = min(KEY_BLOCK - s0 % KEY_BLOCK, last - s0)
        whole, groups = keys // 4 * 4, (keys + 3) // 4
        deep = (groups + MATRIX_DEPTH - 1) // MATRIX_DEPTH * MATRIX_DEPTH
        is_last = s0 + keys >= last
        # 1. scores, and the largest of each query
        lane_product(False, False, k, at_k + s0 * k_row, k_row, keys, q, at_q, depth4, scratch, at_scores)
        term, k_scale, log, ivs = at_term + s0, at_k_scale + s0, at_log + s0, at_inverse + s0
        for c in range(0, WIDTH, LANES):
            at = at_scores + c
            qs = load(q_scales, at_q_scale + c)
            m0 = splat(-_INFINITY)
            m1, m2, m3 = m0, m0, m0
            for s in range(0, whole, 4):
                i = at + s * WIDTH
                w0 = score(scratch, i, k_terms, term + s, k_scales, k_scale + s, qs, v_logs, log + s)
                w1 = score(scratch, i + WIDTH, k_terms, term + s + 1, k_scales, k_scale + s + 1, qs,
                           v_logs, log + s + 1)
                w2 = score(scratch, i + 2 * WIDTH, k_terms, term + s + 2, k_scales, k_scale + s + 2, qs,
                           v_logs, log + s + 2)
                w3 = score(scratch, i + 3 * WIDTH, k_terms, term + s + 3, k_scales, k_scale + s + 3, qs,
                           v_logs, log + s + 3)
                m0, m1, m2, m3 = maximum(w0, m0), maximum(w1, m1), maximum(w2, m2), maximum(w3, m3)
                store(scratch_f, i, w0)
                store(scratch_f, i + WIDTH, w1)
                store(scratch_f, i + 2 * WIDTH, w2)
                store(scratch_f, i + 3 * WIDTH, w3)
            for s in range(whole, keys):
                w0 = score(scratch, at + s * WIDTH, k_terms, term + s, k_scales, k_scale + s, qs, v_logs, log + s)
                m0 = maximum(w0, m0)
                store(scratch_f, at + s * WIDTH, w0)
            for s in range(keys, groups * 4):
                store(scratch_f, at + s * WIDTH, splat(-_INFINITY))
            store(scratch_f, at_new_top + c, maximum(maximum(m0, m1), maximum(m2, m3)))
        if masked:
            at_mask = at_masks + (s0 - first) * WIDTH
            if has_bias:
                add_bias(scratch_f, at_scores, keys, v_logs, log, masks, at_mask)
            mask_scores(scratch_f, at_scores, keys, s0, q0, band, low_edge, high_edge, full_from, full_to,
                        masks, at_mask, has_mask and not has_bias)
            for c in range(0, WIDTH, LANES):
                if has_bias:
                    store(scratch_f, at_new_shift + c, center_scores(scratch_f, at_scores + c, keys, v_logs, log))
                store(scratch_f, at_new_top + c, largest_score(scratch_f, at_scores + c, keys))
        # 2. exponentials as bytes, and their sum without the values' scales
        from_dither = at_dither + s0 % KEY_BLOCK
        for c in range(0, WIDTH, LANES):
            at = at_scores + c
            top = load(scratch_f, at_new_top + c)
            base = select(top == splat(-_INFINITY), splat(_ZERO), top) - splat(_LOG2_TOP)
            t0 = splat(_ZERO)
            t1, t2, t3 = t0, t0, t0
            for g in range(groups):
                i, s = at + 4 * g * WIDTH, 4 * g
                if masked or s >= whole:
                    p0, p1 = probability(scratch_f, i, base, True), probability(scratch_f, i + WIDTH, base, True)
                    p2 = probability(scratch_f, i + 2 * WIDTH, base, True)
                    p3 = probability(scratch_f, i + 3 * WIDTH, base, True)
                else:
                    p0, p1 = probability(scratch_f, i, base, False), probability(scratch_f, i + WIDTH, base, False)
                    p2 = probability(scratch_f, i + 2 * WIDTH, base, False)
                    p3 = probability(scratch_f, i + 3 * WIDTH, base, False)
                t0 = fma(p0, broadcast(v_inverses, ivs + s), t0)
                t1 = fma(p1, broadcast(v_inverses, ivs + s + 1), t1)
                t2 = fma(p2, broadcast(v_inverses, ivs + s + 2), t2)
                t3 = fma(p3, broadcast(v_inverses, ivs + s + 3), t3)
                d = from_dither + s
                four = pack_bytes(probability_code(p0, scratch_f, d), probability_code(p1, scratch_f, d + 1),
                                  probability_code(p2, scratch_f, d + 2), probability_code(p3, scratch_f, d + 3),
                                  np.int32(0))
                store(scratch, at_p + g * WIDTH + c, four ^ splat(_PROBABILITY_FLIP))
            for g in range(groups, deep):
                store(scratch, at_p + g * WIDTH + c, splat(np.int32(0)))
            total, shift = (t0 + t1) + (t2 + t3), load(scratch_f, at_new_shift + c)
            # what turns the context so far, and what it gets now, into the context; that, at the end, into the result
            before, now = splat(_ONE), splat(_ONE)
            if s0 > first:
                old_top, old_shift = load(scratch_f, at_top + c), load(scratch_f, at_shift + c)
                up = (top - old_top) + (shift - old_shift)  # NaN where no key was seen yet
                is_up = up > splat(_ZERO)
                before = exp2(select(is_up, splat(_ZERO) - up, splat(_ZERO)))
                now = exp2(select(up < splat(_ZERO), up, splat(_ZERO)))
                total = fma(load(scratch_f, at_total + c), before, total * now)
                top, shift = select(is_up, top, old_top), select(is_up, shift, old_shift)
            store(scratch_f, at_top + c, top)
            store(scratch_f, at_shift + c, shift)
            store(scratch_f, at_total + c, total)
            store(scratch_f, at_new_top + c, before)
            store(scratch_f, at_factor + c, now)
            if is_last:  # a query that saw no key gets zeros
                total = select(total == splat(_ZERO), splat(_ZERO), splat(unit) / total)
                store(scratch_f, at_total + c, total)
        # 3. context
        lane_product(True, False, v, at_v + s0 // 4, v_row, rows, scratch_u, at_p, deep, scratch, at_scores)
        for d in range(rows):
            missing = np.int32(0)
            if OFFSET == 0:
                missing = value_total(v, at_v + s0 // 4 + d * v_row, groups)
            for c in range(0, WIDTH, LANES):
                i = d * WIDTH + c
                now = load(scratch, at_scores + i)
                if OFFSET == 0:
                    now = now + splat(missing)
                context = to_float(now) * load(scratch_f, at_factor + c)
                if s0 > first:
                    context = fma(load(out, at_out + i), load(scratch_f, at_new_top + c), context)
                if is_last:
                    context = context * load(scratch_f, at_total + c)
                store(out, at_out + i, context)
        s0 += keys
