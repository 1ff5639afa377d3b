"""A single query per head against float32 keys and values, each read once for all queries that share it.

Letters as in decode_blocks.  Keys stay rows: scores are dot products along D, summed for four keys at a time.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .decode_blocks import ADDRESSES, BLOCK, DECODE, cap_and_maximum, inverse_of, join_blocks, keys_of, take_queries
from .portions import portions
from .records import located, named, real
from .simd import (
    LANES,
    ROWS,
    address_of,
    load,
    outer_product,
    pointer_to,
    splat,
    store,
    sum_lanes,
    tile_add_dots,
    tile_add_part_dots,
    tile_add_part_rows,
    tile_add_rows,
    tile_add_to,
    tile_get,
    tile_load,
    tile_row_sums,
    tile_store,
    tile_zero,
)
from .softmax import exp2

KEYS = 4  # whose products are summed along D at once
QUERIES = ROWS // 2  # that meet a key at once: KEYS x QUERIES sums, or QUERIES x 4 vectors of context, in registers
FOLDS = LANES // KEYS
CHUNK = LANES  # what a row of context is rounded up to
_ZERO = np.float32(0)


@inline
def add_dots(tile, keys, at_k, k_row, q, at_q, q_row, D):
    """tile[i][j][l] += the products of key i and query j whose place along D is l modulo LANES"""
    whole = D // LANES * LANES
    for d in range(0, whole, LANES):
        tile = tile_add_dots(tile, keys, at_k + d, k_row, q, at_q + d, q_row)
    if whole < D:
        tile = tile_add_part_dots(tile, keys, at_k + whole, k_row, q, at_q + whole, q_row, D - whole)
    return tile


@inline
def score_block(keys, at_k, k_row, count, D, G, private, at_q, q_row, at_sums, at_scores):
    """private[at_scores + g BLOCK + s] = query g . key s, for `count` keys; at_sums: LANES QUERIES of scratch."""
    whole = count // LANES * LANES
    for s in range(0, whole, LANES):
        g = 0
        while g < G:
            if g + QUERIES <= G:
                for i in range(0, LANES, KEYS):
                    tile = add_dots(tile_zero(KEYS, QUERIES, private), keys, at_k + (s + i) * k_row, k_row,
                                    private, at_q + g * q_row, q_row, D)
                    tile_store(tile_row_sums(tile), private, at_sums + i // KEYS * LANES, 0, FOLDS * LANES)
                done = QUERIES
            else:
                for i in range(0, LANES, KEYS):
                    tile = add_dots(tile_zero(KEYS, 1, private), keys, at_k + (s + i) * k_row, k_row,
                                    private, at_q + g * q_row, q_row, D)
                    tile_store(tile_row_sums(tile), private, at_sums + i // KEYS * LANES, 0, FOLDS * LANES)
                done = 1
            for j in range(done):
                sums = tile_row_sums(tile_load(FOLDS, 1, private, at_sums + j * FOLDS * LANES, LANES, 0))
                store(private, at_scores + (g + j) * BLOCK + s, tile_get(sums, 0, 0))
            g += done
    for s in range(whole, count):
        for g in range(G):
            tile = add_dots(tile_zero(1, 1, private), keys, at_k + s * k_row, k_row, private, at_q + g * q_row, q_row,
                            D)
            private[at_scores + g * BLOCK + s] = sum_lanes(tile_get(tile, 0, 0))


@inline
def add_weighted(tile, chains, values, at_v, v_row, weights, at, count, out, to):
    """out[to + d] += sum over s of weights[at + s] v[s][d], in `chains` chains; returns the first s left"""
    last = count // chains * chains
    for s in range(0, last, chains):
        tile = tile_add_rows(tile, values, at_v + s * v_row, v_row, weights, at + s)
    tile_add_to(tile, out, to)
    return last


@inline
def context_of_one(values, at_v, v_row, count, Dv, weights, at, out, to, from_d):
    """out[to + d] += sum over s of weights[at + s] v[s][d], d from from_d on."""
    d = from_d
    while d < Dv:
        if d + 4 * LANES <= Dv:
            last = add_weighted(tile_zero(2, 4, out), 2, values, at_v + d, v_row, weights, at, count, out, to + d)
            if last < count:
                add_weighted(tile_zero(1, 4, out), 1, values, at_v + d + last * v_row, v_row, weights, at + last,
                             count - last, out, to + d)
            d += 4 * LANES
        elif d + LANES <= Dv:
            last = add_weighted(tile_zero(8, 1, out), 8, values, at_v + d, v_row, weights, at, count, out, to + d)
            if last < count:
                add_weighted(tile_zero(1, 1, out), 1, values, at_v + d + last * v_row, v_row, weights, at + last,
                             count - last, out, to + d)
            d += LANES
        else:
            tile = tile_zero(1, 1, out)
            for s in range(count):
                tile = tile_add_part_rows(tile, values, at_v + d + s * v_row, v_row, weights, at + s, Dv - d)
            tile_add_to(tile, out, to + d)
            d += LANES


@inline
def context_block(values, at_v, v_row, count, Dv, Dv_up, G, weights, at_weights, out, to):
    """out[to + g Dv_up + d] = sum over s of weights[at_weights + g BLOCK + s] v[s][d]"""
    wide = Dv // (4 * LANES) * 4 * LANES
    g = 0
    while g + QUERIES <= G:
        for d in range(0, wide, 4 * LANES):
            tile = tile_zero(QUERIES, 4, out)
            for s in range(count):
                tile = outer_product(tile, weights, at_weights + g * BLOCK + s, BLOCK, values, at_v + s * v_row + d)
            tile_store(tile, out, to + g * Dv_up + d, Dv_up, LANES)
        g += QUERIES
    for one in range(G):
        from_d = wide if one < g else 0
        for d in range(from_d, Dv_up, LANES):
            store(out, to + one * Dv_up + d, splat(_ZERO))
        context_of_one(values, at_v, v_row, count, Dv, weights, at_weights + one * BLOCK, out, to + one * Dv_up, from_d)


@inline
def private_sizes(G, D, Dv):
    """Elements of a thread's arrays: queries, scores, sums of products."""
    return G * ((D + CHUNK - 1) // CHUNK * CHUNK), G * BLOCK, QUERIES * FOLDS * LANES


@task
def decode_part(p, a, scratch, portion, worker, part):
    """`portion` blocks of keys of `decode_float32`."""
    private = pointer_to(scratch + 4 * (p.shared_size + worker * p.private_size), np.float32)
    results, softcap = pointer_to(scratch, np.float32), real(p.softcap)
    D, Dv, Dv_up, G = p.head_size, p.value_size, p.padded_value, p.heads // p.kv_heads
    keys, values = pointer_to(a.k, np.float32), pointer_to(a.v, np.float32)
    k_row, v_row, q_row = p.k_s, p.v_s, (D + CHUNK - 1) // CHUNK * CHUNK
    at_q = 0  # (G, D'), scaled
    sizes = private_sizes(G, D, Dv)
    at_scores = at_q + sizes[0]  # (G, BLOCK)
    at_sums = at_scores + sizes[1]  # (QUERIES, FOLDS) vectors
    ready = np.int64(-1)
    for number in range(part * portion, min((part + 1) * portion, p.batch * p.kv_heads * p.blocks)):
        item, s0 = number // p.blocks, number % p.blocks * BLOCK
        batch, kv = item // p.kv_heads, item % p.kv_heads
        count = min(keys_of(p, a, batch) - s0, BLOCK)
        if count <= 0:
            continue
        if item != ready:
            take_queries(p, a, item, private, at_q, q_row)
            ready = item
        # 1. scores (G, BLOCK)
        score_block(keys, batch * p.k_b + kv * p.k_h + (p.first + s0) * k_row, k_row, count, D, G, private, at_q, q_row,
                    at_sums, at_scores)
        # 2. softmax of the block
        to = number * p.result_size
        for g in range(G):
            at = at_scores + g * BLOCK
            m = cap_and_maximum(private, at, count, softcap)
            total = splat(_ZERO)
            for s in range(0, count, LANES):
                e = exp2(load(private, at + s) - splat(m))
                store(private, at + s, e)
                total = total + e
            whole = sum_lanes(total)
            results[to + G * Dv_up + g], results[to + G * (Dv_up + 1) + g] = m, whole
            inverse = splat(inverse_of(whole))
            for s in range(0, count, LANES):
                store(private, at + s, load(private, at + s) * inverse)
        # 3. context (G, Dv)
        context_block(values, batch * p.v_b + kv * p.v_h + (p.first + s0) * v_row, v_row, count, Dv, Dv_up, G,
                      private, at_scores, results, to)


@inline
def in_order(position):
    """A context's elements lie as the features do."""
    return position


@jit
def decode_float32(parameters, addresses, scratch, task_queue, count):
    """One query per head against float32 keys and values; on at most `count` threads that serve the task_queue.

    parameters DECODE, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, memory = named(parameters, DECODE), located(addresses, ADDRESSES), address_of(scratch)
    portion, parts = portions(p.batch * p.kv_heads * p.blocks, 1, count)
    parallel_for(task_queue, parts, decode_part, p, a, memory, portion)
    join_blocks(p, a, pointer_to(memory, np.float32), in_order)
