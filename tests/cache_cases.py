"""Caches of one shape, a layer, and sequences that come chunk by chunk."""
import numpy as np
from arrays import numbers

from edgeattn import KVCache, MultiHeadAttention

B, H, HKV, D, DV, E, LENGTH = 2, 4, 2, 8, 6, 24, 40
CHUNKS = {"whole": [40], "tokens": [1] * 40, "uneven": [3, 20, 0, 17], "last": [39, 1]}


def qkv(length=LENGTH, seed=0):
    return (
        numbers(B, H, length, D, seed=seed),
        numbers(B, HKV, length, D, seed=seed + 1),
        numbers(B, HKV, length, DV, seed=seed + 2),
    )


def cache(capacity=LENGTH, **changes):
    return KVCache(B, HKV, capacity, D, value_dim=DV, **changes)


def streamed(target, q, k, v, chunks, **arguments):
    """Results over a sequence that comes chunk by chunk, in one array (B, H, L, Dv)."""
    results, at = [], 0
    for n in chunks:
        target.append(k[:, :, at : at + n], v[:, :, at : at + n])
        results.append(target.attend(q[:, :, at : at + n], **arguments))
        at += n
    return np.concatenate(results, axis=2)


def layer(**changes):
    given = {
        "q_weight": numbers(H * D, E, seed=1) / 5, "k_weight": numbers(HKV * D, E, seed=2) / 5,
        "v_weight": numbers(HKV * DV, E, seed=3) / 5, "out_weight": numbers(E, H * DV, seed=4) / 5,
        "q_bias": numbers(H * D, seed=5), "out_bias": numbers(E, seed=6)}
    return MultiHeadAttention(H, **{**given, **changes}, num_kv_heads=HKV)


def through(target, made, x, chunks, **arguments):
    """Results of a layer over a sequence that comes chunk by chunk."""
    results, at = [], 0
    for n in chunks:
        results.append(made(x[:, at : at + n], kv_cache=target, **arguments))
        at += n
    return np.concatenate(results, axis=1)
