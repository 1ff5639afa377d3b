"""Fused dynamic int8 layer: float in, float out, every product in bytes, softmax in float32.

Letters as in attend_lanes.py; sizes with a 4 count groups of four bytes.  dynamic_heads.py makes queries, keys and
values of tokens, attend_dynamic.py contexts, which are quantized by the largest magnitude of their H * Dv values.

Softmax does not see what is added to all scores of a query: so the key projection's bias is left out, and from all
keys of a head the mean of the first TOKENS that are seen is subtracted, which leaves the bytes to what tells keys apart
(SageAttention, arXiv 2410.02367, section 4.2, takes the mean of all).
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_dynamic import Keys, Queries, attend_bytes, fill_dither, values_of
from .byte_products import DEPTH_STEP
from .dynamic import (
    TOKENS,
    inverse_of,
    largest_rows,
    pack_rows,
    scale_of,
    turn,
)
from .dynamic_heads import project_block
from .fused import QUERIES
from .int8_operands import FLIP
from .int8_views import Part, Projection, parts_of, scratch_at
from .key_mean import choose_block
from .matmul import round_up
from .one_token import quantize_context
from .portions import entries_alone, heads_at_once, own_memory, portions
from .positions import POSITIONS
from .projection_dynamic import Apart, project_rows
from .records import MASK_ADDRESSES, MASKS, located, named, record
from .score_masks import adds_to_scores, fill_mask, masks_differ, visible_range
from .simd import (
    LANES,
    WIDTH,
    address_of,
    load,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
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


@inline
def is_row(p):
    """Whether the context of a head is a row, of the one query there is, rather than (Dvp, W)."""
    return p.queries == 1 and p.padded_value % LANES == 0


@inline
def context_size(p):
    """Elements of the context of a head."""
    return p.padded_value if is_row(p) else p.padded_value * WIDTH


@inline
def keys_memory(p, a, memory, batch):
    """Where the keys and values of a batch entry are: in `memory`, an address, or kept."""
    return scratch_at(a.kept + 4 * p.kept_size * batch if a.kept != 0 else memory)


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
    values = values_of(kv, Dvp, p, kept)
    attend_bytes(queries, keys, values, Dvp, seen, mask, adds, p, own, p.at_context + h * context_size(p))


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
