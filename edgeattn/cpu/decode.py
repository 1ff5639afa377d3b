"""One query against a long cache of keys and values: a loop bound by memory, each key and value read once.

Letters: B batch, H query heads, Hkv key heads, G = H / Hkv queries that share a key head, S keys, D head size, Dv value
size.  Keys stay rows: scores are dot products along D, so nothing is packed and nothing is turned.
"""
import numpy as np
from numba import carray, types
from numba.extending import overload

from edgeattn import threads
from edgeattn.crew import separate, share
from edgeattn.jit import entry, inlined, jit

from .functional_float32 import _rows
from .fused import describe, portions
from .matmul import round_up
from .simd import (
    LANES,
    fma,
    larger,
    load,
    load_bytes,
    max_lanes,
    pointer_to,
    splat,
    store,
    sum_lanes,
    tile_add_products,
    tile_add_rows,
    tile_add_to,
    tile_row_sums,
    tile_zero,
    to_float,
)
from .softmax import LOG2_E, exp2, tanh

BLOCK = 256  # keys whose scores are kept at a time
_ZERO = np.float32(0)
_ONE = np.float32(1)
_MINUS_INFINITY = np.float32(-np.inf)

(G_H, G_KV_HEADS, G_S, G_D, G_DV, G_Q, G_Q_B, G_Q_H, G_K, G_K_B, G_K_H, G_K_S, G_V, G_V_B, G_V_H, G_V_S,
 G_O, G_O_B, G_O_H, G_KS, G_KS_B, G_KS_H, G_KS_S, G_VS, G_VS_B, G_VS_H, G_VS_S, G_FIRST, G_BATCH, G_PRIVATE,
 G_SCALED, G_COUNT) = range(32)


def load_numbers(array, at):
    """array[at : at + LANES] as float32: of a float32 or an int8 array."""
    raise TypeError("for kernels only: Numba compiles what stands below in its place")


@overload(load_numbers)
def _load_numbers(array, at):
    if array.dtype == types.float32:
        return lambda array, at: load(array, at)
    return lambda array, at: to_float(load_bytes(array, at))


@inlined
def add_last(columns, values, at_v, v_row, private, at, from_s, count, to):
    """private[to :] += p v for the keys from_s..count that fill no tile."""
    for s in range(from_s, count):
        for j in range(columns):
            here = to + j * LANES
            v = load_numbers(values, at_v + s * v_row + j * LANES)
            store(private, here, fma(splat(private[at + s]), v, load(private, here)))


@separate
def decode_part(numbers, p, scale, softcap, lengths, scratch, portion, worker, part):
    """A portion of the items (batch, kv head) of `decode`; `numbers` is an array of the cache's dtype."""
    private = scratch[worker * p[G_PRIVATE]:]
    H, Hkv, S, D, Dv = p[G_H], p[G_KV_HEADS], p[G_S], p[G_D], p[G_DV]
    G = H // Hkv
    D_whole, Dv_whole = D // LANES * LANES, Dv // LANES * LANES
    D_up, Dv_up = (D + LANES - 1) // LANES * LANES, (Dv + LANES - 1) // LANES * LANES
    has_scales = p[G_SCALED] != 0
    everything = np.int64(1) << 60
    all_q, all_o = carray(pointer_to(p[G_Q], private), everything), carray(pointer_to(p[G_O], private), everything)
    all_k, all_v = carray(pointer_to(p[G_K], numbers), everything), carray(pointer_to(p[G_V], numbers), everything)
    k_scales = carray(pointer_to(p[G_KS], private), everything)
    v_scales = carray(pointer_to(p[G_VS], private), everything)
    at_q = 0  # (G, D_up), scaled
    at_scores = at_q + G * D_up  # (G, BLOCK)
    at_out = at_scores + G * BLOCK  # (G, Dv_up)
    at_stats = at_out + G * Dv_up  # (G, 2): maximum, sum
    factor = scale / softcap if softcap > _ZERO else scale * LOG2_E
    for item in range(part * portion, min((part + 1) * portion, p[G_BATCH] * Hkv)):
        batch, kv = item // Hkv, item % Hkv
        keys = S if lengths.size == 0 else min(max(lengths[batch], 0), S)
        for g in range(G):
            from_q = batch * p[G_Q_B] + (kv * G + g) * p[G_Q_H]
            for d in range(D):
                private[at_q + g * D_up + d] = all_q[from_q + d] * factor
            for d in range(Dv_up):
                private[at_out + g * Dv_up + d] = _ZERO
            private[at_stats + 2 * g] = _MINUS_INFINITY
            private[at_stats + 2 * g + 1] = _ZERO
        from_k, k_row = batch * p[G_K_B] + kv * p[G_K_H], p[G_K_S]
        from_v, v_row = batch * p[G_V_B] + kv * p[G_V_H], p[G_V_S]
        from_ks = batch * p[G_KS_B] + kv * p[G_KS_H]
        from_vs = batch * p[G_VS_B] + kv * p[G_VS_H]
        for s0 in range(min(p[G_FIRST], keys), keys, BLOCK):
            count = min(BLOCK, keys - s0)
            count_up = (count + LANES - 1) // LANES * LANES
            # 1. scores (G, BLOCK) along D; lanes past the last key are -inf
            whole = count // LANES * LANES
            for s in range(0, whole, LANES):
                at_k = from_k + (s0 + s) * k_row
                for g in range(G):
                    tile = tile_zero(LANES, 1, private)
                    for d in range(0, D_whole, LANES):
                        tile = tile_add_products(tile, all_k, at_k + d, k_row, load(private, at_q + g * D_up + d))
                    store(private, at_scores + g * BLOCK + s, tile_row_sums(tile))
            for s in range(count):
                at_k = from_k + (s0 + s) * k_row
                if s >= whole:
                    for g in range(G):
                        total = splat(_ZERO)
                        for d in range(0, D_whole, LANES):
                            total = fma(load_numbers(all_k, at_k + d), load(private, at_q + g * D_up + d), total)
                        private[at_scores + g * BLOCK + s] = sum_lanes(total)
                if D_whole < D or has_scales:
                    key_scale = k_scales[from_ks + (s0 + s) * p[G_KS_S]] if has_scales else _ONE
                    for g in range(G):
                        score = private[at_scores + g * BLOCK + s]
                        for d in range(D_whole, D):
                            score += np.float32(all_k[at_k + d]) * private[at_q + g * D_up + d]
                        private[at_scores + g * BLOCK + s] = score * key_scale
            for g in range(G):
                at = at_scores + g * BLOCK
                if softcap > _ZERO:
                    for s in range(0, count_up, LANES):
                        store(private, at + s, tanh(load(private, at + s)) * splat(softcap * LOG2_E))
                for s in range(count, count_up):
                    private[at + s] = _MINUS_INFINITY
                # 2. online softmax
                best = load(private, at)
                for s in range(LANES, count_up, LANES):
                    best = larger(load(private, at + s), best)
                before = private[at_stats + 2 * g]
                m = max(max_lanes(best), before)
                base = _ZERO if m == _MINUS_INFINITY else m
                total = splat(_ZERO)
                for s in range(0, count_up, LANES):
                    e = exp2(load(private, at + s) - splat(base))
                    store(private, at + s, e)
                for s in range(count, count_up):
                    private[at + s] = _ZERO
                for s in range(0, count_up, LANES):
                    total = total + load(private, at + s)
                shrink = exp2(splat(before - base))
                if before == _MINUS_INFINITY:
                    shrink = splat(_ZERO)
                private[at_stats + 2 * g] = m
                private[at_stats + 2 * g + 1] = private[at_stats + 2 * g + 1] * max_lanes(shrink) + sum_lanes(total)
                for d in range(0, Dv_up, LANES):
                    store(private, at_out + g * Dv_up + d, load(private, at_out + g * Dv_up + d) * shrink)
                if has_scales:
                    for s in range(count):
                        private[at + s] *= v_scales[from_vs + (s0 + s) * p[G_VS_S]]
            # 3. context (G, Dv) += p v, eight chains of additions at a time in registers
            for g in range(G):
                at, to = at_scores + g * BLOCK, at_out + g * Dv_up
                at_v = from_v + s0 * v_row
                d = 0
                while d + 4 * LANES <= Dv_whole:
                    tile = tile_zero(2, 4, private)
                    for s in range(0, count - 1, 2):
                        tile = tile_add_rows(tile, all_v, at_v + s * v_row + d, v_row, private, at + s)
                    tile_add_to(tile, private, to + d)
                    add_last(4, all_v, at_v + d, v_row, private, at, count // 2 * 2, count, to + d)
                    d += 4 * LANES
                while d + 2 * LANES <= Dv_whole:
                    tile = tile_zero(4, 2, private)
                    for s in range(0, count - 3, 4):
                        tile = tile_add_rows(tile, all_v, at_v + s * v_row + d, v_row, private, at + s)
                    tile_add_to(tile, private, to + d)
                    add_last(2, all_v, at_v + d, v_row, private, at, count // 4 * 4, count, to + d)
                    d += 2 * LANES
                while d < Dv_whole:
                    tile = tile_zero(8, 1, private)
                    for s in range(0, count - 7, 8):
                        tile = tile_add_rows(tile, all_v, at_v + s * v_row + d, v_row, private, at + s)
                    tile_add_to(tile, private, to + d)
                    add_last(1, all_v, at_v + d, v_row, private, at, count // 8 * 8, count, to + d)
                    d += LANES
                for d in range(Dv_whole, Dv):
                    for s in range(count):
                        private[to + d] += private[at + s] * np.float32(all_v[at_v + s * v_row + d])
        # 4. divide by the sum; no key, zeros
        for g in range(G):
            total = private[at_stats + 2 * g + 1]
            inverse = _ZERO if total == _ZERO else _ONE / total
            to = batch * p[G_O_B] + (kv * G + g) * p[G_O_H]
            for d in range(Dv):
                all_o[to + d] = private[at_out + g * Dv_up + d] * inverse


@jit
def decode_any(q, k, v, out, k_scale, v_scale, first, scale, softcap, lengths, private_size, scratch, board, count):
    """Query (B, H, D) over keys (B, Hkv, S, D) and values (B, Hkv, S, Dv), float32 or int8; any strides but the last.

    k_scale, v_scale (B, Hkv, S): empty for a float32 cache.  On at most `count` threads that serve the board.
    """
    p = np.zeros(G_COUNT, np.int64)
    p[G_BATCH], p[G_H], p[G_D] = q.shape
    p[G_KV_HEADS], p[G_S], p[G_DV] = k.shape[1], k.shape[2], v.shape[3]
    p[G_FIRST], p[G_PRIVATE], p[G_SCALED] = max(first, 0), private_size, k_scale.size > 0
    describe(p, G_Q, q, 2)
    describe(p, G_K, k, 3)
    describe(p, G_V, v, 3)
    describe(p, G_O, out, 2)
    describe(p, G_KS, k_scale, 3)
    describe(p, G_VS, v_scale, 3)
    portion, parts = portions(p[G_BATCH] * p[G_KV_HEADS], 1, count)
    share(board, parts, decode_part, k[0, 0, 0, :0], p, scale, softcap, lengths, scratch, portion)


_runs = {}
_NO_LENGTHS = np.zeros(0, np.int64)
_NO_SCALES = np.zeros((0, 0, 0), np.float32)


def decode(q, k, v, out, scale, softcap=0.0, lengths=None, first=0, k_scale=None, v_scale=None):
    """out (B, H, Dv) = softmax(q k^T scale) v for one query per head.

    Parameters
    ----------
    q : (B, H, D) float32, last dimension contiguous
    k, v : (B, Hkv, S, D), (B, Hkv, S, Dv)
        float32, or int8 with scales; last dimension contiguous, other strides free: a cache is read in place.
    out : (B, H, Dv) float32, last dimension contiguous
    lengths : (B,) int64 or None
        Keys that exist per batch entry.
    first : int
        The first key that may be seen (a window).
    k_scale, v_scale : (B, Hkv, S) float32, or None for float32 caches
    """
    q = _rows(q)
    B, H, D = q.shape
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    private = round_up(H // Hkv * (round_up(D, LANES) + BLOCK + round_up(Dv, LANES) + 2) + LANES, 16)
    arguments = (q, k, v, out, _NO_SCALES if k_scale is None else k_scale, _NO_SCALES if v_scale is None else v_scale,
                 first, np.float32(scale), np.float32(softcap), _NO_LENGTHS if lengths is None else lengths, private)
    run = _runs.get(k_scale is None)
    if run is None:
        run = _runs[k_scale is None] = entry(
            decode_any, (*arguments, np.zeros(1, np.float32), np.zeros(1, np.int64), 1), strided=6)
    threads.run(run, arguments, np.float32, 0, private, 8 * B * H * S * (D + Dv))
    return out
