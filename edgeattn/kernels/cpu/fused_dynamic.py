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

from edgeattn.runtime.jit import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

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
from .fused import ATTENDING, PROJECTING, fill_mask, portions, visible_range
from .linear_dynamic import FLIP as UNSIGNED
from .linear_dynamic import linear_rows
from .matmul import MATRIX, MATRIX_DEPTH, ROW_STEP, lane_product, round_up
from .records import MASKS, named, record
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    address_of,
    broadcast,
    fma,
    load,
    matrix_configure,
    matrix_release,
    splat,
    store,
    to_float,
)
from .views import MaskAddresses

SMOOTHING = 0  # the phase before those of fused.py
QUERIES, KEYS, VALUES = 0, 1, 2

# The parameters: sizes; where weights begin: bytes, and what SHIFT adds to their products, in the int32 weights, scales
# and biases in the float32 ones; masks; where things begin in the scratch of all threads, and in that of each.
LAYER = record("batch queries keys query_width key_width value_width out_width heads kv_heads",
               "head_size value_size padded_head padded_value has_out same_qk same_kv",
               "wq cq wk ck wv cv wo co", "sq bq sk bk sv bv so bo", MASKS, "alibi",
               "at_mean at_smooth at_units at_kterm at_kscale at_values at_vlog at_vinverse at_queries at_qscale",
               "at_row_major at_x at_xscale at_inverse at_tail at_weights at_seen at_keys at_q at_scores",
               "at_probabilities at_stats at_dither at_context at_context_bytes at_transposed at_tiles at_masks",
               "shared_size private_size")


@register_jitable
def heads_together(size):
    """Of how many heads with `size` features the rows are projected at once: enough to fill a matrix unit."""
    return max(2 * MATRIX_ROWS // size, 1)


@inline
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


@inline
def quantize_block(x, at, E, tokens, p, private, private_f):
    """Up to TOKENS rows of x to bytes with tokens in lanes, block of W by block, and their scales."""
    E4 = depth_groups(E)
    for b in range(BLOCKS):
        some = max(min(tokens - b * WIDTH, WIDTH), 0)
        quantize_rows(x, at + b * WIDTH * E, E, some, WIDTH, FLIP, private, p.at_row_major, private_f,
                      p.at_xscale + b * WIDTH, private, private_f, p.at_inverse, p.at_tail)
        turn(private, p.at_row_major, WIDTH, E4, private, p.at_x + b * E4 * WIDTH)


@inline
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
    at_values = p.at_scores
    for h0 in range(0, heads, together):
        count = min(together, heads - h0)
        row = h0 * size
        for b in range(BLOCKS):
            project_rows(weights, at_weight + h0 // together * group_rows * E4, at_correction + row, E4, factors,
                         at_factor + row, bias, at_bias + row, count * size, private_u, p.at_x + b * E4 * WIDTH,
                         private_f, p.at_xscale + b * WIDTH, private, private_f, at_values + b * values_step)
        if kind == KEYS and smooth:
            subtract_mean(private_f, at_values, values_step, count * size, p.at_weights, shared_f, p.at_mean + row)
        if kind == VALUES and smooth:
            for h in range(h0, h0 + count):
                for b in range(BLOCKS):
                    for c in range(0, WIDTH, LANES):
                        at = at_values + b * values_step + (h - h0) * size * WIDTH + c
                        store(private_f, p.at_weights + b * WIDTH + c, largest_rows(private_f, at, size))
                shared_f[p.at_units + h] = unit_of(private_f, p.at_weights, private, p.at_seen)
        for b in range(BLOCKS):
            for h in range(h0, h0 + count):
                at = at_values + b * values_step + (h - h0) * size * WIDTH
                to_scale = at_scale + b * block_step + h * scale_step
                to_other = at_other + b * block_step + h * other_step
                if kind == VALUES:
                    quantize_values(private_f, at, size, shared_f[p.at_units + h], out_b,
                                    at_bytes + h * size * row_bytes + b * WIDTH, row_bytes, shared_f, to_scale,
                                    shared_f, to_other)
                    continue
                to = at_out + b * out_step + h * size // 4 * WIDTH
                if kind == KEYS:
                    quantize_keys(private_f, at, size, out, to, shared_f, to_scale, shared, to_other)
                else:
                    quantize_queries(private_f, at, size, out, to, shared_f, to_scale)


@task
def layer_part(xq, xk, xv, out, weights, factors, parameters, keep, bias, scratch, batch, phase, portion, worker,
               part):
    """One portion of one phase of one batch entry of a dynamic int8 multi-head attention layer.

    xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), out (B, L, Eo): flat float32.
    weights int32: bytes and corrections; factors float32: weight scales and biases, at the positions in the parameters.
    keep, bias: flat mask data, or empty.  scratch: int32, first what all threads share: keys (S', K4), values
    (Hkv Dvp, S'), queries (L' / W, H D4, W) and what scales them; then what each thread has to itself.
    SMOOTHING: the first block of TOKENS keys and values that is seen, and minus the mean of its keys; PROJECTING:
    `portion` of the other blocks, those of queries last where they have an input of their own; ATTENDING: `portion`
    blocks of W queries; counted from 0 by `part`.
    """
    p = named(parameters, LAYER)
    shared = scratch[:p.shared_size]
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    begin = part * portion
    L, S, H, Hkv = p.queries, p.keys, p.heads, p.kv_heads
    Dv, Dp, Dvp = p.value_size, p.padded_head, p.padded_value
    Eq, Ek, Ev, Eo = p.query_width, p.key_width, p.value_width, p.out_width
    D4 = Dp // 4
    K4 = (Hkv * D4 + LANES - 1) // LANES * LANES
    S_up = (S + TOKENS - 1) // TOKENS * TOKENS
    v_row = (S + 63) // 64 * 16
    at_kterm, at_kscale, at_qscale = p.at_kterm, p.at_kscale, p.at_qscale
    at_values, at_vlog, at_vinverse, at_queries = p.at_values, p.at_vlog, p.at_vinverse, p.at_queries
    at_xscale, at_scores, at_context = p.at_xscale, p.at_scores, p.at_context
    private_u, private_f = private.view(np.uint32), private.view(np.float32)
    shared_b, shared_f = shared.view(np.int8), shared.view(np.float32)
    band = p.band != 0
    if MATRIX:
        matrix_configure(private, p.at_stats)
    if phase != ATTENDING:
        kv_blocks = S_up // TOKENS
        blocks, from_block = 1, 0
        if phase == PROJECTING:
            blocks, from_block = kv_blocks, 1
            if p.same_qk == 0:
                blocks += (L + TOKENS - 1) // TOKENS
        else:
            shared[p.at_smooth] = choose_block(
                private, p.at_seen, S, keep, batch * p.keep_b, p.keep_h, p.keep_l, p.keep_s, bias,
                batch * p.bias_b, p.bias_h, p.bias_l, p.bias_s, H, L, band, p.low, p.high)
        smooth = np.int64(shared[p.at_smooth])
        for i in range(from_block + begin, min(from_block + begin + portion, blocks)):
            block = smooth if i == 0 else i - 1 if i <= smooth else i
            is_query = block >= kv_blocks
            x, E, of = (xq, Eq, L) if is_query else (xk, Ek, S)
            t = (block - kv_blocks if is_query else block) * TOKENS
            tokens = min(TOKENS, of - t)
            quantize_block(x, (batch * of + t) * E, E, tokens, p, private, private_f)
            if is_query or p.same_qk != 0:
                project_heads(QUERIES, H, Dp, Eq, weights, p.wq, p.cq, factors, p.sq, factors, p.bq, False,
                              p, private, private_u, private_f, shared, shared_b, at_queries + t * H * D4,
                              H * D4 * WIDTH, 0, 0, shared, shared_f, at_qscale + t * H, WIDTH, H * WIDTH, 0, 0)
            if is_query:
                continue
            if phase == SMOOTHING:
                for s in range(TOKENS):
                    private_f[p.at_weights + s] = private_f[at_xscale + s]
                weigh_tokens(private_f, p.at_weights, private, p.at_seen)
            minus, at_minus = (factors, p.bk) if phase == SMOOTHING else (shared_f, p.at_mean)  # of those, 0
            project_heads(KEYS, Hkv, Dp, Ek, weights, p.wk, p.ck, factors, p.sk, minus, at_minus,
                          phase == SMOOTHING, p, private, private_u, private_f, private, shared_b, p.at_keys,
                          K4 * WIDTH, 0, 0, shared, shared_f, at_kscale + t, S_up, WIDTH, at_kterm + t, S_up)
            for b in range(BLOCKS):
                keys_to_rows(private, p.at_keys + b * K4 * WIDTH, K4, shared, (t + b * WIDTH) * K4, K4)
            if p.same_kv == 0:
                quantize_block(xv, (batch * S + t) * Ev, Ev, tokens, p, private, private_f)
            project_heads(VALUES, Hkv, Dvp, Ev, weights, p.wv, p.cv, factors, p.sv, factors, p.bv,
                          phase == SMOOTHING, p, private, private_u, private_f, shared, shared_b, 0, 0,
                          4 * at_values + t, 4 * v_row, shared, shared_f, at_vlog + t, S_up, WIDTH, at_vinverse + t,
                          S_up)
        if MATRIX:
            matrix_release()
        return
    b0, b1 = begin, min(begin + portion, (L + WIDTH - 1) // WIDTH)
    has_bias = bias.size > 0 or p.alibi != 0
    has_mask = keep.size > 0 or has_bias
    mask_per_head = p.keep_h != 0 or p.bias_h != 0 or p.alibi != 0
    deep = (D4 + MATRIX_DEPTH - 1) // MATRIX_DEPTH * MATRIX_DEPTH
    for i in range(p.at_q + D4 * WIDTH, p.at_q + deep * WIDTH, LANES):
        store(private, i, splat(np.int32(0)))
    fill_dither(private_f, p.at_dither, S)
    for block in range(b0, b1):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p.low, p.high)
        first = first // 4 * 4
        # 1. attention, head by head: context (H Dvp, W) in float32
        for h in range(H):
            kv = h // (H // Hkv)
            if has_mask and (h == 0 or mask_per_head):
                masks = MaskAddresses(address_of(keep) if keep.size > 0 else 0,
                                     address_of(bias) if bias.size > 0 else 0, p.alibi)
                fill_mask(p, masks, batch, h, q0, queries, first, last, private_f, p.at_masks, p.at_tiles)
            at_head = at_queries + (q0 * H + h * WIDTH) * D4
            for i in range(0, D4 * WIDTH, LANES):
                store(private, p.at_q + i, load(shared, at_head + i))
            attend_bytes(private_u, p.at_q, deep, shared_f, at_qscale + q0 * H + h * WIDTH, shared, kv * D4, K4,
                         shared, at_kterm + kv * S_up, shared_f, at_kscale + kv * S_up,
                         shared, at_values + kv * Dvp * v_row, v_row, shared_f, at_vlog + kv * S_up, shared_f,
                         at_vinverse + kv * S_up, shared_f[p.at_units + kv], first, last, Dvp, private, private_u,
                         private_f, at_scores, p.at_probabilities, p.at_stats, p.at_dither, private_f,
                         at_context + h * Dvp * WIDTH, q0, band, p.low, p.high, full_from, full_to, private_f,
                         p.at_masks, has_mask, has_bias)
        at_row = (batch * L + q0) * Eo
        if p.has_out == 0:
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
            pack_rows(private_f, at_context + c, C, inverse_of(largest), UNSIGNED, private, p.at_context_bytes + c)
        turn(private, p.at_context_bytes, C4, WIDTH, private, p.at_transposed)
        linear_rows(private_u, p.at_transposed, C4, queries, private_f, at_xscale, weights, p.wo, p.co, factors,
                    p.so, p.bo, Eo, out, at_row, Eo, private, private_f, p.at_tiles)
    if MATRIX:
        matrix_release()


@jit
def layer_dynamic(xq, xk, xv, out, weights, factors, parameters, keep, bias, scratch, task_queue, count):
    """A dynamic int8 multi-head attention layer, see `layer_part`, on at most `count` threads that serve the
    task_queue.
    """
    p = named(parameters, LAYER)
    blocks = (p.keys + TOKENS - 1) // TOKENS - 1
    if p.same_qk == 0:
        blocks += (p.queries + TOKENS - 1) // TOKENS
    tokens, token_parts = portions(blocks, 1, count)
    queries, query_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p.batch):
        parallel_for(task_queue, 1, layer_part, xq, xk, xv, out, weights, factors, parameters, keep, bias, scratch,
                     batch,
              SMOOTHING, 1)
        parallel_for(task_queue, token_parts, layer_part, xq, xk, xv, out, weights, factors, parameters, keep, bias,
                     scratch, batch,
              PROJECTING, tokens)
        parallel_for(task_queue, query_parts, layer_part, xq, xk, xv, out, weights, factors, parameters, keep, bias,
                     scratch, batch,
              ATTENDING, queries)
