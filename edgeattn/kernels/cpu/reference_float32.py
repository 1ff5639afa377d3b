"""Attention one row of scores at a time: where the probabilities are wanted, an axis is empty, or a scale extreme."""

import math

import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.plan_cache import planned
from edgeattn.runtime.worker_pool import parallel_for, task

from .call import PreparedCall
from .matmul import round_up
from .portions import portions
from .records import (
    MASK_ADDRESSES,
    MASKS,
    KernelMask,
    bits_of_double,
    blank,
    double,
    located,
    named,
    packed,
    place,
    record,
    set_masks,
)
from .score_masks import adds_to_scores, slope_and_place
from .simd import address_of, pointer_to
from .softmax import LARGEST_MASK, masked_score

_WORK = 8  # a sum in float64, one number at a time, for each of the operations of a tile
# The bounds of a window, -1 of none; bits of scale and softcap as float64; masks, without a band; where in a
# thread's scratch its arrays begin, in elements of 32 bits.
ATTENTION = record("batch heads kv_heads queries keys head_size value_size left right scale softcap",
                   MASKS,
                   "at_context at_columns at_powers at_permitted private_size")
# Arrays in C order. Of masks, weights (B, H, L, S) and lse (B, H, L) 0 where there are none; offset, the position of
# query 0, and lengths: int64, of each batch entry.
ADDRESSES = record("query key value out", MASK_ADDRESSES, "offset lengths weights lse")


def attention(query, key, value, mask, *, scale, softcap, out, weights=None, lse=None):
    """softmax(softcap(query key^T * scale) + mask) value, without checks.

    Parameters
    ----------
    query : (B, H, L, D) float32 array
    key : (B, Hkv, S, D) float32 array
    value : (B, Hkv, S, Dv) float32 array
        All three in C order and read-only; query head h reads key/value head h // (H / Hkv).
    mask : edgeattn.masks.Mask
    scale : float
    softcap : float
        scores = softcap * tanh(scores / softcap); 0 = off.
    out : (B, H, L, Dv) float32 array
        Written, C order, overlapping no input. Rows with no permitted key become zeros.
    weights : (B, H, L, S) float32 array, optional
        Written with the probabilities.
    lse : (B, H, L) float32 array, optional
        Written with log(sum(exp(scores))) over the permitted keys, -inf where there is none.
    """
    batch, _, _, keys = mask.shape
    offset = np.zeros(batch, np.int64) + mask.offset
    lengths = np.full(batch, keys, np.int64) if mask.lengths is None else mask.lengths
    given = KernelMask(mask.keep, None, mask.bias, None, mask.alibi())
    call = planned(_plan, query.shape, key.shape, value.shape, given.shapes, mask.left, mask.right, scale, softcap)
    call(query, key, value, out, *given.arrays, offset, lengths, weights, lse)


def _plan(query, key, value, masks, left, right, scale, softcap):
    """The `PreparedCall` of arrays and masks of these shapes, and these bounds of a window."""
    p = blank(ATTENTION, left=left, right=right, scale=bits_of_double(scale), softcap=bits_of_double(softcap))
    set_masks(p, masks)
    p.batch, p.heads, p.queries, p.head_size = query
    p.kv_heads, p.keys, p.value_size = key[1], key[2], value[3]
    _, size = place(0, 2 * p.keys)  # the scores
    p.at_context, size = place(size, 2 * p.value_size)
    p.at_columns, size = place(size, p.head_size * p.keys)
    p.at_powers, size = place(size, p.keys)
    p.at_permitted, size = place(size, round_up(p.keys, 4) // 4)
    p.private_size = size
    work = _WORK * p.batch * p.heads * p.queries * p.keys * (p.head_size + p.value_size)
    return PreparedCall(attention_by_rows, packed(p, ATTENTION), ADDRESSES, np.float32, 0, size, work)


@inline
def _within(added):
    # as score_masks.fill_mask keeps masks finite; a NaN stays
    return np.float32(min(max(added, -LARGEST_MASK), LARGEST_MASK)) if added == added else added


@inline
def _keys_to_columns(p, keys, at, columns):
    # columns (D, S)
    D, S = p.head_size, p.keys
    for j in range(S):
        for d in range(D):
            columns[d * S + j] = keys[at + j * D + d]


@inline
def _permitted_keys(p, a, b, h, i, position, permitted):
    # The keys [first, last) that length and window leave, and which of them are permitted.
    first, last = np.int64(0), pointer_to(a.lengths, np.int64)[b]
    if p.left >= 0:
        first = max(first, position - p.left)
    if p.right >= 0:
        last = min(last, position + p.right + 1)
    for j in range(first, last):
        permitted[j] = 1
    if a.keep != 0:
        keep, at = pointer_to(a.keep, np.uint8), b * p.keep_b + h * p.keep_h + i * p.keep_l
        for j in range(first, last):
            permitted[j] = keep[at + j * p.keep_s]
    return first, last


@inline
def _add_to_scores(p, a, b, h, i, position, first, last, scores, permitted):
    # What masks add; where a bias is -inf a key is not permitted.
    if not adds_to_scores(a):
        return
    bias, at = pointer_to(a.bias, np.float32), b * p.bias_b + h * p.bias_h + i * p.bias_l
    slope, _ = slope_and_place(a.alibi, p.alibi_b, b, h)
    for j in range(first, last):
        added = np.float32(0)
        if a.bias != 0:
            added = bias[at + j * p.bias_s]
            if added == -np.inf:
                permitted[j] = 0
        if abs(added) != np.inf:
            added = _within(added)
            if slope != 0:
                added = _within(np.float32(added - slope * np.float32(abs(position - j))))
        scores[j] = masked_score(scores[j], added)


@inline
def _scores_of_row(p, query, at, columns, first, last, scores):
    # A column of keys at a time, so that the inner loop runs along keys.
    scale, softcap = double(p.scale), double(p.softcap)
    for j in range(first, last):
        scores[j] = 0
    for d in range(p.head_size):
        number = np.float64(query[at + d])
        for j in range(first, last):
            scores[j] += number * np.float64(columns[d * p.keys + j])
    for j in range(first, last):
        scores[j] *= scale
    if softcap != 0:
        for j in range(first, last):
            scores[j] = softcap * math.tanh(scores[j] / softcap)


@inline
def _powers_of_row(first, last, scores, permitted, powers):
    # The powers of the permitted keys' scores less the highest, which is returned, and their sum. One whose score is
    # -inf is none. NaN wins no comparison, and spreads from the sum.
    highest = -np.inf
    for j in range(first, last):
        if scores[j] == -np.inf:
            permitted[j] = 0
        if permitted[j] != 0 and scores[j] > highest:
            highest = scores[j]
    total = 0.0
    for j in range(first, last):
        if permitted[j] != 0:
            powers[j] = math.exp(np.float32(scores[j] - highest))
            total += powers[j]
    return highest, total


@task
def _attend_part(p, a, scratch, portion, worker, part):
    # A portion of the rows of all batch entries and heads.
    D, S, Dv = p.head_size, p.keys, p.value_size
    own = scratch + 4 * worker * p.private_size
    # Scores and long sums are kept in float64, where their roundings vanish and no float32 is too large.
    scores, context = pointer_to(own, np.float64), pointer_to(own + 4 * p.at_context, np.float64)
    columns, powers = pointer_to(own + 4 * p.at_columns, np.float32), pointer_to(own + 4 * p.at_powers, np.float32)
    permitted = pointer_to(own + 4 * p.at_permitted, np.uint8)
    query, key, value, out = (pointer_to(a.query, np.float32), pointer_to(a.key, np.float32),
                              pointer_to(a.value, np.float32), pointer_to(a.out, np.float32))
    weights, lse = pointer_to(a.weights, np.float32), pointer_to(a.lse, np.float32)
    ready = np.int64(-1)
    for row in range(part * portion, min((part + 1) * portion, p.batch * p.heads * p.queries)):
        b, h, i = row // (p.heads * p.queries), row // p.queries % p.heads, row % p.queries
        item = b * p.kv_heads + h // (p.heads // p.kv_heads)
        if item != ready:
            _keys_to_columns(p, key, item * S * D, columns)
            ready = item
        position = i + pointer_to(a.offset, np.int64)[b]
        # 1. The keys that may be seen.
        first, last = _permitted_keys(p, a, b, h, i, position, permitted)
        # 2. Scores.
        _scores_of_row(p, query, row * D, columns, first, last, scores)
        _add_to_scores(p, a, b, h, i, position, first, last, scores, permitted)
        # 3. Softmax over the permitted keys.
        highest, total = _powers_of_row(first, last, scores, permitted, powers)
        if a.lse != 0:
            # without a permitted key: -inf, the log of an empty sum
            lse[row] = highest if total == 0 else highest + math.log(total)
        # 4. The weighted mean of the values. Without a permitted key nothing is divided or added.
        for d in range(Dv):
            context[d] = 0
        if a.weights != 0:
            for j in range(S):
                weights[row * S + j] = 0
        for j in range(first, last):
            if permitted[j] != 0:
                weight = np.float32(powers[j] / total)
                if a.weights != 0:
                    weights[row * S + j] = weight
                for d in range(Dv):
                    context[d] += np.float64(weight) * np.float64(value[(item * S + j) * Dv + d])
        for d in range(Dv):
            out[row * Dv + d] = context[d]


@jit
def attention_by_rows(parameters, addresses, scratch, task_queue, count):
    """See `attention`; on at most `count` threads that serve the task_queue.

    parameters ATTENTION, addresses ADDRESSES; scratch: 32-bit elements, `private_size` for each thread.
    """
    p, a = named(parameters, ATTENTION), located(addresses, ADDRESSES)
    portion, parts = portions(p.batch * p.heads * p.queries, 1, count)
    parallel_for(task_queue, parts, _attend_part, p, a, address_of(scratch), portion)
