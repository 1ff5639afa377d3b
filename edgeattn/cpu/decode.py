"""One query against a long cache of keys and values: a loop bound by memory, each key and value read once.

Letters: B batch, H query heads, Hkv key heads, G = H / Hkv queries that share a key head, S keys, D head size, Dv value
size.  Keys stay rows: scores are dot products along D, so nothing is packed and nothing is turned.
"""
import numpy as np
from numba import carray, types
from numba.extending import overload

from edgeattn import threads
from edgeattn.jit import entry, inlined, jit

from .functional_float32 import _rows
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
 G_O, G_O_B, G_O_H, G_KS, G_KS_B, G_KS_H, G_KS_S, G_VS, G_VS_B, G_VS_H, G_VS_S, G_FIRST, G_COUNT) = range(29)


def load_numbers(array, at):
    """array[at : at + LANES] as float32: of a float32 or an int8 array."""
    raise TypeError("for kernels only: Numba compiles what stands below in its place")


@overload(load_numbers)
def _load_numbers(array, at):
    if array.dtype == types.float32:
        return lambda array, at: load(array, at)
    return lambda array, at: to_float(load_bytes(array, at))


@inlined
def _decode(numbers, p, scale, softcap, lengths, private, begin, end):
    """The body of `decode_float32` and `decode_int8`; `numbers` is an array of the cache's dtype."""
    H, Hkv, S, D, Dv = p[G_H], p[G_KV_HEADS], p[G_S], p[G_D], p[G_DV]
    G = H // Hkv
    D_whole, Dv_whole = D // LANES * LANES, Dv // LANES * LANES
    D_up, Dv_up = (D + LANES - 1) // LANES * LANES, (Dv + LANES - 1) // LANES * LANES
    has_scales = p[G_KS] != 0
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
    for item in range(begin, end):
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
            # 3. context (G, Dv) += p v, four vectors of it at a time in registers
            for g in range(G):
                at, to = at_scores + g * BLOCK, at_out + g * Dv_up
                at_v = from_v + s0 * v_row
                d = 0
                while d + 4 * LANES <= Dv_whole:
                    c0, c1 = load(private, to + d), load(private, to + d + LANES)
                    c2, c3 = load(private, to + d + 2 * LANES), load(private, to + d + 3 * LANES)
                    for s in range(count):
                        weight = splat(private[at + s])
                        here = at_v + s * v_row + d
                        c0 = fma(weight, load_numbers(all_v, here), c0)
                        c1 = fma(weight, load_numbers(all_v, here + LANES), c1)
                        c2 = fma(weight, load_numbers(all_v, here + 2 * LANES), c2)
                        c3 = fma(weight, load_numbers(all_v, here + 3 * LANES), c3)
                    store(private, to + d, c0)
                    store(private, to + d + LANES, c1)
                    store(private, to + d + 2 * LANES, c2)
                    store(private, to + d + 3 * LANES, c3)
                    d += 4 * LANES
                while d < Dv_whole:
                    c0, c1 = load(private, to + d), splat(_ZERO)
                    for s in range(0, count - 1, 2):
                        here = at_v + s * v_row + d
                        c0 = fma(splat(private[at + s]), load_numbers(all_v, here), c0)
                        c1 = fma(splat(private[at + s + 1]), load_numbers(all_v, here + v_row), c1)
                    if count % 2:
                        last = count - 1
                        c0 = fma(splat(private[at + last]), load_numbers(all_v, at_v + last * v_row + d), c0)
                    store(private, to + d, c0 + c1)
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
def decode_float32(p, scale, softcap, lengths, private, begin, end):
    """Query (B, H, D) over keys (B, Hkv, S, D), values (B, Hkv, S, Dv), float32, for items (batch, kv head)."""
    _decode(private, p, scale, softcap, lengths, private, begin, end)


@jit
def decode_int8(codes, p, scale, softcap, lengths, private, begin, end):
    """As decode_float32, keys and values int8 with one float32 scale per token and head; codes: any int8 array."""
    _decode(codes, p, scale, softcap, lengths, private, begin, end)


_float_run = None
_int8_run = None
_NO_LENGTHS = np.zeros(0, np.int64)
_CODES = np.zeros(1, np.int8)


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
    global _float_run, _int8_run
    q = _rows(q)
    B, H, D = q.shape
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    scales = (0,) * 8
    if k_scale is not None:
        k0, k1, k2 = k_scale.strides
        v0, v1, v2 = v_scale.strides
        scales = (k_scale.ctypes.data, k0 // 4, k1 // 4, k2 // 4, v_scale.ctypes.data, v0 // 4, v1 // 4, v2 // 4)
    size = k.itemsize
    q0, q1, _ = q.strides
    k0, k1, k2, _ = k.strides
    v0, v1, v2, _ = v.strides
    o0, o1, _ = out.strides
    p = np.array((H, Hkv, S, D, Dv, q.ctypes.data, q0 // 4, q1 // 4, k.ctypes.data, k0 // size, k1 // size, k2 // size,
                  v.ctypes.data, v0 // size, v1 // size, v2 // size, out.ctypes.data, o0 // 4, o1 // 4,
                  *scales, max(first, 0)), np.int64)
    G = H // Hkv
    private = G * (round_up(D, LANES) + BLOCK + round_up(Dv, LANES) + 2) + LANES
    lengths = _NO_LENGTHS if lengths is None else lengths
    arguments = (p, np.float32(scale), np.float32(softcap), lengths)
    if k_scale is None:
        if _float_run is None:
            _float_run = entry(decode_float32, (*arguments, np.zeros(1, np.float32), 0, 0))
        run = _float_run
    else:
        arguments = (_CODES, *arguments)
        if _int8_run is None:
            _int8_run = entry(decode_int8, (*arguments, np.zeros(1, np.float32), 0, 0))
        run = _int8_run
    threads.run_items(run, arguments, np.float32, private, B * Hkv, 2 * B * H * S * (D + Dv))
    return out
