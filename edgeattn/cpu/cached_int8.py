"""A static int8 layer with a cache: new tokens go into it, and what it holds to where the layer's own kernel reads.

Letters as in fused_int8.  A cache keeps codes as they are, keys (B, H, C, D) and values (B, H, C, Dv), C its capacity.
Attention itself is that of a layer without a cache, whose keys and values are the S tokens from slot P_FIRST on; the
codes of the P_NEW last of these are computed first.
"""
import numpy as np

from edgeattn.crew import separate, share
from edgeattn.jit import inlined, jit

from . import fused_int8 as f
from .fused import ATTENDING, portions
from .matmul import MATRIX, MATRIX_DEPTH, feature_position, linear, round_up
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


@inlined
def append_codes(x, at_x, E, tokens, weights, rule, at_weight, at_bias, at_multiplier, zero_point, size, padded, p,
                 private, cache, at_cache):
    """Codes of at most W tokens of x, projected, to the heads' rows of a cache from at_cache on."""
    H, rows, depth4 = p[f.P_HEADS], round_up(tokens, ROWS), f.packed_depth(E)
    features = round_up(H * padded, WIDTH)
    row, at_natural = 4 * round_up(features // 4, LANES), 4 * p[f.P_AT_NATURAL]
    private_b = private.view(np.int8)
    f.pack_tokens(x, at_x, E, tokens, rows, private, p[f.P_AT_X], depth4)
    linear(f.finish_bytes, (weights, rule, at_multiplier, features, zero_point, np.int32(0), private_b, at_natural, row,
                            row, 0),
           private.view(np.uint32), p[f.P_AT_X], depth4, 1, rows, weights, at_weight, weights, at_bias, features,
           depth4, private, p[f.P_AT_TILES])
    for h in range(H):
        for t in range(tokens):
            at, to = at_natural + t * row + h * padded, at_cache + (h * p[f.P_CAPACITY] + t) * size
            for d in range(size):
                cache[to + d] = private_b[at + d]


@separate
def append_part(table, project_rule, xk, xv, weights, p, keys, values, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's new tokens, projected, to the cache; the table is there to stand first alone."""
    private = scratch[p[f.P_SHARED] + worker * p[f.P_PRIVATE]:p[f.P_SHARED] + (worker + 1) * p[f.P_PRIVATE]]
    D, Dv, Ek, Ev = p[f.P_D], p[f.P_DV], p[f.P_EK], p[f.P_EV]
    slot = batch * p[f.P_HEADS] * p[f.P_CAPACITY] + p[f.P_FIRST] + p[f.P_S] - p[f.P_NEW]
    if MATRIX:
        matrix_configure(private, p[f.P_AT_TILES])
    end = min((part + 1) * portion, p[f.P_NEW])
    for t in range(part * portion, end, WIDTH):
        tokens, row = min(WIDTH, end - t), batch * p[f.P_NEW] + t
        append_codes(xk, row * Ek, Ek, tokens, weights, project_rule, p[f.P_WK], p[f.P_BK], p[f.P_MK],
                     np.int32(p[f.P_ZK]), D, p[f.P_D_PAD], p, private, keys, (slot + t) * D)
        append_codes(xv, row * Ev, Ev, tokens, weights, project_rule, p[f.P_WV], p[f.P_BV], p[f.P_MV],
                     np.int32(p[f.P_ZV]), Dv, p[f.P_DV_PAD], p, private, values, (slot + t) * Dv)
    if MATRIX:
        matrix_release()


@inlined
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


@inlined
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


@separate
def arrange_part(p, keys, values, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's tokens from the cache to shared scratch, as `layer_part` leaves what it projects.

    Features that only fill up a head, and tokens that only fill up a tile, are whatever lies there: the former meet
    zeros, the latter are dropped.
    """
    shared = scratch[:p[f.P_SHARED]]
    private = scratch[p[f.P_SHARED] + worker * p[f.P_PRIVATE]:p[f.P_SHARED] + (worker + 1) * p[f.P_PRIVATE]]
    H, D, Dv, Dp, Dvp, S = p[f.P_HEADS], p[f.P_D], p[f.P_DV], p[f.P_D_PAD], p[f.P_DV_PAD], p[f.P_S]
    S_up, at_square = f.padded_keys(S), p[f.P_AT_NATURAL]
    k_block, v_block = max(Dp, LANES), max(Dvp, LANES)
    k_step, v_step, v_row = S_up * k_block, S_up // 4 * v_block, round_up(S_up // 4, MATRIX_DEPTH)
    q_zero = f.zero_bytes(np.int32(p[f.P_ZQ]))
    k_base, v_base = address_of(keys), pointer_to(address_of(values), np.uint8)
    base, own = address_of(shared), pointer_to(address_of(private), np.int32)
    everyones = pointer_to(base, np.int32)
    t0, t1 = part * portion, min((part + 1) * portion, S)
    for h in range(H):
        slot = (batch * H + h) * p[f.P_CAPACITY] + p[f.P_FIRST]
        at_k = feature_position(h * Dp, k_block, k_step) + t0 * k_block
        copy_rows(k_base + (slot + t0) * D, D, t1 - t0, base + at_k, k_block)
        f.key_terms(shared, at_k // 4, k_block // 4, round_up(t1 - t0, ROWS), Dp // 4, q_zero, shared,
                  p[f.P_KROW] + h * S_up + t0, private, at_square)
        at_v = p[f.P_VALUES] + feature_position(h * Dvp, v_block, v_step)
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
                                    p[f.P_VALUES] + (h * Dvp + d) * v_row + t // 4, v_row)


@jit
def cached_int8(project_rule, score_rule, context_rule, table, xq, xk, xv, out, weights, p, keep, classes, tables,
                keys, values, scratch, board, count):
    """A static layer with a cache on at most `count` threads that serve the board; what `layer_part` says, and:

    xk (B, P_NEW, Ek), xv (B, P_NEW, Ev), keys and values (of the cache): flat int8
    """
    some, append_parts = portions(p[f.P_NEW], WIDTH, count)
    tokens, token_parts = portions(p[f.P_S], f.TOKENS_TOGETHER, count)
    blocks, block_parts = portions((p[f.P_L] + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p[f.P_BATCH]):
        share(board, append_parts, append_part, table, project_rule, xk, xv, weights, p, keys, values, scratch, batch,
              some)
        share(board, token_parts, arrange_part, p, keys, values, scratch, batch, tokens)
        share(board, block_parts, f.layer_part, table, project_rule, score_rule, context_rule, xq, xk, xv, out, weights,
              p, keep, classes, tables, scratch, batch, ATTENDING, blocks)
