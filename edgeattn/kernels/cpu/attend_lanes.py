"""Float32 attention of one block of queries: scores, softmax and context, queries in lanes.

Letters: B batch, H heads, L queries, S keys, D head size, Dv value size, E model width; W = WIDTH queries per block.

Scores are computed transposed, (keys, W): a key is a broadcast row, a query is a lane.  Maxima and sums over keys are
then plain vector operations, and the context comes out as (Dv, W), which is turned back into rows of tokens.  The few
queries of a short call are rows from the beginning: see attend_rows.py.
Keys go by in blocks of KEY_BLOCK, so scratch memory does not depend on S (except for one row of mask per key where a
mask differs from query to query).  Where no score can be large, exponentials are taken of the scores as they are;
else of their distance to a running maximum.  Every sum is a sum of the sums of short chains: see CHAIN.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .matmul import BLOCK, CHAIN, add_product
from .score_masks import mask_scores
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
)
from .softmax import LOG2_E, exp2, exp2_within, masked_score, tanh
from .views import Grid

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
