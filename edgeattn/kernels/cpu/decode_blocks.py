"""What the decode kernels share: a single query attends to blocks of keys by themselves, then the blocks are joined.

Letters: B batch, H query heads, Hkv key heads, G = H / Hkv queries that share a key head, S keys, D head size, Dv value
size.  An item is a (batch entry, key head); its keys are cut into blocks of BLOCK, the same blocks whatever the number
of threads.  Of each block (G, Dv') context, Dv' = Dv rounded up, then (G,) maxima and (G,) sums lie in the scratch that
all threads share.  A block's context is divided by its sum, so that no number is larger than the largest value.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .records import real, record
from .simd import LANES, first_lane, load, max_lanes, maximum, pointer_to, splat, store
from .softmax import LOG2_E, exp2, tanh

BLOCK = 128  # keys
_ZERO = np.float32(0)
_ONE = np.float32(1)
_MINUS_INFINITY = np.float32(-np.inf)
_LOWEST = np.finfo(np.float32).min

# Sizes, and which row is the first key; where the scratch of each begins; bits of scale and softcap as float32; strides
# in elements.
DECODE = record("batch heads kv_heads keys first head_size value_size padded_value blocks result_size",
                "shared_size private_size scale softcap",
                "q_b q_h k_b k_h k_s v_b v_h v_s out_b out_h",
                "k_scale_b k_scale_h k_scale_s v_scale_b v_scale_h v_scale_s")
# `lengths`: int64, the keys of each batch entry, or 0: all keys are there; scales float32, of bytes.
ADDRESSES = record("q out lengths k v k_scale v_scale")


@inline
def keys_of(p, a, batch):
    """How many keys a batch entry has."""
    return p.keys if a.lengths == 0 else min(max(pointer_to(a.lengths, np.int64)[batch], 0), p.keys)


@inline
def take_queries(p, a, item, private, at_q, q_row):
    """private[at_q + g q_row + d] = query g of the item times what makes its scores exponents of 2; then zeros."""
    G = p.heads // p.kv_heads
    batch, kv = item // p.kv_heads, item % p.kv_heads
    q, scale, softcap = pointer_to(a.q, private), real(p.scale), real(p.softcap)
    factor = scale / softcap if softcap > _ZERO else scale * LOG2_E
    for g in range(G):
        start = batch * p.q_b + (kv * G + g) * p.q_h
        for d in range(p.head_size):
            private[at_q + g * q_row + d] = q[start + d] * factor
        for d in range(p.head_size, q_row):
            private[at_q + g * q_row + d] = _ZERO


@inline
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
        best = maximum(load(private, at + s), best)
    return max_lanes(best)


@inline
def inverse_of(total):
    """1 / total; 0 where no key had a weight."""
    return _ONE / total if total != _ZERO else _ZERO


@inline
def join_blocks(p, a, results, feature_of):
    """out (B, H, Dv) = the softmax over all blocks; feature_of(position) says what a context's element is."""
    out = pointer_to(a.out, np.float32)
    G, Dv, Dv_up = p.heads // p.kv_heads, p.value_size, p.padded_value
    for item in range(p.batch * p.kv_heads):
        batch, kv = item // p.kv_heads, item % p.kv_heads
        blocks = (keys_of(p, a, batch) + BLOCK - 1) // BLOCK
        first = item * p.blocks * p.result_size
        for g in range(G):
            to = batch * p.out_b + (kv * G + g) * p.out_h
            if blocks == 0:
                for d in range(Dv):
                    out[to + d] = _ZERO
                continue
            context, maximum, total = first + g * Dv_up, first + G * Dv_up + g, first + G * (Dv_up + 1) + g
            best = _MINUS_INFINITY
            for block in range(blocks):
                best = max(best, results[maximum + block * p.result_size])
            whole = _ZERO
            for block in range(blocks):
                here = block * p.result_size
                weight = results[total + here] * first_lane(exp2(splat(results[maximum + here] - best)))
                results[total + here] = weight
                whole += weight
            inverse = inverse_of(whole)
            for block in range(blocks):
                here = block * p.result_size
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
