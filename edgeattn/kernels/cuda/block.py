"""What a block of attention.py works on: the addresses of its head, and the keys that its queries may see."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32, int64, larger, smaller
from edgeattn.kernels.cuda.ptx import float_of_bits, load_uniform, load_uniform_64, quotient, times, times_wide

from .attention_parameters import (
    A_BIAS,
    A_K,
    A_KEEP,
    A_Q,
    A_SLOPES,
    A_V,
    FAR,
    P_AT_END,
    P_BIAS_B,
    P_BIAS_H,
    P_K_B,
    P_K_H,
    P_KEEP_B,
    P_KEEP_H,
    P_L,
    P_LEFT,
    P_OFFSET,
    P_Q_B,
    P_Q_H,
    P_RIGHT,
    P_S,
    P_SCALE_B,
    P_SCALE_H,
    P_SLOPES_B,
    P_SPLITS,
    P_V_B,
    P_V_H,
)
from .softmax import LOG2_E
from .tiles import KEYS


@device
def head_addresses(a, p, batch, head, kv):
    """Where the queries, keys, values and masks of a head begin, and its scales, from where the lists of them begin."""
    query = a[A_Q] + times_wide(batch, p[P_Q_B]) + times_wide(head, p[P_Q_H])
    key = a[A_K] + times_wide(batch, p[P_K_B]) + times_wide(kv, p[P_K_H])
    value = a[A_V] + times_wide(batch, p[P_V_B]) + times_wide(kv, p[P_V_H])
    keep = a[A_KEEP] + times_wide(batch, p[P_KEEP_B]) + times_wide(head, p[P_KEEP_H])
    bias = a[A_BIAS] + times_wide(batch, p[P_BIAS_B]) + times_wide(head, p[P_BIAS_H])
    scale_at = times_wide(batch, p[P_SCALE_B]) + times_wide(kv, p[P_SCALE_H])
    return query, key, value, keep, bias, scale_at


@device
def slope_of(a, p, batch, head):
    """What a score to base 2 gets for each position between query and key; 0 where there are no slopes."""
    slope = float32(0.0)
    if a[A_SLOPES] != 0:
        slope = float_of_bits(load_uniform(a[A_SLOPES] + times_wide(batch, p[P_SLOPES_B]) + head * 4))
        slope = slope * float32(-LOG2_E)
    return slope


@device
def visible_keys(lengths, wide_lengths, batch, keys):
    """The number of leading keys of a batch entry that exist."""
    if lengths == 0:
        return keys
    if wide_lengths:
        found = int32(load_uniform_64(lengths + int64(batch) * 8))
    else:
        found = load_uniform(lengths + int64(batch) * 4)
    return int32(smaller(larger(found, 0), keys))


@device
def band(p, length):
    """(offset, low, high): query i sees key j only where i + low <= j <= i + high, and i + offset is its own place."""
    offset = p[P_OFFSET]
    if p[P_AT_END] != 0:
        offset = int32(length - p[P_L])
    low, high = -FAR, FAR
    if p[P_LEFT] >= 0:
        low = int32(offset - p[P_LEFT])
    if p[P_RIGHT] >= 0:
        high = int32(offset + p[P_RIGHT])
    return offset, low, high


@functools.cache
def choosing_keys(rows, codes, weights):
    """A function (p, q0, split, low, high, length) -> (first, end, last): the keys that a block goes over.

    From `first` to before `end`; from `last` on none is seen. With `weights` all of them, else those of the band that
    some of the block's queries may see; and of these the part of its split.
    """
    CODES, WEIGHTS = codes, weights

    @device
    def choose(p, q0, split, low, high, length):
        first = int32(larger(0, int32(q0 + low)))
        if CODES:
            first = int32(first & -4)  # values are read four keys at a time
        last = int32(smaller(length, int32(int32(smaller(q0 + rows, p[P_L])) + high)))
        end = last
        if WEIGHTS:  # every key has one, 0 where it is not to be seen
            first, end = int32(0), p[P_S]
        tiles = int32((larger(end - first, 0) + KEYS - 1) >> 6)
        per_split = quotient(int32(tiles + p[P_SPLITS] - 1), p[P_SPLITS])
        first = int32(first + times(split, per_split) * KEYS)
        end = int32(smaller(end, int32(first + per_split * KEYS)))
        if not WEIGHTS:
            last = end
        return first, end, last

    return choose
