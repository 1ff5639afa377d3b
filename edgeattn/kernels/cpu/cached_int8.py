"""A static int8 layer with a cache: new tokens go into it, and what it holds to where the layer's own kernel reads.

Letters as in fused_int8.  A cache keeps codes as they are, keys (B, H, C, D) and values (B, H, C, Dv), C its capacity.
Attention itself is that of a layer without a cache, whose keys and values are the S tokens from slot `first_slot` on;
the codes of the `new_tokens` last of these are computed first.
"""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from . import fused_int8 as f
from .int8_operands import zero_bytes
from .int8_views import Groups, Part, parts_of
from .matmul import feature_position, round_up
from .portions import portions
from .records import located, named
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
)
from .static_layout import layout_of, place_values, value_room
from .step_int8 import step_part
from .token_codes import Linear, key_terms, project_codes


@inline
def append_codes(codes, row, tokens, size, padded, p, cache):
    """Codes that `project_codes` left, rows so many bytes apart, to the heads' rows of a cache from cache.at on."""
    for h in range(p.heads):
        for t in range(tokens):
            at, to = 4 * p.at_row_major + t * row + h * padded, cache.at + (h * p.capacity + t) * size
            for d in range(size):
                cache.data[to + d] = codes[at + d]


@task
def append_part(p, a, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's new tokens, projected, to the cache; a.keys and a.values are theirs."""
    _, own = parts_of(scratch, p, worker)
    D, Dv, Ek, Ev = p.head_size, p.value_size, p.key_width, p.value_width
    slot = batch * p.heads * p.capacity + p.first_slot + p.keys - p.new_tokens
    xk, xv = pointer_to(a.keys, np.int8), pointer_to(a.values, np.int8)
    keys, values = pointer_to(a.cached_keys, np.int8), pointer_to(a.cached_values, np.int8)
    k_linear, v_linear = Linear(p.wk, p.bk, p.mk, p.yk, p.tk), Linear(p.wv, p.bv, p.mv, p.zv, 0)
    matrix_configure(own.int32, p.at_tiles)
    end = min((part + 1) * portion, p.new_tokens)
    for t in range(part * portion, end, WIDTH):
        tokens, row = min(WIDTH, end - t), batch * p.new_tokens + t
        k_row = project_codes(p, a, Part(xk, row * Ek), Ek, tokens, k_linear, p.padded_head, np.int32(0), own)
        append_codes(own.int8, k_row, tokens, D, p.padded_head, p, Part(keys, (slot + t) * D))
        v_row = project_codes(p, a, Part(xv, row * Ev), Ev, tokens, v_linear, p.padded_value, np.int32(0), own)
        append_codes(own.int8, v_row, tokens, Dv, p.padded_value, p, Part(values, (slot + t) * Dv))
    matrix_release()


@inline
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


@inline
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


@inline
def arrange_keys(p, a, h, t0, t1, slot, layout, shared, own):
    """Keys [t0, t1) of a head, from its slot on, and their terms."""
    D, k_block = p.head_size, layout.k_block
    at_k = feature_position(h * p.padded_head, k_block, layout.k_step) + t0 * k_block
    copy_rows(a.cached_keys + (slot + t0) * D, D, t1 - t0, address_of(shared.int32) + at_k, k_block)
    key_terms(Groups(shared.int32, at_k // 4, k_block // 4, 1), round_up(t1 - t0, ROWS), p.padded_head // 4,
                zero_bytes(np.int32(p.zq)), Part(shared.int32, p.at_krow + h * layout.keys + t0),
                Part(own.int32, p.at_row_major))


@inline
def arrange_values(p, a, h, t0, t1, slot, layout, shared, own):
    """Values [t0, t1) of a head, from its slot on, four tokens to an element."""
    Dv, S, values = p.value_size, p.keys, pointer_to(a.cached_values, np.uint8)
    for t in range(t0, t1, 4 * LANES):
        for d in range(0, Dv, LANES):
            room = value_room(h, d, t, p, layout, shared.int32, own.int32)
            for i in range(t, min(t + 4 * LANES, t1), 4):
                at0, last = (slot + i) * Dv + d, (slot + S - 1) * Dv + d
                join_tokens(values, at0, min(at0 + Dv, last), min(at0 + 2 * Dv, last), min(at0 + 3 * Dv, last),
                            min(LANES, Dv - d), room.data, room.at + (i - t) // 4 * room.step)
            place_values(room, h, d, t, p, layout, shared.int32)


@task
def arrange_part(p, a, scratch, batch, portion, worker, part):
    """`portion` of one batch entry's tokens from the cache to shared scratch, as `project_part` leaves them.

    Features that only fill up a head, and tokens that only fill up a tile, are whatever lies there: the former meet
    zeros, the latter are dropped.
    """
    shared, own = parts_of(scratch, p, worker)
    layout = layout_of(p)
    t0, t1 = part * portion, min((part + 1) * portion, p.keys)
    for h in range(p.heads):
        slot = (batch * p.heads + h) * p.capacity + p.first_slot
        arrange_keys(p, a, h, t0, t1, slot, layout, shared, own)
        arrange_values(p, a, h, t0, t1, slot, layout, shared, own)


@jit
def cached_int8(parameters, addresses, scratch, task_queue, count):
    """A static layer with a cache on at most `count` threads that serve the task_queue; what `layer_int8` says, but:

    keys (B, new_tokens, Ek), values (B, new_tokens, Ev)
    """
    p, a, memory = named(parameters, f.LAYER), located(addresses, f.ADDRESSES), address_of(scratch)
    some, append_parts = portions(p.new_tokens, WIDTH, count)
    tokens, token_parts = portions(p.keys, f.TOKENS_TOGETHER, count)
    blocks, block_parts = portions((p.queries + WIDTH - 1) // WIDTH, 1, count)
    for batch in range(p.batch):
        parallel_for(task_queue, append_parts, append_part, p, a, memory, batch, some)
        if p.queries == 1 and a.keep == 0 and a.lut_index == 0 and p.band == 0:
            parallel_for(task_queue, 1, step_part, p, a, memory, batch)
            continue
        parallel_for(task_queue, token_parts, arrange_part, p, a, memory, batch, tokens)
        parallel_for(task_queue, block_parts, f.attend_part, p, a, memory, batch, blocks)
