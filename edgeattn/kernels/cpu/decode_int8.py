"""A single query per head against int8 keys and values: four-way dot products, exact but for the rounding of float32.

Letters as in decode_blocks.  Queries, and the weights of the values (probabilities times the values' scales), are
written in three digits as digits.py says, each a row of bytes that meets the stored bytes in panels of cache_panels.py.
The matrix unit takes 16 rows of digits at once.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .byte_products import DEPTH_STEP, digit_products
from .cache_panels import QUADS, interleaved, key_panels, value_panels
from .decode_blocks import ADDRESSES, BLOCK, DECODE, cap_and_maximum, inverse_of, join_blocks, keys_of, take_queries
from .digits import CHUNK, DIGITS, join_digits, largest_of, write_digits
from .int8_views import Part
from .matmul import round_up
from .portions import portions
from .records import located, named, real
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    address_of,
    fma,
    load,
    matrix_configure,
    matrix_release,
    max_lanes,
    maximum,
    pointer_to,
    splat,
    store,
    sum_lanes,
)
from .softmax import exp2
from .views import Rows

_ZERO = np.float32(0)
_LOWEST = np.finfo(np.float32).min
_MINUS_INFINITY = np.float32(-np.inf)


@inline
def take_scales(scales, at, step, count, size, out, to):
    """out[to + s] = scales[at + s], or where step is 0 the one scale there is; zeros from the count-th to the size-th.

    Returns zero, or NaN where a scale is not finite.
    """
    whole, poison = count // LANES * LANES, splat(_ZERO)
    for s in range(0, whole, LANES):
        store(out, to + s, splat(scales[at]) if step == 0 else load(scales, at + s))
    for s in range(whole, size, LANES):
        store(out, to + s, splat(_ZERO))
    for s in range(whole, count):
        out[to + s] = scales[at + s * step]
    for s in range(0, size, LANES):
        poison = fma(load(out, to + s), splat(_ZERO), poison)
    return sum_lanes(poison)


@inline
def private_sizes(G, D, Dv):
    """32-bit elements of a thread's arrays.

    Queries; per query two units, a maximum; scores; digits of both; corrections; scales of keys and of values, what is
    added to scores; panels of keys or of values; copies; sums of digits.
    """
    D_up, Dv_up = (D + CHUNK - 1) // CHUNK * CHUNK, (Dv + CHUNK - 1) // CHUNK * CHUNK
    rows = (G * DIGITS + MATRIX_ROWS - 1) // MATRIX_ROWS * MATRIX_ROWS
    deep = (D_up // 4 + 15) // 16 * 16
    return (G * D_up, (3 * G + 15) // 16 * 16, G * BLOCK, rows * deep, rows * QUADS, 2 * rows,
            3 * BLOCK, max(deep * BLOCK, Dv_up * QUADS), LANES * max(D_up, Dv_up) // 4, rows * max(BLOCK, Dv_up))


class Buffers(NamedTuple):
    """A thread's arrays, `private_sizes` elements each, as pointers; `copy` is an address."""

    queries: object
    units: object
    scores: object
    q_digits: object
    w_digits: object
    q_corrections: object
    w_corrections: object
    scales: object
    panels: object
    copy: int
    sums: object


@inline
def buffers_of(p, base, worker):
    """Where in scratch from the address `base` on they are."""
    sizes = private_sizes(p.heads // p.kv_heads, p.head_size, p.value_size)
    queries = base + (p.shared_size + worker * p.private_size) * 4
    units = queries + sizes[0] * 4
    scores = units + sizes[1] * 4
    q_digits = scores + sizes[2] * 4
    w_digits = q_digits + sizes[3] * 4
    corrections = w_digits + sizes[4] * 4
    scales = corrections + sizes[5] * 4
    panels = scales + sizes[6] * 4
    copy = panels + sizes[7] * 4
    sums = copy + sizes[8] * 4
    return Buffers(
        pointer_to(queries, np.float32), pointer_to(units, np.float32), pointer_to(scores, np.float32),
        pointer_to(q_digits, np.int32), pointer_to(w_digits, np.int32), pointer_to(corrections, np.int32),
        pointer_to(corrections + sizes[5] * 2, np.int32), pointer_to(scales, np.float32),
        pointer_to(panels, np.uint32), copy, pointer_to(sums, np.int32))


@inline
def prepare_queries(p, a, item, buffers):
    """An item's queries in digits."""
    D_up = round_up(p.head_size, CHUNK)
    deep = round_up(D_up // 4, 16)
    take_queries(p, a, item, buffers.queries, 0, D_up)
    for g in range(p.heads // p.kv_heads):
        largest, poison = largest_of(buffers.queries, g * D_up, D_up)
        buffers.units[g] = poison + write_digits(
            buffers.queries, g * D_up, D_up, largest, Rows(buffers.q_digits, g * DIGITS * deep, deep),
            Part(buffers.q_corrections, g * DIGITS))


@inline
def score_block(p, a, batch, kv, s0, left, buffers):
    """Sums of digits (G DIGITS, BLOCK) of the queries with a block's keys; left: how many keys there are from s0 on."""
    D, count = p.head_size, min(left, BLOCK)
    D4 = round_up(D, CHUNK) // 4
    deep = round_up(D4, 16)
    from_k = batch * p.k_b + kv * p.k_h + (p.first + s0) * p.k_s
    key_panels(a.k + from_k, p.k_s, D, count, left, deep, buffers.panels, buffers.copy)
    digit_products(p.heads // p.kv_heads * DIGITS, Rows(buffers.q_digits, 0, deep),
                   Rows(buffers.panels, 0, deep * WIDTH), count, round_up(D4, DEPTH_STEP), Rows(buffers.sums, 0, BLOCK))


_OF_KEYS, _OF_VALUES, _ABSENT = 0, BLOCK, 2 * BLOCK  # where scales, and what is added to scores, are


@inline
def take_block_scales(p, a, batch, kv, s0, count, buffers):
    """Scales of a block's keys and values, and what is added to scores; zero, or NaN where a value's is not finite."""
    whole, own_scales, row = round_up(count, CHUNK), buffers.scales, p.first + s0
    k_scales, v_scales = pointer_to(a.k_scale, np.float32), pointer_to(a.v_scale, np.float32)
    take_scales(k_scales, batch * p.k_scale_b + kv * p.k_scale_h + row * p.k_scale_s, p.k_scale_s, count, whole,
                own_scales, _OF_KEYS)
    poison = take_scales(v_scales, batch * p.v_scale_b + kv * p.v_scale_h + row * p.v_scale_s, p.v_scale_s, count,
                         whole, own_scales, _OF_VALUES)
    for s in range(0, whole, LANES):
        store(own_scales, _ABSENT + s, splat(_ZERO))
    for s in range(count, whole):
        own_scales[_ABSENT + s] = _MINUS_INFINITY
    return poison


@inline
def sum_of(private, at, size):
    """The sum of private[at : at + size], size a multiple of 8, in an order that no width of vectors has a part in."""
    t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = _ZERO
    for s in range(at, at + size, 8):
        t0 += private[s]
        t1 += private[s + 1]
        t2 += private[s + 2]
        t3 += private[s + 3]
        t4 += private[s + 4]
        t5 += private[s + 5]
        t6 += private[s + 6]
        t7 += private[s + 7]
    return ((t0 + t4) + (t2 + t6)) + ((t1 + t5) + (t3 + t7))


@inline
def weigh_block(p, count, poison, results, to, buffers):
    """Softmax of a block: probabilities times the values' scales in digits, zeros up to a whole vector.

    results: from `to` on, of each query, the maximum and the sum.
    """
    G, Dv_up, whole, softcap = p.heads // p.kv_heads, p.padded_value, round_up(count, CHUNK), real(p.softcap)
    units, scores, own_scales = buffers.units, buffers.scores, buffers.scales
    for g in range(G):
        at, best, unit = g * BLOCK, splat(_LOWEST), splat(units[g])
        for s in range(0, whole, LANES):
            dots = join_digits(buffers.sums, DIGITS * at + s, BLOCK, Part(buffers.q_corrections, DIGITS * g))
            score = fma(dots, unit * load(own_scales, _OF_KEYS + s), load(own_scales, _ABSENT + s))
            store(scores, at + s, score)
            best = maximum(score, best)
        units[2 * G + g] = max_lanes(best) if softcap == _ZERO else cap_and_maximum(scores, at, count, softcap)
    for g in range(G):
        at, m, largest = g * BLOCK, splat(units[2 * G + g]), splat(_ZERO)
        for s in range(0, whole, LANES):
            store(scores, at + s, exp2(load(scores, at + s) - m))
        results[to + G * Dv_up + g], results[to + G * (Dv_up + 1) + g] = units[2 * G + g], sum_of(scores, at, whole)
        for s in range(0, whole, LANES):
            weight = load(scores, at + s) * load(own_scales, _OF_VALUES + s)
            store(scores, at + s, weight)
            largest = maximum(weight, largest)
        units[G + g] = max_lanes(largest)
    for g in range(G):
        units[G + g] = poison + write_digits(
            scores, g * BLOCK, whole, units[G + g], Rows(buffers.w_digits, DIGITS * g * QUADS, QUADS),
            Part(buffers.w_corrections, DIGITS * g))


@inline
def context_block(p, a, batch, kv, s0, left, results, to, buffers):
    """Context (G, Dv') of a block, positions as `interleaved` says: four keys at a time become a row of the panels."""
    G, Dv, Dv_up, count = p.heads // p.kv_heads, p.value_size, p.padded_value, min(left, BLOCK)
    from_v = batch * p.v_b + kv * p.v_h + (p.first + s0) * p.v_s
    value_panels(a.v + from_v, p.v_s, Dv, count, left, buffers.panels, buffers.copy)
    digit_products(G * DIGITS, Rows(buffers.w_digits, 0, QUADS), Rows(buffers.panels, 0, QUADS * WIDTH), Dv_up,
                   (count + 3) // 4, Rows(buffers.sums, 0, Dv_up))
    for g in range(G):
        inverse = splat(inverse_of(results[to + G * (Dv_up + 1) + g]))
        for d in range(0, Dv_up, LANES):
            sums = join_digits(buffers.sums, DIGITS * g * Dv_up + d, Dv_up, Part(buffers.w_corrections, DIGITS * g))
            store(results, to + g * Dv_up + d, (sums * inverse) * splat(buffers.units[G + g]))


@task
def decode_part(p, a, scratch, portion, worker, part):
    """`portion` blocks of keys of `decode_int8`."""
    results, buffers = pointer_to(scratch, np.float32), buffers_of(p, scratch, worker)
    matrix_configure(buffers.sums, 0)
    ready = np.int64(-1)
    for number in range(part * portion, min((part + 1) * portion, p.batch * p.kv_heads * p.blocks)):
        item, s0 = number // p.blocks, number % p.blocks * BLOCK
        batch, kv = item // p.kv_heads, item % p.kv_heads
        left = keys_of(p, a, batch) - s0  # not p.keys - s0: there may be no memory behind a shorter entry's keys
        count = min(left, BLOCK)
        if count <= 0:
            continue
        if item != ready:
            prepare_queries(p, a, item, buffers)
            ready = item
        to = number * p.result_size
        score_block(p, a, batch, kv, s0, left, buffers)
        poison = take_block_scales(p, a, batch, kv, s0, count, buffers)
        weigh_block(p, count, poison, results, to, buffers)
        context_block(p, a, batch, kv, s0, left, results, to, buffers)
    matrix_release()


@jit
def decode_int8(parameters, addresses, scratch, task_queue, count):
    """One query per head against int8 keys and values; on at most `count` threads that serve the task_queue.

    parameters DECODE, addresses ADDRESSES; scratch: 32-bit elements, `shared_size` for all threads and then
    `private_size` for each.
    """
    p, a, memory = named(parameters, DECODE), located(addresses, ADDRESSES), address_of(scratch)
    portion, parts = portions(p.batch * p.kv_heads * p.blocks, 1, count)
    parallel_for(task_queue, parts, decode_part, p, a, memory, portion)
    join_blocks(p, a, pointer_to(memory, np.float32), interleaved)
