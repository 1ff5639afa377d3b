"""A single query per head against int8 keys and values: four-way dot products, exact but for the rounding of float32.

Letters as in decode_blocks.  Queries, and the weights of the values (probabilities times the values' scales), are
written in three signed digits to the base 256: at least 22 bits and a sign of the largest of their row, nearly what
float32 holds of it.  Each digit is a row of bytes that meets the stored bytes; the sums are integers, whatever their
order.  The matrix unit takes 16 rows of digits at once.
"""
import numpy as np

from edgeattn.runtime.jit import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .decode_blocks import (
    BLOCK,
    DECODE,
    cap_and_maximum,
    inverse_of,
    join_blocks,
    keys_of,
    parameters_of,
    take_queries,
)
from .fused import portions, steps_of
from .matmul import MATRIX, multiply
from .records import named
from .simd import (
    COLUMNS,
    LANES,
    MATRIX_ROWS,
    OFFSET,
    WIDTH,
    address_of,
    bits_of,
    dot_bytes,
    first_lane,
    float_of_bits,
    fma,
    gather_byte,
    interleave_rows,
    load,
    matrix_configure,
    matrix_dot_signed,
    matrix_load,
    matrix_release,
    matrix_store,
    matrix_zero,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    splat,
    store,
    sum_lanes,
    tile_store,
    tile_zero,
    to_float,
    transpose_block,
)
from .softmax import exp2

CHUNK = 4 * LANES  # bytes of a vector
QUADS = BLOCK // 4
DIGITS = 3
TWO = 2 * DIGITS
_FLIP = np.int32(0 if MATRIX or OFFSET == 0 else -0x7f7f7f80)  # the matrix unit multiplies signed by signed
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
def write_digits(private, at, size, largest, rows, to, row_step, corrections, at_correction):
    """The three digits of private[at : at + size], lowest first, as rows of four bytes; what a unit of them is worth.

    private[at + i] = unit * sum over r of 256 ** r * byte i of rows[to + r * row_step:], none larger than `largest`;
    size a multiple of CHUNK.  corrections[at_correction + r] = what the sums of row r are too large by where the
    other operand's bytes are kept with their highest bit flipped.
    """
    # _MOST units or a little less are the largest number; a unit of few bits makes the products with it nearly exact
    fine = bits_of(splat(largest / _MOST))
    unit = maximum(float_of_bits((fine + splat(_FINE)) & splat(_COARSE)), splat(_SMALLEST))
    inverse = splat(_ONE) / unit
    sums0, sums1, sums2 = splat(np.int32(0)), splat(np.int32(0)), splat(np.int32(0))
    flips = splat(np.int32(_FLIP))
    for i in range(0, size, CHUNK):
        x0 = digits_of(private, at + i, inverse)
        x1 = digits_of(private, at + i + LANES, inverse)
        x2 = digits_of(private, at + i + 2 * LANES, inverse)
        x3 = digits_of(private, at + i + 3 * LANES, inverse)
        digit0 = gather_byte(x0, x1, x2, x3, 0)
        digit1 = gather_byte(x0, x1, x2, x3, 1)
        digit2 = gather_byte(x0, x1, x2, x3, 2)
        store(rows, to + i // 4, digit0)
        store(rows, to + row_step + i // 4, digit1)
        store(rows, to + 2 * row_step + i // 4, digit2)
        if _FLIP != 0:  # bytes of 128, unsigned
            sums0 = dot_bytes(sums0, flips, digit0)
            sums1 = dot_bytes(sums1, flips, digit1)
            sums2 = dot_bytes(sums2, flips, digit2)
    if _FLIP != 0:
        corrections[at_correction] = sum_lanes(sums0)
        corrections[at_correction + 1] = sum_lanes(sums1)
        corrections[at_correction + 2] = sum_lanes(sums2)
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
            if _FLIP != 0:
                for i in range(k, k + LANES):
                    store(panels, to + i * WIDTH, load(panels, to + i * WIDTH) ^ splat(_FLIP))


@inline
def value_panels(values, row, size, count, left, panels, copy):
    """`count` values as panels (positions / WIDTH, QUADS, WIDTH) of four keys; otherwise as `key_panels`."""
    for s in range(0, count, LANES):
        at, near_row = readable(values, s * row, row, size, left - s, copy)
        rows = pointer_to(at, np.int8)
        for i in range(0, min(LANES, count - s), 4):
            for d in range(0, size, CHUNK):
                interleave_rows(rows, i * near_row + d, near_row, _FLIP, panels, d * QUADS + (s + i) // 4 * WIDTH,
                                QUADS * WIDTH)


@inline
def products(rows, digits, at_digits, row_step, panels, panel_step, count, depth4, out, out_row):
    """out[r out_row + l] = row r of digits, bytes, times column l of panels (depth4, WIDTH), l < count or more."""
    for column in range(0, count, WIDTH):
        panel = column // WIDTH * panel_step
        if MATRIX:
            for r in range(0, rows, MATRIX_ROWS):
                matrix_zero(0)
                matrix_zero(1)
                for k in range(0, depth4, 16):
                    matrix_load(4, digits, at_digits + r * row_step + k, row_step)
                    matrix_load(6, panels, panel + k * WIDTH, WIDTH)
                    matrix_load(7, panels, panel + k * WIDTH + 16, WIDTH)
                    matrix_dot_signed(0, 4, 6)
                    matrix_dot_signed(1, 4, 7)
                matrix_store(0, out, r * out_row + column, out_row)
                matrix_store(1, out, r * out_row + column + 16, out_row)
        else:
            r = 0
            while r + TWO <= rows:
                found = multiply(tile_zero(TWO, COLUMNS, digits), digits, at_digits + r * row_step, row_step, 1,
                                 panels, panel, depth4)
                tile_store(found, out, r * out_row + column, out_row, LANES)
                r += TWO
            if r < rows:
                found = multiply(tile_zero(DIGITS, COLUMNS, digits), digits, at_digits + r * row_step, row_step, 1,
                                 panels, panel, depth4)
                tile_store(found, out, r * out_row + column, out_row, LANES)


@inline
def join_digits(sums, at, row, corrections, at_correction):
    """The LANES numbers whose digits' sums lie at `at`, rows `row` apart, lowest first."""
    low, middle, high = load(sums, at), load(sums, at + row), load(sums, at + 2 * row)
    if _FLIP != 0:
        low = low - splat(corrections[at_correction])
        middle = middle - splat(corrections[at_correction + 1])
        high = high - splat(corrections[at_correction + 2])
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


@task
def decode_part(parameters, scale, softcap, lengths, scratch, portion, worker, part):
    """`portion` blocks of keys of `decode`."""
    p = named(parameters, DECODE)
    base = address_of(scratch)
    results = pointer_to(base, np.float32)
    D, Dv, Dv_up, G = p.head_size, p.value_size, p.padded_value, p.heads // p.kv_heads
    D_up, deep = (D + CHUNK - 1) // CHUNK * CHUNK, ((D + CHUNK - 1) // CHUNK * LANES + 15) // 16 * 16
    sizes = private_sizes(G, D, Dv)
    address_q = base + (p.shared_size + worker * p.private_size) * 4
    address_units = address_q + sizes[0] * 4
    address_scores = address_units + sizes[1] * 4
    address_qd = address_scores + sizes[2] * 4
    address_wd = address_qd + sizes[3] * 4
    address_corrections = address_wd + sizes[4] * 4
    address_scales = address_corrections + sizes[5] * 4
    address_panels = address_scales + sizes[6] * 4
    address_copy = address_panels + sizes[7] * 4
    address_sums = address_copy + sizes[8] * 4
    q, units = pointer_to(address_q, np.float32), pointer_to(address_units, np.float32)
    scores, own_scales = pointer_to(address_scores, np.float32), pointer_to(address_scales, np.float32)
    qd, wd = pointer_to(address_qd, np.int32), pointer_to(address_wd, np.int32)
    corrections = pointer_to(address_corrections, np.int32)
    w_corrections = pointer_to(address_corrections + sizes[5] * 2, np.int32)
    panels, sums = pointer_to(address_panels, np.uint32), pointer_to(address_sums, np.int32)
    k_scales, v_scales = pointer_to(p.k_scale, np.float32), pointer_to(p.v_scale, np.float32)
    if MATRIX:
        matrix_configure(sums, 0)
    of_keys, of_values, absent = 0, BLOCK, 2 * BLOCK
    ready = np.int64(-1)
    for number in range(part * portion, min((part + 1) * portion, p.batch * p.kv_heads * p.blocks)):
        item, s0 = number // p.blocks, number % p.blocks * BLOCK
        batch, kv = item // p.kv_heads, item % p.kv_heads
        left = keys_of(p, lengths, batch) - s0  # not p.keys - s0: there may be no memory behind a shorter entry's keys
        count = min(left, BLOCK)
        if count <= 0:
            continue
        if item != ready:
            take_queries(p, item, scale, softcap, q, 0, D_up)
            for g in range(G):
                largest, poison = largest_of(q, g * D_up, D_up)
                units[g] = poison + write_digits(q, g * D_up, D_up, largest, qd, g * DIGITS * deep, deep,
                                                 corrections, g * DIGITS)
            ready = item
        # 1. scores (G, BLOCK): keys become panels (D / 4, WIDTH)
        from_k, k_row = batch * p.k_b + kv * p.k_h + s0 * p.k_s, p.k_s
        key_panels(p.k + from_k, k_row, D, count, left, deep, panels, address_copy)
        products(G * DIGITS, qd, 0, deep, panels, deep * WIDTH, count, deep if MATRIX else D_up // 4, sums, BLOCK)
        # 2. softmax of the block, and its probabilities times the values' scales in digits; zeros up to a whole vector
        to, whole = number * p.result_size, (count + CHUNK - 1) // CHUNK * CHUNK
        take_scales(k_scales, batch * p.k_scale_b + kv * p.k_scale_h + s0 * p.k_scale_s, p.k_scale_s, count, whole,
                    own_scales, of_keys)
        poison = take_scales(v_scales, batch * p.v_scale_b + kv * p.v_scale_h + s0 * p.v_scale_s, p.v_scale_s, count,
                             whole, own_scales, of_values)
        for s in range(0, whole, LANES):
            store(own_scales, absent + s, splat(_ZERO))
        for s in range(count, whole):
            own_scales[absent + s] = _MINUS_INFINITY
        for g in range(G):
            at, best, unit = g * BLOCK, splat(_LOWEST), splat(units[g])
            for s in range(0, whole, LANES):
                dots = join_digits(sums, DIGITS * at + s, BLOCK, corrections, DIGITS * g)
                score = fma(dots, unit * load(own_scales, of_keys + s), load(own_scales, absent + s))
                store(scores, at + s, score)
                best = maximum(score, best)
            units[2 * G + g] = max_lanes(best) if softcap == _ZERO else cap_and_maximum(scores, at, count, softcap)
        for g in range(G):
            at, m = g * BLOCK, splat(units[2 * G + g])
            total, largest = splat(_ZERO), splat(_ZERO)
            for s in range(0, whole, LANES):
                e = exp2(load(scores, at + s) - m)
                weight = e * load(own_scales, of_values + s)
                store(scores, at + s, weight)
                total = total + e
                largest = maximum(weight, largest)
            results[to + G * Dv_up + g], results[to + G * (Dv_up + 1) + g] = units[2 * G + g], sum_lanes(total)
            units[G + g] = max_lanes(largest)
        for g in range(G):
            units[G + g] = poison + write_digits(
                scores, g * BLOCK, whole, units[G + g], wd, DIGITS * g * QUADS, QUADS, w_corrections, DIGITS * g)
        # 3. context (G, Dv'), positions as `interleaved` says: four keys at a time become a row of the panels
        from_v, v_row = batch * p.v_b + kv * p.v_h + s0 * p.v_s, p.v_s
        value_panels(p.v + from_v, v_row, Dv, count, left, panels, address_copy)
        products(G * DIGITS, wd, 0, QUADS, panels, QUADS * WIDTH, Dv_up, (count + 3) // 4, sums, Dv_up)
        for g in range(G):
            inverse = splat(inverse_of(results[to + G * (Dv_up + 1) + g]))
            for d in range(0, Dv_up, LANES):
                part_sums = join_digits(sums, DIGITS * g * Dv_up + d, Dv_up, w_corrections, DIGITS * g)
                store(results, to + g * Dv_up + d, (part_sums * inverse) * splat(units[G + g]))
    if MATRIX:
        matrix_release()


@inline
def interleaved(position):
    """The feature at a position of a context: see `interleave_rows`."""
    chunk, rest = position // CHUNK, position % CHUNK
    j, l = rest // LANES, rest % LANES
    return chunk * CHUNK + l // 4 * 16 + j * 4 + l % 4


@jit
def decode(q, k, v, out, k_scale, v_scale, scale, softcap, lengths, private, scratch, task_queue, count):
    """See `decode.decode`; on at most `count` threads that serve the task_queue."""
    parameters = parameters_of(q, k, v, out, (v.shape[3] + CHUNK - 1) // CHUNK * CHUNK, private)
    p = named(parameters, DECODE)
    p.k_scale, p.v_scale = address_of(k_scale), address_of(v_scale)
    p.k_scale_b, p.k_scale_h, p.k_scale_s = steps_of(k_scale)
    p.v_scale_b, p.v_scale_h, p.v_scale_s = steps_of(v_scale)
    portion, parts = portions(p.batch * p.kv_heads * p.blocks, 1, count)
    parallel_for(task_queue, parts, decode_part, parameters, np.float32(scale), np.float32(softcap), lengths, scratch,
                 portion)
    join_blocks(parameters, pointer_to(p.out, np.float32), lengths, pointer_to(address_of(scratch), np.float32),
                interleaved)
