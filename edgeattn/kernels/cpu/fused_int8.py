"""Fused static int8 attention: one block of queries at a time, queries in lanes, four bytes to a lane.

Letters: B batch, H heads, L queries, S keys, D head size, Dv value size, E model width; W = WIDTH queries per block.
Sizes with a 4 count groups of four bytes.  `OFFSET` turns a code into the unsigned operand of a dot product.

The arithmetic is exact: whatever instruction set runs it, the bits are those of the named TFLite kernel set.
"""
import numpy as np
from numba.extending import register_jitable

from edgeattn.runtime.jit import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .fused import ATTENDING, PROJECTING, portions, visible_range
from .matmul import MATRIX, MATRIX_DEPTH, feature_position, linear, round_up
from .records import BAND, KEEP, named, record
from .simd import (
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    dot_bytes,
    load,
    matrix_configure,
    matrix_release,
    splat,
    store,
    tile_add_down,
    tile_map,
    tile_pack_rows,
    tile_store,
    tile_store_bytes,
    transpose_block,
)
from .softmax_int8 import LOWEST_CODES, softmax_codes

# Flipping the top bit of every byte adds 128 to each code: int8 to unsigned bytes and back.
FLIP = np.int32(-2139062144) if OFFSET else np.int32(0)
_ONES = np.int32(0x01010101)
TOKENS = 128  # tokens packed and projected at a time: each pass over the weights serves so many
TOKENS_TOGETHER = 64  # what threads share keys by: values are turned LANES groups of four tokens at a time


@register_jitable
def padded_keys(S):
    """Keys of one head that have room: a multiple of ROWS and of LANES, which both go by at a time."""
    return round_up(S, max(ROWS, LANES))


@register_jitable
def packed_depth(E):
    """Groups of four bytes in a packed row of E."""
    return round_up((E + 3) // 4, MATRIX_DEPTH)


# The parameters: sizes; where panels, biases and multipliers begin in the weights; zero points; masks; where things
# begin in the scratch of all threads, which keys are the first of, and in that of each; of a cache, see cached_int8.
LAYER = record("batch queries keys query_width key_width value_width out_width heads",
               "head_size value_size padded_head padded_value has_out same_kv",
               "wq bq mq wk bk mk wv bv mv wo bo mo ms mc", "zq zk zv zs zc zo fixed",
               BAND, KEEP, "index_b index_h index_l index_s", "at_krow at_values",
               "at_x at_row_major at_q at_codes at_masks at_sums at_context at_softmax at_terms at_tiles",
               "at_transposed shared_size private_size", "first_slot new_tokens capacity at_step")


@inline
def pack_tokens(x, at, E, tokens, rows, out, at_out, out_row):
    """int8 rows of x as unsigned operand (rows, out_row); missing bytes and rows are zero codes."""
    whole = E // (4 * LANES) * LANES if E % 4 == 0 else 0  # groups that come in vectors
    words = x[:x.size // 4 * 4].view(np.int32)
    flip = splat(FLIP)
    for t in range(tokens):
        from_x, to = at + t * E, at_out + t * out_row
        for i in range(0, whole, LANES):
            store(out, to + i, load(words, from_x // 4 + i) ^ flip)
        for i in range(whole, out_row):
            word = np.int32(0)
            for j in range(min(4, E - 4 * i)):
                word |= (np.int32(x[from_x + 4 * i + j]) & np.int32(255)) << np.int32(8 * j)
            out[to + i] = word ^ FLIP
    for i in range(tokens * out_row, rows * out_row):
        out[at_out + i] = FLIP


@inline
def finish_bytes(tile, t, f, weights, rule, at_multiplier, features, zero_point, flip, out, at_out, token_step, block,
                 block_step):
    """Codes to bytes of out (features / block, tokens, block)."""
    at = at_out + feature_position(f, block, block_step)
    next_column = at_out + feature_position(f + LANES, block, block_step) - at
    tile = tile_map(tile, rule, weights, at_multiplier + f, LANES, features)
    tile_store_bytes(tile, out, at + t * token_step, token_step, next_column, zero_point, flip)


@inline
def finish_values(tile, t, f, weights, rule, at_multiplier, features, zero_point, out, at_out, block, block_step):
    """Four tokens to a lane: codes to out (features / block, tokens / 4, block) of int32."""
    at = at_out + feature_position(f, block, block_step)
    next_column = at_out + feature_position(f + LANES, block, block_step) - at
    tile = tile_map(tile, rule, weights, at_multiplier + f, LANES, features)
    tile_store(tile_pack_rows(tile, zero_point, np.int32(0)), out, at + t // 4 * block, block, next_column)


@inline
def finish_transposed_values(tile, t, f, weights, rule, at_multiplier, features, zero_point, out, at_out, out_row,
                             tokens,
                         panel, at_panel):
    """As the matrix unit wants its rows: out (features, tokens / 4) of int32, by way of one panel (tokens / 4, W)."""
    tile = tile_map(tile, rule, weights, at_multiplier + f, LANES, features)
    tile_store(tile_pack_rows(tile, zero_point, np.int32(0)), panel, at_panel + t // 4 * WIDTH, WIDTH, LANES)
    if t + ROWS >= tokens:
        for g in range(0, (tokens + 3) // 4, LANES):
            for c in range(0, WIDTH, LANES):
                transpose_block(panel, at_panel + g * WIDTH + c, WIDTH, out, at_out + (f + c) * out_row + g, out_row)


@inline
def finish_scores(tile, s, f, weights, rule, at_multiplier, zero_point, terms, at_terms, codes, at_codes):
    """Scores of ROWS keys to codes (keys / 4, W) of four keys to a lane."""
    tile = tile_map(tile_add_down(tile, terms, at_terms + s), rule, weights, at_multiplier, 0, LANES)
    tile_store(tile_pack_rows(tile, zero_point, np.int32(0)), codes, at_codes + s // 4 * WIDTH, WIDTH, LANES)


@inline
def finish_context(tile, d, f, weights, rule, at_multiplier, zero_point, terms, at_terms, context, at_context):
    """ROWS features of the context to unsigned operands (features / 4, W), four features to a lane."""
    if OFFSET == 0:
        tile = tile_add_down(tile, terms, at_terms + d)
    tile = tile_map(tile, rule, weights, at_multiplier, 0, LANES)
    tile_store(tile_pack_rows(tile, zero_point, FLIP), context, at_context + d // 4 * WIDTH, WIDTH, LANES)


@inline
def finish_output(tile, l, e, weights, rule, at_multiplier, features, zero_point, out, at_out, Eo, queries, edge,
                  at_edge):
    """Codes to the rows of out, Eo bytes each; a tile that reaches past the edge goes by way of `edge`."""
    tile = tile_map(tile, rule, weights, at_multiplier + e, LANES, features)
    to = at_out + l * Eo + e
    if l + ROWS <= queries and e + WIDTH <= Eo:
        tile_store_bytes(tile, out, to, Eo, LANES, zero_point, np.int32(0))
    else:
        tile_store_bytes(tile, edge, at_edge, WIDTH, LANES, zero_point, np.int32(0))
        for i in range(min(ROWS, queries - l)):
            for j in range(min(WIDTH, Eo - e)):
                out[to + i * Eo + j] = edge[at_edge + i * WIDTH + j]


@inline
def zero_bytes(zero_point):
    """What a zero is among the unsigned operands, in all four bytes."""
    return np.int32((OFFSET + zero_point & 255) * _ONES)


@inline
def key_terms(keys, at, k_row, tokens, D4, zero_point, out, at_out, square, at_square):
    """out[s] = - zero_point * sum over d of keys[s, d], LANES keys at a time; keys (tokens, k_row) of four bytes.

    zero_point in four bytes, as an unsigned operand; square: scratch (LANES, LANES).
    """
    for s in range(0, tokens, LANES):
        total = splat(np.int32(0))
        for d in range(0, D4, LANES):
            transpose_block(keys, at + s * k_row + d, k_row, square, at_square, LANES)
            for i in range(min(LANES, D4 - d)):
                total = dot_bytes(total, splat(zero_point), load(square, at_square + i * LANES))
        store(out, at_out + s, splat(np.int32(0)) - total)


@inline
def value_terms(values, at, v_block, groups, features, out, at_out):
    """out[d] = 128 * sum over keys of values[d, key]: what probabilities lack that are stored less 128."""
    for d in range(0, features, LANES):
        total = splat(np.int32(0))
        for g in range(groups):
            total = dot_bytes(total, splat(_ONES), load(values, at + g * v_block + d))
        store(out, at_out + d, total * splat(np.int32(128)))


@inline
def fill_drop_mask(masks, at, keep, at_keep, keep_row, keep_key, q0, queries, first, last, groups, band, low, high):
    """masks (groups, W) bytes: 255 where the query may see the key, else 0; keys past `last` are never seen."""
    has_keep = keep.size > 0
    for g in range(groups):
        for q in range(WIDTH):
            word = np.uint32(0)
            for j in range(4):
                s = first + 4 * g + j
                seen = s < last
                if band and not (low <= s - q0 - q <= high):
                    seen = False
                if seen and has_keep and keep[at_keep + min(q, queries - 1) * keep_row + s * keep_key] == 0:
                    seen = False
                if seen:
                    word |= np.uint32(255) << np.uint32(8 * j)
            masks[at + g * WIDTH + q] = np.int32(word)


@inline
def map_codes(codes, at, groups, score_luts, lut_index, at_index, index_row, index_key, queries, first, last):
    """codes = score_luts[index, code + 128]; the first table where there is no index."""
    for g in range(groups):
        for q in range(WIDTH):
            word = codes[at + g * WIDTH + q]
            result = np.uint32(0)
            for j in range(4):
                s = min(first + 4 * g + j, last - 1)
                row = 0
                if lut_index.size > 0:
                    row = np.int64(lut_index[at_index + min(q, queries - 1) * index_row + s * index_key])
                code = score_luts[row * 256 + ((word >> (8 * j)) & 255 ^ 128)]
                result |= (np.uint32(code) & np.uint32(255)) << np.uint32(8 * j)
            codes[at + g * WIDTH + q] = np.int32(result)


@task
def layer_part(table, project_rule, score_rule, context_rule, xq, xk, xv, out, weights, parameters, keep, lut_index,
               score_luts, scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry of a static int8 multi-head attention layer.

    project_rule, score_rule, context_rule: functions of requantize.py.
    table    of the softmax rule, see `softmax_codes` (float32: lut_f32; int32: lut_u16 or fixed)
    xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), out (B, L, Eo): flat int8
    weights  int32: panels, biases and multipliers at the positions in the parameters
    keep     flat uint8 or empty; lut_index flat uint8 or empty; score_luts flat int8 (n * 256) or empty
    scratch  int32: keys, values and key terms of this batch entry for all threads, then what each has to itself
    phase, portion, part: as in fused.layer_part
    """
    p = named(parameters, LAYER)
    shared = scratch[:p.shared_size]
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    begin = part * portion
    L, S, H = p.queries, p.keys, p.heads
    Dv, Dp, Dvp = p.value_size, p.padded_head, p.padded_value
    Eq, Ek, Ev, Eo = p.query_width, p.key_width, p.value_width, p.out_width
    D4 = Dp // 4
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)  # bytes, lanes
    k_row = k_block // 4
    features = (H * Dp + WIDTH - 1) // WIDTH * WIDTH
    v_features = (H * Dvp + WIDTH - 1) // WIDTH * WIDTH
    S_up = padded_keys(S)
    k_step, v_step = S_up * k_block, S_up // 4 * v_block
    v_row = round_up(S_up // 4, MATRIX_DEPTH)  # where values lie turned
    q_groups = round_up(D4, MATRIX_DEPTH)
    zq, zk, zv = np.int32(p.zq), np.int32(p.zk), np.int32(p.zv)
    zs, zc, zo = np.int32(p.zs), np.int32(p.zc), np.int32(p.zo)
    q_zero = zero_bytes(zq)
    at_krow, at_values = p.at_krow, p.at_values
    at_x, at_row_major, at_q, at_codes = p.at_x, p.at_row_major, p.at_q, p.at_codes
    at_masks, at_sums, at_context, at_softmax = p.at_masks, p.at_sums, p.at_context, p.at_softmax
    private_u = private.view(np.uint32)
    private_b = private.view(np.int8)
    shared_b = shared.view(np.int8)
    at_tiles, at_transposed, at_terms = p.at_tiles, p.at_transposed, p.at_terms
    if MATRIX:
        matrix_configure(private, at_tiles)
    # 1. keys and values of all tokens, in the layout the attention loop reads
    if phase == PROJECTING:
        t0, t1 = begin, min(begin + portion, S)
        for t in range(t0, t1, TOKENS):
            tokens = min(TOKENS, t1 - t)
            rows = (tokens + ROWS - 1) // ROWS * ROWS
            Ek4, Ev4 = packed_depth(Ek), packed_depth(Ev)
            pack_tokens(xk, (batch * S + t) * Ek, Ek, tokens, rows, private, at_x, Ek4)
            linear(finish_bytes, (weights, project_rule, p.mk, features, zk, np.int32(0), shared_b, t * k_block,
                                  k_block, k_block, k_step),
                   private_u, at_x, Ek4, 1, rows, weights, p.wk, weights, p.bk, features, Ek4, private, at_tiles)
            if p.same_kv == 0:
                pack_tokens(xv, (batch * S + t) * Ev, Ev, tokens, rows, private, at_x, Ev4)
            if MATRIX:
                linear(finish_transposed_values, (weights, project_rule, p.mv, v_features, zv, shared,
                                              at_values + t // 4, v_row, rows, private, at_row_major),
                       private_u, at_x, Ev4, 1, rows, weights, p.wv, weights, p.bv, v_features, Ev4,
                       private, at_tiles)
            else:
                linear(finish_values, (weights, project_rule, p.mv, v_features, zv, shared,
                                       at_values + t // 4 * v_block, v_block, v_step),
                       private_u, at_x, Ev4, 1, rows, weights, p.wv, weights, p.bv, v_features, Ev4,
                       private, at_tiles)
            for h in range(H):
                at = feature_position(h * Dp, k_block, k_step) // 4 + t * k_row
                key_terms(shared, at, k_row, rows, D4, q_zero, shared, at_krow + h * S_up + t, private, at_row_major)
        if MATRIX:
            matrix_release()
        return
    b0, b1 = begin, min(begin + portion, (L + WIDTH - 1) // WIDTH)
    band = p.band != 0
    has_keep = keep.size > 0
    fixed = p.fixed != 0
    row_major_row = (features // 4 + LANES - 1) // LANES * LANES
    for block in range(b0, b1):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        Eq4 = packed_depth(Eq)
        # 2. queries of this block: project, then turn so that queries are lanes: (H, q_groups, W)
        pack_tokens(xq, (batch * L + q0) * Eq, Eq, queries, WIDTH, private, at_x, Eq4)
        linear(finish_bytes, (weights, project_rule, p.mq, features, zq, FLIP, private_b, 4 * at_row_major,
                              4 * row_major_row, 4 * row_major_row, 0),
               private_u, at_x, Eq4, 1, WIDTH, weights, p.wq, weights, p.bq, features, Eq4, private, at_tiles)
        turns, turn = (1, row_major_row) if q_groups == D4 else (H, q_groups)
        for h in range(turns):
            for f in range(0, turn, LANES):
                for l in range(0, WIDTH, LANES):
                    transpose_block(private, at_row_major + l * row_major_row + h * D4 + f, row_major_row,
                                    private, at_q + (h * turn + f) * WIDTH + l, WIDTH)
            for i in range(D4 * WIDTH, q_groups * WIDTH, LANES):  # depth that only fills up the matrix unit: nothing
                store(private, at_q + h * turn * WIDTH + i, splat(np.int32(0)))
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p.low, p.high)
        first = first // ROWS * ROWS
        last_up = (last + ROWS - 1) // ROWS * ROWS
        groups = (last_up - first) // 4
        masked = band or has_keep or last_up > last
        # 3. attention, head by head: context (H * Dvp / 4, W) of unsigned operands
        for h in range(H):
            at_q_head = at_q + h * q_groups * WIDTH
            at_k = feature_position(h * Dp, k_block, k_step) // 4
            # a. what a key zero point adds to every score of a query
            for c in range(0, WIDTH, LANES):
                term = splat(np.int32(0))
                if zk != 0:
                    for d in range(D4):
                        term = dot_bytes(term, load(private, at_q_head + d * WIDTH + c), splat(_ONES))
                    term = (term - splat(np.int32((OFFSET + zq) * Dp))) * splat(np.int32(-zk))
                store(private, at_sums + c, term)
            # b. scores, as codes of four keys to a lane
            linear(finish_scores, (weights, score_rule, p.ms, zs, shared, at_krow + h * S_up + first, private,
                                   at_codes),
                   shared, at_k + first * k_row, k_row, 1, last_up - first, private_u, at_q_head, private, at_sums,
                   WIDTH, q_groups, private, at_tiles)
            if score_luts.size > 0 and last > first:
                map_codes(private, at_codes, groups, score_luts, lut_index,
                          batch * p.index_b + h * p.index_h + q0 * p.index_l, p.index_l, p.index_s,
                          queries, first, last)
            # c. drop what may not be seen
            if masked:
                if h == 0 or (has_keep and p.keep_h != 0):
                    fill_drop_mask(private, at_masks, keep,
                                   batch * p.keep_b + h * p.keep_h + q0 * p.keep_l, p.keep_l,
                                   p.keep_s, q0, queries, first, last, groups, band, p.low, p.high)
                for i in range(0, groups * WIDTH, LANES):
                    m = load(private, at_masks + i)
                    dropped = splat(LOWEST_CODES) & (m ^ splat(np.int32(-1)))
                    store(private, at_codes + i, (load(private, at_codes + i) & m) | dropped)
            # d. probabilities
            softmax_codes(table, fixed, private, at_codes, groups, private, at_masks, masked, private, at_softmax,
                          private, at_sums + WIDTH)
            # e. context
            for c in range(0, WIDTH, LANES):
                term = splat(np.int32(0))
                if zv != 0:
                    for g in range(groups):
                        term = dot_bytes(term, load(private, at_codes + g * WIDTH + c), splat(_ONES))
                    if OFFSET == 0:  # probabilities minus 128: put back 128 per key
                        term = term + splat(np.int32(128 * 4 * groups))
                    term = term * splat(np.int32(-zv))
                store(private, at_sums + c, term)
            if MATRIX:
                for i in range(groups * WIDTH, round_up(groups, MATRIX_DEPTH) * WIDTH, LANES):
                    store(private, at_codes + i, splat(np.int32(0)))
                at_v, v_feature, v_group = at_values + h * Dvp * v_row + first // 4, v_row, 1
            else:
                at_v = at_values + feature_position(h * Dvp, v_block, v_step) + first // 4 * v_block
                v_feature, v_group = 1, v_block
                if OFFSET == 0:
                    value_terms(shared, at_v, v_block, groups, Dvp, private, at_terms)
            linear(finish_context, (weights, context_rule, p.mc, zc, private, at_terms, private,
                                    at_context + h * Dvp // 4 * WIDTH),
                   shared, at_v, v_feature, v_group, Dvp, private_u, at_codes, private, at_sums, WIDTH,
                   round_up(groups, MATRIX_DEPTH), private, at_tiles)
        # 4. output rows: projection of the context, or the context itself
        at_row = (batch * L + q0) * Eo
        if p.has_out == 0:
            for h in range(H):
                for d in range(Dv):
                    for l in range(queries):
                        byte = (at_context + (h * Dvp + d) // 4 * WIDTH + l) * 4 + d % 4
                        out[at_row + l * Eo + h * Dv + d] = private_b[byte] ^ np.int8(-128 if OFFSET else 0)
            continue
        C4 = round_up(H * Dvp // 4, MATRIX_DEPTH)
        Eo_up = round_up(Eo, WIDTH)
        at_rows, row_step, group_step = at_context, 1, WIDTH
        if MATRIX:  # the matrix unit reads whole rows
            for c in range(0, C4, LANES):
                for l in range(0, WIDTH, LANES):
                    transpose_block(private, at_context + c * WIDTH + l, WIDTH, private, at_transposed + l * C4 + c, C4)
            at_rows, row_step, group_step = at_transposed, C4, 1
        linear(finish_output, (weights, project_rule, p.mo, Eo_up, zo, out, at_row, Eo, queries, private_b,
                               4 * at_x),
               private_u, at_rows, row_step, group_step, queries, weights, p.wo, weights, p.bo, Eo_up, C4,
               private, at_tiles)
    if MATRIX:
        matrix_release()


@jit
def layer_int8(project_rule, score_rule, context_rule, table, xq, xk, xv, out, weights, parameters, keep, lut_index,
               score_luts, scratch, task_queue, count):
    """A static int8 multi-head attention layer, see `layer_part`, on at most `count` threads that serve the
    task_queue.
    """
    p = named(parameters, LAYER)
    tokens, token_parts = portions(p.keys, TOKENS_TOGETHER, count)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p.batch):  # the table first: Numba takes arguments that begin with a function for functions
        parallel_for(task_queue, token_parts, layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv,
                     out, weights,
              parameters, keep, lut_index, score_luts, scratch, batch, PROJECTING, tokens)
        parallel_for(task_queue, block_parts, layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv,
                     out, weights,
              parameters, keep, lut_index, score_luts, scratch, batch, ATTENDING, blocks)
