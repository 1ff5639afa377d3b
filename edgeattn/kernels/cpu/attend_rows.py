"""Float32 attention of few queries, as in attend_lanes.py, but queries are rows: none is computed that is not there.

Keys are turned, so that they are lanes of the scores (queries, keys); features are lanes of the context.  Products have
the chains of attend_lanes.py.  The powers of a row are summed in 32 lanes, whatever a register holds, and are always
those of the distance to a running maximum.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, register_jitable

from .matmul import BLOCK, CHAIN, round_up
from .positions import transpose
from .row_products import NO_BIAS, Weights, product_rows
from .simd import (
    LANES,
    VIRTUAL_LANES,
    WIDTH,
    any_lane,
    bits_of,
    first_lane,
    lane_index,
    load,
    max_lanes,
    maximum,
    select,
    splat,
    store,
    wide_load,
    wide_sum,
)
from .softmax import LOG2_E, exp2, tanh
from .views import Blocks, Rows

FEW_QUERIES = 8  # in a call, whatever the instruction set: up to so many are rows
KEY_BLOCK = BLOCK
SCORE_CHAIN = CHAIN // 2  # an error of a score counts as often as the score is large
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)
_INFINITY_BITS = np.int32(0x7F800000)
_ZERO = np.float32(0)
_ONE = np.float32(1)

# Scratch, float32 elements: of each query its largest score and its sum, then scores, then what products read and sums.
AT_TOP = 0
AT_TOTAL = AT_TOP + FEW_QUERIES
AT_SCORES = AT_TOTAL + FEW_QUERIES
AT_PANELS = AT_SCORES + FEW_QUERIES * KEY_BLOCK


MORE_MASK = FEW_QUERIES * LANES  # elements that masks of rows may need beyond (keys, W)


@register_jitable
def scratch_of_rows(D, Dv):
    """Elements of scratch that `attend_rows` needs."""
    features = round_up(Dv, WIDTH)
    return AT_PANELS + KEY_BLOCK * max(D, features) + FEW_QUERIES * features


@inline
def turn_keys(k, keys, D, out, at):
    """Keys, Rows of D features, as panels (keys / W, D, W) from out[at] on; lanes past the last are left."""
    for s in range(0, keys, WIDTH):
        transpose(k.data, k.at + s * k.step, k.step, min(WIDTH, keys - s), D, out, at + s * D, WIDTH)


@inline
def copy_values(v, keys, Dv, out, at):
    """Values, Rows of Dv features, as panels (Dv / W, keys, W) from out[at] on."""
    for d in range(0, Dv, LANES):
        to = at + d // WIDTH * keys * WIDTH + d % WIDTH
        for s in range(keys):
            if d + LANES <= Dv:
                store(out, to + s * WIDTH, load(v.data, v.at + s * v.step + d))
            else:
                for i in range(Dv - d):
                    out[to + s * WIDTH + i] = v.data[v.at + s * v.step + d + i]


@inline
def mask_row_of_scores(scores, at, keys, s0, q, seen, mask, at_mask):
    """mask_scores() of the query q, whose scores with the keys from s0 on are a row."""
    for s in range(0, keys, LANES):
        v = load(scores, at + s)
        if seen.band:
            distance = splat(np.int32(s0 + s - q)) + lane_index()
            v = select(distance < splat(np.int32(seen.low)), splat(_MINUS_INFINITY), v)
            v = select(distance > splat(np.int32(seen.high)), splat(_MINUS_INFINITY), v)
        if mask.given:
            m = load(mask.data, at_mask + s)
            v = select(m == splat(_MINUS_INFINITY), m, v + m)
        store(scores, at + s, v)


@inline
def weigh_row(scratch, q, keys, is_first, at_sums, features):
    """Powers of the scores of query q, and what they make of its sums of the keys before; zeros past the last key."""
    at = AT_SCORES + q * KEY_BLOCK
    up = round_up(keys, LANES)
    is_key = lane_index() < splat(np.int32(keys - up + LANES))
    m = select(is_key, load(scratch, at + up - LANES), splat(_MINUS_INFINITY))
    store(scratch, at + up - LANES, m)
    for s in range(0, up - LANES, LANES):
        m = maximum(load(scratch, at + s), m)
    best = max_lanes(m)
    if not is_first:
        best = max(scratch[AT_TOP + q], best)
    base = splat(_ZERO if best == _MINUS_INFINITY else best)  # of a query that has seen no key yet
    for s in range(0, up, LANES):
        store(scratch, at + s, exp2(load(scratch, at + s) - base))
    for s in range(up, round_up(keys, VIRTUAL_LANES), LANES):
        store(scratch, at + s, splat(_ZERO))
    powers = wide_load(scratch, at)
    if keys > VIRTUAL_LANES:
        powers = powers + wide_load(scratch, at + VIRTUAL_LANES)
    total = wide_sum(powers)
    if not is_first:
        factor = exp2(splat(scratch[AT_TOP + q]) - base)
        total += scratch[AT_TOTAL + q] * first_lane(factor)
        for d in range(at_sums, at_sums + features, LANES):
            store(scratch, d, load(scratch, d) * factor)
    scratch[AT_TOP + q], scratch[AT_TOTAL + q] = best, total


@inline
def write_mean(scratch, q, at_sums, Dv, may_be_none, out, to):
    """The context of a query, its sums divided by that of its powers, zeros if it saw no key; whether it is finite.

    may_be_none: whether it may have seen none.
    """
    total = scratch[AT_TOTAL + q]
    factor = _ZERO if total == _ZERO else _ONE / total
    largest, whole = splat(np.int32(0)), Dv // LANES * LANES  # of the bits: as integers, NaN is the largest of all
    for d in range(0, whole, LANES):
        mean = load(scratch, at_sums + d) * splat(factor)
        store(out, to + d, mean)
        largest = maximum(bits_of(mean) & splat(_MAGNITUDE), largest)
    for d in range(whole, Dv):
        mean = scratch[at_sums + d] * factor
        out[to + d] = mean
        largest = maximum(bits_of(splat(mean)) & splat(_MAGNITUDE), largest)
    return not any_lane(largest >= splat(_INFINITY_BITS)) and (may_be_none or total != _ZERO)


@inline
def attend_rows(q, queries, k, v, out, D, Dv, seen, mask, mask_step, softcap, scratch):
    """attend_block() of `queries` queries, at most FEW_QUERIES: rows of q, (queries, D), and of out, (queries, Dv).

    No more is read of keys and values than there is.  mask: rows that are mask_step apart; scratch: as many elements as
    `scratch_of_rows` says.  Returns whether float32 could hold what was summed.
    """
    features = round_up(Dv, WIDTH)
    at_sums, held = AT_PANELS + KEY_BLOCK * max(D, features), True
    for s0 in range(seen.first, seen.last, KEY_BLOCK):
        keys, is_first = min(KEY_BLOCK, seen.last - s0), s0 == seen.first
        # 1. scores (queries, keys), capped, then masked
        turn_keys(Rows(k.data, k.at + s0 * k.step, k.step), keys, D, scratch, AT_PANELS)
        separately(product_rows, (False, q, queries, Weights(scratch, AT_PANELS, D * WIDTH, D, SCORE_CHAIN, NO_BIAS),
                                  round_up(keys, WIDTH), Blocks(scratch, AT_SCORES, KEY_BLOCK, 0)))
        for i in range(queries):
            at = AT_SCORES + i * KEY_BLOCK
            if softcap > _ZERO:
                for s in range(at, at + keys, LANES):
                    store(scratch, s, tanh(load(scratch, s)) * splat(softcap * LOG2_E))
            if mask.given or (seen.band and not (seen.full_from <= s0 and s0 + keys <= seen.full_to)):
                mask_row_of_scores(scratch, at, keys, s0, seen.q0 + i, seen, mask,
                                   mask.at + i * mask_step + s0 - mask.first)
            # 2. maximum, exponentials, sum
            weigh_row(scratch, i, keys, is_first, at_sums + i * features, features)
        # 3. context (queries, Dv) += p v
        copy_values(Rows(v.data, v.at + s0 * v.step, v.step), keys, Dv, scratch, AT_PANELS)
        separately(product_rows, (not is_first, Rows(scratch, AT_SCORES, KEY_BLOCK), queries,
                                  Weights(scratch, AT_PANELS, keys * WIDTH, keys, CHAIN, NO_BIAS), features,
                                  Blocks(scratch, at_sums, features, 0)))
    # 4. divide by the sum
    for i in range(queries):
        if seen.first >= seen.last:  # no key at all
            for d in range(Dv):
                out.data[out.at + i * out.step + d] = _ZERO
        else:
            may_be_none = seen.band or mask.given
            if not write_mean(scratch, i, at_sums + i * features, Dv, may_be_none, out.data, out.at + i * out.step):
                held = False
    return held
