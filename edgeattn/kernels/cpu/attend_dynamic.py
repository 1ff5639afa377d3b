"""Attention of one head over bytes, for W queries, as dynamic.py says: what layers and functions share.

Keys go by in blocks that begin at multiples of KEY_BLOCK, wherever the first key is: what a query gets does not depend
on its neighbours.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, register_jitable

from .byte_products import DEPTH_STEP, READ_AHEAD, lane_product
from .dynamic import TOKENS
from .int8_operands import FLIP, add_lane_term, lacking_sum
from .int8_views import Part
from .matmul import round_up
from .records import place
from .score_masks import mask_scores
from .simd import (
    LANES,
    WIDTH,
    broadcast,
    fma,
    lane_index,
    load,
    maximum,
    pack_bytes,
    round_to_int,
    select,
    splat,
    store,
    to_float,
)
from .softmax import exp2, exp2_roughly
from .views import Rows

KEY_BLOCK = 256  # keys whose scores are kept at a time, counted from the first one on
_ZERO = np.float32(0)
_ONE = np.float32(1)
_INFINITY = np.float32(np.inf)
_LOG2_TOP = np.float32(np.log2(254))  # a half more, and what exp2_roughly is off, still rounds to a byte
SMALL = np.float32(3.5)
_LEVEL = np.float32(-128)  # from 0 .. 255 to bytes with a sign
_GOLDEN = np.int32(-1640531527)  # 2**32 times the golden ratio's fraction: steps of it fall evenly, each some apart too
_TO_FRACTION = np.float32(2.0**-32)


class Queries(NamedTuple):
    """Bytes (depth4, W) plus LANE_SHIFT from data[at] on, depth4 a multiple of DEPTH_STEP; scales (W,), float32.

    The scales are in units of log 2. count: lanes with queries; nothing is found for vectors without any.
    alone: whether there is one, whose context is a row, of whole vectors.
    """

    data: object
    at: int
    depth4: int
    scales: object
    at_scales: int
    count: int
    alone: bool


class Keys(NamedTuple):
    """Rows of bytes from data[at] on, `step` apart; of each key what `store_lane_term` left, and a scale, float32."""

    data: object
    at: int
    step: int
    at_terms: int
    scales: object
    at_scales: int


class Values(NamedTuple):
    """Of each feature a row of bytes from data[at] on, `step` apart; of each key, float32, a logarithm and an inverse.

    Both of its scale, relative to `unit`.
    """

    data: object
    at: int
    step: int
    scales: object
    at_logs: int
    at_inverses: int
    unit: object


class Stats(NamedTuple):
    """Where in scratch, (W,) each, a block of queries keeps what it knows of the keys so far.

    top, shift: the largest score, in two parts, of which the second is 0 without a float mask, of the block that has
    it; total: the divisor in units of that block; new_top, new_shift: of the block of keys at hand, of which the first
    becomes what turns the context so far into the context; factor: what turns into it what is added.
    """

    top: int
    total: int
    new_top: int
    shift: int
    new_shift: int
    factor: int


class Block(NamedTuple):
    """Keys of a block, from s0 on; whether it is the first one, and the last."""

    s0: int
    keys: int
    is_first: bool
    is_last: bool


@register_jitable
def values_row(S):
    """Elements of a row of values, one feature's bytes of all keys: whole vectors of them, and depths of products."""
    return round_up(S, max(4 * DEPTH_STEP, LANES)) // 4


@register_jitable
def lay_out_values(p, start, heads, rows, S):
    """Lay out values, `rows` features of each head, and what scales them and S keys; where the next may begin."""
    S_up = heads * round_up(S, TOKENS)
    p.at_values, size = place(start, (heads * rows + READ_AHEAD) * values_row(S) + READ_AHEAD)
    p.at_kterm, size = place(size, S_up)
    p.at_kscale, size = place(size, S_up)
    p.at_vlog, size = place(size, S_up)
    p.at_vinverse, size = place(size, S_up)
    p.at_units, size = place(size, heads)
    return size


@inline
def values_of(kv, rows, p, shared):
    """The values of a head, `rows` features, that `quantize_values` left."""
    S_up, step = round_up(p.keys, TOKENS), values_row(p.keys)
    return Values(shared.int32, p.at_values + kv * rows * step, step, shared.float32, p.at_vlog + kv * S_up,
                  p.at_vinverse + kv * S_up, shared.float32[p.at_units + kv])


@inline
def score(products, at, keys, values, s, q_scale):
    """Four-byte products of key s with LANES queries, as scores."""
    x = add_lane_term(load(products, at), keys.data, keys.at_terms + s)
    return fma(to_float(x) * broadcast(keys.scales, keys.at_scales + s), q_scale,
               broadcast(values.scales, values.at_logs + s))


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
def score_block(queries, keys, values, block, stats, p, own):
    """Scores (keys, W) of a block, -inf up to a whole group, and the largest of each query."""
    count, s0, at_scores = block.keys, block.s0, p.at_scores
    whole, groups = count // 4 * 4, (count + 3) // 4
    lane_product(False, Rows(keys.data, keys.at + s0 * keys.step, keys.step), count,
                 Part(queries.data, queries.at), queries.depth4, Part(own.int32, at_scores))
    for c in range(0, queries.count, LANES):
        at = at_scores + c
        qs = load(queries.scales, queries.at_scales + c)
        m0 = splat(-_INFINITY)
        m1, m2, m3 = m0, m0, m0
        for s in range(0, whole, 4):
            i = at + s * WIDTH
            w0 = score(own.int32, i, keys, values, s0 + s, qs)
            w1 = score(own.int32, i + WIDTH, keys, values, s0 + s + 1, qs)
            w2 = score(own.int32, i + 2 * WIDTH, keys, values, s0 + s + 2, qs)
            w3 = score(own.int32, i + 3 * WIDTH, keys, values, s0 + s + 3, qs)
            m0, m1, m2, m3 = maximum(w0, m0), maximum(w1, m1), maximum(w2, m2), maximum(w3, m3)
            store(own.float32, i, w0)
            store(own.float32, i + WIDTH, w1)
            store(own.float32, i + 2 * WIDTH, w2)
            store(own.float32, i + 3 * WIDTH, w3)
        for s in range(whole, count):
            w0 = score(own.int32, at + s * WIDTH, keys, values, s0 + s, qs)
            m0 = maximum(w0, m0)
            store(own.float32, at + s * WIDTH, w0)
        for s in range(count, groups * 4):
            store(own.float32, at + s * WIDTH, splat(-_INFINITY))
        store(own.float32, stats.new_top + c, maximum(maximum(m0, m1), maximum(m2, m3)))


@inline
def mask_block(queries, values, block, seen, mask, has_bias, stats, p, own):
    """The same under a mask."""
    count, s0, at_scores, at_log = block.keys, block.s0, p.at_scores, values.at_logs + block.s0
    at_mask = mask.at + (s0 - mask.first) * WIDTH
    if has_bias:
        add_bias(own.float32, at_scores, count, values.scales, at_log, mask.data, at_mask)
    mask_scores(own.float32, at_scores, count, s0, seen, mask, mask.given and not has_bias)
    for c in range(0, queries.count, LANES):
        if has_bias:
            store(own.float32, stats.new_shift + c,
                  center_scores(own.float32, at_scores + c, count, values.scales, at_log))
        store(own.float32, stats.new_top + c, largest_score(own.float32, at_scores + c, count))


@inline
def weigh_lanes(values, block, c, masked, stats, p, own):
    """Exponentials of LANES queries from c on, as bytes; their sum without the values' scales."""
    at, at_p, whole, groups = p.at_scores + c, p.at_probabilities, block.keys // 4 * 4, (block.keys + 3) // 4
    at_dither, ivs = p.at_dither + block.s0 % KEY_BLOCK, values.at_inverses + block.s0
    top = load(own.float32, stats.new_top + c)
    base = select(top == splat(-_INFINITY), splat(_ZERO), top) - splat(_LOG2_TOP)
    t0 = splat(_ZERO)
    t1, t2, t3 = t0, t0, t0
    for g in range(groups):
        i, s = at + 4 * g * WIDTH, 4 * g
        if masked or s >= whole:
            p0, p1 = probability(own.float32, i, base, True), probability(own.float32, i + WIDTH, base, True)
            p2 = probability(own.float32, i + 2 * WIDTH, base, True)
            p3 = probability(own.float32, i + 3 * WIDTH, base, True)
        else:
            p0, p1 = probability(own.float32, i, base, False), probability(own.float32, i + WIDTH, base, False)
            p2 = probability(own.float32, i + 2 * WIDTH, base, False)
            p3 = probability(own.float32, i + 3 * WIDTH, base, False)
        t0 = fma(p0, broadcast(values.scales, ivs + s), t0)
        t1 = fma(p1, broadcast(values.scales, ivs + s + 1), t1)
        t2 = fma(p2, broadcast(values.scales, ivs + s + 2), t2)
        t3 = fma(p3, broadcast(values.scales, ivs + s + 3), t3)
        d = at_dither + s
        four = pack_bytes(probability_code(p0, own.float32, d), probability_code(p1, own.float32, d + 1),
                          probability_code(p2, own.float32, d + 2), probability_code(p3, own.float32, d + 3),
                          np.int32(0))
        store(own.int32, at_p + g * WIDTH + c, four ^ splat(FLIP))
    for g in range(groups, round_up(groups, DEPTH_STEP)):
        store(own.int32, at_p + g * WIDTH + c, splat(np.int32(0)))
    return (t0 + t1) + (t2 + t3)


@inline
def weigh_block(queries, values, block, masked, stats, p, own):
    """Exponentials of a block's scores as bytes, and what their sum makes of the sums of blocks before."""
    for c in range(0, queries.count, LANES):
        total = weigh_lanes(values, block, c, masked, stats, p, own)
        top, shift = load(own.float32, stats.new_top + c), load(own.float32, stats.new_shift + c)
        before, now = splat(_ONE), splat(_ONE)
        if not block.is_first:
            old_top, old_shift = load(own.float32, stats.top + c), load(own.float32, stats.shift + c)
            up = (top - old_top) + (shift - old_shift)  # NaN where no key was seen yet
            is_up = up > splat(_ZERO)
            before = exp2(select(is_up, splat(_ZERO) - up, splat(_ZERO)))
            now = exp2(select(up < splat(_ZERO), up, splat(_ZERO)))
            total = fma(load(own.float32, stats.total + c), before, total * now)
            top, shift = select(is_up, top, old_top), select(is_up, shift, old_shift)
        store(own.float32, stats.top + c, top)
        store(own.float32, stats.shift + c, shift)
        store(own.float32, stats.total + c, total)
        store(own.float32, stats.new_top + c, before)
        store(own.float32, stats.factor + c, now)
        if block.is_last:  # a query that saw no key gets zeros
            total = select(total == splat(_ZERO), splat(_ZERO), splat(values.unit) / total)
            store(own.float32, stats.total + c, total)


@inline
def context_block(queries, values, block, rows, stats, p, own, at_out):
    """Add probabilities times values to the context, out (rows, W); the last block's divided by the sum.

    Of a query that is alone out (rows,).
    """
    at_scores, groups = p.at_scores, (block.keys + 3) // 4
    at_v = values.at + block.s0 // 4
    lane_product(True, Rows(values.data, at_v, values.step), rows, Part(own.uint32, p.at_probabilities),
                 round_up(groups, DEPTH_STEP), Part(own.int32, at_scores))
    if queries.alone:
        for d in range(rows):
            lacking = lacking_sum(values.data, at_v + d * values.step, groups)
            own.int32[at_scores + d] = own.int32[at_scores + d * WIDTH] + lacking
        for d in range(0, rows, LANES):
            context = to_float(load(own.int32, at_scores + d)) * broadcast(own.float32, stats.factor)
            if not block.is_first:
                context = fma(load(own.float32, at_out + d), broadcast(own.float32, stats.new_top), context)
            if block.is_last:
                context = context * broadcast(own.float32, stats.total)
            store(own.float32, at_out + d, context)
        return
    for d in range(rows):
        lacking = lacking_sum(values.data, at_v + d * values.step, groups)
        for c in range(0, queries.count, LANES):
            i = d * WIDTH + c
            sums = load(own.int32, at_scores + i) + splat(lacking)
            context = to_float(sums) * load(own.float32, stats.factor + c)
            if not block.is_first:
                context = fma(load(own.float32, at_out + i), load(own.float32, stats.new_top + c), context)
            if block.is_last:
                context = context * load(own.float32, stats.total + c)
            store(own.float32, at_out + i, context)


@inline
def attend_bytes(queries, keys, values, rows, seen, mask, has_bias, p, own, at_out):
    """Attention of one head for W queries over the keys seen.first..last, the first a multiple of 4.

    out: as in `context_block`.
    seen: Visible; mask: ScoreMask, as fill_mask writes them.
    p: says where scratch is: scores (KEY_BLOCK or `rows`, and ROW_STEP, W), probabilities (KEY_BLOCK / 4, W), stats
    (6, W), dither (KEY_BLOCK,)
    """
    first, last, masked = seen.first, seen.last, seen.band or mask.given
    at = p.at_stats
    stats = Stats(at, at + WIDTH, at + 2 * WIDTH, at + 3 * WIDTH, at + 4 * WIDTH, at + 5 * WIDTH)
    for i in range(0, WIDTH, LANES):
        store(own.float32, stats.new_shift + i, splat(_ZERO))
    if first >= last:
        for i in range(at_out, at_out + rows * (1 if queries.alone else WIDTH), LANES):
            store(own.float32, i, splat(_ZERO))
    s0, count = first, 0
    while s0 < last:
        count = min(KEY_BLOCK - s0 % KEY_BLOCK, last - s0)
        block = Block(s0, count, s0 == first, s0 + count >= last)
        score_block(queries, keys, values, block, stats, p, own)
        if masked:
            mask_block(queries, values, block, seen, mask, has_bias, stats, p, own)
        weigh_block(queries, values, block, masked, stats, p, own)
        context_block(queries, values, block, rows, stats, p, own, at_out)
        s0 += count
