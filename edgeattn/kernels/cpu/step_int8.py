"""One token of a static int8 layer against its cache, which is read in place: keys in lanes, then heads in lanes.

Letters as in fused_int8.  Queries less their zero point, and probabilities, are numbers of nine bits, written in two
digits 2 a + c, bytes with a sign, that meet the stored bytes as the digits of decode_int8 do.  The rows of scores
become lanes for the softmax, a head to a lane: its sums go in the order of the keys whatever the layout.
"""
import numpy as np
from numba.extending import register_jitable

from edgeattn.runtime.jit import inline
from edgeattn.runtime.worker_pool import task

from . import fused_int8 as f
from .decode_blocks import BLOCK
from .decode_int8 import CHUNK, QUADS, interleaved, key_panels, products, value_panels
from .matmul import MATRIX, MATRIX_DEPTH, linear, round_up
from .records import named
from .simd import (
    LANES,
    MATRIX_ROWS,
    OFFSET,
    ROWS,
    WIDTH,
    address_of,
    join_bytes,
    load,
    matrix_configure,
    matrix_release,
    maximum,
    pointer_to,
    smaller,
    splat,
    store,
)
from .softmax_int8 import LOWEST_CODES, PROBABILITY_FLIP, softmax_codes

_SHIFT = 0 if MATRIX or OFFSET == 0 else 128  # what the panels' bytes are more than the cache's
_FAR, _FAR_BELOW = np.int32(1 << 12), np.int32(-1 << 12)  # beyond every code, whatever the zero point
_SEVEN_BITS, _LOWEST_BITS = np.int32(0x7F7F7F7F), np.int32(0x01010101)


@register_jitable
def step_sizes(D, Dv):
    """32-bit elements of what a step needs beside a plan: digits, panels, copies, sums, and a context."""
    D_up, Dv_up = round_up(D, CHUNK), round_up(Dv, CHUNK)
    deep = round_up(D_up // 4, 16)
    return (MATRIX_ROWS * max(deep, QUADS), max(deep * BLOCK, Dv_up * QUADS), LANES * max(D_up, Dv_up) // 4,
            MATRIX_ROWS * max(BLOCK, Dv_up), Dv_up)


@inline
def project_codes(x, at_x, E, tokens, weights, rule, at_weight, at_bias, at_multiplier, zero_point, padded, p, private):
    """Codes of at most W tokens of x to p.at_row_major, where their rows are so many bytes apart."""
    rows, depth4 = round_up(tokens, ROWS), f.packed_depth(E)
    features = round_up(p.heads * padded, WIDTH)
    row = 4 * round_up(features // 4, LANES)
    f.pack_tokens(x, at_x, E, tokens, rows, private, p.at_x, depth4)
    linear(f.finish_bytes, (weights, rule, at_multiplier, features, zero_point, np.int32(0), private.view(np.int8),
                            4 * p.at_row_major, row, row, 0),
           private.view(np.uint32), p.at_x, depth4, 1, rows, weights, at_weight, weights, at_bias, features,
           depth4, private, p.at_tiles)
    return row


@inline
def shifted(v, zero_point):
    """v + zero_point, or as far from every code."""
    return smaller(maximum(v, splat(_FAR_BELOW)), splat(_FAR)) + splat(zero_point)


@inline
def write_query(codes, at, size, zero_point, digits, row):
    """Two rows of digits of codes[at : at + size] less their zero point, zeros up to the row's end; their sum."""
    high, low = pointer_to(digits, np.int8), pointer_to(digits + 4 * row, np.int8)
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
    for g in range(round_up(count, MATRIX_DEPTH)):
        word = np.int32(0)
        if g < count:
            word = codes[at + g * WIDTH] ^ LOWEST_CODES ^ PROBABILITY_FLIP
        digits[g], digits[QUADS + g] = (word >> 1) & _SEVEN_BITS, word & _LOWEST_BITS
        for j in range(4):
            total += (word >> (8 * j)) & 255
    return total


@task
def step_part(table, project_rule, score_rule, context_rule, xq, out, weights, parameters, lut_index, score_luts, keys,
              values, scratch, batch, worker, part):
    """A batch entry's one query against its S keys and values, all of which it sees; arguments as cached_int8's.

    There is one part, and one class.
    """
    p = named(parameters, f.LAYER)
    private = scratch[p.shared_size + worker * p.private_size:p.shared_size + (worker + 1) * p.private_size]
    H, S, Eq, Eo = p.heads, p.keys, p.query_width, p.out_width
    D, Dv, Dp, Dvp = p.head_size, p.value_size, p.padded_head, p.padded_value
    zq, zk, zv = np.int32(p.zq), np.int32(p.zk), np.int32(p.zv)
    zs, zc = np.int32(p.zs), np.int32(p.zc)
    at_codes, at_masks, at_row_major, at_context = p.at_codes, p.at_masks, p.at_row_major, p.at_context
    private_b = private.view(np.int8)
    sizes = step_sizes(D, Dv)
    digits_at = address_of(private) + 4 * p.at_step
    panels_at = digits_at + 4 * sizes[0]
    copy = panels_at + 4 * sizes[1]
    sums_at = copy + 4 * sizes[2]
    digits, panels = pointer_to(digits_at, np.int32), pointer_to(panels_at, np.uint32)
    sums, sum_ = pointer_to(sums_at, np.int32), pointer_to(sums_at + 4 * sizes[3], np.int32)
    D_up, Dv_up = round_up(D, CHUNK), round_up(Dv, CHUNK)
    deep = round_up(D_up // 4, 16)
    groups, codes = (S + 3) // 4, pointer_to(address_of(private) + 4 * at_codes, np.int32)
    if MATRIX:
        matrix_configure(private, p.at_tiles)
    # 1. the query of all heads
    project_codes(xq, batch * Eq, Eq, 1, weights, project_rule, p.wq, p.bq, p.mq, zq, Dp, p, private)
    for h0 in range(0, H, WIDTH):
        heads = min(WIDTH, H - h0)
        # 2. scores, as codes of four keys to a lane: (keys / 4, W) with heads in lanes
        for h in range(heads):
            total = write_query(private_b, 4 * at_row_major + (h0 + h) * Dp, D, zq, digits_at, deep)
            excess = splat(np.int32(total * (_SHIFT + zk)))
            k_address = address_of(keys) + ((batch * H + h0 + h) * p.capacity + p.first_slot) * D
            for s0 in range(0, S, BLOCK):
                count = min(BLOCK, S - s0)
                key_panels(k_address + s0 * D, D, D, count, S - s0, deep, panels, copy)
                products(2, digits, 0, deep, panels, deep * WIDTH, count, deep if MATRIX else D_up // 4, sums, BLOCK)
                for s in range(0, count, LANES):
                    twice = load(sums, s)
                    acc = twice + twice + load(sums, BLOCK + s) - excess
                    store(sums, s, shifted(score_rule(acc, weights, p.ms, LANES), zs))
                for s in range(0, count, CHUNK):
                    store(sums, s, join_bytes(load(sums, s), load(sums, s + LANES), load(sums, s + 2 * LANES),
                                              load(sums, s + 3 * LANES)))
                    for i in range(LANES):  # lane 4 g + i of the four vectors is four lanes of the i-th
                        group = (s0 + s) // 4 + i % 4 * (LANES // 4) + i // 4
                        codes[group * WIDTH + h] = sums[s + i]
        if score_luts.size > 0:
            f.map_codes(codes, 0, groups, score_luts, lut_index, 0, 0, 0, WIDTH, 0, S)
        # 3. probabilities of the S keys, where the last group has less than four
        masked = S % 4 != 0
        if masked:
            for i in range(0, groups * WIDTH, LANES):
                store(private, at_masks + i, splat(np.int32(-1)))
            last, there = (groups - 1) * WIDTH, splat(np.int32((1 << 8 * (S % 4)) - 1))
            for c in range(0, WIDTH, LANES):
                absent = splat(LOWEST_CODES) & (there ^ splat(np.int32(-1)))
                store(codes, last + c, (load(codes, last + c) & there) | absent)
                store(private, at_masks + last + c, there)
        softmax_codes(table, p.fixed != 0, private, at_codes, groups, private, at_masks, masked, private,
                      p.at_softmax, private, p.at_sums + WIDTH)
        # 4. context, positions as `interleaved` says, to the row of unsigned operands that the output projection reads
        for h in range(heads):
            v_address = address_of(values) + ((batch * H + h0 + h) * p.capacity + p.first_slot) * Dv
            for d in range(0, Dv_up, LANES):
                store(sum_, d, splat(np.int32(0)))
            total = np.int32(0)
            for s0 in range(0, S, BLOCK):
                count = min(BLOCK, S - s0)
                total += write_probabilities(codes, s0 // 4 * WIDTH + h, (count + 3) // 4, digits)
                value_panels(v_address + s0 * Dv, Dv, Dv, count, S - s0, panels, copy)
                products(2, digits, 0, QUADS, panels, QUADS * WIDTH, Dv_up, (count + 3) // 4, sums, Dv_up)
                for d in range(0, Dv_up, LANES):
                    twice = load(sums, d)
                    store(sum_, d, load(sum_, d) + twice + twice + load(sums, Dv_up + d))
            excess = splat(np.int32(total * (_SHIFT + zv)))
            for d in range(0, Dv_up, LANES):
                store(sum_, d, shifted(context_rule(load(sum_, d) - excess, weights, p.mc, LANES), zc))
            for d in range(Dv_up):
                feature = interleaved(d)
                if feature < Dv:
                    code = np.int8(min(max(sum_[d], -128), 127))
                    private_b[4 * at_context + (h0 + h) * Dvp + feature] = code ^ np.int8(-128 if OFFSET else 0)
    # 5. output
    if p.has_out == 0:
        for h in range(H):
            for d in range(Dv):
                byte = private_b[4 * at_context + h * Dvp + d]
                out[batch * Eo + h * Dv + d] = byte ^ np.int8(-128 if OFFSET else 0)
    else:
        C4, Eo_up = f.packed_depth(H * Dvp), round_up(Eo, WIDTH)
        linear(f.finish_output, (weights, project_rule, p.mo, Eo_up, np.int32(p.zo), out, batch * Eo, Eo, 1,
                                 private_b, 4 * p.at_x),
               private.view(np.uint32), at_context, C4, 1, 1, weights, p.wo, weights, p.bo, Eo_up, C4,
               private, p.at_tiles)
    if MATRIX:
        matrix_release()
