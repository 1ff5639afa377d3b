"""Attention one row of scores at a time: where the probabilities are wanted, an axis is empty, or a scale extreme."""

import math

import numpy as np
from numba.extending import register_jitable

from edgeattn import threads
from edgeattn.runtime.jit import jit

from .softmax import LARGEST_MASK, masked_score

_WORK = 8  # a sum in float64, one number at a time, for each of the operations of a tile
_NO_KEEP = np.empty((0, 0, 0, 0), np.bool_)
_NO_BIAS = np.empty((0, 0, 0, 0), np.float32)
_NO_SLOPES = np.empty((0, 0), np.float32)
for _absent in (_NO_KEEP, _NO_BIAS):
    _absent.flags.writeable = False  # the type that a mask has, so that one compiled kernel serves both


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
    batch, heads, _, keys = mask.shape
    offset = np.zeros(batch, np.int64) + mask.offset
    lengths = np.full(batch, keys, np.int64) if mask.lengths is None else mask.lengths
    repeats = heads // max(key.shape[1], 1)
    for entries, some, rows in _parts(mask.shape, _WORK * math.prod(mask.shape) * (query.shape[3] + value.shape[3])):
        own = entries, some, rows
        shared = entries, slice(some.start // repeats, -(-some.stop // repeats)) if heads else some
        _attention(
            query[own],
            key[shared],
            value[shared],
            _cut(_NO_KEEP if mask.keep is None else mask.keep, own),
            _cut(_NO_BIAS if mask.bias is None else mask.bias, own),
            _cut(_NO_SLOPES if mask.slopes is None else mask.slopes, own),
            mask.left,
            mask.right,
            offset[entries] + rows.start,
            lengths[entries],
            float(scale),
            float(softcap),
            out[own],
            np.empty((0, 0, 0, 0), np.float32) if weights is None else weights[own],
            np.empty((0, 0, 0), np.float32) if lse is None else lse[own],
        )


def _parts(shape, work):
    """Batch entries, heads and rows, as slices, of the parts of a call between which signals are handled."""
    batch, heads, queries, _ = shape
    for first, last in threads.in_portions(batch, work):
        if last - first > 1 or work <= threads.LONG_WORK:
            yield slice(first, last), slice(0, heads), slice(0, queries)
            continue
        for head in range(heads):
            for begin, end in threads.in_portions(queries, work // (batch * heads)):
                yield slice(first, last), slice(head, head + 1), slice(begin, end)


def _cut(mask, own):
    """A part of a mask, whose axes may be 1."""
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip(own, mask.shape, strict=False))]


@register_jitable
def _row(mask, b, h, i):
    # mask (B or 1, H or 1, L or 1, S) -> (S,)
    return mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1), min(i, mask.shape[2] - 1)]


@register_jitable
def _within(added):
    # as fused.fill_mask keeps masks finite; a NaN stays
    return np.float32(min(max(added, -LARGEST_MASK), LARGEST_MASK)) if added == added else added


@jit
def _attention(query, key, value, keep, bias, slopes, left, right, offset, lengths, scale, softcap, out, weights, lse):
    # query (B, H, L, D)  key (B, Hkv, S, D)  value (B, Hkv, S, Dv)  out (B, H, L, Dv)
    # keep, bias (B or 1, H or 1, L or 1, S), or empty: absent   weights (B, H, L, S), or empty: not wanted
    # slopes (B or 1, H), or empty: absent   lse (B, H, L), or empty: not wanted
    # offset, lengths (B,)
    B, H, L, D = query.shape
    Hkv, S, Dv = key.shape[1], key.shape[2], value.shape[3]
    has_keep, has_bias, has_weights, has_lse = keep.size > 0, bias.size > 0, weights.size > 0, lse.size > 0
    key_columns = np.empty((D, S), np.float32)
    # Scores and long sums are kept in float64, where their roundings vanish and no float32 is too large.
    scores = np.empty(S, np.float64)
    powers = np.empty(S, np.float32)
    context = np.empty(Dv, np.float64)
    permitted = np.empty(S, np.bool_)
    for b in range(B):
        for kv in range(Hkv):
            for j in range(S):
                for d in range(D):
                    key_columns[d, j] = key[b, kv, j, d]
            for h in range(kv * (H // Hkv), (kv + 1) * (H // Hkv)):
                for i in range(L):
                    # 1. The keys [first, last) that length and window leave, and which of them are permitted.
                    first, last = 0, lengths[b]
                    if left >= 0:
                        first = max(first, i + offset[b] - left)
                    if right >= 0:
                        last = min(last, i + offset[b] + right + 1)
                    permitted[:] = False
                    for j in range(first, last):
                        permitted[j] = True
                    if has_keep:
                        keep_row = _row(keep, b, h, i)
                        for j in range(first, last):
                            permitted[j] = keep_row[j]

                    # 2. Scores, a column of keys at a time so that the inner loop runs along keys.
                    scores[:] = 0
                    for d in range(D):
                        for j in range(first, last):
                            scores[j] += np.float64(query[b, h, i, d]) * np.float64(key_columns[d, j])
                    for j in range(first, last):
                        scores[j] *= scale
                    if softcap != 0:
                        for j in range(first, last):
                            scores[j] = softcap * math.tanh(scores[j] / softcap)
                    if has_bias or slopes.size > 0:
                        slope = np.float32(0)
                        if slopes.size > 0:
                            slope = np.float32(slopes[min(b, slopes.shape[0] - 1), h])
                        for j in range(first, last):
                            added = np.float32(0)
                            if has_bias:
                                added = _row(bias, b, h, i)[j]
                                permitted[j] = permitted[j] and added != -np.inf
                            if abs(added) != np.inf:
                                added = _within(added)
                                if slope != 0:
                                    added = _within(np.float32(added - slope * np.float32(abs(i + offset[b] - j))))
                            scores[j] = masked_score(scores[j], added)

                    # 3. Softmax over the permitted keys; one whose score is -inf is none. NaN wins no comparison, and
                    # spreads from the sum.
                    highest = -np.inf
                    for j in range(first, last):
                        permitted[j] = permitted[j] and scores[j] != -np.inf
                        if permitted[j] and scores[j] > highest:
                            highest = scores[j]
                    total = 0.0
                    for j in range(first, last):
                        if permitted[j]:
                            powers[j] = math.exp(np.float32(scores[j] - highest))
                            total += powers[j]
                    if has_lse:
                        # without a permitted key: -inf, the log of an empty sum
                        lse[b, h, i] = highest if total == 0 else highest + math.log(total)

                    # 4. The weighted mean of the values. Without a permitted key nothing is divided or added.
                    context[:] = 0
                    if has_weights:
                        weights[b, h, i, :] = 0
                    for j in range(first, last):
                        if permitted[j]:
                            weight = np.float32(powers[j] / total)
                            if has_weights:
                                weights[b, h, i, j] = weight
                            for d in range(Dv):
                                context[d] += np.float64(weight) * np.float64(value[b, kv, j, d])
                    for d in range(Dv):
                        out[b, h, i, d] = context[d]
