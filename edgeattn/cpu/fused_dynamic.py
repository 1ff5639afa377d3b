"""Fused dynamic int8 layer: float in, float out, every product in bytes, softmax in float32.

Letters as in fused.py; sizes with a 4 count groups of four bytes.  Every token is quantized by its own largest
magnitude: the input over its E values, queries, keys and values over each head, the context over its H * Dv values.
Projections come out as (features, W) with tokens in lanes, which is what dynamic.py quantizes.

Softmax does not see what is added to all scores of a query: so the key projection's bias is left out, and from all
keys of a head the mean of the first TOKENS that are seen is subtracted, which leaves the bytes to what tells keys apart
(SageAttention, arXiv 2410.02367, section 4.2, takes the mean of all).
"""
import numpy as np
from numba.extending import register_jitable

from edgeattn.crew import separate, share
from edgeattn.jit import inlined, jit

from .dynamic import (
    BLOCKS,
    FLIP,
    SHIFT,
    TOKENS,
    attend_bytes,
    choose_block,
    depth_groups,
    fill_dither,
    inverse_of,
    keys_to_rows,
    largest_rows,
    pack_rows,
    quantize_keys,
    quantize_queries,
    quantize_rows,
    quantize_values,
    scale_of,
    subtract_mean,
    turn,
    unit_of,
    weigh_tokens,
)
from .fused import ATTENDING, PROJECTING, fill_mask, portions, slope_and_place, visible_range
from .linear_dynamic import FLIP as UNSIGNED
from .linear_dynamic import linear_rows
from .matmul import MATRIX, MATRIX_DEPTH, ROW_STEP, lane_product, round_up
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    broadcast,
    fma,
    load,
    matrix_configure,
    matrix_release,
    splat,
    store,
    to_float,
)

SMOOTHING = 0  # the phase before those of fused.py
QUERIES, KEYS, VALUES = 0, 1, 2

(P_L, P_S, P_EQ, P_EK, P_EV, P_EO, P_HEADS, P_KV_HEADS, P_D, P_DV, P_D_PAD, P_DV_PAD, P_HAS_OUT, P_SAME_QK, P_SAME_KV,
 P_WQ, P_CQ, P_WK, P_CK, P_WV, P_CV, P_WO, P_CO,  # bytes, and what SHIFT adds to their products, in the int32 weights
 P_SQ, P_BQ, P_SK, P_BK, P_SV, P_BV, P_SO, P_BO,  # scales and biases, in the float32 weights
 P_BAND, P_LOW, P_HIGH, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S, P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S,
 P_ALIBI, P_ALIBI_B,
 P_MEAN, P_SMOOTH, P_UNITS, P_KTERM, P_KSCALE, P_VALUES, P_VLOG, P_VINVERSE, P_QUERIES, P_QSCALE,
 P_AT_NATURAL, P_AT_X, P_AT_XSCALE, P_AT_INVERSE, P_AT_TAIL, P_AT_WEIGHTS, P_AT_SEEN, P_AT_KEYS, P_AT_Q, P_AT_SCORES,
 P_AT_P, P_AT_STATS, P_AT_DITHER, P_AT_CONTEXT, P_AT_CBYTES, P_AT_TURNED, P_AT_TILES, P_AT_MASKS,
 P_BATCH, P_SHARED, P_PRIVATE, P_COUNT) = range(76)


@register_jitable
def heads_together(size):
    """Of how many heads with `size` features the rows are projected at once: enough to fill a matrix unit."""
    return max(2 * MATRIX_ROWS // size, 1)


@inlined
def project_rows(weights, at_weight, at_correction, depth4, factors, at_factor, bias, at_bias, rows, x, at_x, scales,
                 at_scales, values, values_f, at_values):
    """values (rows, W) float32 = w x, times the scales of rows and lanes, + bias: rows of weights, tokens in lanes."""
    lane_product(False, True, weights, at_weight, depth4, rows, x, at_x, depth4, values, at_values)
    for c in range(0, WIDTH, LANES):
        scale = load(scales, at_scales + c)
        for d in range(rows):
            at = at_values + d * WIDTH + c
            v = load(values, at)
            if SHIFT:
                v = v + broadcast(weights, at_correction + d)
            v = fma(to_float(v) * broadcast(factors, at_factor + d), scale, broadcast(bias, at_bias + d))
            store(values_f, at, v)


@inlined
def quantize_block(x, at, E, tokens, p, private, private_f):
    """Up to TOKENS rows of x to bytes with tokens in lanes, block of W by block, and their scales."""
    E4 = depth_groups(E)
    for b in range(BLOCKS):
        some = max(min(tokens - b * WIDTH, WIDTH), 0)
        quantize_rows(x, at + b * WIDTH * E, E, some, WIDTH, FLIP, private, p[P_AT_NATURAL], private_f,
                      p[P_AT_XSCALE] + b * WIDTH, private, private_f, p[P_AT_INVERSE], p[P_AT_TAIL])
        turn(private, p[P_AT_NATURAL], WIDTH, E4, private, p[P_AT_X] + b * E4 * WIDTH)


@inlined
def project_heads(kind, heads, size, E, weights, at_weight, at_correction, factors, at_factor, bias, at_bias, smooth, p,
                  private, private_u, private_f, out, out_b, at_out, out_step, at_bytes, row_bytes, shared, shared_f,
                  at_scale, scale_step, block_step, at_other, other_step):
    """Queries, keys or values of one quantized block, head by head, each block of W quantized again.

    QUERIES, KEYS: bytes to out (blocks, heads, size / 4, W), blocks out_step apart; VALUES: to out_b, rows of bytes.
    What belongs to a token is block_step and scale_step apart for the next block and head: its scale, or the
    logarithm of it; at_other holds the keys' terms or the values' inverse scales.  `smooth`: the mean of the block's
    keys is left out of them, and left there; the unit of the heads' values is found in it.
    """
    E4 = depth_groups(E)
    together = heads_together(size)
    group_rows = round_up(together * size, ROW_STEP)
    values_step = group_rows * WIDTH
    at_values = p[P_AT_SCORES]
    for h0 in range(0, heads, together):
        count = min(together, heads - h0)
        row = h0 * size
        for b in range(BLOCKS):
            project_rows(weights, at_weight + h0 // together * group_rows * E4, at_correction + row, E4, factors,
                         at_factor + row, bias, at_bias + row, count * size, private_u, p[P_AT_X] + b * E4 * WIDTH,
                         private_f, p[P_AT_XSCALE] + b * WIDTH, private, private_f, at_values + b * values_step)
        if kind == KEYS and smooth:
            subtract_mean(private_f, at_values, values_step, count * size, p[P_AT_WEIGHTS], shared_f, p[P_MEAN] + row)
        if kind == VALUES and smooth:
            for h in range(h0, h0 + count):
                for b in range(BLOCKS):
                    for c in range(0, WIDTH, LANES):
                        at = at_values + b * values_step + (h - h0) * size * WIDTH + c
                        store(private_f, p[P_AT_WEIGHTS] + b * WIDTH + c, largest_rows(private_f, at, size))
                shared_f[p[P_UNITS] + h] = unit_of(private_f, p[P_AT_WEIGHTS], private, p[P_AT_SEEN])
        for b in range(BLOCKS):
            for h in range(h0, h0 + count):
                at = at_values + b * values_step + (h - h0) * size * WIDTH
                to_scale = at_scale + b * block_step + h * scale_step
                to_other = at_other + b * block_step + h * other_step
                if kind == VALUES:
                    quantize_values(private_f, at, size, shared_f[p[P_UNITS] + h], out_b,
                                    at_bytes + h * size * row_bytes + b * WIDTH, row_bytes, shared_f, to_scale,
                                    shared_f, to_other)
                    continue
                to = at_out + b * out_step + h * size // 4 * WIDTH
                if kind == KEYS:
                    quantize_keys(private_f, at, size, out, to, shared_f, to_scale, shared, to_other)
                else:
                    quantize_queries(private_f, at, size, out, to, shared_f, to_scale)


@separate
def layer_part(xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry of a dynamic int8 multi-head attention layer.

    xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), out (B, L, Eo): flat float32.
    weights int32: bytes and corrections; factors float32: weight scales and biases, at the positions in p.
    keep, bias: flat mask data, or empty.  scratch: int32, first what all threads share: keys (S', K4), values
    (Hkv Dvp, S'), queries (L' / W, H D4, W) and what scales them; then what each thread has to itself.
    SMOOTHING: the first block of TOKENS keys and values that is seen, and minus the mean of its keys; PROJECTING:
    `portion` of the other blocks, those of queries last where they have an input of their own; ATTENDING: `portion`
    blocks of W queries; counted from 0 by `part`.
    """
    shared = scratch[:p[P_SHARED]]
    private = scratch[p[P_SHARED] + worker * p[P_PRIVATE]:p[P_SHARED] + (worker + 1) * p[P_PRIVATE]]
    begin = part * portion
    L, S, H, Hkv = p[P_L], p[P_S], p[P_HEADS], p[P_KV_HEADS]
    Dv, Dp, Dvp = p[P_DV], p[P_D_PAD], p[P_DV_PAD]
    Eq, Ek, Ev, Eo = p[P_EQ], p[P_EK], p[P_EV], p[P_EO]
    D4 = Dp // 4
    K4 = (Hkv * D4 + LANES - 1) // LANES * LANES
    S_up = (S + TOKENS - 1) // TOKENS * TOKENS
    v_row = (S + 63) // 64 * 16
    at_kterm, at_kscale, at_qscale = p[P_KTERM], p[P_KSCALE], p[P_QSCALE]
    at_values, at_vlog, at_vinverse, at_queries = p[P_VALUES], p[P_VLOG], p[P_VINVERSE], p[P_QUERIES]
    at_xscale, at_scores, at_context = p[P_AT_XSCALE], p[P_AT_SCORES], p[P_AT_CONTEXT]
    private_u, private_f = private.view(np.uint32), private.view(np.float32)
    shared_b, shared_f = shared.view(np.int8), shared.view(np.float32)
    band = p[P_BAND] != 0
    if MATRIX:
        matrix_configure(private, p[P_AT_STATS])
    if phase != ATTENDING:
        kv_blocks = S_up // TOKENS
        blocks, from_block = 1, 0
        if phase == PROJECTING:
            blocks, from_block = kv_blocks, 1
            if p[P_SAME_QK] == 0:
                blocks += (L + TOKENS - 1) // TOKENS
        else:
            shared[p[P_SMOOTH]] = choose_block(
                private, p[P_AT_SEEN], S, keep, batch * p[P_KEEP_B], p[P_KEEP_H], p[P_KEEP_L], p[P_KEEP_S], bias,
                batch * p[P_BIAS_B], p[P_BIAS_H], p[P_BIAS_L], p[P_BIAS_S], H, L, band, p[P_LOW], p[P_HIGH])
        smooth = np.int64(shared[p[P_SMOOTH]])
        for i in range(from_block + begin, min(from_block + begin + portion, blocks)):
            block = smooth if i == 0 else i - 1 if i <= smooth else i
            is_query = block >= kv_blocks
            x, E, of = (xq, Eq, L) if is_query else (xk, Ek, S)
            t = (block - kv_blocks if is_query else block) * TOKENS
            tokens = min(TOKENS, of - t)
            quantize_block(x, (batch * of + t) * E, E, tokens, p, private, private_f)
            if is_query or p[P_SAME_QK] != 0:
                project_heads(QUERIES, H, Dp, Eq, weights, p[P_WQ], p[P_CQ], factors, p[P_SQ], factors, p[P_BQ], False,
                              p, private, private_u, private_f, shared, shared_b, at_queries + t * H * D4,
                              H * D4 * WIDTH, 0, 0, shared, shared_f, at_qscale + t * H, WIDTH, H * WIDTH, 0, 0)
            if is_query:
                continue
            if phase == SMOOTHING:
                for s in range(TOKENS):
                    private_f[p[P_AT_WEIGHTS] + s] = private_f[at_xscale + s]
                weigh_tokens(private_f, p[P_AT_WEIGHTS], private, p[P_AT_SEEN])
            minus, at_minus = (factors, p[P_BK]) if phase == SMOOTHING else (shared_f, p[P_MEAN])  # of those, 0
            project_heads(KEYS, Hkv, Dp, Ek, weights, p[P_WK], p[P_CK], factors, p[P_SK], minus, at_minus,
                          phase == SMOOTHING, p, private, private_u, private_f, private, shared_b, p[P_AT_KEYS],
                          K4 * WIDTH, 0, 0, shared, shared_f, at_kscale + t, S_up, WIDTH, at_kterm + t, S_up)
            for b in range(BLOCKS):
                keys_to_rows(private, p[P_AT_KEYS] + b * K4 * WIDTH, K4, shared, (t + b * WIDTH) * K4, K4)
            if p[P_SAME_KV] == 0:
                quantize_block(xv, (batch * S + t) * Ev, Ev, tokens, p, private, private_f)
            project_heads(VALUES, Hkv, Dvp, Ev, weights, p[P_WV], p[P_CV], factors, p[P_SV], factors, p[P_BV],
                          phase == SMOOTHING, p, private, private_u, private_f, shared, shared_b, 0, 0,
                          4 * at_values + t, 4 * v_row, shared, shared_f, at_vlog + t, S_up, WIDTH, at_vinverse + t,
                          S_up)
        if MATRIX:
            matrix_release()
        return
    b0, b1 = begin, min(begin + portion, (L + WIDTH - 1) // WIDTH)
    has_mask = keep.size > 0 or bias.size > 0 or p[P_ALIBI] != 0
    mask_per_head = p[P_KEEP_H] != 0 or p[P_BIAS_H] != 0 or p[P_ALIBI] != 0
    deep = (D4 + MATRIX_DEPTH - 1) // MATRIX_DEPTH * MATRIX_DEPTH
    for i in range(p[P_AT_Q] + D4 * WIDTH, p[P_AT_Q] + deep * WIDTH, LANES):
        store(private, i, splat(np.int32(0)))
    fill_dither(private_f, p[P_AT_DITHER], S)
    for block in range(b0, b1):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p[P_LOW], p[P_HIGH])
        first = first // 4 * 4
        # 1. attention, head by head: context (H Dvp, W) in float32
        for h in range(H):
            kv = h // (H // Hkv)
            if has_mask and (h == 0 or mask_per_head):
                slope, place = slope_and_place(p[P_ALIBI], p[P_ALIBI_B], batch, h)
                fill_mask(private_f, p[P_AT_MASKS],
                          keep, batch * p[P_KEEP_B] + h * p[P_KEEP_H] + q0 * p[P_KEEP_L] + first * p[P_KEEP_S],
                          p[P_KEEP_L], p[P_KEEP_S],
                          bias, batch * p[P_BIAS_B] + h * p[P_BIAS_H] + q0 * p[P_BIAS_L] + first * p[P_BIAS_S],
                          p[P_BIAS_L], p[P_BIAS_S], slope, place + q0 - first, queries, last - first, private_f,
                          p[P_AT_TILES])
            at_head = at_queries + (q0 * H + h * WIDTH) * D4
            for i in range(0, D4 * WIDTH, LANES):
                store(private, p[P_AT_Q] + i, load(shared, at_head + i))
            attend_bytes(private_u, p[P_AT_Q], deep, shared_f, at_qscale + q0 * H + h * WIDTH, shared, kv * D4, K4,
                         shared, at_kterm + kv * S_up, shared_f, at_kscale + kv * S_up,
                         shared, at_values + kv * Dvp * v_row, v_row, shared_f, at_vlog + kv * S_up, shared_f,
                         at_vinverse + kv * S_up, shared_f[p[P_UNITS] + kv], first, last, Dvp, private, private_u,
                         private_f, at_scores, p[P_AT_P], p[P_AT_STATS], p[P_AT_DITHER], private_f,
                         at_context + h * Dvp * WIDTH, q0, band, p[P_LOW], p[P_HIGH], full_from, full_to, private_f,
                         p[P_AT_MASKS], has_mask, bias.size > 0 or p[P_ALIBI] != 0)
        at_row = (batch * L + q0) * Eo
        if p[P_HAS_OUT] == 0:
            for h in range(H):
                for d in range(Dv):
                    for l in range(queries):
                        out[at_row + l * Eo + h * Dv + d] = private_f[at_context + (h * Dvp + d) * WIDTH + l]
            continue
        # 2. context as bytes, one scale per query, and the output projection
        C = H * Dvp
        C4 = (C // 4 + LANES - 1) // LANES * LANES
        for c in range(0, WIDTH, LANES):
            largest = largest_rows(private_f, at_context + c, C)
            store(private_f, at_xscale + c, scale_of(largest))
            pack_rows(private_f, at_context + c, C, inverse_of(largest), UNSIGNED, private, p[P_AT_CBYTES] + c)
        turn(private, p[P_AT_CBYTES], C4, WIDTH, private, p[P_AT_TURNED])
        linear_rows(private_u, p[P_AT_TURNED], C4, queries, private_f, at_xscale, weights, p[P_WO], p[P_CO], factors,
                    p[P_SO], p[P_BO], Eo, out, at_row, Eo, private, private_f, p[P_AT_TILES])
    if MATRIX:
        matrix_release()


@jit
def layer_dynamic(xq, xk, xv, out, weights, factors, p, keep, bias, scratch, board, count):
    """A dynamic int8 multi-head attention layer, see `layer_part`, on at most `count` threads that serve the board."""
    blocks = (p[P_S] + TOKENS - 1) // TOKENS - 1
    if p[P_SAME_QK] == 0:
        blocks += (p[P_L] + TOKENS - 1) // TOKENS
    tokens, token_parts = portions(blocks, 1, count)
    queries, query_parts = portions((p[P_L] + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p[P_BATCH]):
        share(board, 1, layer_part, xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch,
              SMOOTHING, 1)
        share(board, token_parts, layer_part, xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch,
              PROJECTING, tokens)
        share(board, query_parts, layer_part, xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch,
              ATTENDING, queries)
