"""Queries, keys and values of the dynamic layer: a block of tokens to bytes, projected, and each head to bytes again.

Every token is quantized by its own largest magnitude: the input over its E values, queries, keys and values over each
head.  Projections come out as rows of tokens, so that few cost little; each head's is turned, (features, W) with tokens
in lanes, which is what dynamic.py quantizes; a lone token's is quantized as one_token.py says.

A few features of the input may be apart, as dynamic_rows.py has them: their products with the weights of queries, keys
and values are float32.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline

from .attend_dynamic import values_row
from .dynamic import (
    TOKENS,
    depth_groups,
    keys_to_rows,
    largest_rows,
    quantize_keys,
    quantize_queries,
    quantize_rows,
    quantize_values,
    unit_of,
)
from .int8_operands import FLIP
from .int8_views import Part, Projection
from .key_mean import add_to_tokens, subtract_mean, weigh_tokens
from .matmul import round_up
from .one_token import largest_of_head, quantize_key, quantize_query, quantize_value, subtract_mean_of_one
from .positions import place_keys, place_queries
from .projection_dynamic import Apart, project_rows, set_apart
from .simd import LANES, WIDTH, first_lane, load, pointer_to, store, transpose_block
from .views import Heads, Rows


@inline
def quantize_block(x, E, tokens, p, a, own):
    """Up to TOKENS rows of x, a Part, to rows of bytes, and their scales; what is apart is kept in float32."""
    if p.apart > 0:
        columns = Part(pointer_to(a.weights, np.int32), p.columns)
        separately(set_apart, (x, E, tokens, columns, p.apart, own, p.at_rest, p.at_apart))
        x = Part(own.float32, p.at_rest)
    quantize_rows(x, E, tokens, round_up(tokens, LANES), FLIP, Part(own.int32, p.at_x), Part(own.float32, p.at_xscale),
                  own, p.at_inverse, p.at_tail)


@inline
def project_block_rows(projection, at_apart, features, heads, size, tokens, p, a, own):
    """A quantized block's rows of some heads, `size` of the features each, from p.at_rows on; how far they are apart.

    at_apart: of the weights of what is apart among the factors.
    """
    first, row = heads.first * size, round_up(heads.count * size, WIDTH)
    some = Projection(projection.weights, projection.at + first * projection.depth4, projection.at_terms + first,
                      projection.own_step, projection.factors, projection.at_factors + first, projection.bias,
                      projection.at_bias + first, projection.depth4)
    apart = Apart(p.apart, own.float32, p.at_apart, pointer_to(a.factors, np.float32), at_apart + first,
                  round_up(features, WIDTH))
    separately(project_rows, (Part(own.uint32, p.at_x), tokens, Part(own.float32, p.at_xscale), some, apart, row,
                              Rows(own.float32, p.at_rows, row), own, p.at_tiles))
    return row


@inline
def turn_head(h, size, row, tokens, p, own):
    """A head's features of some tokens, blocks of W of them, (size, W), from p.at_scores on; how far these are apart.

    h: which of those whose rows there are. Lanes without a token have any features.
    """
    step = round_up(size, LANES) * WIDTH
    for t in range(0, tokens, LANES):
        to = p.at_scores + t // WIDTH * step + t % WIDTH
        for d in range(0, size, LANES):
            transpose_block(own.float32, p.at_rows + t * row + h * size + d, row, own.float32, to + d * WIDTH, WIDTH)
    return step


@inline
def lanes_of(tokens, b):
    """How many of some tokens are in the b-th block of W."""
    return min(WIDTH, tokens - b * WIDTH)


@inline
def is_lone(tokens, size, placed):
    """Whether heads of so many features are quantized as one_token.py says."""
    return tokens == 1 and size % LANES == 0 and not placed


@inline
def places_keys(p):
    """Whether keys are normed or rotated."""
    return p.k_norm != 0 or p.pairs > 0


@inline
def project_queries(projection, heads, t, blocks, tokens, p, a, shared, own):
    """Queries of a quantized block of tokens from t on, quantized again: bytes (blocks, H, size / 4, W), some heads."""
    H, size = p.heads, p.padded_head
    D4, at_scales = size // 4, p.at_qscale + t * H
    at_queries = p.at_queries + t * H * D4
    row = project_block_rows(projection, p.vq, H * size, heads, size, tokens, p, a, own)
    placed = p.q_norm != 0 or p.pairs > 0
    for h in range(heads.count):
        if is_lone(tokens, size, placed):
            number = heads.first + h
            quantize_query(own.float32, p.at_rows + h * size, size, own, p.at_scores,
                           Part(shared.int32, at_queries + number * D4 * WIDTH),
                           Part(shared.float32, at_scales + number * WIDTH))
            continue
        step = turn_head(h, size, row, tokens, p, own)
        for b in range(blocks):
            at, number = p.at_scores + b * step, b * H + heads.first + h
            if placed:
                place_queries(own.float32, at, p, projection.factors, pointer_to(a.table, np.float32), t + b * WIDTH,
                              p.at_inverse)
            quantize_queries(Part(own.float32, at), size, lanes_of(tokens, b),
                             Part(shared.int32, at_queries + number * D4 * WIDTH),
                             Part(shared.float32, at_scales + number * WIDTH))


@inline
def project_keys(projection, heads, t, blocks, tokens, smoothing, p, a, shared, own):
    """Keys of some heads of a quantized block of tokens from t on, to rows of bytes; smoothing: less their mean, kept.

    Without it the projection has left that out already, unless keys are normed or rotated between.
    """
    Hkv, size, S_up = p.kv_heads, p.padded_head, round_up(p.keys, TOKENS)
    K4 = round_up(Hkv * size // 4, LANES)
    row, at_first = project_block_rows(projection, p.vk, Hkv * size, heads, size, tokens, p, a, own), heads.first * size
    if smoothing:  # beside the mean, for the blocks that have it for a bias
        for f in range(at_first, at_first + row, LANES):
            store(shared.float32, p.at_key_factors + f, load(projection.factors, projection.at_factors + f))
    if is_lone(tokens, size, places_keys(p)):
        for h in range(heads.first, heads.first + heads.count):
            at_head, token = p.at_rows + (h - heads.first) * size, h * S_up + t
            if smoothing:
                subtract_mean_of_one(own.float32, at_head, size, own.float32[p.at_weights], shared.float32,
                                     p.at_mean + h * size)
            quantize_key(own.float32, at_head, size, shared.int8, 4 * t * K4 + h * size,
                         Part(shared.float32, p.at_kscale + token), Part(shared.int32, p.at_kterm + token))
        return
    for h in range(heads.first, heads.first + heads.count):
        step = turn_head(h - heads.first, size, row, tokens, p, own)
        if places_keys(p):
            for b in range(blocks):
                place_keys(own.float32, p.at_scores + b * step, p, projection.factors, pointer_to(a.table, np.float32),
                           t + b * WIDTH, p.at_inverse)
            if not smoothing:
                add_to_tokens(own.float32, p.at_scores, step, size, tokens, shared.float32, p.at_mean + h * size)
        if smoothing:
            subtract_mean(own.float32, p.at_scores, step, size, tokens, p.at_weights, shared.float32,
                          p.at_mean + h * size)
        for b in range(blocks):
            token = h * S_up + t + b * WIDTH
            quantize_keys(Part(own.float32, p.at_scores + b * step), size, lanes_of(tokens, b),
                          Part(own.int32, p.at_keys + b * K4 * WIDTH + h * size // 4 * WIDTH),
                          Part(shared.float32, p.at_kscale + token), Part(shared.int32, p.at_kterm + token))
    for b in range(blocks):
        keys_to_rows(own.int32, p.at_keys + (b * K4 + at_first // 4) * WIDTH, round_up(heads.count * size // 4, LANES),
                     lanes_of(tokens, b), shared.int32, (t + b * WIDTH) * K4 + at_first // 4, K4)


@inline
def project_values(projection, heads, t, blocks, tokens, smoothing, p, a, shared, own):
    """Values of some heads of a quantized block of tokens from t on, to rows of bytes; smoothing: their units first."""
    Hkv, size, S_up, row4 = p.kv_heads, p.padded_value, round_up(p.keys, TOKENS), values_row(p.keys)
    row = project_block_rows(projection, p.vv, Hkv * size, heads, size, tokens, p, a, own)
    for h in range(heads.first, heads.first + heads.count):
        if is_lone(tokens, size, False):
            at_head, token = p.at_rows + (h - heads.first) * size, h * S_up + t
            if smoothing:
                own.float32[p.at_weights] = first_lane(largest_of_head(own.float32, at_head, size))
                shared.float32[p.at_units + h] = unit_of(own.float32, p.at_weights, own.int32, p.at_seen, 1)
            quantize_value(own.float32, at_head, size, shared.float32[p.at_units + h], own, p.at_scores,
                           Rows(shared.int8, 4 * (p.at_values + h * size * row4) + t, 4 * row4),
                           Part(shared.float32, p.at_vlog + token), Part(shared.float32, p.at_vinverse + token))
            continue
        step = turn_head(h - heads.first, size, row, tokens, p, own)
        if smoothing:
            for s in range(0, tokens, LANES):
                at = p.at_scores + s // WIDTH * step + s % WIDTH
                store(own.float32, p.at_weights + s, largest_rows(own.float32, at, size))
            shared.float32[p.at_units + h] = unit_of(own.float32, p.at_weights, own.int32, p.at_seen, tokens)
        for b in range(blocks):
            token = h * S_up + t + b * WIDTH
            to = Rows(shared.int8, 4 * (p.at_values + h * size * row4) + t + b * WIDTH, 4 * row4)
            quantize_values(Part(own.float32, p.at_scores + b * step), size, lanes_of(tokens, b),
                            shared.float32[p.at_units + h], to,
                            Part(shared.float32, p.at_vlog + token), Part(shared.float32, p.at_vinverse + token))


@inline
def project_block(p, a, heads, batch, block, smoothing, shared, kept, own):
    """Queries, keys and values of a block of tokens, for some key heads and those that attend to them.

    Blocks of queries with an input of their own follow the keys'.
    """
    L, S, weights, factors = p.queries, p.keys, pointer_to(a.weights, np.int32), pointer_to(a.factors, np.float32)
    kv_blocks = (S + TOKENS - 1) // TOKENS
    is_query = block >= kv_blocks
    x, E, of = (a.queries, p.query_width, L) if is_query else (a.keys, p.key_width, S)
    t = (block - kv_blocks if is_query else block) * TOKENS
    tokens = min(TOKENS, of - t)
    blocks = (tokens + WIDTH - 1) // WIDTH
    quantize_block(Part(pointer_to(x, np.float32), (batch * of + t) * E), E, tokens, p, a, own)
    if is_query or p.same_qk != 0:
        depth4, repeats = depth_groups(p.query_width), p.heads // p.kv_heads
        up = round_up(p.heads * p.padded_head, WIDTH)
        project_queries(Projection(weights, p.wq, p.cq, up, factors, p.sq, factors, p.bq, depth4),
                        Heads(heads.first * repeats, heads.count * repeats), t, blocks, tokens, p, a, shared, own)
    if is_query:
        return
    if smoothing:
        for s in range(TOKENS):
            own.float32[p.at_weights + s] = own.float32[p.at_xscale + s]
        weigh_tokens(own.float32, p.at_weights, own.int32, p.at_seen)
    reals, at_factors, at_bias = factors, p.sk, p.bk  # a bias of zeros, where keys are not placed
    if not (smoothing or places_keys(p)):
        reals, at_factors, at_bias = kept.float32, p.at_key_factors, p.at_mean
    depth4, up = depth_groups(p.key_width), round_up(p.kv_heads * p.padded_head, WIDTH)
    project_keys(Projection(weights, p.wk, p.ck, up, reals, at_factors, reals, at_bias, depth4), heads, t, blocks,
                 tokens, smoothing, p, a, kept, own)
    if p.same_kv == 0:
        values = pointer_to(a.values, np.float32)
        quantize_block(Part(values, (batch * S + t) * p.value_width), p.value_width, tokens, p, a, own)
    depth4, up = depth_groups(p.value_width), round_up(p.kv_heads * p.padded_value, WIDTH)
    project_values(Projection(weights, p.wv, p.cv, up, factors, p.sv, factors, p.bv, depth4), heads, t, blocks, tokens,
                   smoothing, p, a, kept, own)
