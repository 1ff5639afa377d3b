"""What masks, biases and slopes add to the scores of a block of queries, and hide of them.

Letters as in attend_lanes.py.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, register_jitable

from .matmul import round_up
from .simd import (
    COLUMNS,
    LANES,
    WIDTH,
    bits_of,
    lane_index,
    load,
    load_bytes,
    maximum,
    pointer_to,
    select,
    splat,
    store,
    to_float,
    transpose_block,
)
from .softmax import LARGEST_MASK, LOG2_E

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)
_INFINITY_BITS = np.int32(0x7F800000)
_FURTHEST = (1 << 31) - 1 - WIDTH  # a position whose distances fit int32
_ZERO = np.float32(0)


@inline
def visible_range(q0, queries, S, band, low_edge, high_edge):
    """(first, last, full_from, full_to): keys any of `queries` queries from q0 may see, and keys all of W may see."""
    first, last, full_from, full_to = 0, S, 0, S
    if band:
        first = min(max(q0 + low_edge, 0), S)
        last = max(min(q0 + queries + high_edge, S), first)
        full_from = q0 + WIDTH - 1 + low_edge
        full_to = q0 + high_edge + 1
    return first, last, full_from, full_to


@inline
def mask_scores(scores, at, keys, s0, seen, mask, adds):
    """Lower the scores (keys, W) of the keys from s0 on that may not be seen to -inf and add the mask, in place.

    seen: Visible; mask: ScoreMask, which is added where `adds`
    """
    if seen.band:
        for s in range(keys):
            key = s0 + s
            if seen.full_from <= key < seen.full_to:
                continue
            for c in range(COLUMNS):
                distance = splat(np.int32(key - seen.q0 - c * LANES)) - lane_index()
                v = load(scores, at + s * WIDTH + c * LANES)
                v = select(distance < splat(np.int32(seen.low)), splat(_MINUS_INFINITY), v)
                v = select(distance > splat(np.int32(seen.high)), splat(_MINUS_INFINITY), v)
                store(scores, at + s * WIDTH + c * LANES, v)
    if adds:
        at_mask = mask.at + (s0 - mask.first) * WIDTH
        for i in range(0, keys * WIDTH, LANES):
            m = load(mask.data, at_mask + i)
            v = load(scores, at + i) + m
            store(scores, at + i, select(m == splat(_MINUS_INFINITY), m, v))


@inline
def slope_and_place(alibi, batch_step, batch, head):
    """What a step away from a query costs its scores, and the position of query 0: of ALiBi, for one head.

    alibi : address of (B or 1, H, 2) float64, or 0 where there is none; batch_step: 0 where all entries share one.
    """
    if alibi == 0:
        return _ZERO, 0
    pairs = pointer_to(alibi, np.float64)
    at = batch * batch_step + 2 * head
    return np.float32(pairs[at]), np.int64(pairs[at + 1])


@inline
def within(v):
    """v within +-LARGEST_MASK; a NaN stays."""
    v = select(v > splat(LARGEST_MASK), splat(LARGEST_MASK), v)
    return maximum(splat(-LARGEST_MASK), v)


@inline
def adds_to_scores(a):
    """Whether the masks at these addresses add numbers to scores."""
    return a.bias != 0 or a.alibi != 0


@inline
def masks_differ(p, a):
    """Whether those of a head may differ from another's."""
    return p.keep_h != 0 or p.bias_h != 0 or a.alibi != 0


@inline
def in_units(v, slope, distance):
    """A mask, and a slope that counts so many steps, in units of log 2; an infinity or NaN stays."""
    added = within(v)
    if slope != _ZERO:
        distance = maximum(distance, splat(np.int32(0)) - distance)
        added = within(added + to_float(distance) * splat(-slope))
    hidden = (bits_of(v) & splat(_MAGNITUDE)) == splat(_INFINITY_BITS)
    return select(hidden, v, added * splat(LOG2_E))


@inline
def fill_mask(p, a, batch, head, q0, queries, first, last, masks, at, at_square):
    """masks (keys, W) = (bias - slope * distance) * log2(e) where kept, else -inf; what is finite stays so.

    Of `queries` queries from q0 on and the keys from `first` to `last`; the distance of lane l and key s is
    |place + q0 + l - s|; lanes past `queries` have the mask of the last one.
    p, a: a record of MASKS, and one of MASK_ADDRESSES.  at_square: (LANES, LANES) of masks, for what is turned.
    """
    keep, padding, bias = pointer_to(a.keep, np.uint8), pointer_to(a.padding, np.uint8), pointer_to(a.bias, np.float32)
    at_keep = batch * p.keep_b + head * p.keep_h + q0 * p.keep_l + first * p.keep_s
    at_padding = batch * p.padding_b + first
    at_bias = batch * p.bias_b + head * p.bias_h + q0 * p.bias_l + first * p.bias_s
    keep_row, keep_key, bias_row, bias_key = p.keep_l, p.keep_s, p.bias_l, p.bias_s
    slope, place = slope_and_place(a.alibi, p.alibi_b, batch, head)
    place, keys = place + q0 - first, last - first
    has_keep, has_padding, has_bias, has_slope = a.keep != 0, a.padding != 0, a.bias != 0, slope != _ZERO
    # 1. the bias, and -inf where it is not kept: a row for all queries is spread, rows of queries become lanes
    fast = ((not has_keep) or keep_key == 1) and ((not has_bias) or bias_key == 1) and keys >= LANES
    given, is_one = has_keep or has_bias, keep_row == 0 and bias_row == 0
    for begin in range(0, keys if given and fast and not is_one else 0, LANES):
        s = min(begin, keys - LANES)
        for q0 in range(0, WIDTH, LANES):
            for l in range(LANES):
                q = min(q0 + l, queries - 1)
                v = splat(_ZERO)
                if has_bias:
                    v = load(bias, at_bias + q * bias_row + s)
                if has_keep:
                    kept = load_bytes(keep, at_keep + q * keep_row + s) == splat(np.int32(0))
                    v = select(kept, splat(_MINUS_INFINITY), v)
                if has_padding:
                    v = select(load_bytes(padding, at_padding + s) == splat(np.int32(0)), splat(_MINUS_INFINITY), v)
                store(masks, at_square + l * LANES, v)
            transpose_block(masks, at_square, LANES, masks, at + s * WIDTH + q0, WIDTH)
    for s in range(keys if given and (is_one or not fast) else 0):
        for q0 in range(1 if is_one else WIDTH):
            q = min(q0, queries - 1)
            added = bias[at_bias + q * bias_row + s * bias_key] if has_bias else _ZERO
            if has_keep and keep[at_keep + q * keep_row + s * keep_key] == 0:
                added = _MINUS_INFINITY
            if has_padding and padding[at_padding + s] == 0:
                added = _MINUS_INFINITY
            masks[at + s * WIDTH + q0] = added
        for c in range(0, WIDTH if is_one else 0, LANES):
            store(masks, at + s * WIDTH + c, splat(masks[at + s * WIDTH]))
    # 2. the slope, and units of log 2
    for s in range(keys if has_bias or has_slope or not has_keep else 0):
        for c in range(0, WIDTH, LANES):
            distance = splat(np.int32(min(place + c, _FURTHEST) - s)) + lane_index()
            if given:
                store(masks, at + s * WIDTH + c, in_units(load(masks, at + s * WIDTH + c), slope, distance))
            else:
                store(masks, at + s * WIDTH + c, in_units(splat(_ZERO), slope, distance))


@register_jitable
def mask_row(keys):
    """How far the rows are apart that `fill_mask_rows` writes."""
    return round_up(keys, LANES)


@inline
def fill_mask_rows(p, a, batch, head, q0, queries, first, last, masks, at):
    """fill_mask() of queries that are rows, mask_row(p.keys) apart: masks (queries, keys)."""
    keep, padding, bias = pointer_to(a.keep, np.uint8), pointer_to(a.padding, np.uint8), pointer_to(a.bias, np.float32)
    slope, place = slope_and_place(a.alibi, p.alibi_b, batch, head)
    keys, has_keep, has_padding, has_bias = last - first, a.keep != 0, a.padding != 0, a.bias != 0
    fast = ((not has_keep) or p.keep_s == 1) and ((not has_bias) or p.bias_s == 1) and keys >= LANES
    at_padding = batch * p.padding_b + first
    for q in range(queries):
        row = at + q * mask_row(p.keys)
        at_keep = batch * p.keep_b + head * p.keep_h + (q0 + q) * p.keep_l + first * p.keep_s
        at_bias = batch * p.bias_b + head * p.bias_h + (q0 + q) * p.bias_l + first * p.bias_s
        for begin in range(0, keys if fast else 0, LANES):
            s = min(begin, keys - LANES)
            v = splat(_ZERO)
            if has_bias:
                v = load(bias, at_bias + s)
            if has_keep:
                v = select(load_bytes(keep, at_keep + s) == splat(np.int32(0)), splat(_MINUS_INFINITY), v)
            if has_padding:
                v = select(load_bytes(padding, at_padding + s) == splat(np.int32(0)), splat(_MINUS_INFINITY), v)
            store(masks, row + s, v)
        for s in range(0 if fast else keys):
            v = bias[at_bias + s * p.bias_s] if has_bias else _ZERO
            if has_keep and keep[at_keep + s * p.keep_s] == 0:
                v = _MINUS_INFINITY
            if has_padding and padding[at_padding + s] == 0:
                v = _MINUS_INFINITY
            masks[row + s] = v
        from_key = min(place + q0 + q, _FURTHEST) - first
        for s in range(0, keys if adds_to_scores(a) else 0, LANES):
            distance = splat(np.int32(from_key - s)) - lane_index()
            store(masks, row + s, in_units(load(masks, row + s), slope, distance))
