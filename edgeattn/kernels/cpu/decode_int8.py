"""A single query per head against int8 keys and values: four-way dot products, exact but for the rounding of float32.

Letters as in decode_blocks.  Queries, and the weights of the values (probabilities times the values' scales), are
written in three signed digits to the base 256: at least 22 bits and a sign of the largest of their row, nearly what
float32 holds of it.  Each digit is a row of bytes that meets the stored bytes; the sums are integers, whatever their
order.  The matrix unit takes 16 rows of digits at once.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .byte_products import DEPTH_STEP, digit_products
from .decode_blocks import ADDRESSES, BLOCK, DECODE, cap_and_maximum, inverse_of, join_blocks, keys_of, take_queries
from .int8_operands import LANE_FLIP, add_digit_sum, flip_lanes, less_digit_sum, store_digit_sum
from .int8_views import Part
from .matmul import round_up
from .portions import portions
from .records import located, named, real
from .simd import (
    LANES,
    MATRIX_ROWS,
    WIDTH,
    address_of,
    bits_of,
    first_lane,
    float_of_bits,
    fma,
    gather_byte,
    interleave_rows,
    load,
    matrix_configure,
    matrix_release,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    splat,
    store,
    sum_lanes,
    to_float,
    transpose_block,
)
from .softmax import exp2
from .views import Rows

CHUNK = 4 * LANES  # bytes of a vector
QUADS = BLOCK // 4
DIGITS = 3
_BASE, _SQUARE = np.float32(256), np.float32(65536)
_BIAS = np.int32(0x808080)
_MOST = np.float32(0x7f7f7f)  # three digits of 127
_FINE, _COARSE = np.int32((1 << 20) - 1), np.int32(-1 << 20)  # all but three bits of a mantissa, and the rest
_SMALLEST = np.finfo(np.float32).tiny
_ZERO = np.float32(0)
_ONE = np.float32(1)
_LOWEST = np.finfo(np.float32).min
_MINUS_INFINITY = np.float32(-np.inf)


@inline
def largest_of(private, at, size):
    """The largest magnitude in private[at : at + size], and zero, or NaN where a number is not finite."""
    best, poison = splat(_ZERO), splat(_ZERO)
    for i in range(0, size, LANES):
        v = load(private, at + i)
        best = maximum(maximum(v, splat(_ZERO) - v), best)
        poison = fma(v, splat(_ZERO), poison)
    return max_lanes(best), sum_lanes(poison)


@inline
def digits_of(private, at, inverse):
    """Numbers over a unit to whole ones, and those to three digits that are bytes with a sign."""
    return (round_to_int(load(private, at) * inverse) + splat(_BIAS)) ^ splat(_BIAS)


@inline
def write_digits(private, at, size, largest, rows, corrections):
    """The three digits of private[at : at + size], lowest first, as Rows of four bytes; what a unit of them is worth.

    private[at + i] = unit * sum over r of 256 ** r * byte i of row r, none larger than `largest`; size a multiple of
    CHUNK.  corrections: Part, of each row what its sums are too large by where the other operand's bytes are kept with
    their highest bit flipped.
    """
    # _MOST units or a little less are the largest number; a unit of few bits makes the products with it nearly exact
    fine = bits_of(splat(largest / _MOST))
    unit = maximum(float_of_bits((fine + splat(_FINE)) & splat(_COARSE)), splat(_SMALLEST))
    inverse = splat(_ONE) / unit
    sums0, sums1, sums2 = splat(np.int32(0)), splat(np.int32(0)), splat(np.int32(0))
    for i in range(0, size, CHUNK):
        x0 = digits_of(private, at + i, inverse)
        x1 = digits_of(private, at + i + LANES, inverse)
        x2 = digits_of(private, at + i + 2 * LANES, inverse)
        x3 = digits_of(private, at + i + 3 * LANES, inverse)
        digit0 = gather_byte(x0, x1, x2, x3, 0)
        digit1 = gather_byte(x0, x1, x2, x3, 1)
        digit2 = gather_byte(x0, x1, x2, x3, 2)
        store(rows.data, rows.at + i // 4, digit0)
        store(rows.data, rows.at + rows.step + i // 4, digit1)
        store(rows.data, rows.at + 2 * rows.step + i // 4, digit2)
        sums0 = add_digit_sum(sums0, digit0)
        sums1 = add_digit_sum(sums1, digit1)
        sums2 = add_digit_sum(sums2, digit2)
    store_digit_sum(sums0, corrections.data, corrections.at)
    store_digit_sum(sums1, corrections.data, corrections.at + 1)
    store_digit_sum(sums2, corrections.data, corrections.at + 2)
    return first_lane(unit)


@inline
def readable(rows, at, row, size, left, copy):
    """(address, distance) of LANES rows that may be read to the end of their last chunk: in place or copied.

    rows: address; at, row, size in bytes; left: how many rows there are from the first on.
    """
    size_up = (size + CHUNK - 1) // CHUNK * CHUNK
    if size == size_up and left >= LANES or (left - LANES) * row >= size_up - size:
        return rows + at, row
    source, target = pointer_to(rows + at, np.int8), pointer_to(copy, np.int8)
    for i in range(min(left, LANES)):
        for d in range(size):
            target[i * size_up + d] = source[i * row + d]
    return copy, size_up


@inline
def key_panels(keys, row, size, count, left, deep, panels, copy):
    """`count` keys as panels (keys / WIDTH, deep, WIDTH) of four features, their highest bits flipped.

    keys, copy: addresses, of rows `size` bytes long and `row` apart, `left` of them, and of room for LANES rows.
    """
    for s in range(0, count, LANES):
        at, near_row = readable(keys, s * row, row, size, left - s, copy)
        rows, to = pointer_to(at, np.int8), s // WIDTH * (deep * WIDTH) + s % WIDTH
        for k in range(0, (size + CHUNK - 1) // CHUNK * LANES, LANES):
            transpose_block(rows, 4 * k, near_row, panels, to + k * WIDTH, WIDTH)
            for i in range(k, k + LANES):
                flip_lanes(panels, to + i * WIDTH, LANES)


@inline
def value_panels(values, row, size, count, left, panels, copy):
    """`count` values as panels (positions / WIDTH, QUADS, WIDTH) of four keys; otherwise as `key_panels`."""
    for s in range(0, count, LANES):
        at, near_row = readable(values, s * row, row, size, left - s, copy)
        rows = pointer_to(at, np.int8)
        for i in range(0, min(LANES, count - s), 4):
            for d in range(0, size, CHUNK):
                interleave_rows(rows, i * near_row + d, near_row, LANE_FLIP, panels, d * QUADS + (s + i) // 4 * WIDTH,
                                QUADS * WIDTH)


@inline
def join_digits(sums, at, row, corrections):
    """The LANES numbers whose digits' sums lie at `at`, rows `row` apart, lowest first; corrections: Part."""
    low, middle, high = load(sums, at), load(sums, at + row), load(sums, at + 2 * row)
    low = less_digit_sum(low, corrections.data, corrections.at)
    middle = less_digit_sum(middle, corrections.data, corrections.at + 1)
    high = less_digit_sum(high, corrections.data, corrections.at + 2)
    return fma(to_float(high), splat(_SQUARE), fma(to_float(middle), splat(_BASE), to_float(low)))


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


@inline
def interleaved(position):
    """The feature at a position of a context: see `interleave_rows`."""
    chunk, rest = position // CHUNK, position % CHUNK
    j, l = rest // LANES, rest % LANES
    return chunk * CHUNK + l // 4 * 16 + j * 4 + l % 4


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
