"""What the decode kernels share: a single query attends to blocks of keys by themselves, then the blocks are joined.

Letters: B batch, H query heads, Hkv key heads, G = H / Hkv queries that share a key head, S keys, D head size, Dv value
size.  An item is a (batch entry, key head); its keys are cut into blocks of BLOCK, the same blocks whatever the number
of threads.  Of each block (G, Dv') context, Dv' = Dv rounded up, then (G,) maxima and (G,) sums lie in the scratch that
all threads share.  A block's context is divided by its sum, so that no number is larger than the largest value.
"""
import numpy as np
from numba.extending import register_jitable

from edgeattn.jit import inlined

from .fused import describe
from .simd import LANES, first_lane, larger, load, max_lanes, pointer_to, splat, store
from .softmax import LOG2_E, exp2, tanh

BLOCK = 128  # keys
_ZERO = np.float32(0)
_ONE = np.float32(1)
_MINUS_INFINITY = np.float32(-np.inf)
_LOWEST = np.finfo(np.float32).min

# Parameters: sizes, then per array its address and its strides in elements.
(D_B, D_H, D_KV_HEADS, D_S, D_D, D_DV, D_DV_UP, D_BLOCKS, D_RESULT, D_SHARED, D_PRIVATE,
 D_Q, D_Q_B, D_Q_H, D_K, D_K_B, D_K_H, D_K_S, D_V, D_V_B, D_V_H, D_V_S, D_O, D_O_B, D_O_H,
 D_KS, D_KS_B, D_KS_H, D_KS_S, D_VS, D_VS_B, D_VS_H, D_VS_S, D_COUNT) = range(34)


@register_jitable
def parameters(q, k, v, out, result_row, private):
    """The parameters of one call, without scales; `result_row` is Dv', `private` the scratch elements of a thread."""
    p = np.zeros(D_COUNT, np.int64)
    p[D_B], p[D_H], p[D_D] = q.shape
    p[D_KV_HEADS], p[D_S], p[D_DV], p[D_DV_UP] = k.shape[1], k.shape[2], v.shape[3], result_row
    p[D_BLOCKS], p[D_PRIVATE] = (p[D_S] + BLOCK - 1) // BLOCK, private
    p[D_RESULT] = p[D_H] // p[D_KV_HEADS] * (result_row + 2)
    p[D_SHARED] = (p[D_B] * p[D_KV_HEADS] * p[D_BLOCKS] * p[D_RESULT] + 15) // 16 * 16
    describe(p, D_Q, q, 2)
    describe(p, D_K, k, 3)
    describe(p, D_V, v, 3)
    describe(p, D_O, out, 2)
    return p


@inlined
def keys_of(p, lengths, batch):
    """How many keys a batch entry has."""
    return p[D_S] if lengths.size == 0 else min(max(lengths[batch], 0), p[D_S])


@inlined
def take_queries(p, item, scale, softcap, private, at_q, q_row):
    """private[at_q + g q_row + d] = query g of the item times what makes its scores exponents of 2; then zeros."""
    G = p[D_H] // p[D_KV_HEADS]
    batch, kv = item // p[D_KV_HEADS], item % p[D_KV_HEADS]
    q = pointer_to(p[D_Q], private)
    factor = scale / softcap if softcap > _ZERO else scale * LOG2_E
    for g in range(G):
        start = batch * p[D_Q_B] + (kv * G + g) * p[D_Q_H]
        for d in range(p[D_D]):
            private[at_q + g * q_row + d] = q[start + d] * factor
        for d in range(p[D_D], q_row):
            private[at_q + g * q_row + d] = _ZERO


@inlined
def cap_and_maximum(private, at, count, softcap):
    """Cap the `count` scores at private[at] and lower those up to the next whole vector to -inf; their maximum.

    The lowest finite number where all are -inf, so that the difference to it exists.
    """
    count_up = (count + LANES - 1) // LANES * LANES
    if softcap > _ZERO:
        for s in range(0, count_up, LANES):
            store(private, at + s, tanh(load(private, at + s)) * splat(softcap * LOG2_E))
    for s in range(count, count_up):
        private[at + s] = _MINUS_INFINITY
    best = splat(_LOWEST)
    for s in range(0, count_up, LANES):
        best = larger(load(private, at + s), best)
    return max_lanes(best)


@inlined
def inverse_of(total):
    """1 / total; 0 where no key had a weight."""
    return _ONE / total if total != _ZERO else _ZERO


@inlined
def join_blocks(p, out, lengths, results, feature_of):
    """out (B, H, Dv) = the softmax over all blocks; feature_of(position) says what a context's element is."""
    G, Dv, Dv_up = p[D_H] // p[D_KV_HEADS], p[D_DV], p[D_DV_UP]
    for item in range(p[D_B] * p[D_KV_HEADS]):
        batch, kv = item // p[D_KV_HEADS], item % p[D_KV_HEADS]
        blocks = (keys_of(p, lengths, batch) + BLOCK - 1) // BLOCK
        first = item * p[D_BLOCKS] * p[D_RESULT]
        for g in range(G):
            to = batch * p[D_O_B] + (kv * G + g) * p[D_O_H]
            if blocks == 0:
                for d in range(Dv):
                    out[to + d] = _ZERO
                continue
            context, maximum, total = first + g * Dv_up, first + G * Dv_up + g, first + G * (Dv_up + 1) + g
            best = _MINUS_INFINITY
            for block in range(blocks):
                best = max(best, results[maximum + block * p[D_RESULT]])
            whole = _ZERO
            for block in range(blocks):
                here = block * p[D_RESULT]
                weight = results[total + here] * first_lane(exp2(splat(results[maximum + here] - best)))
                results[total + here] = weight
                whole += weight
            inverse = inverse_of(whole)
            for block in range(blocks):
                here = block * p[D_RESULT]
                weight = splat(results[total + here] * inverse)
                for d in range(0, Dv_up, LANES):
                    part = load(results, context + here + d) * weight
                    if block > 0:
                        part = part + load(results, context + d)
                    store(results, context + d, part)
            for d in range(Dv_up):
                feature = feature_of(d)
                if feature < Dv:
                    out[to + feature] = results[context + d]
