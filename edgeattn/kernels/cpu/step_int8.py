"""One token of a static int8 layer against its cache, which is read in place: keys in lanes, then heads in lanes.

Letters as in fused_int8.  Queries less their zero point, and probabilities, are numbers of nine bits, written in two
digits 2 a + c, bytes with a sign, that meet the stored bytes as those of digits.py do.  The rows of scores
become lanes for the softmax, a head to a lane: its sums go in the order of the keys whatever the layout.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, register_jitable
from edgeattn.runtime.worker_pool import task

from .byte_products import DEPTH_STEP, digit_products
from .cache_panels import QUADS, interleaved, key_panels, value_panels
from .code_masks import Seen, map_codes
from .decode_blocks import BLOCK
from .digits import CHUNK
from .fused_int8 import project_output_of_one
from .int8_operands import BYTE_FLIP, FLIP, LANE_SHIFT
from .int8_views import Mask, Part, parts_of
from .matmul import round_up
from .requantize import bounded_codes, requantize
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    address_of,
    join_bytes,
    load,
    matrix_configure,
    matrix_release,
    pointer_to,
    splat,
    store,
)
from .softmax_int8 import LOWEST_CODES, softmax
from .token_codes import Linear, project_codes
from .views import Rows

_SEVEN_BITS, _LOWEST_BITS = np.int32(0x7F7F7F7F), np.int32(0x01010101)


class Buffers(NamedTuple):
    """Scratch of a step, `step_sizes` elements each, as pointers, `copy` an address; and where codes of scores are."""

    digits: object
    panels: object
    copy: int
    sums: object
    context: object
    codes: object


@register_jitable
def step_sizes(D, Dv):
    """32-bit elements of what a step needs beside a plan: digits, panels, copies, sums, and a context."""
    D_up, Dv_up = round_up(D, CHUNK), round_up(Dv, CHUNK)
    deep = round_up(D_up // 4, 16)
    return (MATRIX_ROWS * max(deep, QUADS), max(deep * BLOCK, Dv_up * QUADS), LANES * max(D_up, Dv_up) // 4,
            MATRIX_ROWS * max(BLOCK, Dv_up), Dv_up)


@inline
def buffers_of(p, own):
    """Where in a thread's scratch they are."""
    sizes, base = step_sizes(p.head_size, p.value_size), address_of(own.int32)
    digits = base + 4 * p.at_step
    panels = digits + 4 * sizes[0]
    copy = panels + 4 * sizes[1]
    sums = copy + 4 * sizes[2]
    return Buffers(pointer_to(digits, np.int32), pointer_to(panels, np.uint32), copy, pointer_to(sums, np.int32),
                   pointer_to(sums + 4 * sizes[3], np.int32), pointer_to(base + 4 * p.at_codes, np.int32))


@inline
def write_query(codes, at, size, zero_point, digits, row):
    """Two rows of digits of codes[at : at + size] less their zero point, zeros up to the row's end; their sum."""
    high, low = pointer_to(address_of(digits), np.int8), pointer_to(address_of(digits) + 4 * row, np.int8)
    total = np.int32(0)
    for d in range(4 * row):
        v = np.int32(codes[at + d]) - zero_point if d < size else np.int32(0)
        high[d], low[d] = v >> 1, v & 1
        total += v
    return total


@inline
def write_probabilities(codes, at, count, digits):
    """Two rows (QUADS,) of digits of the probabilities of `count` groups of keys, zeros after them; their sum."""
    total = np.int32(0)
    for g in range(round_up(count, DEPTH_STEP)):
        word = np.int32(0)
        if g < count:
            word = codes[at + g * WIDTH] ^ LOWEST_CODES ^ FLIP
        digits[g], digits[QUADS + g] = (word >> 1) & _SEVEN_BITS, word & _LOWEST_BITS
        for j in range(4):
            total += (word >> (8 * j)) & 255
    return total


@inline
def score_codes(p, a, batch, head, lane, own, buffers):
    """A head's scores of all keys, as codes of four keys to an element, to its lane of the codes (keys / 4, W)."""
    D, S, zq, zs = p.head_size, p.keys, np.int32(p.zq), np.int32(p.zs)
    deep, depth4 = round_up(round_up(D, CHUNK) // 4, 16), round_up(round_up(D, CHUNK) // 4, DEPTH_STEP)
    sums, codes, weights = buffers.sums, buffers.codes, pointer_to(a.weights, np.int32)
    total = write_query(own.int8, 4 * p.at_row_major + head * p.padded_head, D, zq, buffers.digits, deep)
    excess = splat(np.int32(total * (LANE_SHIFT + np.int32(p.zk))))
    k_address = a.cached_keys + ((batch * p.heads + head) * p.capacity + p.first_slot) * D
    for s0 in range(0, S, BLOCK):
        count = min(BLOCK, S - s0)
        key_panels(k_address + s0 * D, D, D, count, S - s0, deep, buffers.panels, buffers.copy)
        digit_products(2, Rows(buffers.digits, 0, deep), Rows(buffers.panels, 0, deep * WIDTH), count, depth4,
                       Rows(sums, 0, BLOCK))
        for s in range(0, count, LANES):
            twice = load(sums, s)
            acc = twice + twice + load(sums, BLOCK + s) - excess
            store(sums, s, bounded_codes(requantize(acc, p.score_rule, weights, p.ms, LANES), zs))
        for s in range(0, count, CHUNK):
            store(sums, s, join_bytes(load(sums, s), load(sums, s + LANES), load(sums, s + 2 * LANES),
                                      load(sums, s + 3 * LANES)))
            for i in range(LANES):  # lane 4 g + i of the four vectors is four lanes of the i-th
                group = (s0 + s) // 4 + i % 4 * (LANES // 4) + i // 4
                codes[group * WIDTH + lane] = sums[s + i]


@inline
def drop_rest(S, codes, masks):
    """Masks (groups, W) of S keys, and the lowest codes where the last group has less than four."""
    groups = (S + 3) // 4
    for i in range(0, groups * WIDTH, LANES):
        store(masks.data, masks.at + i, splat(np.int32(-1)))
    last, there = (groups - 1) * WIDTH, splat(np.int32((1 << 8 * (S % 4)) - 1))
    for c in range(0, WIDTH, LANES):
        absent = splat(LOWEST_CODES) & (there ^ splat(np.int32(-1)))
        store(codes, last + c, (load(codes, last + c) & there) | absent)
        store(masks.data, masks.at + last + c, there)


@inline
def context_codes(p, a, batch, head, lane, own, buffers):
    """A head's context, positions as `interleaved` says, to the row of unsigned operands that the output reads."""
    Dv, S, zv, zc = p.value_size, p.keys, np.int32(p.zv), np.int32(p.zc)
    Dv_up, sums, context, weights = round_up(Dv, CHUNK), buffers.sums, buffers.context, pointer_to(a.weights, np.int32)
    v_address = a.cached_values + ((batch * p.heads + head) * p.capacity + p.first_slot) * Dv
    for d in range(0, Dv_up, LANES):
        store(context, d, splat(np.int32(0)))
    total = np.int32(0)
    for s0 in range(0, S, BLOCK):
        count = min(BLOCK, S - s0)
        total += write_probabilities(buffers.codes, s0 // 4 * WIDTH + lane, (count + 3) // 4, buffers.digits)
        value_panels(v_address + s0 * Dv, Dv, Dv, count, S - s0, buffers.panels, buffers.copy)
        digit_products(2, Rows(buffers.digits, 0, QUADS), Rows(buffers.panels, 0, QUADS * WIDTH), Dv_up,
                       (count + 3) // 4, Rows(sums, 0, Dv_up))
        for d in range(0, Dv_up, LANES):
            twice = load(sums, d)
            store(context, d, load(context, d) + twice + twice + load(sums, Dv_up + d))
    excess = splat(np.int32(total * (LANE_SHIFT + zv)))
    for d in range(0, Dv_up, LANES):
        exact = load(context, d) - excess
        store(context, d, bounded_codes(requantize(exact, p.context_rule, weights, p.mc, LANES), zc))
    for d in range(Dv_up):
        feature = interleaved(d)
        if feature < Dv:
            own.int8[4 * p.at_context + head * p.padded_value + feature] = np.int8(context[d]) ^ BYTE_FLIP


@task
def step_part(p, a, scratch, batch, worker, part):
    """A batch entry's one query against its S keys and values, all of which it sees.

    There is one part, and one table of score_luts.
    """
    _, own = parts_of(scratch, p, worker)
    H, S, Eq, Eo, Dv = p.heads, p.keys, p.query_width, p.out_width, p.value_size
    groups, masked, buffers = (S + 3) // 4, S % 4 != 0, buffers_of(p, own)
    codes, masks = Part(own.int32, p.at_codes), Part(own.int32, p.at_masks)
    index, seen = Mask(False, pointer_to(0, np.uint8), 0, 0, 0, 0), Seen(0, WIDTH, 0, S, groups, False, 0, 0)
    matrix_configure(own.int32, p.at_tiles)
    # 1. the query of all heads
    query = Linear(p.wq, p.bq, p.mq, p.yq, p.tq)
    project_codes(p, a, Part(pointer_to(a.queries, np.int8), batch * Eq), Eq, 1, query, p.padded_head, np.int32(0), own)
    for h0 in range(0, H, WIDTH):
        heads = min(WIDTH, H - h0)
        # 2. scores, with heads in lanes
        for h in range(heads):
            score_codes(p, a, batch, h0 + h, h, own, buffers)
        if a.score_luts != 0:
            map_codes(codes, pointer_to(a.score_luts, np.int8), index, 0, seen)
        # 3. probabilities of the S keys
        if masked:
            drop_rest(S, buffers.codes, masks)
        softmax(a.softmax, p.softmax_rule, codes, groups, masks, masked, Part(own.int32, p.at_softmax),
                      Part(own.int32, p.at_sums + WIDTH))
        # 4. context
        for h in range(heads):
            context_codes(p, a, batch, h0 + h, h, own, buffers)
    # 5. output
    out = pointer_to(a.out, np.int8)
    if p.has_out == 0:
        for h in range(H):
            for d in range(Dv):
                byte = own.int8[4 * p.at_context + h * p.padded_value + d]
                out[batch * Eo + h * Dv + d] = byte ^ BYTE_FLIP
    else:
        project_output_of_one(p, a, batch * Eo, own)
    matrix_release()
