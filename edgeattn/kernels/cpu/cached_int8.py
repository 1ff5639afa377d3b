"""A static int8 layer with a cache: new tokens go into it, and what it holds to where the layer's own kernel reads.

Letters as in fused_int8.  A cache keeps codes as they are, keys (B, H, C, D) and values (B, H, C, Dv), C its capacity.
Attention itself is that of a layer without a cache, whose keys and values are the S tokens from slot `first_slot` on;
the codes of the `new_tokens` last of these are computed first.
"""
import numpy as np

from edgeattn.runtime.jit import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from . import fused_int8 as f
from .fused import ATTENDING, portions
from .matmul import MATRIX, MATRIX_DEPTH, feature_position, round_up
from .records import named
from .simd import (
    LANES,
    ROWS,
    WIDTH,
    address_of,
    load,
    load_bytes,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
    transpose_block,
)
from .step_int8 import project_codes, step_part


@inline
def append_codes(row, tokens, size, padded, p, private, cache, at_cache):
    """Codes that `project_codes` left, to the heads' rows of a cache from at_cache on."""
    codes = private.view(np.int8)
    for h in range(p.heads):
        for t in range(tokens):
            at, to = 4 * p.at_row_major + t * row + h * padded, at_cache + (h * p.capacity + t) * size
            for d in range(size):
                cache[to + d] = codes[at + d]


@task
def append_part(table, project_rule, xk, xv, weights, parameters, keys, values, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's new tokens, projected, to the cache; the table is there to stand first alone."""
    p = named(parameters, f.LAYER)
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    D, Dv, Ek, Ev = p.head_size, p.value_size, p.key_width, p.value_width
    slot = batch * p.heads * p.capacity + p.first_slot + p.keys - p.new_tokens
    if MATRIX:
        matrix_configure(private, p.at_tiles)
    end = min((part + 1) * portion, p.new_tokens)
    for t in range(part * portion, end, WIDTH):
        tokens, row = min(WIDTH, end - t), batch * p.new_tokens + t
        k_row = project_codes(xk, row * Ek, Ek, tokens, weights, project_rule, p.wk, p.bk, p.mk,
                              np.int32(p.zk), p.padded_head, p, private)
        append_codes(k_row, tokens, D, p.padded_head, p, private, keys, (slot + t) * D)
        v_row = project_codes(xv, row * Ev, Ev, tokens, weights, project_rule, p.wv, p.bv, p.mv,
                              np.int32(p.zv), p.padded_value, p, private)
        append_codes(v_row, tokens, Dv, p.padded_value, p, private, values, (slot + t) * Dv)
    if MATRIX:
        matrix_release()


@inline
def copy_rows(source, size, count, out, out_row):
    """Bytes (count, size), side by side, to rows out_row apart; source and out are addresses."""
    if size == out_row:
        size, count = size * count, 1
    whole = size // (4 * LANES) * LANES
    for i in range(count):
        bytes_, to = pointer_to(source + i * size, np.int8), pointer_to(out + i * out_row, np.int8)
        words, to_words = pointer_to(source + i * size, np.int32), pointer_to(out + i * out_row, np.int32)
        for d in range(0, whole, LANES):
            store(to_words, d, load(words, d))
        for d in range(4 * whole, size):
            to[d] = bytes_[d]


@inline
def join_tokens(rows, at0, at1, at2, at3, count, out, to):
    """byte j of out[to + i] = rows[at + i], at the j-th of four positions, for i < count; rows of dtype uint8."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        low = load_bytes(rows, at0 + i) | (load_bytes(rows, at1 + i) << splat(np.int32(8)))
        high = load_bytes(rows, at2 + i) | (load_bytes(rows, at3 + i) << splat(np.int32(8)))
        store(out, to + i, low | (high << splat(np.int32(16))))
    for i in range(whole, count):
        low = np.uint32(rows[at0 + i]) | (np.uint32(rows[at1 + i]) << np.uint32(8))
        high = np.uint32(rows[at2 + i]) | (np.uint32(rows[at3 + i]) << np.uint32(8))
        out[to + i] = np.int32(low | (high << np.uint32(16)))


@task
def arrange_part(parameters, keys, values, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's tokens from the cache to shared scratch, as `layer_part` leaves what it projects.

    Features that only fill up a head, and tokens that only fill up a tile, are whatever lies there: the former meet
    zeros, the latter are dropped.
    """
    p = named(parameters, f.LAYER)
    shared = scratch[:p.shared_size]
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    H, D, Dv, Dp, Dvp, S = p.heads, p.head_size, p.value_size, p.padded_head, p.padded_value, p.keys
    S_up, at_square = f.padded_keys(S), p.at_row_major
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    k_step, v_step, v_row = S_up * k_block, S_up // 4 * v_block, round_up(S_up // 4, MATRIX_DEPTH)
    q_zero = f.zero_bytes(np.int32(p.zq))
    k_base, v_base = address_of(keys), pointer_to(address_of(values), np.uint8)
    base, own = address_of(shared), pointer_to(address_of(private), np.int32)
    everyones = pointer_to(base, np.int32)
    t0, t1 = part * portion, min((part + 1) * portion, S)
    for h in range(H):
        slot = (batch * H + h) * p.capacity + p.first_slot
        at_k = feature_position(h * Dp, k_block, k_step) + t0 * k_block
        copy_rows(k_base + (slot + t0) * D, D, t1 - t0, base + at_k, k_block)
        f.key_terms(shared, at_k // 4, k_block // 4, round_up(t1 - t0, ROWS), Dp // 4, q_zero, shared,
                  p.at_krow + h * S_up + t0, private, at_square)
        at_v = p.at_values + feature_position(h * Dvp, v_block, v_step)
        for t in range(t0, t1, 4 * LANES):
            for d in range(0, Dv, LANES):
                count = min(LANES, Dv - d)
                target, to, step = everyones, at_v + t // 4 * v_block + d, v_block
                if MATRIX:
                    target, to, step = own, at_square, LANES
                for i in range(t, min(t + 4 * LANES, t1), 4):
                    at0, last = (slot + i) * Dv + d, (slot + S - 1) * Dv + d
                    join_tokens(v_base, at0, min(at0 + Dv, last), min(at0 + 2 * Dv, last), min(at0 + 3 * Dv, last),
                                count, target, to + (i - t) // 4 * step)
                if MATRIX:
                    transpose_block(own, at_square, LANES, everyones,
                                    p.at_values + (h * Dvp + d) * v_row + t // 4, v_row)


@jit
def cached_int8(project_rule, score_rule, context_rule, table, xq, xk, xv, out, weights, parameters, keep, lut_index,
                score_luts, keys, values, scratch, task_queue, count):
    """A static layer with a cache on at most `count` threads that serve the task_queue; what `layer_part` says, and:

    xk (B, new_tokens, Ek), xv (B, new_tokens, Ev), keys and values (of the cache): flat int8
    """
    p = named(parameters, f.LAYER)
    some, append_parts = portions(p.new_tokens, WIDTH, count)
    tokens, token_parts = portions(p.keys, f.TOKENS_TOGETHER, count)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p.batch):
        parallel_for(task_queue, append_parts, append_part, table, project_rule, xk, xv, weights, parameters, keys,
                     values, scratch,
              batch, some)
        if p.queries == 1 and keep.size == 0 and lut_index.size == 0 and p.band == 0:
            parallel_for(task_queue, 1, step_part, table, project_rule, score_rule, context_rule, xq, out, weights,
                         parameters,
                  lut_index, score_luts, keys, values, scratch, batch)
            continue
        parallel_for(task_queue, token_parts, arrange_part, parameters, keys, values, scratch, batch, tokens)
        parallel_for(task_queue, block_parts, f.layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv,
                     out, weights,
              parameters, keep, lut_index, score_luts, scratch, batch, ATTENDING, blocks)
