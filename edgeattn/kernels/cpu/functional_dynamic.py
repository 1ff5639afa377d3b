"""Attention on given queries, keys and values with int8 products: float32 in and out, quantized at run time."""
import functools

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for, inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

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
from .fused import ATTENDING, PROJECTING, fill_mask, portions, visible_range
from .layer_float32 import _NO_BIAS, _NO_KEEP, shape_of, with_alibi
from .matmul import MATRIX, MATRIX_DEPTH, ROW_STEP, round_up
from .records import MASKS, blank, mask_fields, named, packed, place, record, slot
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    address_of,
    broadcast,
    load,
    matrix_configure,
    matrix_release,
    splat,
    store,
)
from .softmax import LOG2_E
from .views import MaskAddresses

_ZERO = np.float32(0)
_ONE = np.float32(1)
_run = None

# The parameters: sizes; masks; where things begin in the scratch of all threads, and in that of each.
ATTENTION = record("batch heads kv_heads queries keys head_size value_size", MASKS, "alibi",
                   "at_mean at_units at_kterm at_kscale at_values at_vlog at_vinverse",
                   "at_row_major at_rows at_weights at_seen at_keys at_q at_qscale at_scores at_probabilities at_stats",
                   "at_dither at_context at_square at_masks shared_size private_size")
_ALIBI = slot(ATTENTION, "alibi")


@inline
def turn_rows(x, at, size, tokens, factor, private_f, at_row_major, at_rows):
    """(size up to LANES, W) = factor x^T for up to W rows of x; what is missing is 0."""
    padded = round_up(size, LANES)
    for t in range(tokens):
        for d in range(size):
            private_f[at_row_major + t * padded + d] = x[at + t * size + d] * factor
        for d in range(size, padded):
            private_f[at_row_major + t * padded + d] = _ZERO
    for i in range(at_row_major + tokens * padded, at_row_major + WIDTH * padded, LANES):
        store(private_f, i, splat(_ZERO))
    turn(private_f, at_row_major, WIDTH, padded, private_f, at_rows)


@task
def attention_part(q, k, v, out, parameters, factor, keep, bias, scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry.

    q (B, H, L, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), out (B, H, L, Dv): flat float32; keep, bias: flat or empty.
    PROJECTING: keys and values of `portion` heads; ATTENDING: `portion` of the heads' blocks of W queries.
    scratch: int32, first keys (Hkv, S', K4), values (Hkv Dvp, S') and their scales for all threads.
    """
    p = named(parameters, ATTENTION)
    shared = scratch[:p.shared_size]
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    H, Hkv, L, S, D, Dv = p.heads, p.kv_heads, p.queries, p.keys, p.head_size, p.value_size
    Dp, Dvp, D_up, Dv_up = round_up(D, 4), round_up(Dv, 4), round_up(D, LANES), round_up(Dv, LANES)
    D4, K4, S_up, v_row = Dp // 4, round_up(Dp // 4, LANES), round_up(S, TOKENS), round_up(S, 64) // 4
    private_u, private_f = private.view(np.uint32), private.view(np.float32)
    shared_b, shared_f = shared.view(np.int8), shared.view(np.float32)
    at_row_major, at_rows, at_weights, at_mean = p.at_row_major, p.at_rows, p.at_weights, p.at_mean
    band = p.band != 0
    has_bias = bias.size > 0 or p.alibi != 0
    has_mask = keep.size > 0 or has_bias
    if MATRIX:
        matrix_configure(private, p.at_stats)
    if phase == PROJECTING:
        smooth = choose_block(private, p.at_seen, S, keep, batch * p.keep_b, p.keep_h, p.keep_l,
                              p.keep_s, bias, batch * p.bias_b, p.bias_h, p.bias_l, p.bias_s, H, L,
                              band, p.low, p.high)
        for kv in range(part * portion, min((part + 1) * portion, Hkv)):
            head = batch * Hkv + kv
            minus = at_mean + kv * D_up
            for i in range((S + TOKENS - 1) // TOKENS):
                # 1. keys of a block, minus the mean of those in the one that comes first
                t = TOKENS * (smooth if i == 0 else i - 1 if i <= smooth else i)
                for b in range(BLOCKS):
                    turn_rows(k, (head * S + t + b * WIDTH) * D, D, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                              private_f, at_row_major, at_rows + b * D_up * WIDTH)
                if i == 0:
                    for b in range(BLOCKS):
                        for c in range(0, WIDTH, LANES):
                            largest = largest_rows(private_f, at_rows + b * D_up * WIDTH + c, Dp)
                            store(private_f, at_weights + b * WIDTH + c, largest)
                    weigh_tokens(private_f, at_weights, private, p.at_seen)
                    subtract_mean(private_f, at_rows, D_up * WIDTH, D_up, at_weights, shared_f, minus)
                else:
                    for j in range(0, BLOCKS * D_up * WIDTH, LANES):
                        at = at_rows + j
                        store(private_f, at, load(private_f, at) + broadcast(shared_f, minus + j // WIDTH % D_up))
                for b in range(BLOCKS):
                    at = kv * S_up + t + b * WIDTH
                    quantize_keys(private_f, at_rows + b * D_up * WIDTH, Dp, private, p.at_keys, shared_f,
                                  p.at_kscale + at, shared, p.at_kterm + at)
                    keys_to_rows(private, p.at_keys, K4, shared, at * K4, K4)
                # 2. values, in units that fit those of the block that comes first
                if i == 0:
                    for b in range(BLOCKS):
                        turn_rows(v, (head * S + t + b * WIDTH) * Dv, Dv, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                                  private_f, at_row_major, at_rows)
                        for c in range(0, WIDTH, LANES):
                            store(private_f, at_weights + b * WIDTH + c, largest_rows(private_f, at_rows + c, Dvp))
                    shared_f[p.at_units + kv] = unit_of(private_f, at_weights, private, p.at_seen)
                for b in range(BLOCKS):
                    at = kv * S_up + t + b * WIDTH
                    turn_rows(v, (head * S + t + b * WIDTH) * Dv, Dv, max(min(S - t - b * WIDTH, WIDTH), 0), _ONE,
                              private_f, at_row_major, at_rows)
                    quantize_values(private_f, at_rows, Dvp, shared_f[p.at_units + kv], shared_b,
                                    4 * (p.at_values + kv * Dvp * v_row) + t + b * WIDTH, 4 * v_row, shared_f,
                                    p.at_vlog + at, shared_f, p.at_vinverse + at)
        if MATRIX:
            matrix_release()
        return
    blocks = (L + WIDTH - 1) // WIDTH
    deep = round_up(D4, MATRIX_DEPTH)
    fill_dither(private_f, p.at_dither, S)
    for i in range(p.at_q + D4 * WIDTH, p.at_q + deep * WIDTH, LANES):
        store(private, i, splat(np.int32(0)))
    for item in range(part * portion, min((part + 1) * portion, H * blocks)):
        h, q0 = item // blocks, item % blocks * WIDTH
        kv = h // (H // Hkv)
        queries = min(WIDTH, L - q0)
        at_row = (batch * H + h) * L + q0
        # 3. queries
        turn_rows(q, at_row * D, D, queries, factor, private_f, at_row_major, at_rows)
        quantize_queries(private_f, at_rows, Dp, private, p.at_q, private_f, p.at_qscale)
        # 4. attention
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p.low, p.high)
        first = first // 4 * 4
        if has_mask:
            masks = MaskAddresses(address_of(keep) if keep.size > 0 else 0,
                                 address_of(bias) if bias.size > 0 else 0, p.alibi)
            fill_mask(p, masks, batch, h, q0, queries, first, last, private_f, p.at_masks, p.at_square)
        at = kv * S_up
        attend_bytes(private_u, p.at_q, deep, private_f, p.at_qscale, shared, at * K4, K4, shared,
                     p.at_kterm + at, shared_f, p.at_kscale + at, shared, p.at_values + kv * Dvp * v_row, v_row,
                     shared_f, p.at_vlog + at, shared_f, p.at_vinverse + at, shared_f[p.at_units + kv], first, last,
                     Dvp, private, private_u, private_f, p.at_scores, p.at_probabilities, p.at_stats, p.at_dither,
                     private_f, p.at_context, q0, band, p.low, p.high, full_from, full_to, private_f,
                     p.at_masks, has_mask, has_bias)
        turn(private, p.at_context, Dv_up, WIDTH, private, at_row_major)
        for l in range(queries):
            for d in range(Dv):
                out[(at_row + l) * Dv + d] = private_f[at_row_major + l * Dv_up + d]
    if MATRIX:
        matrix_release()


@jit
def attention_dynamic(q, k, v, out, parameters, scale, keep, bias, scratch, task_queue, count):
    """See `attention_part`; on at most `count` threads that serve the task_queue."""
    p = named(parameters, ATTENTION)
    heads, head_parts = portions(p.kv_heads, 1, count)
    items, item_parts = portions(p.heads * ((p.queries + WIDTH - 1) // WIDTH), 1, count)
    factor = scale * LOG2_E
    for batch in range(p.batch):
        parallel_for(task_queue, head_parts, attention_part, q, k, v, out, parameters, factor, keep, bias, scratch,
                     batch,
              PROJECTING, heads)
        parallel_for(task_queue, item_parts, attention_part, q, k, v, out, parameters, factor, keep, bias, scratch,
                     batch,
              ATTENDING, items)


def plan(p, masked):
    """Write where what a call needs lies in its scratch into p; (shared, private) elements of that."""
    Hkv, S, D, Dv = p.kv_heads, p.keys, p.head_size, p.value_size
    Dvp, D_up, Dv_up = round_up(Dv, 4), round_up(D, LANES), round_up(Dv, LANES)
    D4, K4, S_up = -(-D // 4), round_up(-(-D // 4), LANES), round_up(S, TOKENS)
    past = 2 * MATRIX_ROWS  # rows that a tile may read past the last, and a row past the last number
    shared = round_up((Hkv * S_up + past) * K4 + past, 16)  # the keys
    p.at_values, shared = place(shared, (Hkv * Dvp + past) * (round_up(S, 64) // 4) + past)
    p.at_kterm, shared = place(shared, Hkv * S_up)
    p.at_kscale, shared = place(shared, Hkv * S_up)
    p.at_vlog, shared = place(shared, Hkv * S_up)
    p.at_vinverse, shared = place(shared, Hkv * S_up)
    p.at_mean, shared = place(shared, Hkv * D_up)
    p.at_units, shared = place(shared, Hkv)
    p.at_row_major, private = place(0, WIDTH * max(D_up, Dv_up))
    p.at_rows, private = place(private, TOKENS * max(D_up, Dv_up))
    p.at_weights, private = place(private, TOKENS)
    p.at_seen, private = place(private, TOKENS)
    p.at_keys, private = place(private, WIDTH * K4)
    p.at_q, private = place(private, round_up(D4, MATRIX_DEPTH) * WIDTH)
    p.at_qscale, private = place(private, WIDTH)
    p.at_scores, private = place(private, (max(KEY_BLOCK, Dvp) + ROW_STEP) * WIDTH)
    p.at_probabilities, private = place(private, KEY_BLOCK // 4 * WIDTH)
    p.at_stats, private = place(private, 6 * WIDTH)
    p.at_dither, private = place(private, KEY_BLOCK)
    p.at_context, private = place(private, Dv_up * WIDTH)
    p.at_square, private = place(private, LANES * LANES)
    p.at_masks, private = place(private, (S + 4) * WIDTH if masked else 0)
    p.shared_size, p.private_size = shared, private
    return shared, private


@functools.lru_cache(256)
def _plan_of(q, k, v, keep, bias, band, alibi):
    """(parameters, shared elements, private elements) for arrays and masks of these shapes."""
    p = blank(ATTENTION, **mask_fields(keep, bias, band, alibi))
    p.batch, p.heads, p.queries, p.head_size = q
    p.kv_heads, p.keys, p.value_size = k[1], k[2], v[3]
    sizes = plan(p, keep is not None or bias is not None or alibi is not None)
    return packed(p, ATTENTION), *sizes


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
    parameters, shared, private = _plan_of(q.shape, k.shape, v.shape, shape_of(keep), shape_of(bias), band,
                                           shape_of(alibi))
    if alibi is not None:
        parameters = with_alibi(parameters, _ALIBI, alibi)
    keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
    bias = _NO_BIAS if bias is None else bias.reshape(-1)
    arguments = (q.reshape(-1), k.reshape(-1), v.reshape(-1), out.reshape(-1), parameters, np.float32(scale), keep,
                 bias)
    if _run is None:
        _run = compiled_for(attention_dynamic, (*arguments, np.zeros(1, np.int32), np.zeros(1, np.int64), 1))
    threads.run(_run, arguments, np.int32, shared, private, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
                * (q.shape[3] + v.shape[3]), q.shape[0])
    return out


def prepare(q, k, v, out, scale, softcap=0.0, keep=None, bias=None, band=None, alibi=None):
    """(q, k, v, out, keep, bias, alibi) -> `attention` of such arrays and masks, which need not be shaped as masks."""
    shapes = shape_of(keep), shape_of(bias)

    def call(q, k, v, out, keep, bias, alibi):
        keep = None if keep is None else keep.reshape(shapes[0])
        bias = None if bias is None else bias.reshape(shapes[1])
        attention(q, k, v, out, scale, keep, bias, band, alibi)
    return call
