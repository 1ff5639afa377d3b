"""Attention on given queries, keys and values with int8 products: float32 in and out, quantized at run time."""
import functools

import numpy as np

from edgeattn import threads
from edgeattn.crew import separate, share
from edgeattn.jit import entry, inlined, jit

from .dynamic import (
    BLOCKS,
    KEY_BLOCK,
    TOKENS,
    attend_bytes,
    choose_block,
    fill_dither,
    keys_to_rows,
    largest_rows,
    quantize_keys,
    quantize_queries,
    quantize_values,
    subtract_mean,
    turn,
    unit_of,
    weigh_tokens,
)
from .fused import ATTENDING, PROJECTING, fill_mask, portions, slope_and_place, visible_range
from .layer_float32 import _NO_BIAS, _NO_KEEP, place_masks, shape_of, with_alibi
from .matmul import MATRIX, MATRIX_DEPTH, ROW_STEP, place, round_up
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    broadcast,
    load,
    matrix_configure,
    matrix_release,
    splat,
    store,
)
from .softmax import LOG2_E

_ZERO = np.float32(0)
_ONE = np.float32(1)
_run = None

(A_B, A_H, A_KV_HEADS, A_L, A_S, A_D, A_DV,
 A_BAND, A_LOW, A_HIGH, A_KEEP_B, A_KEEP_H, A_KEEP_L, A_KEEP_S, A_BIAS_B, A_BIAS_H, A_BIAS_L, A_BIAS_S,
 A_ALIBI, A_ALIBI_B,
 A_MEAN, A_UNITS, A_KTERM, A_KSCALE, A_VALUES, A_VLOG, A_VINVERSE,
 A_AT_NATURAL, A_AT_ROWS, A_AT_WEIGHTS, A_AT_SEEN, A_AT_KEYS, A_AT_Q, A_AT_QSCALE, A_AT_SCORES, A_AT_P, A_AT_STATS,
 A_AT_DITHER, A_AT_CONTEXT, A_AT_SQUARE, A_AT_MASKS, A_SHARED, A_PRIVATE, A_COUNT) = range(44)


@inlined
def turn_rows(x, at, size, tokens, factor, private_f, at_natural, at_rows):
    """(size up to LANES, W) = factor x^T for up to W rows of x; what is missing is 0."""
    padded = round_up(size, LANES)
    for t in range(tokens):
        for d in range(size):
            private_f[at_natural + t * padded + d] = x[at + t * size + d] * factor
        for d in range(size, padded):
            private_f[at_natural + t * padded + d] = _ZERO
    for i in range(at_natural + tokens * padded, at_natural + WIDTH * padded, LANES):
        store(private_f, i, splat(_ZERO))
    turn(private_f, at_natural, WIDTH, padded, private_f, at_rows)


@separate
def attention_part(q, k, v, out, p, factor, keep, bias, scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry.

    q (B, H, L, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), out (B, H, L, Dv): flat float32; keep, bias: flat or empty.
    PROJECTING: keys and values of `portion` heads; ATTENDING: `portion` of the heads' blocks of W queries.
    scratch: int32, first keys (Hkv, S', K4), values (Hkv Dvp, S') and their scales for all threads.
    """
    shared = scratch[:p[A_SHARED]]
    private = scratch[p[A_SHARED] + worker * p[A_PRIVATE]:p[A_SHARED] + (worker + 1) * p[A_PRIVATE]]
    H, Hkv, L, S, D, Dv = p[A_H], p[A_KV_HEADS], p[A_L], p[A_S], p[A_D], p[A_DV]
    Dp, Dvp, D_up, Dv_up = round_up(D, 4), round_up(Dv, 4), round_up(D, LANES), round_up(Dv, LANES)
    D4, K4, S_up, v_row = Dp // 4, round_up(Dp // 4, LANES), round_up(S, TOKENS), round_up(S, 64) // 4
    private_u, private_f = private.view(np.uint32), private.view(np.float32)
    shared_b, shared_f = shared.view(np.int8), shared.view(np.float32)
    at_natural, at_rows, at_weights, at_mean = p[A_AT_NATURAL], p[A_AT_ROWS], p[A_AT_WEIGHTS], p[A_MEAN]
    band = p[A_BAND] != 0
    has_mask = keep.size > 0 or bias.size > 0 or p[A_ALIBI] != 0
    if MATRIX:
        matrix_configure(private, p[A_AT_STATS])
    if phase == PROJECTING:
        smooth = choose_block(private, p[A_AT_SEEN], S, keep, batch * p[A_KEEP_B], p[A_KEEP_H], p[A_KEEP_L],
                              p[A_KEEP_S], bias, batch * p[A_BIAS_B], p[A_BIAS_H], p[A_BIAS_L], p[A_BIAS_S], H, L,
                              band, p[A_LOW], p[A_HIGH])
        for kv in range(part * portion, min((part + 1) * portion, Hkv)):
            head = batch * Hkv + kv
            minus = at_mean + kv * D_up
            for i in range((S + TOKENS - 1) // TOKENS):
                # 1. keys of a block, minus the mean of those in the one that comes first
                t = TOKENS * (smooth if i == 0 else i - 1 if i <= smooth else i)
                for b in range(BLOCKS):
                    turn_rows(k, (head * S + t + b * WIDTH) * D, D, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                              private_f, at_natural, at_rows + b * D_up * WIDTH)
                if i == 0:
                    for b in range(BLOCKS):
                        for c in range(0, WIDTH, LANES):
                            largest = largest_rows(private_f, at_rows + b * D_up * WIDTH + c, Dp)
                            store(private_f, at_weights + b * WIDTH + c, largest)
                    weigh_tokens(private_f, at_weights, private, p[A_AT_SEEN])
                    subtract_mean(private_f, at_rows, D_up * WIDTH, D_up, at_weights, shared_f, minus)
                else:
                    for j in range(0, BLOCKS * D_up * WIDTH, LANES):
                        at = at_rows + j
                        store(private_f, at, load(private_f, at) + broadcast(shared_f, minus + j // WIDTH % D_up))
                for b in range(BLOCKS):
                    at = kv * S_up + t + b * WIDTH
                    quantize_keys(private_f, at_rows + b * D_up * WIDTH, Dp, private, p[A_AT_KEYS], shared_f,
                                  p[A_KSCALE] + at, shared, p[A_KTERM] + at)
                    keys_to_rows(private, p[A_AT_KEYS], K4, shared, at * K4, K4)
                # 2. values, in units that fit those of the block that comes first
                if i == 0:
                    for b in range(BLOCKS):
                        turn_rows(v, (head * S + t + b * WIDTH) * Dv, Dv, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                                  private_f, at_natural, at_rows)
                        for c in range(0, WIDTH, LANES):
                            store(private_f, at_weights + b * WIDTH + c, largest_rows(private_f, at_rows + c, Dvp))
                    shared_f[p[A_UNITS] + kv] = unit_of(private_f, at_weights, private, p[A_AT_SEEN])
                for b in range(BLOCKS):
                    at = kv * S_up + t + b * WIDTH
                    turn_rows(v, (head * S + t + b * WIDTH) * Dv, Dv, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                              private_f, at_natural, at_rows)
                    quantize_values(private_f, at_rows, Dvp, shared_f[p[A_UNITS] + kv], shared_b,
                                    4 * (p[A_VALUES] + kv * Dvp * v_row) + t + b * WIDTH, 4 * v_row, shared_f,
                                    p[A_VLOG] + at, shared_f, p[A_VINVERSE] + at)
        if MATRIX:
            matrix_release()
        return
    blocks = (L + WIDTH - 1) // WIDTH
    deep = round_up(D4, MATRIX_DEPTH)
    fill_dither(private_f, p[A_AT_DITHER], S)
    for i in range(p[A_AT_Q] + D4 * WIDTH, p[A_AT_Q] + deep * WIDTH, LANES):
        store(private, i, splat(np.int32(0)))
    for item in range(part * portion, min((part + 1) * portion, H * blocks)):
        h, q0 = item // blocks, item % blocks * WIDTH
        kv = h // (H // Hkv)
        queries = min(WIDTH, L - q0)
        at_row = (batch * H + h) * L + q0
        # 3. queries
        turn_rows(q, at_row * D, D, queries, factor, private_f, at_natural, at_rows)
        quantize_queries(private_f, at_rows, Dp, private, p[A_AT_Q], private_f, p[A_AT_QSCALE])
        # 4. attention
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p[A_LOW], p[A_HIGH])
        first = first // 4 * 4
        if has_mask:
            slope, place = slope_and_place(p[A_ALIBI], p[A_ALIBI_B], batch, h)
            fill_mask(private_f, p[A_AT_MASKS],
                      keep, batch * p[A_KEEP_B] + h * p[A_KEEP_H] + q0 * p[A_KEEP_L] + first * p[A_KEEP_S],
                      p[A_KEEP_L], p[A_KEEP_S],
                      bias, batch * p[A_BIAS_B] + h * p[A_BIAS_H] + q0 * p[A_BIAS_L] + first * p[A_BIAS_S],
                      p[A_BIAS_L], p[A_BIAS_S], slope, place + q0 - first, queries, last - first, private_f,
                      p[A_AT_SQUARE])
        at = kv * S_up
        attend_bytes(private_u, p[A_AT_Q], deep, private_f, p[A_AT_QSCALE], shared, at * K4, K4, shared,
                     p[A_KTERM] + at, shared_f, p[A_KSCALE] + at, shared, p[A_VALUES] + kv * Dvp * v_row, v_row,
                     shared_f, p[A_VLOG] + at, shared_f, p[A_VINVERSE] + at, shared_f[p[A_UNITS] + kv], first, last,
                     Dvp, private, private_u, private_f, p[A_AT_SCORES], p[A_AT_P], p[A_AT_STATS], p[A_AT_DITHER],
                     private_f, p[A_AT_CONTEXT], q0, band, p[A_LOW], p[A_HIGH], full_from, full_to, private_f,
                     p[A_AT_MASKS], has_mask, bias.size > 0 or p[A_ALIBI] != 0)
        turn(private, p[A_AT_CONTEXT], Dv_up, WIDTH, private, at_natural)
        for l in range(queries):
            for d in range(Dv):
                out[(at_row + l) * Dv + d] = private_f[at_natural + l * Dv_up + d]
    if MATRIX:
        matrix_release()


@jit
def attention_dynamic(q, k, v, out, p, scale, keep, bias, scratch, board, count):
    """See `attention_part`; on at most `count` threads that serve the board."""
    heads, head_parts = portions(p[A_KV_HEADS], 1, count)
    items, item_parts = portions(p[A_H] * ((p[A_L] + WIDTH - 1) // WIDTH), 1, count)
    factor = scale * LOG2_E
    for batch in range(p[A_B]):
        share(board, head_parts, attention_part, q, k, v, out, p, factor, keep, bias, scratch, batch, PROJECTING, heads)
        share(board, item_parts, attention_part, q, k, v, out, p, factor, keep, bias, scratch, batch, ATTENDING, items)


def plan(p, masked):
    """Write where what a call needs lies in its scratch into p; (shared, private) elements of that."""
    Hkv, S, D, Dv = (int(p[i]) for i in (A_KV_HEADS, A_S, A_D, A_DV))
    Dvp, D_up, Dv_up = round_up(Dv, 4), round_up(D, LANES), round_up(Dv, LANES)
    D4, K4, S_up = -(-D // 4), round_up(-(-D // 4), LANES), round_up(S, TOKENS)
    past = 2 * MATRIX_ROWS  # rows that a tile may read past the last, and a row past the last number
    shared = round_up((Hkv * S_up + past) * K4 + past, 16)  # the keys
    shared = place(p, A_VALUES, shared, (Hkv * Dvp + past) * (round_up(S, 64) // 4) + past)
    for slot in (A_KTERM, A_KSCALE, A_VLOG, A_VINVERSE):
        shared = place(p, slot, shared, Hkv * S_up)
    shared = place(p, A_MEAN, shared, Hkv * D_up)
    shared = place(p, A_UNITS, shared, Hkv)
    private = place(p, A_AT_NATURAL, 0, WIDTH * max(D_up, Dv_up))
    private = place(p, A_AT_ROWS, private, TOKENS * max(D_up, Dv_up))
    private = place(p, A_AT_WEIGHTS, private, TOKENS)
    private = place(p, A_AT_SEEN, private, TOKENS)
    private = place(p, A_AT_KEYS, private, WIDTH * K4)
    private = place(p, A_AT_Q, private, round_up(D4, MATRIX_DEPTH) * WIDTH)
    private = place(p, A_AT_QSCALE, private, WIDTH)
    private = place(p, A_AT_SCORES, private, (max(KEY_BLOCK, Dvp) + ROW_STEP) * WIDTH)
    private = place(p, A_AT_P, private, KEY_BLOCK // 4 * WIDTH)
    private = place(p, A_AT_STATS, private, 6 * WIDTH)
    private = place(p, A_AT_DITHER, private, KEY_BLOCK)
    private = place(p, A_AT_CONTEXT, private, Dv_up * WIDTH)
    private = place(p, A_AT_SQUARE, private, LANES * LANES)
    private = place(p, A_AT_MASKS, private, (S + 4) * WIDTH if masked else 0)
    p[A_SHARED], p[A_PRIVATE] = shared, private
    return shared, private


@functools.lru_cache(256)
def _plan_of(q, k, v, keep, bias, band, alibi):
    """(parameters, shared elements, private elements) for arrays and masks of these shapes."""
    p = np.zeros(A_COUNT, np.int64)
    p[A_B], p[A_H], p[A_L], p[A_D] = q
    p[A_KV_HEADS], p[A_S], p[A_DV] = k[1], k[2], v[3]
    place_masks(p, A_BAND, keep, bias, band, alibi)
    return p, *map(int, plan(p, keep is not None or bias is not None or alibi is not None))


def attention(q, k, v, out, scale, keep=None, bias=None, band=None, alibi=None):
    """out (B, H, L, Dv) = softmax(q k^T scale, masked) v, products in int8.

    Parameters
    ----------
    q, k, v : float32 arrays, C order
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); no axis empty.
    out : float32 array, C order
    keep, bias, band, alibi
        As `functional_float32.attention` takes them.
    """
    global _run
    p, shared, private = _plan_of(q.shape, k.shape, v.shape, shape_of(keep), shape_of(bias), band, shape_of(alibi))
    if alibi is not None:
        p = with_alibi(p, A_ALIBI, alibi)
    keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
    bias = _NO_BIAS if bias is None else bias.reshape(-1)
    arguments = (q.reshape(-1), k.reshape(-1), v.reshape(-1), out.reshape(-1), p, np.float32(scale), keep, bias)
    if _run is None:
        _run = entry(attention_dynamic, (*arguments, np.zeros(1, np.int32), np.zeros(1, np.int64), 1))
    threads.run(_run, arguments, np.int32, shared, private, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
                * (q.shape[3] + v.shape[3]), q.shape[0])
    return out
