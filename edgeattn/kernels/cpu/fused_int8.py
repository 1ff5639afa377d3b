"""Fused static int8 attention: one block of queries at a time, queries in lanes, four bytes to a lane.

Letters: B batch, H heads, L queries, S keys, D head size, Dv value size, E model width; W = WIDTH queries per block.
Sizes with a 4 count groups of four bytes.  `FLIP` turns a code into the unsigned operand of a dot product.

The arithmetic is exact: whatever instruction set runs it, the bits are those of the named TFLite kernel set.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .byte_products import DEPTH_STEP, linear, linear_ahead
from .code_masks import Seen, drop_codes, fill_drop_mask, map_codes
from .finish_int8 import finish_bytes, finish_context, finish_output, finish_scores
from .int8_operands import (
    BYTE_FLIP,
    FLIP,
    ONES,
    add_feature_terms,
    store_value_terms,
    whole_sums,
    zero_bytes,
)
from .int8_views import BytePanels, Groups, Mask, Part, Scaling, parts_of
from .matmul import feature_position, round_up
from .one_row import linear_of_row, linear_of_tokens
from .portions import portions
from .records import BAND, KEEP, located, named, record
from .requantize import bounded_codes, requantize
from .score_masks import visible_range
from .simd import (
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    address_of,
    broadcast,
    dot_bytes,
    first_lane,
    load,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
    store_bytes,
    transpose_block,
)
from .softmax_int8 import softmax
from .static_layout import FEATURES_TOGETHER, context_rows, layout_of, project_values, values_of
from .token_codes import Linear, key_terms, pack_tokens, packed_depth, project_codes, scale_codes
from .views import Blocks

_NONE = np.int32(0)
TOKENS = 128  # tokens packed and projected at a time: each pass over the weights serves so many
TOKENS_TOGETHER = 64  # what threads share keys by: values are turned LANES groups of four tokens at a time
# The parameters: sizes; where panels, biases and multipliers begin in the weights; where tables do, of what products
# read of queries and keys, or 0 of none, and zero points of the codes that they are of; zero points; numbers of rules,
# see softmax_int8 and requantize; what each call with a cache has of its own, see cached_int8, masks among it; where
# things begin in the scratch of all threads, which keys are the first of, and in that of each, the last of them of a
# step.
LAYER = record("batch queries query_width key_width value_width out_width heads",
               "head_size value_size padded_head padded_value has_out same_kv",
               "wq bq mq wk bk mk wv bv mv wo bo mo ms mc", "tq tk yq yk", "zq zk zv zs zc zo",
               "softmax_rule project_rule score_rule context_rule",
               "keys first_slot new_tokens capacity", BAND, KEEP,
               "index_b index_h index_l index_s", "at_krow at_values",
               "at_x at_row_major at_q at_codes at_masks at_sums at_context at_softmax at_terms at_tiles",
               "at_transposed shared_size private_size at_step")
# Where the arrays of a call are: queries (B, L, Eq), keys (B, S, Ek), values (B, S, Ev), out (B, L, Eo), int8; or 0 of
# none: keep and padding, as in records.py; codes of a cache, see cached_int8; lut_index, uint8, which of score_luts,
# int8 (n, 256), maps a score's code; weights, int32, as the parameters say, and the softmax's table; in C order.
ADDRESSES = record("queries keys values out keep padding cached_keys cached_values",
                   "lut_index score_luts weights softmax")


@task
def project_part(p, a, scratch, batch, portion, worker, part):
    """Keys, values and key terms of `portion` tokens of one batch entry, in the layout that `attend_part` reads.

    scratch: int32, first those of this batch entry for all threads, then what each has to itself.
    """
    shared, own = parts_of(scratch, p, worker)
    layout, weights = layout_of(p), pointer_to(a.weights, np.int32)
    xk, xv = pointer_to(a.keys, np.int8), pointer_to(a.values, np.int8)
    S, Ek, Ev, Ek4, Ev4 = p.keys, p.key_width, p.value_width, packed_depth(p.key_width), packed_depth(p.value_width)
    features, v_features = round_up(p.heads * p.padded_head, WIDTH), round_up(p.heads * p.padded_value, WIDTH)
    k_row, q_zero = layout.k_block // 4, zero_bytes(np.int32(p.zq))
    k_scaling = Scaling(weights, p.project_rule, p.mk, features, np.int32(p.yk))
    v_scaling = Scaling(weights, p.project_rule, p.mv, v_features, np.int32(p.zv))
    k_panels = BytePanels(weights, p.wk, weights, p.bk, features, Ek4)
    v_panels = BytePanels(weights, p.wv, weights, p.bv, v_features, Ev4)
    packed, tiles, square = Part(own.int32, p.at_x), Part(own.int32, p.at_tiles), Part(own.int32, p.at_row_major)
    matrix_configure(own.int32, p.at_tiles)
    end = min((part + 1) * portion, S)
    for t in range(part * portion, end, TOKENS):
        tokens = min(TOKENS, end - t)
        rows = round_up(tokens, ROWS)
        pack_tokens(Part(xk, (batch * S + t) * Ek), Ek, tokens, rows, packed, Ek4)
        to = Blocks(shared.int8, t * layout.k_block, layout.k_block, layout.k_step)
        linear_of_tokens(finish_bytes, (k_scaling, _NONE, to), Groups(own.uint32, p.at_x, Ek4, 1), tokens, k_panels,
                         tiles)
        if p.tk != 0:
            for d in range(0, features, layout.k_block):  # tokens that only fill up a vector have room, and are any
                at = feature_position(d, layout.k_block, layout.k_step) // 4 + t * k_row
                scale_codes(Part(shared.int32, at), round_up(tokens, LANES) * k_row, weights, p.tk, _NONE)
        if p.same_kv == 0:
            pack_tokens(Part(xv, (batch * S + t) * Ev), Ev, tokens, rows, packed, Ev4)
        project_values(Groups(own.uint32, p.at_x, Ev4, 1), tokens, v_panels, v_scaling, t, p, layout, shared, own)
        for h in range(p.heads):
            at = feature_position(h * p.padded_head, layout.k_block, layout.k_step) // 4 + t * k_row
            key_terms(Groups(shared.int32, at, k_row, 1), rows, p.padded_head // 4, q_zero,
                      Part(shared.int32, p.at_krow + h * layout.keys + t), square)
    matrix_release()


@inline
def project_queries(p, a, batch, q0, queries, own):
    """Queries of a block, turned so that they are lanes: (H, groups of a head's features, W); others have any codes."""
    x = Part(pointer_to(a.queries, np.int8), (batch * p.queries + q0) * p.query_width)
    row = project_codes(p, a, x, p.query_width, queries, Linear(p.wq, p.bq, p.mq, p.yq, p.tq), p.padded_head, FLIP,
                        own) // 4
    D4, q_groups = p.padded_head // 4, round_up(p.padded_head // 4, DEPTH_STEP)
    turns, turn = (1, row) if q_groups == D4 else (p.heads, q_groups)
    for h in range(turns):
        for f in range(0, turn, LANES):
            for l in range(0, queries, LANES):
                transpose_block(own.int32, p.at_row_major + l * row + h * D4 + f, row,
                                own.int32, p.at_q + (h * turn + f) * WIDTH + l, WIDTH)
        for i in range(D4 * WIDTH, q_groups * WIDTH, LANES):  # depth that only fills up the matrix unit: nothing
            store(own.int32, p.at_q + h * turn * WIDTH + i, splat(_NONE))


@inline
def score_head(p, a, h, first, keys, layout, shared, own):
    """Scores of `keys` keys from `first` on, up to a multiple of ROWS: codes of four keys to a lane."""
    D4, Dp, zq, zk = p.padded_head // 4, p.padded_head, np.int32(p.zq), np.int32(p.zk)
    q_groups, at_sums, k_row = round_up(D4, DEPTH_STEP), p.at_sums, layout.k_block // 4
    at_q = p.at_q + h * q_groups * WIDTH
    at_k = feature_position(h * Dp, layout.k_block, layout.k_step) // 4
    # a. what a key zero point adds to every score of a query
    for c in range(0, WIDTH, LANES):
        term = splat(_NONE)
        if zk != 0:
            for d in range(D4):
                term = dot_bytes(term, load(own.int32, at_q + d * WIDTH + c), splat(ONES))
            term = (term - splat(np.int32((OFFSET + zq) * Dp))) * splat(np.int32(-zk))
        store(own.int32, at_sums + c, term)
    # b. scores
    scaling = Scaling(pointer_to(a.weights, np.int32), p.score_rule, p.ms, LANES, np.int32(p.zs))
    terms = Part(shared.int32, p.at_krow + h * layout.keys + first)
    linear(finish_scores, (scaling, terms, Part(own.int32, p.at_codes)),
           Groups(shared.int32, at_k + first * k_row, k_row, 1), round_up(keys, ROWS),
           BytePanels(own.uint32, at_q, own.int32, at_sums, WIDTH, q_groups), Part(own.int32, p.at_tiles))


@inline
def context_head(p, a, h, first, groups, layout, shared, own):
    """Probabilities times values from the key `first` on: unsigned operands (Dv / 4, W) of the head's context."""
    at_codes, at_sums, zv = p.at_codes, p.at_sums, np.int32(p.zv)
    # a. what a value zero point adds to every feature of a query
    for c in range(0, WIDTH, LANES):
        term = splat(_NONE)
        if zv != 0:
            for g in range(groups):
                term = dot_bytes(term, load(own.int32, at_codes + g * WIDTH + c), splat(ONES))
            term = whole_sums(term, groups) * splat(np.int32(-zv))
        store(own.int32, at_sums + c, term)
    # b. context
    deep = round_up(groups, DEPTH_STEP)
    for i in range(groups * WIDTH, deep * WIDTH, LANES):
        store(own.int32, at_codes + i, splat(_NONE))
    v, terms = values_of(h, first, p, layout, shared), Part(own.int32, p.at_terms)
    store_value_terms(Part(v.data, v.at), v.step, groups, p.padded_value, terms)
    scaling = Scaling(pointer_to(a.weights, np.int32), p.context_rule, p.mc, LANES, np.int32(p.zc))
    to = Part(own.int32, p.at_context + h * p.padded_value // 4 * WIDTH)
    linear(finish_context, (scaling, terms, to), v, p.padded_value,
           BytePanels(own.uint32, at_codes, own.int32, at_sums, WIDTH, deep), Part(own.int32, p.at_tiles))


@inline
def context_of_one(p, a, h, first, groups, layout, shared, own):
    """The same of a block's one query, with features in lanes: unsigned operands of all heads, one after the other."""
    at_codes, zv, weights = p.at_codes, np.int32(p.zv), pointer_to(a.weights, np.int32)
    term = splat(_NONE)
    if zv != 0:
        for g in range(groups):
            term = dot_bytes(term, load(own.int32, at_codes + g * WIDTH), splat(ONES))
        term = whole_sums(term, groups) * splat(np.int32(-zv))
    from_zero = first_lane(term)
    v = values_of(h, first, p, layout, shared)
    store_value_terms(Part(v.data, v.at), v.step, groups, p.padded_value, Part(own.int32, p.at_terms))
    for d in range(0, p.padded_value, LANES):  # past its last feature lies what the next head replaces
        sums = add_feature_terms(splat(from_zero), own.int32, p.at_terms + d)
        for g in range(groups):
            sums = dot_bytes(sums, broadcast(own.int32, at_codes + g * WIDTH), load(v.data, v.at + g * v.step + d))
        codes = bounded_codes(requantize(sums, p.context_rule, weights, p.mc, LANES), np.int32(p.zc))
        store_bytes(own.int8, 4 * p.at_context + h * p.padded_value + d, codes ^ splat(np.int32(BYTE_FLIP)))


@inline
def write_rows(p, a, at_row, queries, alone, own):
    """A block's rows of the result, from at_row on: projection of the context, or the context itself.

    alone: whether the context is that of `context_of_one`.
    """
    H, Dv, Dvp, Eo = p.heads, p.value_size, p.padded_value, p.out_width
    out = pointer_to(a.out, np.int8)
    if p.has_out == 0:
        group = 1 if alone else WIDTH
        for h in range(H):
            for d in range(Dv):
                for l in range(queries):
                    byte = (p.at_context + (h * Dvp + d) // 4 * group + l) * 4 + d % 4
                    out[at_row + l * Eo + h * Dv + d] = own.int8[byte] ^ BYTE_FLIP
    elif alone:
        project_output_of_one(p, a, at_row, own)
    else:
        scaling, panels = output_parts(p, a)
        to = Groups(out, at_row, Eo, 1)
        linear_ahead(finish_output, (scaling, to, queries, Part(own.int8, 4 * p.at_x)),
                     context_rows(p, packed_depth(H * Dvp), own), queries, panels, Part(own.int32, p.at_tiles))


@inline
def output_parts(p, a):
    """Scaling and panels of the output projection."""
    weights, features = pointer_to(a.weights, np.int32), round_up(p.out_width, WIDTH)
    panels = BytePanels(weights, p.wo, weights, p.bo, features, packed_depth(p.heads * p.padded_value))
    return Scaling(weights, p.project_rule, p.mo, features, np.int32(p.zo)), panels


@inline
def project_output_of_one(p, a, at_row, own):
    """Output projection of one query's context, unsigned operands side by side, to a row from at_row on."""
    scaling, panels = output_parts(p, a)
    to = Groups(pointer_to(a.out, np.int8), at_row, p.out_width, 1)
    linear_of_row(finish_output, (scaling, to, 1, Part(own.int8, 4 * p.at_x)),
                  Groups(own.uint32, p.at_context, panels.depth4, 1), panels)


@task
def attend_part(p, a, scratch, batch, portion, worker, part):
    """`portion` blocks of W queries of one batch entry: attention, head by head, and the output projection."""
    shared, own = parts_of(scratch, p, worker)
    layout, L, S, H = layout_of(p), p.queries, p.keys, p.heads
    keep = Mask(a.keep != 0, pointer_to(a.keep, np.uint8), batch * p.keep_b, p.keep_h, p.keep_l, p.keep_s)
    padding = Mask(a.padding != 0, pointer_to(a.padding, np.uint8), batch * p.padding_b, 0, 0, 1)
    index = Mask(a.lut_index != 0, pointer_to(a.lut_index, np.uint8), batch * p.index_b, p.index_h, p.index_l,
                 p.index_s)
    codes, masks = Part(own.int32, p.at_codes), Part(own.int32, p.at_masks)
    band, has_keep = p.band != 0, keep.given
    matrix_configure(own.int32, p.at_tiles)
    for block in range(part * portion, min((part + 1) * portion, (L + WIDTH - 1) // WIDTH)):
        q0 = block * WIDTH
        queries = min(WIDTH, L - q0)
        project_queries(p, a, batch, q0, queries, own)
        first, last, _, _ = visible_range(q0, queries, S, band, p.low, p.high)
        first = first // ROWS * ROWS
        last_up = round_up(last, 4)
        groups = (last_up - first) // 4
        seen = Seen(q0, queries, first, last, groups, band, p.low, p.high)
        masked = band or has_keep or last_up > last
        alone = FEATURES_TOGETHER and queries == 1
        for h in range(H):
            score_head(p, a, h, first, last_up - first, layout, shared, own)
            if a.score_luts != 0 and last > first:
                map_codes(codes, pointer_to(a.score_luts, np.int8), index, h, seen)
            if masked:
                if h == 0 or (has_keep and p.keep_h != 0):
                    fill_drop_mask(masks, keep, padding, h, seen)
                drop_codes(codes, masks, groups)
            softmax(a.softmax, p.softmax_rule, codes, groups, masks, masked, Part(own.int32, p.at_softmax),
                          Part(own.int32, p.at_sums + WIDTH))
            if alone:
                context_of_one(p, a, h, first, groups, layout, shared, own)
            else:
                context_head(p, a, h, first, groups, layout, shared, own)
        write_rows(p, a, (batch * L + q0) * p.out_width, queries, alone, own)
    matrix_release()


@jit
def layer_int8(parameters, addresses, scratch, task_queue, count):
    """A static int8 multi-head attention layer, see LAYER, on at most `count` threads that serve the task_queue."""
    p, a, memory = named(parameters, LAYER), located(addresses, ADDRESSES), address_of(scratch)
    tokens, token_parts = portions(p.keys, TOKENS_TOGETHER, count)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p.batch):
        parallel_for(task_queue, token_parts, project_part, p, a, memory, batch, tokens)
        parallel_for(task_queue, block_parts, attend_part, p, a, memory, batch, blocks)
