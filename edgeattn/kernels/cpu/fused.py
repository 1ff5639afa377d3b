"""A float32 attention layer, whole: projections, attention, output; see `attend_lanes` for the letters.

Projections have tokens as rows of tiles, attention has queries as lanes, or, where they are few, as rows.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .attend_lanes import AT_MAXIMUM, AT_TILE, all_small, attend, largest_magnitudes
from .attend_rows import FEW_QUERIES, attend_rows
from .matmul import feature_position
from .portions import entries_alone, heads_at_once, own_memory, portions
from .positions import POSITIONS, place_keys, place_queries, transpose
from .records import MASK_ADDRESSES, MASKS, located, named, record
from .row_products import CHAIN, NO_BIAS, Weights, product_rows
from .score_masks import adds_to_scores, fill_mask, fill_mask_rows, mask_row, masks_differ, visible_range
from .simd import LANES, ROWS, WIDTH, address_of, pointer_to, splat, store, transpose_block
from .views import Blocks, Group, Rows, ScoreMask, Visible

_ZERO = np.float32(0)


# The parameters of `layer_float32`: sizes; where each weight and bias begins; masks; heads that go by at a time; where
# things begin in the scratch of all threads, which keys are the first of, and in that of each; of keys and values that
# are kept from call to call, the size of a group's, and whether they are there.
LAYER = record("batch queries keys query_width key_width value_width out_width heads kv_heads",
               "head_size value_size padded_head padded_value has_out out_chain",
               "wq bq wk bk wv bv wo bo", MASKS, POSITIONS, "group unit at_values",
               "at_largest at_rows at_q at_head at_context at_few at_edge at_masks at_entry",
               "shared_size private_size kept_size is_kept")
# Where the arrays of a call of a layer are: queries (B, L, Eq), keys (B, S, Ek), values (B, S, Ev), out (B, L, Eo),
# masks, or 0 of none, keys and values that are kept, or 0 of none, what `FloatLayer` packed, and the table of a
# rotation; all in C order.
LAYER_ADDRESSES = record("queries keys values out", MASK_ADDRESSES, "kept weights table")
QUERIES = 128  # projected at a time; a multiple of WIDTH
LARGEST_ENTRY = 1 << 18  # elements of keys and values up to which a thread does a batch entry alone


@inline
def project(x, tokens, weights, at_weight, at_bias, features, out):
    """out = x @ weight.T + bias; x: Rows, as long as they are apart; out: Blocks."""
    panels = Weights(weights, at_weight, x.step * WIDTH, x.step, CHAIN, at_bias)
    separately(product_rows, (False, x, tokens, panels, features, out))


@inline
def project_context(p, a, group, context, first_query, tokens, e_from, e_to, private):
    """Features e_from to e_to of the output of some tokens = or += the context of the group's heads @ weight.T.

    The bias comes last.  context: Rows of the heads' features.
    """
    weights, out, Eo = pointer_to(a.weights, np.float32), pointer_to(a.out, np.float32), p.out_width
    repeats = p.heads // p.kv_heads
    panel, depth = p.heads * p.padded_value * WIDTH, group.count * repeats * p.padded_value
    first, last = group.first == 0, group.first + group.count == p.kv_heads
    at_panels = p.wo + group.first * repeats * p.padded_value * WIDTH
    to, whole = (group.batch * p.queries + first_query) * Eo, min(e_to, Eo // WIDTH * WIDTH)
    at_bias = p.bo + e_from if last else np.int64(NO_BIAS)
    panels = Weights(weights, at_panels + e_from // WIDTH * panel, panel, depth, p.out_chain, at_bias)
    separately(product_rows, (not first, context, tokens, panels, whole - e_from, Blocks(out, to + e_from, Eo, 0)))
    if whole < e_to:  # features that fill no panel wait beside
        for t in range(tokens):
            for e in range(e_to - whole):
                private[p.at_edge + t * WIDTH + e] = _ZERO if first else out[to + t * Eo + whole + e]
        at_bias = p.bo + whole if last else np.int64(NO_BIAS)
        panels = Weights(weights, at_panels + whole // WIDTH * panel, panel, depth, p.out_chain, at_bias)
        separately(product_rows, (not first, context, tokens, panels, WIDTH, Blocks(private, p.at_edge, WIDTH, 0)))
        for t in range(tokens):
            for e in range(e_to - whole):
                out[to + t * Eo + whole + e] = private[p.at_edge + t * WIDTH + e]


@inline
def private_scratch(p, scratch, worker):
    """What a thread has to itself of the scratch at an address."""
    return pointer_to(scratch + 4 * (p.shared_size + worker * p.private_size), np.float32)


@inline
def keys_and_values(p, at_keys):
    """Where all threads have the keys (KF / KB, S', KB) and the values (VF / VB, S', VB) of a group: Blocks.

    S' = S rounded up to ROWS.
    """
    shared, S_up = pointer_to(at_keys, np.float32), (p.keys + ROWS - 1) // ROWS * ROWS
    k_block, v_block = max(p.padded_head, LANES), max(p.padded_value, LANES)
    return Blocks(shared, 0, k_block, S_up * k_block), Blocks(shared, p.at_values, v_block, S_up * v_block)


@inline
def whole_panels(features):
    """`features`, or so many more that they fill whole panels."""
    return (features + WIDTH - 1) // WIDTH * WIDTH


@inline
def project_heads(x, tokens, weights, at_weight, at_bias, heads, size, out, from_head, begin):
    """Keys or values of some tokens from `begin` on, for some heads from `from_head` on of the Blocks `out`."""
    at = out.at + begin * out.block + feature_position(from_head * size, out.block, out.step)
    project(x, tokens, weights, at_weight, at_bias, whole_panels(heads * size),
            Blocks(out.data, at, out.block, out.step))


@inline
def place_key_heads(p, a, heads, keys, from_kv, begin, tokens, private):
    """Norm and rotate the keys of some heads from `from_kv` on, of some tokens from `begin` on, where they are."""
    weights, table = pointer_to(a.weights, np.float32), pointer_to(a.table, np.float32)
    for h in range(from_kv, from_kv + heads):
        at_head = keys.at + feature_position(h * p.padded_head, keys.block, keys.step)
        for t in range(begin, begin + tokens, WIDTH):
            some, at = min(WIDTH, begin + tokens - t), at_head + t * keys.block
            transpose(keys.data, at, keys.block, some, p.head_size, private, p.at_q, WIDTH)
            place_keys(private, p.at_q, p, weights, table, t, AT_MAXIMUM)
            transpose(private, p.at_q, WIDTH, p.head_size, some, keys.data, at, keys.block)


@task
def project_keys(p, a, scratch, group, portion, worker, part):
    """Stage 1 of a layer: keys and values of `portion` tokens, for `at_once` heads of the group.

    `part` counts the portions, and in each of them the heads.
    """
    keys, values = keys_and_values(p, group.at_keys)
    private, weights = private_scratch(p, scratch, worker), pointer_to(a.weights, np.float32)
    begin, from_kv = part // group.splits * portion, part % group.splits * group.at_once
    heads, tokens = min(group.at_once, group.count - from_kv), min(portion, p.keys - begin)
    row, head = group.batch * p.keys + begin, group.first + from_kv
    k_from, v_from = head * p.padded_head, head * p.padded_value
    x = Rows(pointer_to(a.keys, np.float32), row * p.key_width, p.key_width)
    project_heads(x, tokens, weights, p.wk + k_from * x.step, p.bk + k_from, heads, p.padded_head, keys, from_kv, begin)
    if p.k_norm != 0 or p.pairs > 0:
        place_key_heads(p, a, heads, keys, from_kv, begin, tokens, private)
    x = Rows(pointer_to(a.values, np.float32), row * p.value_width, p.value_width)
    project_heads(x, tokens, weights, p.wv + v_from * x.step, p.bv + v_from, heads, p.padded_value, values, from_kv,
                  begin)


@inline
def project_queries(p, a, group, head, heads, first_query, tokens, private):
    """Rows of the queries of some tokens, for some heads; they have room for a vector more, and whole blocks of W."""
    features, from_feature = whole_panels(heads * p.padded_head), head * p.padded_head
    x = Rows(pointer_to(a.queries, np.float32), (group.batch * p.queries + first_query) * p.query_width, p.query_width)
    project(x, tokens, pointer_to(a.weights, np.float32), p.wq + from_feature * x.step, p.bq + from_feature, features,
            Blocks(private, p.at_rows, features + WIDTH, 0))
    return Rows(private, p.at_rows, features + WIDTH)


@inline
def turn_head(q, size, queries, out, at):
    """W queries of a head, Rows, turned so that they are lanes, (size, W) from out[at] on; zeros for those missing."""
    for l in range(queries, WIDTH):
        for d in range(0, size, LANES):
            store(q.data, q.at + l * q.step + d, splat(_ZERO))
    for d in range(0, size, LANES):
        for l in range(0, WIDTH, LANES):
            transpose_block(q.data, q.at + l * q.step + d, q.step, out, at + d * WIDTH + l, WIDTH)


@inline
def attend_heads(p, a, group, from_kv, heads, q, q0, queries, context, private):
    """Rows of context of a block of queries, Rows, head by head; from_kv: the first head's in the group."""
    keys, values = keys_and_values(p, group.at_keys)
    repeats, Dp, Dvp, band = p.heads // p.kv_heads, p.padded_head, p.padded_value, p.band != 0
    adds, few, placed = adds_to_scores(a), p.queries <= FEW_QUERIES, p.q_norm != 0 or p.pairs > 0
    masked, mask_per_head = adds or a.keep != 0, masks_differ(p, a)
    first, last, full_from, full_to = visible_range(q0, queries, p.keys, band, p.low, p.high)
    seen = Visible(first, last, full_from, full_to, q0, band, p.low, p.high)
    mask, has_mask = ScoreMask(private, p.at_masks, first, masked), False
    for h in range(heads):
        head, kv = (group.first + from_kv) * repeats + h, from_kv + h // repeats
        of_head = Rows(private, q.at + h * Dp, q.step)
        to = Rows(context.data, context.at + h * Dvp, context.step)
        k = Rows(keys.data, feature_position(kv * Dp, keys.block, keys.step), keys.block)
        v = Rows(values.data, values.at + feature_position(kv * Dvp, values.block, values.step), values.block)
        if placed or not few:
            turn_head(of_head, Dp, queries, private, p.at_q)
        if placed:
            place_queries(private, p.at_q, p, pointer_to(a.weights, np.float32), pointer_to(a.table, np.float32), q0,
                          AT_MAXIMUM)
        if few:
            if placed:
                transpose(private, p.at_q, WIDTH, p.head_size, queries, private, of_head.at, q.step)
            if masked and (mask_per_head or not has_mask):
                fill_mask_rows(p, a, group.batch, head, q0, queries, first, last, private, p.at_masks)
                has_mask = True
            if attend_rows(of_head, queries, k, v, to, p.head_size, Dvp, seen, mask, mask_row(p.keys), _ZERO,
                           pointer_to(address_of(private) + 4 * p.at_few, np.float32)):
                continue
            has_mask = False
            if not placed:
                turn_head(of_head, Dp, queries, private, p.at_q)
        if masked and (mask_per_head or not has_mask):
            fill_mask(p, a, group.batch, head, q0, queries, first, last, private, p.at_masks, AT_TILE)
            has_mask = not few
        lanes = Rows(private, p.at_q, WIDTH)
        small = not (few or adds) and all_small(lanes, p.head_size, private, p.at_largest + kv * Dp)
        attend(lanes, k, v, Rows(private, p.at_head, WIDTH), p.head_size, Dvp, seen, mask, _ZERO, small, private)
        for d in range(0, Dvp, LANES):
            for l in range(0, WIDTH, LANES):
                transpose_block(private, p.at_head + d * WIDTH + l, WIDTH, to.data, to.at + l * to.step + d, to.step)


@inline
def copy_context(p, a, group, context, head, heads, first_query, tokens):
    """The output of some heads of a layer without a projection: its context."""
    out, at_row = pointer_to(a.out, np.float32), (group.batch * p.queries + first_query) * p.out_width
    for t in range(tokens):
        for h in range(heads):
            for d in range(p.value_size):
                out[at_row + t * p.out_width + (head + h) * p.value_size + d] = (
                    context.data[context.at + t * context.step + h * p.padded_value + d])


@inline
def context_rows(p, scratch, group, private):
    """Rows of a group's context, with room for a vector more; the first thread's, where all write heads."""
    own = private if group.splits == 1 else private_scratch(p, scratch, 0)
    return Rows(own, p.at_context, group.count * (p.heads // p.kv_heads) * p.padded_value + WIDTH)


@task
def attend_queries(p, a, scratch, group, portion, worker, part):
    """Stage 2 of a layer: `portion` blocks of queries, for `at_once` heads of the group; and their part of the output.

    `part` counts the portions, and in each of them the heads. The output waits where no part has all heads.
    """
    private, repeats = private_scratch(p, scratch, worker), p.heads // p.kv_heads
    begin, from_kv = part // group.splits * portion, part % group.splits * group.at_once
    kv_heads = min(group.at_once, group.count - from_kv)
    heads, head = kv_heads * repeats, (group.first + from_kv) * repeats
    context = context_rows(p, scratch, group, private)
    if not (adds_to_scores(a) or p.queries <= FEW_QUERIES):
        keys, _ = keys_and_values(p, group.at_keys)
        from_feature = from_kv * p.padded_head
        for f in range(from_feature, from_feature + whole_panels(kv_heads * p.padded_head), keys.block):
            largest_magnitudes(Rows(keys.data, f // keys.block * keys.step, keys.block), p.keys, keys.block, private,
                               p.at_largest + f)
    share = (adds_to_scores(a) or a.keep != 0) and not masks_differ(p, a)  # a mask, in memory, of a block of queries
    to = min((begin + portion) * WIDTH, p.queries)
    for first_query in range(begin * WIDTH, to, QUERIES):
        tokens = min(QUERIES, to - first_query)
        at = context.at + (first_query * context.step if group.splits > 1 else 0)
        of_heads = Rows(context.data, at + from_kv * repeats * p.padded_value, context.step)
        q = project_queries(p, a, group, head, heads, first_query, tokens, private)
        some = kv_heads if share or tokens <= WIDTH else 1  # else a head's keys and values stay near while queries pass
        for kv in range(0, kv_heads, some):
            at_q, at_heads = q.at + kv * repeats * p.padded_head, of_heads.at + kv * repeats * p.padded_value
            for t in range(0, tokens, WIDTH):
                attend_heads(p, a, group, from_kv + kv, some * repeats, Rows(private, at_q + t * q.step, q.step),
                             first_query + t, min(WIDTH, tokens - t),
                             Rows(of_heads.data, at_heads + t * of_heads.step, of_heads.step), private)
        if p.has_out == 0:
            copy_context(p, a, group, of_heads, head, heads, first_query, tokens)
        elif group.splits == 1:
            project_context(p, a, group, context, first_query, tokens, 0, p.out_width, private)


@task
def finish_features(p, a, scratch, group, portion, worker, part):
    """Stage 3 of a layer, where no part of stage 2 had all heads of the group: `portion` features of the output."""
    private = private_scratch(p, scratch, worker)
    project_context(p, a, group, context_rows(p, scratch, group, private), 0, p.queries, part * portion,
                    min((part + 1) * portion, p.out_width), private)


@inline
def group_of(p, a, batch, first, at_once, memory):
    """The Group of heads from `first` on, whose keys are in `memory`, an address, or kept."""
    heads, groups = min(p.group, p.kv_heads - first), (p.kv_heads + p.group - 1) // p.group
    at_keys = a.kept + 4 * p.kept_size * (batch * groups + first // p.group) if a.kept != 0 else memory
    return Group(batch, first, heads, at_once, (heads + at_once - 1) // at_once, at_keys)


@task
def attend_entries(p, a, scratch, portion, alone, worker, part):
    """All stages of a layer for `portion` of the batch entries that threads do alone."""
    for batch in range(part * portion, min((part + 1) * portion, alone)):
        for first in range(0, p.kv_heads, p.group):
            group = group_of(p, a, batch, first, p.group, own_memory(p, scratch, worker))
            if p.is_kept == 0:
                separately(project_keys, (p, a, scratch, group, p.keys, worker, np.int64(0)))
            separately(attend_queries, (p, a, scratch, group, (p.queries + WIDTH - 1) // WIDTH, worker, np.int64(0)))


@jit
def layer_float32(parameters, addresses, scratch, task_queue, count):
    """A multi-head attention layer, see LAYER, on at most `count` threads that serve the task_queue.

    As many batch entries as each thread can have alone are done so. For every group of heads of every other one the
    three stages follow each other.
    scratch: first what all threads share, see `keys_and_values`; then what each thread has to itself.
    """
    p, a, memory = named(parameters, LAYER), located(addresses, LAYER_ADDRESSES), address_of(scratch)
    alone, entries, entry_parts = entries_alone(p, count)
    if alone > 0:
        parallel_for(task_queue, entry_parts, attend_entries, p, a, memory, entries, alone)
    # Of few queries threads take some heads each, but not heads narrower than a vector: its last lanes are the next
    # head's, which may be another thread's.
    splits_heads = p.queries <= QUERIES and p.padded_value % LANES == 0
    at_once = heads_at_once(p.group, p.unit, count) if splits_heads else p.group
    splits = (p.group + at_once - 1) // at_once
    others = (count + splits - 1) // splits
    tokens, token_parts = portions(p.keys, ROWS, others)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, others)
    features, feature_parts = portions(p.out_width, WIDTH, count)
    for batch in range(alone, p.batch):
        for first in range(0, p.kv_heads, p.group):
            group = group_of(p, a, batch, first, at_once, memory)
            if p.is_kept == 0:
                parallel_for(task_queue, token_parts * group.splits, project_keys, p, a, memory, group, tokens)
            parallel_for(task_queue, block_parts * group.splits, attend_queries, p, a, memory, group, blocks)
            if group.splits > 1 and p.has_out != 0 and p.queries > 0:
                parallel_for(task_queue, feature_parts, finish_features, p, a, memory, group, features)
