"""Fused float32 attention: scores, softmax and context of one block of queries at a time, queries in lanes.

Letters: B batch, H heads, L queries, S keys, D head size, Dv value size, E model width; W = WIDTH queries per block.

Scores are computed transposed, (keys, W): a key is a broadcast row, a query is a lane.  Maxima and sums over keys are
then plain vector operations, and the context comes out as (Dv, W), which is turned back into rows of tokens.  The few
queries of a short call are rows from the beginning: see attend_rows.py.  Projections have tokens as rows of tiles.
Keys go by in blocks of KEY_BLOCK, so scratch memory does not depend on S (except for one row of mask per key where a
mask differs from query to query).  Where no score can be large, exponentials are taken of the scores as they are;
else of their distance to a running maximum.  Every sum is a sum of the sums of short chains: see CHAIN.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_rows import FEW_QUERIES, attend_rows
from .matmul import BLOCK, CHAIN, add_product, feature_position, round_up
from .positions import POSITIONS, place_keys, place_queries, transpose
from .records import MASK_ADDRESSES, MASKS, located, named, real, record
from .row_products import NO_BIAS, Weights, product_rows
from .score_masks import adds_to_scores, fill_mask, fill_mask_rows, mask_row, mask_scores, masks_differ
from .simd import (
    COLUMNS,
    LANES,
    ROWS,
    WIDTH,
    address_of,
    any_lane,
    bits_of,
    float_of_bits,
    fma,
    load,
    maximum,
    pointer_to,
    select,
    splat,
    store,
    transpose_block,
)
from .softmax import LOG2_E, exp2, exp2_within, masked_score, tanh
from .views import Blocks, Grid, Group, Rows, ScoreMask, Visible

KEY_BLOCK = BLOCK
SCORE_CHAIN = CHAIN // 2  # an error of a score counts as often as the score is large
# Scores in units of log 2 that are certain to be smaller than this need no maximum: powers of two between 2**-60 and
# 2**60, their sums, and their products with values stay far from the ends of float32.
SMALL = np.float32(60)
_SMALL_BITS = SMALL.view(np.int32)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)
_INFINITY_BITS = np.int32(0x7F800000)
_FAINT = np.float32(2.0**-20)
_ZERO = np.float32(0)
_ONE = np.float32(1)

# Private scratch of one query block, float32 elements; SCORES keeps ROWS rows in front for a tile that steps back.
AT_MAXIMUM = 0
AT_SUM = AT_MAXIMUM + WIDTH
AT_TILE = AT_SUM + WIDTH
AT_SCORES = AT_TILE + max(ROWS * WIDTH, LANES * LANES)
AT_FREE = AT_SCORES + (KEY_BLOCK + ROWS) * WIDTH
SUMS = KEY_BLOCK * WIDTH // 2  # in float64, that fit where scores are


@inline
def largest_magnitudes(k, keys, D, out, at_out):
    """out[d] = max over keys of |k[key][d]|, NaN if any is; k: Rows, D at least LANES."""
    for start in range(0, D, LANES):
        d = min(start, D - LANES)
        largest = splat(np.int32(0))  # of the bits: as integers, NaN is the largest of all
        for s in range(keys):
            largest = maximum(bits_of(load(k.data, k.at + s * k.step + d)) & splat(_MAGNITUDE), largest)
        store(out, at_out + d, float_of_bits(largest))


@inline
def all_small(q, D, largest, at_largest):
    """Whether no score of q (D, W) with keys whose features are at most largest (D,) can be as large as SMALL."""
    small = True
    for c in range(COLUMNS):
        bound = splat(_ZERO)
        for d in range(D):
            size = float_of_bits(bits_of(load(q.data, q.at + d * WIDTH + c * LANES)) & splat(_MAGNITUDE))
            bound = fma(size, splat(largest[at_largest + d]), bound)
        if any_lane(bits_of(bound) >= splat(_SMALL_BITS)):  # a NaN's bits are
            small = False
    return small


@inline
def power_of_small(score, base):
    """2**score"""
    return exp2_within(score)


@inline
def power_of_distance(score, base):
    """2**(score - base)"""
    return exp2(score - base)


@inline
def powers(power, scores, at, keys, base):
    """Replace the LANES scores at `at` of each of `keys` rows by power(score, base), and return their sums."""
    total = splat(_ZERO)
    for s in range(0, keys - 3, 4):
        row = at + s * WIDTH
        p0 = power(load(scores, row), base)
        p1 = power(load(scores, row + WIDTH), base)
        p2 = power(load(scores, row + 2 * WIDTH), base)
        p3 = power(load(scores, row + 3 * WIDTH), base)
        store(scores, row, p0)
        store(scores, row + WIDTH, p1)
        store(scores, row + 2 * WIDTH, p2)
        store(scores, row + 3 * WIDTH, p3)
        total = total + ((p0 + p1) + (p2 + p3))
    for s in range(keys // 4 * 4, keys):
        p0 = power(load(scores, at + s * WIDTH), base)
        store(scores, at + s * WIDTH, p0)
        total = total + p0
    return total


@inline
def attend_block(q, k, v, out, D, Dv, seen, mask, softcap, small, scratch):
    """Attention of one head for W queries over keys first..last: out (Dv, W) = softmax(q k^T) v, transposed.

    q, k, v, out: Rows; q (D, W) is scaled so that scores come out in units of log 2 (or, with softcap, divided by it);
    of k (S, step) and v (S, step) rows before `first` may be read, and past `last` those that make k ROWS rows.
    seen: Visible; mask: ScoreMask; small: whether every score is certain to be smaller than SMALL.
    Rows of `out` are written in whole tiles: up to ROWS - 1 rows past Dv are overwritten.
    A key whose score is -inf is not there.  Returns whether float32 could hold what was summed.
    """
    first, last = seen.first, seen.last
    top = (Dv + ROWS - 1) // ROWS * ROWS
    at_scores = AT_SCORES + ROWS * WIDTH
    if first >= last:  # no key at all
        for i in range(0, Dv * WIDTH, LANES):
            store(out.data, out.at + i, splat(_ZERO))
        return True
    for s0 in range(first, last, KEY_BLOCK):
        keys = min(KEY_BLOCK, last - s0)
        # 1. scores (keys, W); the last tile steps back rather than past the end, to key 0 at most
        for s in range(0, keys, ROWS):
            t = max(min(s, keys - ROWS), -s0)
            add_product(False, Grid(k.data, k.at + (s0 + t) * k.step, k.step, 1), q.data, q.at, D, SCORE_CHAIN,
                        Grid(scratch, at_scores + t * WIDTH, WIDTH, LANES))
        # 2. softcap, then masks
        if softcap > _ZERO:
            for i in range(0, keys * WIDTH, LANES):
                capped = tanh(load(scratch, at_scores + i)) * splat(softcap * LOG2_E)
                store(scratch, at_scores + i, capped)
        hides = mask.given or (seen.band and not (seen.full_from <= s0 and s0 + keys <= seen.full_to))
        if hides:
            mask_scores(scratch, at_scores, keys, s0, seen, mask, mask.given)
        # 3. maximum, exponentials, sum
        for c in range(COLUMNS):
            at = at_scores + c * LANES
            base = splat(_ZERO)
            if not small:
                m0 = load(scratch, at)
                m1 = m0
                for s in range(1, keys, 2):
                    m0 = maximum(load(scratch, at + s * WIDTH), m0)
                    m1 = maximum(load(scratch, at + min(s + 1, keys - 1) * WIDTH), m1)
                base = maximum(m0, m1)
                if s0 > first:
                    before = load(scratch, AT_MAXIMUM + c * LANES)
                    base = maximum(before, base)
                store(scratch, AT_MAXIMUM + c * LANES, base)
                base = select(base == splat(_MINUS_INFINITY), splat(_ZERO), base)  # of a query that has seen no key yet
                if s0 > first:
                    factor = exp2(before - base)
                    store(scratch, AT_SUM + c * LANES, load(scratch, AT_SUM + c * LANES) * factor)
                    for d in range(top):
                        at_d = out.at + d * WIDTH + c * LANES
                        store(out.data, at_d, load(out.data, at_d) * factor)
            if small and not hides:
                total = powers(power_of_small, scratch, at, keys, base)
            else:
                total = powers(power_of_distance, scratch, at, keys, base)
            if s0 > first:
                total = total + load(scratch, AT_SUM + c * LANES)
            store(scratch, AT_SUM + c * LANES, total)
        # 4. context (Dv, W) += v^T p
        for d in range(0, Dv, ROWS):
            add_product(s0 > first, Grid(v.data, v.at + s0 * v.step + d, 1, v.step), scratch, at_scores, keys, CHAIN,
                        Grid(out.data, out.at + d * WIDTH, WIDTH, LANES))
    # 5. divide by the sum; a query that saw no key gets zeros
    largest = splat(np.int32(0))  # of the bits, as in largest_magnitudes
    for c in range(COLUMNS):
        total = load(scratch, AT_SUM + c * LANES)
        none = total == splat(_ZERO)
        factor = select(none, splat(_ZERO), splat(_ONE) / total)
        for d in range(Dv):
            at_d = out.at + d * WIDTH + c * LANES
            mean = load(out.data, at_d) * factor
            store(out.data, at_d, mean)
            largest = maximum(bits_of(mean) & splat(_MAGNITUDE), largest)
        if small:  # tiny powers alone, times small values, lose digits
            faint = select(none, splat(_ONE), total) < splat(_FAINT)
            largest = select(faint, splat(_INFINITY_BITS), largest)
        if not (seen.band or mask.given):  # without a mask, scores were too low for float32
            largest = select(none, splat(_INFINITY_BITS), largest)
    return not any_lane(largest >= splat(_INFINITY_BITS))


@inline
def attend_around(q, k, v, out, D, Dv, seen, mask, softcap, scratch):
    """attend_block in plain loops, with sums in float64, that never touch a masked key or value.

    For when what is masked holds NaN, and for what float32 cannot sum.
    """
    sums = pointer_to(address_of(scratch) + 4 * AT_SCORES, np.float64)
    for l in range(WIDTH):
        for d0 in range(0, Dv, SUMS):
            some = min(SUMS, Dv - d0)
            best, total = -np.inf, 0.0
            for d in range(some):
                sums[d] = 0.0
            for s in range(seen.first, seen.last):
                if seen.band and not (seen.low <= s - seen.q0 - l <= seen.high):
                    continue
                m = _ZERO
                if mask.given:
                    m = mask.data[mask.at + (s - mask.first) * WIDTH + l]
                    if m == _MINUS_INFINITY:
                        continue
                score = 0.0
                for d in range(D):
                    score += np.float64(q.data[q.at + d * WIDTH + l]) * np.float64(k.data[k.at + s * k.step + d])
                if softcap > _ZERO:
                    score = np.float64(np.tanh(np.float32(score))) * np.float64(softcap) * np.float64(LOG2_E)
                if mask.given:
                    score = masked_score(score, m)
                if score == -np.inf:
                    continue
                if not (score <= best):
                    factor = np.float64(np.float32(2) ** np.float32(best - score))
                    best = score
                    total *= factor
                    for d in range(some):
                        sums[d] *= factor
                p = np.float64(np.float32(2) ** np.float32(score - best))
                total += p
                for d in range(some):
                    sums[d] += p * np.float64(v.data[v.at + s * v.step + d0 + d])
            for d in range(some):
                out.data[out.at + (d0 + d) * WIDTH + l] = np.float32(sums[d] / total) if total != 0.0 else _ZERO


@inline
def attend(q, k, v, out, D, Dv, seen, mask, softcap, small, scratch):
    """attend_block, and where float32 could not hold what it summed, again with a maximum, then in float64."""
    while not attend_block(q, k, v, out, D, Dv, seen, mask, softcap, small, scratch):
        if not small:
            attend_around(q, k, v, out, D, Dv, seen, mask, softcap, scratch)
            break
        small = False


# The parameters of `layer_float32`: sizes; where each weight and bias begins; masks; heads that go by at a time; where
# things begin in the scratch of all threads, which keys are the first of, and in that of each; of keys and values that
# are kept from call to call, the size of a group's, and whether they are there.
LAYER = record("batch queries keys query_width key_width value_width out_width heads kv_heads",
               "head_size value_size padded_head padded_value has_out",
               "wq bq wk bk wv bv wo bo", MASKS, POSITIONS, "group unit at_values",
               "at_largest at_rows at_q at_head at_context at_few at_edge at_masks at_entry",
               "shared_size private_size kept_size is_kept")
# Where the arrays of a call of a layer are: queries (B, L, Eq), keys (B, S, Ek), values (B, S, Ev), out (B, L, Eo),
# masks, or 0 of none, keys and values that are kept, or 0 of none, what `FloatLayer` packed, and the table of a
# rotation; all in C order.
LAYER_ADDRESSES = record("queries keys values out", MASK_ADDRESSES, "kept weights table")
QUERIES = 128  # projected at a time; a multiple of WIDTH
LARGEST_ENTRY = 1 << 18  # elements of keys and values up to which a thread does a batch entry alone
MOST_ENTRIES = 1 << 16  # parts that such entries become at most


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
def project(x, tokens, weights, at_weight, at_bias, features, out):
    """out = x @ weight.T + bias; x: Rows, as long as they are apart; out: Blocks."""
    panels = Weights(weights, at_weight, x.step * WIDTH, x.step, CHAIN, at_bias)
    separately(product_rows, (False, x, tokens, panels, features, out))


@inline
def project_context(p, a, group, context, first_query, tokens, e_from, e_to, private):
    """Features e_from to e_to of the output of some tokens = or += the context of the group's heads @ weight.T.

    The bias comes last.  context: Rows of the heads' features.
    """
    weights, out, Eo = pointer_to(a.weights, np.float32), pointer_to(a.out, np.float32), p.out_width
    repeats = p.heads // p.kv_heads
    panel, depth = p.heads * p.padded_value * WIDTH, group.count * repeats * p.padded_value
    first, last = group.first == 0, group.first + group.count == p.kv_heads
    at_panels = p.wo + group.first * repeats * p.padded_value * WIDTH
    to, whole = (group.batch * p.queries + first_query) * Eo, min(e_to, Eo // WIDTH * WIDTH)
    at_bias = p.bo + e_from if last else np.int64(NO_BIAS)
    panels = Weights(weights, at_panels + e_from // WIDTH * panel, panel, depth, CHAIN, at_bias)
    separately(product_rows, (not first, context, tokens, panels, whole - e_from, Blocks(out, to + e_from, Eo, 0)))
    if whole < e_to:  # features that fill no panel wait beside
        for t in range(tokens):
            for e in range(e_to - whole):
                private[p.at_edge + t * WIDTH + e] = _ZERO if first else out[to + t * Eo + whole + e]
        at_bias = p.bo + whole if last else np.int64(NO_BIAS)
        panels = Weights(weights, at_panels + whole // WIDTH * panel, panel, depth, CHAIN, at_bias)
        separately(product_rows, (not first, context, tokens, panels, WIDTH, Blocks(private, p.at_edge, WIDTH, 0)))
        for t in range(tokens):
            for e in range(e_to - whole):
                out[to + t * Eo + whole + e] = private[p.at_edge + t * WIDTH + e]


@inline
def portions(total, unit, count):
    """(size, number) of the portions of range(total) that `count` threads take one by one; size a multiple of unit."""
    if count == 1:
        return max(total, 1), 1
    size = max((total + 2 * count - 1) // (2 * count), 1)
    size = (size + unit - 1) // unit * unit
    return size, max((total + size - 1) // size, 1)


@inline
def heads_at_once(heads, unit, count):
    """How many heads, whole units, a part takes so that `count` threads are done soonest.

    The most where it is alike. Some heads of all tokens have a part of the weights to themselves, which is read once;
    in int8 each part makes its bytes of the tokens.
    """
    best = least = heads
    if count > 1:
        for at_once in range((heads - 1) // unit * unit, 0, -unit):
            parts = (heads + at_once - 1) // at_once
            longest = (parts + count - 1) // count * at_once
            if longest < least:
                best, least = at_once, longest
    return best


@inline
def entries_alone(p, count):
    """(number, of a part, parts) of the first batch entries: threads do these alone, each as many."""
    alone = p.batch // count * count if count > 1 and p.at_entry > 0 else 0
    portion = max((alone + MOST_ENTRIES - 1) // MOST_ENTRIES, 1)
    return alone, portion, (alone + portion - 1) // portion


@inline
def own_memory(p, scratch, worker):
    """Where a thread that does a batch entry alone has what else all threads share: an address."""
    return scratch + 4 * (p.shared_size + worker * p.private_size + p.at_entry)


@inline
def private_scratch(p, scratch, worker):
    """What a thread has to itself of the scratch at an address."""
    return pointer_to(scratch + 4 * (p.shared_size + worker * p.private_size), np.float32)


@inline
def keys_and_values(p, at_keys):
    """Where all threads have the keys (KF / KB, S', KB) and the values (VF / VB, S', VB) of a group: Blocks.

    S' = S rounded up to ROWS.
    """
    shared, S_up = pointer_to(at_keys, np.float32), (p.keys + ROWS - 1) // ROWS * ROWS
    k_block, v_block = max(p.padded_head, LANES), max(p.padded_value, LANES)
    return Blocks(shared, 0, k_block, S_up * k_block), Blocks(shared, p.at_values, v_block, S_up * v_block)


@inline
def whole_panels(features):
    """`features`, or so many more that they fill whole panels."""
    return (features + WIDTH - 1) // WIDTH * WIDTH


@inline
def project_heads(x, tokens, weights, at_weight, at_bias, heads, size, out, from_head, begin):
    """Keys or values of some tokens from `begin` on, for some heads from `from_head` on of the Blocks `out`."""
    at = out.at + begin * out.block + feature_position(from_head * size, out.block, out.step)
    project(x, tokens, weights, at_weight, at_bias, whole_panels(heads * size),
            Blocks(out.data, at, out.block, out.step))


@inline
def place_key_heads(p, a, heads, keys, from_kv, begin, tokens, private):
    """Norm and rotate the keys of some heads from `from_kv` on, of some tokens from `begin` on, where they are."""
    weights, table = pointer_to(a.weights, np.float32), pointer_to(a.table, np.float32)
    for h in range(from_kv, from_kv + heads):
        at_head = keys.at + feature_position(h * p.padded_head, keys.block, keys.step)
        for t in range(begin, begin + tokens, WIDTH):
            some, at = min(WIDTH, begin + tokens - t), at_head + t * keys.block
            transpose(keys.data, at, keys.block, some, p.head_size, private, p.at_q, WIDTH)
            place_keys(private, p.at_q, p, weights, table, t, AT_MAXIMUM)
            transpose(private, p.at_q, WIDTH, p.head_size, some, keys.data, at, keys.block)


@task
def project_keys(p, a, scratch, group, portion, worker, part):
    """Stage 1 of a layer: keys and values of `portion` tokens, for `at_once` heads of the group.

    `part` counts the portions, and in each of them the heads.
    """
    keys, values = keys_and_values(p, group.at_keys)
    private, weights = private_scratch(p, scratch, worker), pointer_to(a.weights, np.float32)
    begin, from_kv = part // group.splits * portion, part % group.splits * group.at_once
    heads, tokens = min(group.at_once, group.count - from_kv), min(portion, p.keys - begin)
    row, head = group.batch * p.keys + begin, group.first + from_kv
    k_from, v_from = head * p.padded_head, head * p.padded_value
    x = Rows(pointer_to(a.keys, np.float32), row * p.key_width, p.key_width)
    project_heads(x, tokens, weights, p.wk + k_from * x.step, p.bk + k_from, heads, p.padded_head, keys, from_kv, begin)
    if p.k_norm != 0 or p.pairs > 0:
        place_key_heads(p, a, heads, keys, from_kv, begin, tokens, private)
    x = Rows(pointer_to(a.values, np.float32), row * p.value_width, p.value_width)
    project_heads(x, tokens, weights, p.wv + v_from * x.step, p.bv + v_from, heads, p.padded_value, values, from_kv,
                  begin)


@inline
def project_queries(p, a, group, head, heads, first_query, tokens, private):
    """Rows of the queries of some tokens, for some heads; they have room for a vector more, and whole blocks of W."""
    features, from_feature = whole_panels(heads * p.padded_head), head * p.padded_head
    x = Rows(pointer_to(a.queries, np.float32), (group.batch * p.queries + first_query) * p.query_width, p.query_width)
    project(x, tokens, pointer_to(a.weights, np.float32), p.wq + from_feature * x.step, p.bq + from_feature, features,
            Blocks(private, p.at_rows, features + WIDTH, 0))
    return Rows(private, p.at_rows, features + WIDTH)


@inline
def turn_head(q, size, queries, out, at):
    """W queries of a head, Rows, turned so that they are lanes, (size, W) from out[at] on; zeros for those missing."""
    for l in range(queries, WIDTH):
        for d in range(0, size, LANES):
            store(q.data, q.at + l * q.step + d, splat(_ZERO))
    for d in range(0, size, LANES):
        for l in range(0, WIDTH, LANES):
            transpose_block(q.data, q.at + l * q.step + d, q.step, out, at + d * WIDTH + l, WIDTH)


@inline
def attend_heads(p, a, group, from_kv, heads, q, q0, queries, context, private):
    """Rows of context of a block of queries, Rows, head by head; from_kv: the first head's in the group."""
    keys, values = keys_and_values(p, group.at_keys)
    repeats, Dp, Dvp, band = p.heads // p.kv_heads, p.padded_head, p.padded_value, p.band != 0
    adds, few, placed = adds_to_scores(a), p.queries <= FEW_QUERIES, p.q_norm != 0 or p.pairs > 0
    masked, mask_per_head = adds or a.keep != 0, masks_differ(p, a)
    first, last, full_from, full_to = visible_range(q0, queries, p.keys, band, p.low, p.high)
    seen = Visible(first, last, full_from, full_to, q0, band, p.low, p.high)
    mask, has_mask = ScoreMask(private, p.at_masks, first, masked), False
    for h in range(heads):
        head, kv = (group.first + from_kv) * repeats + h, from_kv + h // repeats
        of_head = Rows(private, q.at + h * Dp, q.step)
        to = Rows(context.data, context.at + h * Dvp, context.step)
        k = Rows(keys.data, feature_position(kv * Dp, keys.block, keys.step), keys.block)
        v = Rows(values.data, values.at + feature_position(kv * Dvp, values.block, values.step), values.block)
        if placed or not few:
            turn_head(of_head, Dp, queries, private, p.at_q)
        if placed:
            place_queries(private, p.at_q, p, pointer_to(a.weights, np.float32), pointer_to(a.table, np.float32), q0,
                          AT_MAXIMUM)
        if few:
            if placed:
                transpose(private, p.at_q, WIDTH, p.head_size, queries, private, of_head.at, q.step)
            if masked and (mask_per_head or not has_mask):
                fill_mask_rows(p, a, group.batch, head, q0, queries, first, last, private, p.at_masks)
                has_mask = True
            if attend_rows(of_head, queries, k, v, to, p.head_size, Dvp, seen, mask, mask_row(p.keys), _ZERO,
                           pointer_to(address_of(private) + 4 * p.at_few, np.float32)):
                continue
            has_mask = False
            if not placed:
                turn_head(of_head, Dp, queries, private, p.at_q)
        if masked and (mask_per_head or not has_mask):
            fill_mask(p, a, group.batch, head, q0, queries, first, last, private, p.at_masks, AT_TILE)
            has_mask = not few
        lanes = Rows(private, p.at_q, WIDTH)
        small = not (few or adds) and all_small(lanes, p.head_size, private, p.at_largest + kv * Dp)
        attend(lanes, k, v, Rows(private, p.at_head, WIDTH), p.head_size, Dvp, seen, mask, _ZERO, small, private)
        for d in range(0, Dvp, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, p.at_head + d * WIDTH + l, WIDTH, to.data, to.at + l * to.step + d, to.step)


@inline
def copy_context(p, a, group, context, head, heads, first_query, tokens):
    """The output of some heads of a layer without a projection: its context."""
    out, at_row = pointer_to(a.out, np.float32), (group.batch * p.queries + first_query) * p.out_width
    for t in range(tokens):
        for h in range(heads):
            for d in range(p.value_size):
                out[at_row + t * p.out_width + (head + h) * p.value_size + d] = (
                    context.data[context.at + t * context.step + h * p.padded_value + d])


@inline
def context_rows(p, scratch, group, private):
    """Rows of a group's context, with room for a vector more; the first thread's, where all write heads."""
    own = private if group.splits == 1 else private_scratch(p, scratch, 0)
    return Rows(own, p.at_context, group.count * (p.heads // p.kv_heads) * p.padded_value + WIDTH)


@task
def attend_queries(p, a, scratch, group, portion, worker, part):
    """Stage 2 of a layer: `portion` blocks of queries, for `at_once` heads of the group; and their part of the output.

    `part` counts the portions, and in each of them the heads. The output waits where no part has all heads.
    """
    private, repeats = private_scratch(p, scratch, worker), p.heads // p.kv_heads
    begin, from_kv = part // group.splits * portion, part % group.splits * group.at_once
    kv_heads = min(group.at_once, group.count - from_kv)
    heads, head = kv_heads * repeats, (group.first + from_kv) * repeats
    context = context_rows(p, scratch, group, private)
    if not (adds_to_scores(a) or p.queries <= FEW_QUERIES):
        keys, _ = keys_and_values(p, group.at_keys)
        from_feature = from_kv * p.padded_head
        for f in range(from_feature, from_feature + whole_panels(kv_heads * p.padded_head), keys.block):
            largest_magnitudes(Rows(keys.data, f // keys.block * keys.step, keys.block), p.keys, keys.block, private,
                               p.at_largest + f)
    to = min((begin + portion) * WIDTH, p.queries)
    for first_query in range(begin * WIDTH, to, QUERIES):
        tokens = min(QUERIES, to - first_query)
        at = context.at + (first_query * context.step if group.splits > 1 else 0)
        of_heads = Rows(context.data, at + from_kv * repeats * p.padded_value, context.step)
        q = project_queries(p, a, group, head, heads, first_query, tokens, private)
        for t in range(0, tokens, WIDTH):
            attend_heads(p, a, group, from_kv, heads, Rows(private, q.at + t * q.step, q.step), first_query + t,
                         min(WIDTH, tokens - t), Rows(of_heads.data, of_heads.at + t * of_heads.step, of_heads.step),
                         private)
        if p.has_out == 0:
            copy_context(p, a, group, of_heads, head, heads, first_query, tokens)
        elif group.splits == 1:
            project_context(p, a, group, context, first_query, tokens, 0, p.out_width, private)


@task
def finish_features(p, a, scratch, group, portion, worker, part):
    """Stage 3 of a layer, where no part of stage 2 had all heads of the group: `portion` features of the output."""
    private = private_scratch(p, scratch, worker)
    project_context(p, a, group, context_rows(p, scratch, group, private), 0, p.queries, part * portion,
                    min((part + 1) * portion, p.out_width), private)


@inline
def group_of(p, a, batch, first, at_once, memory):
    """The Group of heads from `first` on, whose keys are in `memory`, an address, or kept."""
    heads, groups = min(p.group, p.kv_heads - first), (p.kv_heads + p.group - 1) // p.group
    at_keys = a.kept + 4 * p.kept_size * (batch * groups + first // p.group) if a.kept != 0 else memory
    return Group(batch, first, heads, at_once, (heads + at_once - 1) // at_once, at_keys)


@task
def attend_entries(p, a, scratch, portion, alone, worker, part):
    """All stages of a layer for `portion` of the batch entries that threads do alone."""
    for batch in range(part * portion, min((part + 1) * portion, alone)):
        for first in range(0, p.kv_heads, p.group):
            group = group_of(p, a, batch, first, p.group, own_memory(p, scratch, worker))
            if p.is_kept == 0:
                separately(project_keys, (p, a, scratch, group, p.keys, worker, np.int64(0)))
            separately(attend_queries, (p, a, scratch, group, (p.queries + WIDTH - 1) // WIDTH, worker, np.int64(0)))


@jit
def layer_float32(parameters, addresses, scratch, task_queue, count):
    """A multi-head attention layer, see LAYER, on at most `count` threads that serve the task_queue.

    As many batch entries as each thread can have alone are done so. For every group of heads of every other one the
    three stages follow each other.
    scratch: first what all threads share, see `keys_and_values`; then what each thread has to itself.
    """
    p, a, memory = named(parameters, LAYER), located(addresses, LAYER_ADDRESSES), address_of(scratch)
    alone, entries, entry_parts = entries_alone(p, count)
    if alone > 0:
        parallel_for(task_queue, entry_parts, attend_entries, p, a, memory, entries, alone)
    # Of few queries threads take some heads each, but not heads narrower than a vector: its last lanes are the next
    # head's, which may be another thread's.
    splits_heads = p.queries <= QUERIES and p.padded_value % LANES == 0
    at_once = heads_at_once(p.group, p.unit, count) if splits_heads else p.group
    splits = (p.group + at_once - 1) // at_once
    others = (count + splits - 1) // splits
    tokens, token_parts = portions(p.keys, ROWS, others)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, others)
    features, feature_parts = portions(p.out_width, WIDTH, count)
    for batch in range(alone, p.batch):
        for first in range(0, p.kv_heads, p.group):
            group = group_of(p, a, batch, first, at_once, memory)
            if p.is_kept == 0:
                parallel_for(task_queue, token_parts * group.splits, project_keys, p, a, memory, group, tokens)
            parallel_for(task_queue, block_parts * group.splits, attend_queries, p, a, memory, group, blocks)
            if group.splits > 1 and p.has_out != 0 and p.queries > 0:
                parallel_for(task_queue, feature_parts, finish_features, p, a, memory, group, features)


# The parameters of `attention_float32`: sizes; float32 by their bits; strides of each array, in elements; masks; how
# far those of blocks of queries are apart that the next head finds again, or 0 where it does not.
ATTENTION = record("batch heads kv_heads queries keys head_size value_size", "scale softcap",
                   "q_b q_h q_l", "k_b k_h k_s", "v_b v_h v_s", "out_b out_h out_l", MASKS,
                   "mask_step at_few private_size")
# Where its arrays are: q (B, H, L, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), out (B, H, L, Dv), the last dimension
# contiguous; masks, and (B,) int64 keys that exist per batch entry, or 0 of none.
ATTENTION_ADDRESSES = record("q k v out", MASK_ADDRESSES, "lengths")


@inline
def copy_rows(source, at, step, rows, size, factor, target, to, target_step):
    """target = source * factor, `rows` rows of `size` that are `step` and `target_step` apart."""
    for row in range(rows):
        i, j = at + row * step, to + row * target_step
        for d in range(0, size - LANES + 1, LANES):
            store(target, j + d, load(source, i + d) * splat(factor))
        for d in range(size // LANES * LANES, size):
            target[j + d] = source[i + d] * factor


@task
def attention_part(p, a, scratch, portion, worker, part):
    """Scaled dot product attention over given queries, keys and values, for a portion of (batch, head, block).

    The arrays stay where they are unless a tile would read past their end.  scratch: for each thread its own.
    """
    private = pointer_to(scratch + 4 * worker * p.private_size, np.float32)
    scale, softcap = real(p.scale), real(p.softcap)
    H, L, S, D, Dv = p.heads, p.queries, p.keys, p.head_size, p.value_size
    group = H // p.kv_heads
    blocks = (L + WIDTH - 1) // WIDTH
    D_up = (D + LANES - 1) // LANES * LANES
    Dv_up = (Dv + ROWS - 1) // ROWS * ROWS
    Dv_lanes = (Dv + LANES - 1) // LANES * LANES
    band = p.band != 0
    adds = adds_to_scores(a)
    has_mask = adds or a.keep != 0
    all_q, all_k = pointer_to(a.q, np.float32), pointer_to(a.k, np.float32)
    all_v, all_o = pointer_to(a.v, np.float32), pointer_to(a.out, np.float32)
    lengths = pointer_to(a.lengths, np.int64)
    few = L <= FEW_QUERIES
    at_row_major = AT_FREE
    at_q = at_row_major + WIDTH * max(D_up, Dv_lanes)
    at_context = at_q + D_up * WIDTH
    at_k_copy = at_context + (max(Dv_up, Dv_lanes) + ROWS) * WIDTH
    at_v_copy = at_k_copy + ROWS * D
    at_largest = at_v_copy + S * Dv_up if Dv != Dv_up else at_v_copy
    at_masks = round_up(at_largest + D_up, 16)
    bounded = D >= LANES and not adds and not softcap > _ZERO and not few
    measured = copied = -1
    factor = scale / softcap if softcap > _ZERO else scale * LOG2_E
    for item in range(part * portion, min((part + 1) * portion, p.batch * H * blocks)):
        batch, h, q0 = item // (H * blocks), item // blocks % H, item % blocks * WIDTH
        kv = h // group
        queries = min(WIDTH, L - q0)
        keys = S if a.lengths == 0 else min(max(lengths[batch], 0), S)
        first, last, full_from, full_to = visible_range(q0, queries, keys, band, p.low, p.high)
        seen = Visible(first, last, full_from, full_to, q0, band, p.low, p.high)
        mask = ScoreMask(private, at_masks + q0 // WIDTH * p.mask_step, first, has_mask)
        is_filled = p.mask_step != 0 and min(item % (H * blocks), item - part * portion) >= blocks
        k, v = Rows(all_k, batch * p.k_b + kv * p.k_h, p.k_s), Rows(all_v, batch * p.v_b + kv * p.v_h, p.v_s)
        out = Rows(all_o, batch * p.out_b + h * p.out_h + q0 * p.out_l, p.out_l)
        # 1. queries of this block, scaled
        copy_rows(all_q, batch * p.q_b + h * p.q_h + q0 * p.q_l, p.q_l, queries, D, factor,
                  private, at_row_major, D_up)
        if few:
            if has_mask and not is_filled:
                fill_mask_rows(p, a, batch, h, q0, queries, first, last, private, mask.at)
            if attend_rows(Rows(private, at_row_major, D_up), queries, k, v, out, D, Dv, seen, mask, mask_row(S),
                           softcap, pointer_to(address_of(private) + 4 * p.at_few, np.float32)):
                continue
        # 2. turned so that queries are lanes
        for i in range(queries * D_up, WIDTH * D_up):
            private[at_row_major + i] = _ZERO
        for d in range(0, D_up, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, at_row_major + l * D_up + d, D_up, private, at_q + d * WIDTH + l, WIDTH)
        if has_mask and not is_filled:
            fill_mask(p, a, batch, h, q0, queries, first, last, private, mask.at, AT_TILE)
        # 3. fewer keys than a tile has rows, or a value row narrower than whole tiles: read from a padded copy
        if keys < ROWS:
            for s in range(ROWS):
                for d in range(D):
                    private[at_k_copy + s * D + d] = all_k[k.at + s * k.step + d] if s < keys else _ZERO
            k = Rows(private, at_k_copy, D)
        if Dv != Dv_up:
            if copied != batch * p.kv_heads + kv:
                copied = batch * p.kv_heads + kv
                for s in range(keys):
                    for d in range(Dv):
                        private[at_v_copy + s * Dv_up + d] = all_v[v.at + s * v.step + d]
                    for d in range(Dv, Dv_up):
                        private[at_v_copy + s * Dv_up + d] = _ZERO
            v = Rows(private, at_v_copy, Dv_up)
        # 4. attention
        q, context = Rows(private, at_q, WIDTH), Rows(private, at_context, WIDTH)
        if bounded and measured != batch * p.kv_heads + kv:
            measured = batch * p.kv_heads + kv
            largest_magnitudes(k, keys, D, private, at_largest)
        small = bounded and all_small(q, D, private, at_largest)
        attend(q, k, v, context, D, Dv, seen, mask, softcap, small, private)
        # 5. turn the context back into rows
        for d in range(0, Dv_lanes, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, at_context + d * WIDTH + l, WIDTH,
                                private, at_row_major + l * Dv_lanes + d, Dv_lanes)
        copy_rows(private, at_row_major, Dv_lanes, queries, Dv, _ONE, all_o, out.at, p.out_l)


@jit
def attention_float32(parameters, addresses, scratch, task_queue, count):
    """See `attention_part`; on at most `count` threads that serve the task_queue."""
    p, a = named(parameters, ATTENTION), located(addresses, ATTENTION_ADDRESSES)
    items = p.batch * p.heads * ((p.queries + WIDTH - 1) // WIDTH)
    portion, parts = portions(items, 1, count)
    parallel_for(task_queue, parts, attention_part, p, a, address_of(scratch), portion)
