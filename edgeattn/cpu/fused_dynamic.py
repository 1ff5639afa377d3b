"""Fused dynamic int8 attention: float in, float out, every product in bytes, softmax in float32.

Letters as in fused.py; sizes with a 4 count groups of four bytes.  Every token is quantized by its own largest
magnitude: the input over its E values, queries, keys and values over each feature block (one head, or the heads that
share a vector), the context over its H * Dv values.  A key's scale multiplies its scores; a value's scale multiplies
its probabilities before those are quantized, per query and key block, to 0..255.  The key projection's bias is left
out: it adds the same number to all scores of a query, which softmax does not see.
"""
import numpy as np

from edgeattn.crew import separate, share
from edgeattn.jit import inlined, jit

from .fused import ATTENDING, PROJECTING, fill_mask, mask_scores, portions, visible_range
from .matmul import MATRIX, MATRIX_TOKENS, feature_position, linear_tile, multiply
from .simd import (
    COLUMNS,
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    any_nan,
    bits_of,
    float_of_bits,
    larger,
    load,
    matrix_configure,
    matrix_release,
    max_lanes,
    pack_bytes,
    round_to_int,
    select,
    splat,
    store,
    store_bytes,
    tile_add_scaled,
    tile_dequantize,
    tile_of_columns,
    tile_of_rows_and_columns,
    tile_store,
    tile_zero,
    transpose_block,
)
from .softmax import exp2

TOKENS = 32
KEY_BLOCK = 256
_ZERO = np.float32(0)
_ONE = np.float32(1)
_LARGEST = np.float32(127)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)
FLIP = np.int32(-2139062144) if OFFSET else np.int32(0)
_FLIP_ONE = np.int32(-128) if OFFSET else np.int32(0)
_PROBABILITY_FLIP = FLIP

(P_L, P_S, P_EQ, P_EK, P_EV, P_EO, P_HEADS, P_KV_HEADS, P_D, P_DV, P_D_PAD, P_DV_PAD, P_HAS_OUT, P_SAME_KV,
 P_WQ, P_CQ, P_WK, P_CK, P_WV, P_CV, P_WO, P_CO,  # bytes and their column corrections, in the int32 weights
 P_SQ, P_BQ, P_SK, P_BK, P_SV, P_BV, P_SO, P_BO,  # scales and biases, in the float32 weights
 P_BAND, P_LOW, P_HIGH, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S, P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S,
 P_VALUES, P_KTERM, P_KSCALE, P_VSCALE,
 P_AT_X, P_AT_XSCALE, P_AT_NATURAL, P_AT_QBYTES, P_AT_Q, P_AT_QSCALE, P_AT_SCORES, P_AT_P, P_AT_STATS,
 P_AT_CONTEXT, P_AT_CBYTES, P_AT_TILE, P_AT_MASKS,
 P_AT_TILES, P_AT_TURNED, P_BATCH, P_SHARED, P_PRIVATE,
 P_COUNT) = range(64)


@inlined
def magnitude(v):
    """|v|, by clearing the sign bit."""
    return float_of_bits(bits_of(v) & splat(_MAGNITUDE))


@inlined
def quantize_tokens(x, at, E, tokens, rows, out, at_out, scales, at_scales):
    """Rows of x to unsigned operands (rows, 4 E4) bytes, and the scale of each row; missing rows are zeros."""
    row_bytes = (E + 3) // 4 * 4
    whole = E // LANES * LANES
    flip = splat(_FLIP_ONE)
    for t in range(tokens):
        from_x = at + t * E
        best = splat(_ZERO)
        bad = False
        for e in range(0, whole, LANES):
            v = load(x, from_x + e)
            best = larger(magnitude(v), best)
            bad = bad or any_nan(v)
        largest = max_lanes(best)
        for e in range(whole, E):
            largest = max(largest, abs(x[from_x + e]))
            bad = bad or np.isnan(x[from_x + e])
        inverse = _LARGEST / largest if largest > _ZERO else _ZERO
        scales[at_scales + t] = np.float32(np.nan) if bad else largest / _LARGEST
        to = at_out + t * row_bytes
        for e in range(0, whole, LANES):
            store_bytes(out, to + e, round_to_int(load(x, from_x + e) * splat(inverse)) ^ flip)
        for e in range(whole, row_bytes):
            code = np.int8(np.rint(x[from_x + e] * inverse)) if e < E and not bad else np.int8(0)
            out[to + e] = code ^ np.int8(_FLIP_ONE)
    for i in range(tokens * row_bytes, rows * row_bytes):
        out[at_out + i] = np.int8(_FLIP_ONE)
    for t in range(tokens, rows):
        scales[at_scales + t] = _ZERO


@inlined
def project(x, E4, x_scales, at_scales, rows, weights, at_weight, at_correction, factors, at_factor, features,
            out, at_out, tiles, at_tiles):
    """float32 out (rows, features) = x w^T, without bias."""
    use_matrix = MATRIX and E4 % 16 == 0
    for f in range(0, features, WIDTH):
        for t in range(0, rows, ROWS):
            tile = linear_tile(use_matrix, t, x, E4, weights, at_weight + f * E4, at_correction + f, E4, tiles,
                               at_tiles)
            tile_store(tile_dequantize(tile, x_scales, at_scales + t, factors, at_factor + f),
                       out, at_out + t * features + f, features, LANES)


@inlined
def block_scale(x, at, block):
    """(scale, 1 / scale) of `block` values; a NaN among them makes the scale NaN."""
    best = splat(_ZERO)
    bad = False
    for i in range(0, block, LANES):
        v = load(x, at + i)
        best = larger(magnitude(v), best)
        bad = bad or any_nan(v)
    largest = max_lanes(best)
    if bad:
        return np.float32(np.nan), _ZERO
    if not largest > _ZERO:
        return _ZERO, _ZERO
    return largest / _LARGEST, _LARGEST / largest


@inlined
def add_bias(x, at, rows, features, bias, at_bias):
    """x (rows, features) += bias (features,), in place."""
    for t in range(rows):
        for f in range(0, features, LANES):
            store(x, at + t * features + f, load(x, at + t * features + f) + load(bias, at_bias + f))


@separate
def layer_part(xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch, phase, portion, worker, part):
    """One portion of one phase of one batch entry of a dynamic int8 multi-head attention layer.

    xq (B, L, Eq), xk (B, S, Ek), xv (B, S, Ev), out (B, L, Eo): flat float32.
    weights int32: byte panels and corrections; factors float32: weight scales and biases, at the positions in p.
    keep, bias: flat mask data, or empty.  scratch: int32, as in fused_int8.layer_part.
    phase, portion, part: as in fused.layer_part.
    """
    shared = scratch[:p[P_SHARED]]
    private = scratch[p[P_SHARED] + worker * p[P_PRIVATE]:p[P_SHARED] + (worker + 1) * p[P_PRIVATE]]
    begin = part * portion
    L, S, H, Hkv = p[P_L], p[P_S], p[P_HEADS], p[P_KV_HEADS]
    Dv, Dp, Dvp = p[P_DV], p[P_D_PAD], p[P_DV_PAD]
    Eq, Ek, Ev, Eo = p[P_EQ], p[P_EK], p[P_EV], p[P_EO]
    D4 = Dp // 4
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    k_row = k_block // 4
    q_features = (H * Dp + WIDTH - 1) // WIDTH * WIDTH
    k_features = (Hkv * Dp + WIDTH - 1) // WIDTH * WIDTH
    v_features = (Hkv * Dvp + WIDTH - 1) // WIDTH * WIDTH
    S_up = (S + ROWS - 1) // ROWS * ROWS
    k_step, v_step = S_up * k_block, S_up // 4 * v_block
    at_values, at_kterm, at_kscale, at_vscale = p[P_VALUES], p[P_KTERM], p[P_KSCALE], p[P_VSCALE]
    at_x, at_xscale, at_natural = p[P_AT_X], p[P_AT_XSCALE], p[P_AT_NATURAL]
    at_qbytes, at_q, at_qscale = p[P_AT_QBYTES], p[P_AT_Q], p[P_AT_QSCALE]
    at_scores, at_p, at_stats = p[P_AT_SCORES], p[P_AT_P], p[P_AT_STATS]
    at_context, at_cbytes, at_tile, at_masks = p[P_AT_CONTEXT], p[P_AT_CBYTES], p[P_AT_TILE], p[P_AT_MASKS]
    private_u, private_b, private_f = private.view(np.uint32), private.view(np.int8), private.view(np.float32)
    shared_b, shared_f = shared.view(np.int8), shared.view(np.float32)
    x_u = private_u[at_x:]
    at_tiles, at_turned = p[P_AT_TILES], p[P_AT_TURNED]
    if MATRIX:
        matrix_configure(private, at_tiles)
    # 1. keys and values of all tokens
    if phase == PROJECTING:
        t0, t1 = begin, min(begin + portion, S)
        for t in range(t0, t1, TOKENS):
            tokens = min(TOKENS, t1 - t)
            rows = (tokens + ROWS - 1) // ROWS * ROWS
            quantize_tokens(xk, (batch * S + t) * Ek, Ek, tokens, rows, private_b, 4 * at_x, private_f, at_xscale)
            project(x_u, (Ek + 3) // 4, private_f, at_xscale, rows, weights, p[P_WK], p[P_CK], factors, p[P_SK],
                    k_features, private_f, at_natural, private, at_tiles)
            for b in range(0, k_features, k_block):
                for i in range(rows):
                    scale, inverse = block_scale(private_f, at_natural + i * k_features + b, k_block)
                    shared_f[at_kscale + b // k_block * S_up + t + i] = scale
                    to = b // k_block * k_step + (t + i) * k_block
                    for d in range(0, k_block, LANES):
                        v = load(private_f, at_natural + i * k_features + b + d)
                        store_bytes(shared_b, to + d, round_to_int(v * splat(inverse)))
            for h in range(Hkv):
                at = feature_position(h * Dp, k_block, k_step) + t * k_block
                for i in range(rows):
                    total = np.int32(0)
                    for d in range(Dp):
                        total += np.int32(shared_b[at + i * k_block + d])
                    shared[at_kterm + h * S_up + t + i] = np.int32(-OFFSET * total)
            if p[P_SAME_KV] == 0:
                quantize_tokens(xv, (batch * S + t) * Ev, Ev, tokens, rows, private_b, 4 * at_x, private_f, at_xscale)
            project(x_u, (Ev + 3) // 4, private_f, at_xscale, rows, weights, p[P_WV], p[P_CV], factors, p[P_SV],
                    v_features, private_f, at_natural, private, at_tiles)
            add_bias(private_f, at_natural, rows, v_features, factors, p[P_BV])
            for b in range(0, v_features, v_block):
                to_scale = at_vscale + b // v_block * S_up + t
                for i in range(0, rows, 4):
                    from_i = at_natural + i * v_features + b
                    s0, i0 = block_scale(private_f, from_i, v_block)
                    s1, i1 = block_scale(private_f, from_i + v_features, v_block)
                    s2, i2 = block_scale(private_f, from_i + 2 * v_features, v_block)
                    s3, i3 = block_scale(private_f, from_i + 3 * v_features, v_block)
                    shared_f[to_scale + i], shared_f[to_scale + i + 1] = s0, s1
                    shared_f[to_scale + i + 2], shared_f[to_scale + i + 3] = s2, s3
                    to = at_values + b // v_block * v_step + (t + i) // 4 * v_block
                    for d in range(0, v_block, LANES):
                        c0 = round_to_int(load(private_f, from_i + d) * splat(i0))
                        c1 = round_to_int(load(private_f, from_i + d + v_features) * splat(i1))
                        c2 = round_to_int(load(private_f, from_i + d + 2 * v_features) * splat(i2))
                        c3 = round_to_int(load(private_f, from_i + d + 3 * v_features) * splat(i3))
                        store(shared, to + d, pack_bytes(c0, c1, c2, c3, np.int32(0)))
            # A NaN among a token's values shows in its scores, where masks are, so that it goes where it may be seen.
            for i in range(tokens):
                bad = False
                for b in range(0, v_features, v_block):
                    bad = bad or np.isnan(shared_f[at_vscale + b // v_block * S_up + t + i])
                if bad:
                    for b in range(0, k_features, k_block):
                        shared_f[at_kscale + b // k_block * S_up + t + i] = np.float32(np.nan)
        if MATRIX:
            matrix_release()
        return
    b0, b1 = begin, min(begin + portion, (L + WIDTH - 1) // WIDTH)
    has_mask = keep.size > 0 or bias.size > 0
    band = p[P_BAND] != 0
    masked = band or has_mask
    mask_per_head = p[P_KEEP_H] != 0 or p[P_BIAS_H] != 0
    q_row = (q_features // 4 + LANES - 1) // LANES * LANES
    for block in range(b0, b1):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        # 2. queries of this block; their scale carries log2(e) / sqrt(D), folded into the weight scales
        quantize_tokens(xq, (batch * L + q0) * Eq, Eq, queries, WIDTH, private_b, 4 * at_x, private_f, at_xscale)
        project(x_u, (Eq + 3) // 4, private_f, at_xscale, WIDTH, weights, p[P_WQ], p[P_CQ], factors, p[P_SQ],
                q_features, private_f, at_natural, private, at_tiles)
        add_bias(private_f, at_natural, WIDTH, q_features, factors, p[P_BQ])
        for b in range(0, q_features, k_block):
            for l in range(WIDTH):
                scale, inverse = block_scale(private_f, at_natural + l * q_features + b, k_block)
                private_f[at_qscale + b // k_block * WIDTH + l] = scale
                for d in range(0, k_block, LANES):
                    v = load(private_f, at_natural + l * q_features + b + d)
                    store_bytes(private_b, 4 * (at_qbytes + l * q_row) + b + d,
                                round_to_int(v * splat(inverse)) ^ splat(_FLIP_ONE))
        for f in range(0, q_row, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, at_qbytes + l * q_row + f, q_row, private, at_q + f * WIDTH + l, WIDTH)
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p[P_LOW], p[P_HIGH])
        first = first // ROWS * ROWS
        # 3. attention, head by head, context (H * Dvp, W) in float32
        for h in range(H):
            kv = h // (H // Hkv)
            at_out = at_context + h * Dvp * WIDTH
            if has_mask and (h == 0 or mask_per_head):
                fill_mask(private_f, at_masks,
                          keep, batch * p[P_KEEP_B] + h * p[P_KEEP_H] + q0 * p[P_KEEP_L] + first * p[P_KEEP_S],
                          p[P_KEEP_L], p[P_KEEP_S],
                          bias, batch * p[P_BIAS_B] + h * p[P_BIAS_H] + q0 * p[P_BIAS_L] + first * p[P_BIAS_S],
                          p[P_BIAS_L], p[P_BIAS_S], queries, last - first, private_f, at_tile)
            at_k = feature_position(kv * Dp, k_block, k_step) // 4
            at_v = at_values + feature_position(kv * Dvp, v_block, v_step)
            at_sk = at_kscale + kv * Dp // k_block * S_up
            at_sv = at_vscale + kv * Dvp // v_block * S_up
            for i in range(0, (Dvp + ROWS) * WIDTH, LANES):
                store(private_f, at_out + i, splat(_ZERO))
            for c in range(0, WIDTH, LANES):
                store(private_f, at_stats + c, splat(_MINUS_INFINITY))
                store(private_f, at_stats + WIDTH + c, splat(_ZERO))
                store(private, at_stats + 3 * WIDTH + c, splat(np.int32(0)))
            for s0 in range(first, last, KEY_BLOCK):
                keys = min(KEY_BLOCK, last - s0)
                groups = (keys + 3) // 4
                # a. scores
                for s in range(0, keys, ROWS):
                    tile = tile_of_rows_and_columns(ROWS, COLUMNS, shared, at_kterm + kv * S_up + s0 + s,
                                                    private, at_stats + 3 * WIDTH)
                    tile = multiply(tile, shared, at_k + (s0 + s) * k_row, k_row, 1, private_u,
                                    at_q + h * D4 * WIDTH, D4)
                    tile_store(tile_dequantize(tile, shared_f, at_sk + s0 + s, private_f,
                                               at_qscale + h * Dp // k_block * WIDTH),
                               private_f, at_scores + s * WIDTH, WIDTH, LANES)
                if masked:
                    mask_scores(private_f, at_scores, keys, s0, q0, band, p[P_LOW], p[P_HIGH], full_from, full_to,
                                private_f, at_masks + (s0 - first) * WIDTH, has_mask)
                for i in range(keys * WIDTH, groups * 4 * WIDTH, LANES):
                    store(private_f, at_scores + i, splat(_MINUS_INFINITY))
                # b. exponentials times the scale of the value they will multiply; the sum without it
                for c in range(0, WIDTH, LANES):
                    at = at_scores + c
                    before = load(private_f, at_stats + c)
                    m = before
                    for s in range(keys):
                        m = larger(load(private_f, at + s * WIDTH), m)
                    base = select(m == splat(_MINUS_INFINITY), splat(_ZERO), m)
                    total = splat(_ZERO)
                    top = splat(_ZERO)
                    for s in range(keys):
                        score = load(private_f, at + s * WIDTH)
                        e = exp2(score - base)
                        weighted = e * splat(shared_f[at_sv + s0 + s])
                        if masked:
                            gone = score == splat(_MINUS_INFINITY)
                            e = select(gone, splat(_ZERO), e)
                            weighted = select(gone, splat(_ZERO), weighted)
                        total = total + e
                        top = larger(weighted, top)
                        store(private_f, at + s * WIDTH, weighted)
                    for s in range(keys, groups * 4):
                        store(private_f, at + s * WIDTH, splat(_ZERO))
                    shrink = select(before == splat(_MINUS_INFINITY), splat(_ZERO), exp2(before - base))
                    if s0 > first:
                        for d in range(Dvp):
                            at_d = at_out + d * WIDTH + c
                            store(private_f, at_d, load(private_f, at_d) * shrink)
                    store(private_f, at_stats + c, m)
                    store(private_f, at_stats + WIDTH + c, load(private_f, at_stats + WIDTH + c) * shrink + total)
                    # c. probabilities of this block as bytes
                    positive = top > splat(_ZERO)
                    inverse = select(positive, splat(np.float32(255)) / top, splat(_ZERO))
                    store(private_f, at_stats + 2 * WIDTH + c, top * splat(np.float32(1 / 255)))
                    for g in range(groups):
                        v = at + 4 * g * WIDTH
                        p0 = round_to_int(load(private_f, v) * inverse)
                        p1 = round_to_int(load(private_f, v + WIDTH) * inverse)
                        p2 = round_to_int(load(private_f, v + 2 * WIDTH) * inverse)
                        p3 = round_to_int(load(private_f, v + 3 * WIDTH) * inverse)
                        store(private, at_p + g * WIDTH + c,
                              pack_bytes(p0, p1, p2, p3, np.int32(-128)) ^ splat(_PROBABILITY_FLIP))
                # d. context += p v
                for d in range(0, Dvp, ROWS):
                    if OFFSET == 0:
                        for i in range(ROWS):
                            total_v = np.int32(0)
                            for g in range(groups):
                                for j in range(4):
                                    at_byte = 4 * (at_v + (s0 // 4 + g) * v_block + d + i) + j
                                    total_v += np.int32(shared_b[at_byte])
                            private[at_stats + 4 * WIDTH + i] = np.int32(128 * total_v)
                        tile = tile_of_rows_and_columns(ROWS, COLUMNS, private, at_stats + 4 * WIDTH,
                                                        private, at_stats + 3 * WIDTH)
                    else:
                        tile = tile_zero(ROWS, COLUMNS, private)
                    tile = multiply(tile, shared, at_v + s0 // 4 * v_block + d, 1, v_block, private_u, at_p, groups)
                    tile_store(tile_add_scaled(tile, private_f, at_out + d * WIDTH, WIDTH, private_f,
                                               at_stats + 2 * WIDTH),
                               private_f, at_out + d * WIDTH, WIDTH, LANES)
            # e. divide by the sum; a query that saw no key gets zeros
            for c in range(0, WIDTH, LANES):
                total = load(private_f, at_stats + WIDTH + c)
                inverse = select(total == splat(_ZERO), splat(_ZERO), splat(_ONE) / total)
                for d in range(Dvp):
                    at_d = at_out + d * WIDTH + c
                    store(private_f, at_d, load(private_f, at_d) * inverse)
        at_row = (batch * L + q0) * Eo
        if p[P_HAS_OUT] == 0:
            for h in range(H):
                for d in range(Dv):
                    for l in range(queries):
                        out[at_row + l * Eo + h * Dv + d] = private_f[at_context + (h * Dvp + d) * WIDTH + l]
            continue
        # 4. context as bytes, one scale per query, and the output projection
        C = H * Dvp
        for c in range(0, WIDTH, LANES):
            best = splat(_ZERO)
            sum_of_all = splat(_ZERO)
            for i in range(C):
                v = load(private_f, at_context + i * WIDTH + c)
                best = larger(magnitude(v), best)
                sum_of_all = sum_of_all + v
            inverse = select(best > splat(_ZERO), splat(_LARGEST) / best, splat(_ZERO))
            scale = best * splat(np.float32(1 / 127))
            # NaN is lost in a maximum but not in a sum.
            scale = select(sum_of_all == sum_of_all, scale, sum_of_all)
            store(private_f, at_xscale + c, scale)
            for i in range(0, C, 4):
                at = at_context + i * WIDTH + c
                c0 = round_to_int(load(private_f, at) * inverse)
                c1 = round_to_int(load(private_f, at + WIDTH) * inverse)
                c2 = round_to_int(load(private_f, at + 2 * WIDTH) * inverse)
                c3 = round_to_int(load(private_f, at + 3 * WIDTH) * inverse)
                store(private, at_cbytes + i // 4 * WIDTH + c, pack_bytes(c0, c1, c2, c3, np.int32(0)) ^ splat(FLIP))
        C4 = C // 4
        use_matrix = MATRIX and C4 % 16 == 0
        turned_u = private_u[at_turned:]
        if use_matrix:  # the matrix unit reads whole rows
            for c in range(0, C4, LANES):
                for l in range(0, WIDTH, LANES):
                    transpose_block(private, at_cbytes + c * WIDTH + l, WIDTH, private, at_turned + l * C4 + c, C4)
        for e in range(0, Eo, WIDTH):
            for l in range(0, queries, ROWS):
                if use_matrix:
                    tile = linear_tile(True, l, turned_u, C4, weights, p[P_WO] + e * C4, p[P_CO] + e, C4,
                                       private, at_tiles)
                else:
                    tile = tile_of_columns(ROWS, COLUMNS, weights, p[P_CO] + e)
                    tile = multiply(tile, private_u, at_cbytes + l, 1, WIDTH, weights, p[P_WO] + e * C4, C4)
                tile_store(tile_dequantize(tile, private_f, at_xscale + l, factors, p[P_SO] + e),
                           private_f, at_tile, WIDTH, LANES)
                inside = e + WIDTH <= Eo
                for i in range(min(ROWS, queries - l)):
                    to = at_row + (l + i) * Eo + e
                    if inside:
                        for c in range(0, WIDTH, LANES):
                            v = load(private_f, at_tile + i * WIDTH + c)
                            store(out, to + c, v + load(factors, p[P_BO] + e + c))
                    else:
                        for j in range(Eo - e):
                            out[to + j] = private_f[at_tile + i * WIDTH + j] + factors[p[P_BO] + e + j]
    if MATRIX:
        matrix_release()


@jit
def layer_dynamic(xq, xk, xv, out, weights, factors, p, keep, bias, scratch, board, count):
    """A dynamic int8 multi-head attention layer, see `layer_part`, on at most `count` threads that serve the board."""
    tokens, token_parts = portions(p[P_S], MATRIX_TOKENS, count)
    blocks, block_parts = portions((p[P_L] + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p[P_BATCH]):
        share(board, token_parts, layer_part, xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch,
              PROJECTING, tokens)
        share(board, block_parts, layer_part, xq, xk, xv, out, weights, factors, p, keep, bias, scratch, batch,
              ATTENDING, blocks)
