"""Fused dynamic int8 layer: float in, float out, every product in bytes, softmax in float32.

Letters as in attend_lanes.py; sizes with a 4 count groups of four bytes.  Every token is quantized by its own largest
magnitude: the input over its E values, queries, keys and values over each head, the context over its H * Dv values.
Projections come out as rows of tokens, so that few cost little; each head's is turned, (features, W) with tokens in
lanes, which is what dynamic.py quantizes.

Softmax does not see what is added to all scores of a query: so the key projection's bias is left out, and from all
keys of a head the mean of the first TOKENS that are seen is subtracted, which leaves the bytes to what tells keys apart
(SageAttention, arXiv 2410.02367, section 4.2, takes the mean of all).

A few features of the input may be apart, as dynamic_rows.py has them: their products with the weights of
queries, keys and values are float32.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, register_jitable
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_dynamic import Keys, Queries, attend_bytes, fill_dither, values_of
from .byte_products import DEPTH_STEP
from .dynamic import (
    TOKENS,
    depth_groups,
    inverse_of,
    keys_to_rows,
    largest_rows,
    pack_rows,
    quantize_keys,
    quantize_queries,
    quantize_rows,
    quantize_values,
    scale_of,
    turn,
    unit_of,
)
from .fused import QUERIES
from .int8_operands import FLIP
from .int8_views import Part, Projection, parts_of, scratch_at
from .key_mean import add_to_tokens, choose_block, subtract_mean, weigh_tokens
from .matmul import round_up
from .one_token import (
    largest_of_head,
    quantize_context,
    quantize_key,
    quantize_query,
    quantize_value,
    subtract_mean_of_one,
)
from .portions import entries_alone, heads_at_once, own_memory, portions
from .positions import POSITIONS, place_keys, place_queries
from .projection_dynamic import Apart, project_rows, set_apart
from .records import MASK_ADDRESSES, MASKS, located, named, record
from .score_masks import adds_to_scores, fill_mask, masks_differ, visible_range
from .simd import (
    LANES,
    WIDTH,
    address_of,
    first_lane,
    load,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
    transpose_block,
)
from .views import Heads, Rows, ScoreMask, Visible

# The parameters: sizes; where weights begin: bytes, and what OFFSET adds to their products, in the int32 weights,
# scales and biases in the float32 ones, as are the weights v of `apart` features, which `columns` names; masks; where
# things begin in the scratch of all threads, and in that of each;
# of keys and values that are kept from call to call, the size of a batch entry's, and whether they are there.
LAYER = record("batch queries keys query_width key_width value_width out_width heads kv_heads",
               "head_size value_size padded_head padded_value has_out same_qk same_kv",
               "wq cq wk ck wv cv wo co columns", "sq bq vq sk bk vk sv bv vv so bo apart", MASKS, POSITIONS,
               "at_mean at_key_factors at_smooth at_units at_kterm at_kscale at_values at_vlog at_vinverse",
               "at_queries at_qscale at_contexts unit",
               "at_rest at_apart at_x at_rows at_xscale at_inverse at_tail at_weights at_seen at_keys at_q at_scores",
               "at_probabilities at_stats at_dither at_context at_context_bytes at_transposed at_tiles at_masks",
               "at_entry",
               "shared_size private_size kept_size is_kept")
# Where the arrays of a call are: queries (B, L, Eq), keys (B, S, Ek), values (B, S, Ev), out (B, L, Eo), float32;
# masks, or 0 of none; keys and values that are kept, or 0 of none; factors, float32, and weights, int32, as the
# parameters say, and the table of a rotation; all in C order.
LAYER_ADDRESSES = record("queries keys values out", MASK_ADDRESSES, "kept factors weights table")


@register_jitable
def values_row(S):
    """Elements of a row of values, one feature's bytes of all keys: whole vectors of them, and depths of products."""
    return round_up(S, max(4 * DEPTH_STEP, LANES)) // 4


@inline
def is_row(p):
    """Whether the context of a head is a row, of the one query there is, rather than (Dvp, W)."""
    return p.queries == 1 and p.padded_value % LANES == 0


@inline
def context_size(p):
    """Elements of the context of a head."""
    return p.padded_value if is_row(p) else p.padded_value * WIDTH


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
def keys_memory(p, a, memory, batch):
    """Where the keys and values of a batch entry are: in `memory`, an address, or kept."""
    return scratch_at(a.kept + 4 * p.kept_size * batch if a.kept != 0 else memory)


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
def is_lone(tokens, size, placed):
    """Whether heads of so many features are quantized as one_token.py says."""
    return tokens == 1 and size % LANES == 0 and not placed


@inline
def places_keys(p):
    """Whether keys are normed or rotated."""
    return p.k_norm != 0 or p.pairs > 0


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


@inline
def heads_of_part(p, at_once, part):
    """(portion, Heads) of a part of parts that count portions, and in each of them the key heads, `at_once` a part."""
    splits = (p.kv_heads + at_once - 1) // at_once
    first = part % splits * at_once
    return part // splits, Heads(first, min(at_once, p.kv_heads - first))


@task
def project_part(p, a, scratch, memory, batch, smoothing, at_once, portion, worker, part):
    """Keys, values and queries of one batch entry, of `at_once` key heads: bytes, and what scales them.

    smoothing: the first block of TOKENS keys and values that is seen, and minus the mean of its keys; then `portion` of
    the other blocks, those of queries last where they have an input of their own.
    memory: where all threads that are at this entry have keys (S', K4), values (Hkv Dvp, S'), queries (L' / W, H D4, W)
    and what scales them.
    """
    _, own = parts_of(scratch, p, worker)
    shared, kept = scratch_at(memory), keys_memory(p, a, memory, batch)
    number, heads = heads_of_part(p, at_once, part)
    matrix_configure(own.int32, p.at_stats)
    first = np.int64(0)
    if smoothing:
        first = np.int64(choose_block(p, a, batch, own.int32, p.at_seen))
        if part == 0:
            kept.int32[p.at_smooth] = first
    else:
        first = np.int64(kept.int32[p.at_smooth])
    blocks, begin = 1, number * portion
    if not smoothing:
        blocks, begin = (p.keys + TOKENS - 1) // TOKENS, begin + 1
        if p.same_qk == 0:
            blocks += (p.queries + TOKENS - 1) // TOKENS
        if p.is_kept != 0:
            begin += (p.keys + TOKENS - 1) // TOKENS - 1
    for i in range(begin, min(begin + portion, blocks)):
        block = first if i == 0 else i - 1 if i <= first else i
        project_block(p, a, heads, batch, block, smoothing, shared, kept, own)
    matrix_release()


@inline
def attend_head(h, q0, seen, mask, adds, p, shared, kept, own):
    """Context of a head for a block of queries, in float32; see context_size."""
    H, D4, S_up, Dvp = p.heads, p.padded_head // 4, round_up(p.keys, TOKENS), p.padded_value
    kv = h // (H // p.kv_heads)
    K4, at_head = round_up(p.kv_heads * D4, LANES), p.at_queries + (q0 * H + h * WIDTH) * D4
    for i in range(0, D4 * WIDTH, WIDTH):
        for c in range(0, min(WIDTH, p.queries - q0), LANES):
            store(own.int32, p.at_q + i + c, load(shared.int32, at_head + i + c))
    queries = Queries(own.uint32, p.at_q, round_up(D4, DEPTH_STEP), shared.float32,
                      p.at_qscale + q0 * H + h * WIDTH, min(WIDTH, p.queries - q0), is_row(p))
    keys = Keys(kept.int32, kv * D4, K4, p.at_kterm + kv * S_up, kept.float32, p.at_kscale + kv * S_up)
    values = values_of(kv, Dvp, values_row(p.keys), p, kept)
    attend_bytes(queries, keys, values, Dvp, seen, mask, adds, p, own,
                 p.at_context + h * context_size(p))


@inline
def write_context(p, a, heads, at_row, queries, own):
    """Some heads of a block's rows of the result, from at_row on, where that is the context."""
    out, Dv, Eo, size = pointer_to(a.out, np.float32), p.value_size, p.out_width, context_size(p)
    step = size // p.padded_value
    for h in range(heads.first, heads.first + heads.count):
        for d in range(Dv):
            for l in range(queries):
                out[at_row + l * Eo + h * Dv + d] = own.float32[p.at_context + h * size + d * step + l]


@inline
def write_rows(p, a, context, at_row, queries, first, features, own):
    """Features from `first` on of a block's rows of the result, from at_row on: the projection of a context, a Part.

    Of bytes with a scale per query.
    """
    out, factors = pointer_to(a.out, np.float32), pointer_to(a.factors, np.float32)
    C, Eo = p.heads * p.padded_value, p.out_width
    C4 = round_up(C // 4, LANES)
    if is_row(p):
        quantize_context(context.data, context.at, C, own, p.at_transposed, p.at_xscale)
    else:
        for c in range(0, queries, LANES):
            largest = largest_rows(context.data, context.at + c, C)
            store(own.float32, p.at_xscale + c, scale_of(largest))
            pack_rows(context.data, context.at + c, C, inverse_of(largest), FLIP, own.int32, p.at_context_bytes + c)
        turn(own.int32, p.at_context_bytes, C4, WIDTH, queries, own.int32, p.at_transposed)
    output = Projection(pointer_to(a.weights, np.int32), p.wo + first * C4, p.co + first, round_up(Eo, WIDTH), factors,
                        p.so + first, factors, p.bo + first, C4)
    none = Apart(0, own.float32, p.at_apart, factors, 0, 0)
    separately(project_rows, (Part(own.uint32, p.at_transposed), queries, Part(own.float32, p.at_xscale), output, none,
                              features, Rows(out, at_row + first, Eo), own, p.at_tiles))


@task
def attend_part(p, a, scratch, memory, batch, at_once, portion, worker, part):
    """`portion` blocks of W queries of one batch entry: attention, head by head, and the output projection.

    Of `at_once` key heads; where those are not all, the context waits in memory.
    """
    _, own = parts_of(scratch, p, worker)
    shared, kept = scratch_at(memory), keys_memory(p, a, memory, batch)
    number, kv = heads_of_part(p, at_once, part)
    heads = Heads(kv.first * (p.heads // p.kv_heads), kv.count * (p.heads // p.kv_heads))
    L, S, D4, band, adds = p.queries, p.keys, p.padded_head // 4, p.band != 0, adds_to_scores(a)
    masked, mask_per_head = adds or a.keep != 0, masks_differ(p, a)
    matrix_configure(own.int32, p.at_stats)
    for i in range(p.at_q + D4 * WIDTH, p.at_q + round_up(D4, DEPTH_STEP) * WIDTH, LANES):
        store(own.int32, i, splat(np.int32(0)))
    fill_dither(own.float32, p.at_dither, S)
    for block in range(number * portion, min((number + 1) * portion, (L + WIDTH - 1) // WIDTH)):
        q0, at_row = block * WIDTH, (batch * L + block * WIDTH) * p.out_width
        queries = min(WIDTH, L - q0)
        first, last, full_from, full_to = visible_range(q0, queries, S, band, p.low, p.high)
        first = first // 4 * 4
        seen = Visible(first, last, full_from, full_to, q0, band, p.low, p.high)
        mask = ScoreMask(own.float32, p.at_masks, first, masked)
        for h in range(heads.first, heads.first + heads.count):
            if masked and (h == heads.first or mask_per_head):
                fill_mask(p, a, batch, h, q0, queries, first, last, own.float32, p.at_masks, p.at_tiles)
            attend_head(h, q0, seen, mask, adds, p, shared, kept, own)
        if p.has_out == 0:
            write_context(p, a, heads, at_row, queries, own)
        elif heads.count == p.heads:
            write_rows(p, a, Part(own.float32, p.at_context), at_row, queries, 0, p.out_width, own)
        else:
            row = context_size(p)
            at = p.at_contexts + block * p.heads * row
            for i in range(heads.first * row, (heads.first + heads.count) * row, LANES):
                store(shared.float32, at + i, load(own.float32, p.at_context + i))
    matrix_release()


@task
def project_output(p, a, scratch, batch, portion, worker, part):
    """`portion` features of the output of a block of queries of one batch entry, whose context all threads have.

    `part` counts the blocks, and in each of them the portions.
    """
    shared, own = parts_of(scratch, p, worker)
    portions_of_row = (p.out_width + portion - 1) // portion
    q0, first = part // portions_of_row * WIDTH, part % portions_of_row * portion
    matrix_configure(own.int32, p.at_stats)
    context = Part(shared.float32, p.at_contexts + part // portions_of_row * p.heads * context_size(p))
    write_rows(p, a, context, (batch * p.queries + q0) * p.out_width, min(WIDTH, p.queries - q0), first,
               min(portion, p.out_width - first), own)
    matrix_release()


@inline
def other_blocks(p):
    """Blocks of TOKENS to be projected beside the one whose keys' mean is left out."""
    blocks = (p.keys + TOKENS - 1) // TOKENS - 1 if p.is_kept == 0 else 0
    return blocks + (p.queries + TOKENS - 1) // TOKENS if p.same_qk == 0 else blocks


@task
def attend_entries(p, a, scratch, portion, alone, worker, part):
    """All of a layer for `portion` of the batch entries that threads do alone."""
    memory, all_heads, none = own_memory(p, scratch, worker), p.kv_heads, np.int64(0)
    for batch in range(part * portion, min((part + 1) * portion, alone)):
        if p.is_kept == 0:
            separately(project_part, (p, a, scratch, memory, batch, True, all_heads, np.int64(1), worker, none))
        separately(project_part, (p, a, scratch, memory, batch, False, all_heads, other_blocks(p), worker, none))
        separately(attend_part, (p, a, scratch, memory, batch, all_heads, (p.queries + WIDTH - 1) // WIDTH, worker,
                                 none))


@jit
def layer_dynamic(parameters, addresses, scratch, task_queue, count):
    """A dynamic int8 multi-head attention layer, see LAYER, on at most `count` threads that serve the task_queue."""
    p, a, memory = named(parameters, LAYER), located(addresses, LAYER_ADDRESSES), address_of(scratch)
    alone, entries, entry_parts = entries_alone(p, count)
    if alone > 0:
        parallel_for(task_queue, entry_parts, attend_entries, p, a, memory, entries, alone)
    all_heads, all_tokens, all_queries = p.kv_heads, other_blocks(p), (p.queries + WIDTH - 1) // WIDTH
    some = heads_at_once(all_heads, p.unit, count)
    splits = (all_heads + some - 1) // some
    # Where there are few blocks, threads take some heads each: of all tokens, or of all queries.
    at_once = some if all_tokens < 4 * count else all_heads
    others = (count + splits - 1) // splits if at_once == some else count
    tokens, token_parts = portions(all_tokens, 1, others)
    token_parts *= (all_heads + at_once - 1) // at_once
    attend_once = some if 0 < all_queries < 4 * count and p.queries <= QUERIES else all_heads
    others = (count + splits - 1) // splits if attend_once == some else count
    queries, query_parts = portions(all_queries, 1, others)
    query_parts *= (all_heads + attend_once - 1) // attend_once
    # What makes bytes of a block's context makes them for each portion of its output.
    of_block = max(count // max(all_queries, 1), 1)
    features = round_up((p.out_width + of_block - 1) // of_block, WIDTH)
    output_parts = all_queries * ((p.out_width + features - 1) // features)
    for batch in range(alone, p.batch):
        if p.is_kept == 0:
            parallel_for(task_queue, splits, project_part, p, a, memory, memory, batch, True, some, np.int64(1))
        if all_tokens > 0:
            parallel_for(task_queue, token_parts, project_part, p, a, memory, memory, batch, False, at_once, tokens)
        parallel_for(task_queue, query_parts, attend_part, p, a, memory, memory, batch, attend_once, queries)
        if attend_once < all_heads and p.has_out != 0:
            parallel_for(task_queue, output_parts, project_output, p, a, memory, batch, features)
