"""Fused static int8 attention: one block of queries at a time, queries in lanes, four bytes to a lane.

Letters: B batch, H heads, L queries, S keys, D head size, Dv value size, E model width; W = WIDTH queries per block.
Sizes with a 4 count groups of four bytes.  `OFFSET` turns a code into the unsigned operand of a dot product.

The arithmetic is exact: whatever instruction set runs it, the bits are those of the named TFLite kernel set.
"""
import numpy as np

from edgeattn.crew import separate, share
from edgeattn.jit import inlined, jit

from .fused import ATTENDING, PROJECTING, portions, visible_range
from .matmul import MATRIX, MATRIX_TOKENS, feature_position, linear_tile, multiply
from .simd import (
    COLUMNS,
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
    tile_map,
    tile_of_columns,
    tile_of_rows_and_columns,
    tile_pack_rows,
    tile_store,
    tile_store_bytes,
    transpose_block,
)
from .softmax_int8 import LOWEST_CODES, softmax_codes

# Flipping the top bit of every byte adds 128 to each code: int8 to unsigned bytes and back.
FLIP = np.int32(-2139062144) if OFFSET else np.int32(0)
_FLIP_ONE = np.int32(OFFSET)
_ONES = np.int32(0x01010101)
TOKENS = 128  # tokens packed and projected at a time: each pass over the weights serves so many

# Positions in the integer parameters (int64).
(P_L, P_S, P_EQ, P_EK, P_EV, P_EO, P_HEADS, P_D, P_DV, P_D_PAD, P_DV_PAD, P_HAS_OUT, P_SAME_KV,
 P_WQ, P_BQ, P_MQ, P_WK, P_BK, P_MK, P_WV, P_BV, P_MV, P_WO, P_BO, P_MO, P_MS, P_MC,
 P_ZQ, P_ZK, P_ZV, P_ZS, P_ZC, P_ZO, P_FIXED,
 P_BAND, P_LOW, P_HIGH, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_CLASS_B, P_CLASS_H, P_CLASS_L, P_CLASS_S,
 P_KROW, P_VSUM, P_VALUES,
 P_AT_X, P_AT_NATURAL, P_AT_Q, P_AT_CODES, P_AT_MASKS, P_AT_CLASSES, P_AT_SUMS, P_AT_CONTEXT, P_AT_VALUES,
 P_AT_TILES, P_AT_TURNED, P_BATCH, P_SHARED, P_PRIVATE,
 P_COUNT) = range(63)


@inlined
def pack_tokens(x, at, E, tokens, rows, out, at_out):
    """int8 rows of x as unsigned operand (rows, E4); missing bytes and rows are zero codes."""
    E4 = (E + 3) // 4
    if E == E4 * 4:
        words = x.view(np.int32)
        for i in range(tokens * E4):
            out[at_out + i] = words[at // 4 + i] ^ FLIP
    else:
        for t in range(tokens):
            for e4 in range(E4):
                word = np.int32(0)
                for j in range(min(4, E - 4 * e4)):
                    word |= (np.int32(x[at + t * E + 4 * e4 + j]) & np.int32(255)) << np.int32(8 * j)
                out[at_out + t * E4 + e4] = word ^ FLIP
    for i in range(tokens * E4, rows * E4):
        out[at_out + i] = FLIP


@inlined
def project_bytes(rule, x, x_row, tokens, weights, at_weight, at_bias, at_multiplier, features, zero_point, flip,
                  out, at_out, token_step, block, block_step, tiles, at_tiles):
    """int8 out (features / block, tokens, block) = rule(x w^T + bias) + zero point; positions of out in bytes."""
    use_matrix = MATRIX and x_row % 16 == 0
    for f in range(0, features, WIDTH):
        at = at_out + feature_position(f, block, block_step)
        next_column = at_out + feature_position(f + LANES, block, block_step) - at
        for t in range(0, tokens, ROWS):
            tile = linear_tile(use_matrix, t, x, x_row, weights, at_weight + f * x_row, at_bias + f, x_row,
                               tiles, at_tiles)
            tile = tile_map(tile, rule, weights, at_multiplier + f, LANES, features)
            tile_store_bytes(tile, out, at + t * token_step, token_step, next_column, zero_point, flip)


@inlined
def project_values(rule, x, x_row, tokens, weights, at_weight, at_bias, at_multiplier, features, zero_point,
                   out, at_out, block, block_step, tiles, at_tiles):
    """Four tokens to a lane: out (features / block, tokens / 4, block) of int32."""
    use_matrix = MATRIX and x_row % 16 == 0
    for f in range(0, features, WIDTH):
        at = at_out + feature_position(f, block, block_step)
        next_column = at_out + feature_position(f + LANES, block, block_step) - at
        for t in range(0, tokens, ROWS):
            tile = linear_tile(use_matrix, t, x, x_row, weights, at_weight + f * x_row, at_bias + f, x_row,
                               tiles, at_tiles)
            tile = tile_map(tile, rule, weights, at_multiplier + f, LANES, features)
            tile_store(tile_pack_rows(tile, zero_point, np.int32(0)), out, at + t // 4 * block, block, next_column)


@inlined
def key_terms(keys, at, k_row, tokens, D, factor, out, at_out):
    """out[s] = factor * sum over d of keys[s, d]; keys (tokens, k_row) int8."""
    for s in range(tokens):
        total = np.int32(0)
        for d in range(D):
            total += np.int32(keys[at + s * k_row + d])
        out[at_out + s] = np.int32(factor * total)


@inlined
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


@inlined
def map_codes(codes, at, groups, tables, classes, at_classes, class_row, class_key, queries, first, last):
    """codes = tables[class, code + 128]; class 0 where there is no class array."""
    for g in range(groups):
        for q in range(WIDTH):
            word = codes[at + g * WIDTH + q]
            result = np.uint32(0)
            for j in range(4):
                s = min(first + 4 * g + j, last - 1)
                row = 0
                if classes.size > 0:
                    row = np.int64(classes[at_classes + min(q, queries - 1) * class_row + s * class_key])
                code = tables[row * 256 + ((word >> (8 * j)) & 255 ^ 128)]
                result |= (np.uint32(code) & np.uint32(255)) << np.uint32(8 * j)
            codes[at + g * WIDTH + q] = np.int32(result)


@separate
def layer_part(table, project_rule, score_rule, context_rule, xq, xk, xv, out, weights, p, keep, classes, tables,
               scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry of a static int8 multi-head attention layer.

    project_rule, score_rule, context_rule: functions of requantize.py.
    table    (256,) of the softmax rule (float32: lut_f32; int32: lut_u16 or fixed)
    xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), out (B, L, Eo): flat int8
    weights  int32: panels, biases and multipliers at the positions in p
    keep     flat uint8 or empty; classes flat uint8 or empty; tables flat int8 (n * 256) or empty
    scratch  int32: keys, values and key terms of this batch entry for all threads, then what each has to itself
    phase, portion, part: as in fused.layer_part
    """
    shared = scratch[:p[P_SHARED]]
    private = scratch[p[P_SHARED] + worker * p[P_PRIVATE]:p[P_SHARED] + (worker + 1) * p[P_PRIVATE]]
    begin = part * portion
    L, S, H = p[P_L], p[P_S], p[P_HEADS]
    Dv, Dp, Dvp = p[P_DV], p[P_D_PAD], p[P_DV_PAD]
    Eq, Ek, Ev, Eo = p[P_EQ], p[P_EK], p[P_EV], p[P_EO]
    D4 = Dp // 4
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)  # bytes, lanes
    k_row = k_block // 4
    features = (H * Dp + WIDTH - 1) // WIDTH * WIDTH
    v_features = (H * Dvp + WIDTH - 1) // WIDTH * WIDTH
    S_up = (S + ROWS - 1) // ROWS * ROWS
    k_step, v_step = S_up * k_block, S_up // 4 * v_block
    zq, zk, zv = np.int32(p[P_ZQ]), np.int32(p[P_ZK]), np.int32(p[P_ZV])
    zs, zc, zo = np.int32(p[P_ZS]), np.int32(p[P_ZC]), np.int32(p[P_ZO])
    q_offset = np.int32(OFFSET + zq)
    at_krow, at_values = p[P_KROW], p[P_VALUES]
    at_x, at_natural, at_q, at_codes = p[P_AT_X], p[P_AT_NATURAL], p[P_AT_Q], p[P_AT_CODES]
    at_masks, at_sums, at_context, at_softmax = p[P_AT_MASKS], p[P_AT_SUMS], p[P_AT_CONTEXT], p[P_AT_VALUES]
    private_u = private.view(np.uint32)
    private_b = private.view(np.int8)
    shared_b = shared.view(np.int8)
    x_u = private_u[at_x:]
    at_tiles, at_turned = p[P_AT_TILES], p[P_AT_TURNED]
    if MATRIX:
        matrix_configure(private, at_tiles)
    # 1. keys and values of all tokens, in the layout the attention loop reads
    if phase == PROJECTING:
        t0, t1 = begin, min(begin + portion, S)
        for t in range(t0, t1, TOKENS):
            tokens = min(TOKENS, t1 - t)
            rows = (tokens + ROWS - 1) // ROWS * ROWS
            Ek4, Ev4 = (Ek + 3) // 4, (Ev + 3) // 4
            pack_tokens(xk, (batch * S + t) * Ek, Ek, tokens, rows, private, at_x)
            project_bytes(project_rule, x_u, Ek4, rows, weights, p[P_WK], p[P_BK], p[P_MK], features, zk, np.int32(0),
                          shared_b, t * k_block, k_block, k_block, k_step, private, at_tiles)
            if p[P_SAME_KV] == 0:
                pack_tokens(xv, (batch * S + t) * Ev, Ev, tokens, rows, private, at_x)
            project_values(project_rule, x_u, Ev4, rows, weights, p[P_WV], p[P_BV], p[P_MV], v_features, zv,
                           shared, at_values + t // 4 * v_block, v_block, v_step, private, at_tiles)
            for h in range(H):
                at = feature_position(h * Dp, k_block, k_step) + t * k_block
                key_terms(shared_b, at, k_block, rows, Dp, -q_offset, shared, at_krow + h * S_up + t)
        if MATRIX:
            matrix_release()
        return
    b0, b1 = begin, min(begin + portion, (L + WIDTH - 1) // WIDTH)
    band = p[P_BAND] != 0
    has_keep = keep.size > 0
    fixed = p[P_FIXED] != 0
    natural_row = (features // 4 + LANES - 1) // LANES * LANES
    for block in range(b0, b1):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        Eq4 = (Eq + 3) // 4
        # 2. queries of this block: project, then turn so that queries are lanes
        pack_tokens(xq, (batch * L + q0) * Eq, Eq, queries, WIDTH, private, at_x)
        project_bytes(project_rule, x_u, Eq4, WIDTH, weights, p[P_WQ], p[P_BQ], p[P_MQ], features, zq, _FLIP_ONE,
                      private_b, 4 * at_natural, 4 * natural_row, 4 * natural_row, 0, private, at_tiles)
        for f in range(0, natural_row, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, at_natural + l * natural_row + f, natural_row,
                                private, at_q + f * WIDTH + l, WIDTH)
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p[P_LOW], p[P_HIGH])
        first = first // ROWS * ROWS
        last_up = (last + ROWS - 1) // ROWS * ROWS
        groups = (last_up - first) // 4
        masked = band or has_keep or last_up > last
        # 3. attention, head by head: context (H * Dvp / 4, W) of unsigned operands
        for h in range(H):
            at_q_head = at_q + h * D4 * WIDTH
            at_k = feature_position(h * Dp, k_block, k_step) // 4
            at_v = at_values + feature_position(h * Dvp, v_block, v_step) + first // 4 * v_block
            # a. what a key zero point adds to every score of a query
            for c in range(0, WIDTH, LANES):
                term = splat(np.int32(0))
                if zk != 0:
                    for d in range(D4):
                        term = dot_bytes(term, load(private, at_q_head + d * WIDTH + c), splat(_ONES))
                    term = (term - splat(np.int32(q_offset * Dp))) * splat(np.int32(-zk))
                store(private, at_sums + c, term)
            # b. scores, as codes of four keys to a lane
            for s in range(first, last_up, ROWS):
                tile = tile_of_rows_and_columns(ROWS, COLUMNS, shared, at_krow + h * S_up + s, private, at_sums)
                tile = multiply(tile, shared, at_k + s * k_row, k_row, 1, private_u, at_q_head, D4)
                tile = tile_map(tile, score_rule, weights, p[P_MS], 0, LANES)
                tile_store(tile_pack_rows(tile, zs, np.int32(0)), private, at_codes + (s - first) // 4 * WIDTH,
                           WIDTH, LANES)
            if tables.size > 0 and last > first:
                map_codes(private, at_codes, groups, tables, classes,
                          batch * p[P_CLASS_B] + h * p[P_CLASS_H] + q0 * p[P_CLASS_L], p[P_CLASS_L], p[P_CLASS_S],
                          queries, first, last)
            # c. drop what may not be seen
            if masked:
                if h == 0 or (has_keep and p[P_KEEP_H] != 0):
                    fill_drop_mask(private, at_masks, keep,
                                   batch * p[P_KEEP_B] + h * p[P_KEEP_H] + q0 * p[P_KEEP_L], p[P_KEEP_L],
                                   p[P_KEEP_S], q0, queries, first, last, groups, band, p[P_LOW], p[P_HIGH])
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
            for d in range(0, Dvp, ROWS):
                at_row_terms = at_sums + 3 * WIDTH
                for i in range(ROWS):
                    total = np.int32(0)
                    if OFFSET == 0:
                        for g in range(groups):
                            for j in range(4):
                                total += np.int32(shared_b[4 * (at_v + g * v_block + d + i) + j])
                    private[at_row_terms + i] = np.int32(128 * total)
                tile = tile_of_rows_and_columns(ROWS, COLUMNS, private, at_row_terms, private, at_sums)
                tile = multiply(tile, shared, at_v + d, 1, v_block, private_u, at_codes, groups)
                tile = tile_map(tile, context_rule, weights, p[P_MC], 0, LANES)
                tile_store(tile_pack_rows(tile, zc, FLIP), private, at_context + (h * Dvp + d) // 4 * WIDTH,
                           WIDTH, LANES)
        # 4. output rows: projection of the context, or the context itself
        at_row = (batch * L + q0) * Eo
        if p[P_HAS_OUT] == 0:
            for h in range(H):
                for d in range(Dv):
                    for l in range(queries):
                        byte = (at_context + (h * Dvp + d) // 4 * WIDTH + l) * 4 + d % 4
                        out[at_row + l * Eo + h * Dv + d] = private_b[byte] ^ np.int8(-128 if OFFSET else 0)
            continue
        C4 = H * Dvp // 4
        Eo_up = (Eo + WIDTH - 1) // WIDTH * WIDTH
        use_matrix = MATRIX and C4 % 16 == 0
        turned_u = private_u[at_turned:]
        if use_matrix:  # the matrix unit reads whole rows
            for c in range(0, C4, LANES):
                for l in range(0, WIDTH, LANES):
                    transpose_block(private, at_context + c * WIDTH + l, WIDTH, private, at_turned + l * C4 + c, C4)
        for e in range(0, Eo, WIDTH):
            for l in range(0, queries, ROWS):
                if use_matrix:
                    tile = linear_tile(True, l, turned_u, C4, weights, p[P_WO] + e * C4, p[P_BO] + e, C4,
                                       private, at_tiles)
                else:
                    tile = tile_of_columns(ROWS, COLUMNS, weights, p[P_BO] + e)
                    tile = multiply(tile, private_u, at_context + l, 1, WIDTH, weights, p[P_WO] + e * C4, C4)
                tile = tile_map(tile, project_rule, weights, p[P_MO] + e, LANES, Eo_up)
                if l + ROWS <= queries and e + WIDTH <= Eo:
                    tile_store_bytes(tile, out, at_row + l * Eo + e, Eo, LANES, zo, np.int32(0))
                else:
                    tile_store_bytes(tile, private_b, 4 * at_x, WIDTH, LANES, zo, np.int32(0))
                    for i in range(min(ROWS, queries - l)):
                        for j in range(min(WIDTH, Eo - e)):
                            out[at_row + (l + i) * Eo + e + j] = private_b[4 * at_x + i * WIDTH + j]
    if MATRIX:
        matrix_release()


@jit
def layer_int8(project_rule, score_rule, context_rule, table, xq, xk, xv, out, weights, p, keep, classes, tables,
               scratch, board, count):
    """A static int8 multi-head attention layer, see `layer_part`, on at most `count` threads that serve the board."""
    tokens, token_parts = portions(p[P_S], MATRIX_TOKENS, count)
    blocks, block_parts = portions((p[P_L] + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p[P_BATCH]):  # the table first: Numba takes arguments that begin with a function for functions
        share(board, token_parts, layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv, out, weights,
              p, keep, classes, tables, scratch, batch, PROJECTING, tokens)
        share(board, block_parts, layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv, out, weights,
              p, keep, classes, tables, scratch, batch, ATTENDING, blocks)
