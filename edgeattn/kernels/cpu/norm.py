"""Residual, activation and norm of rows that a product has left in scratch, and layer norm and RMS norm alone.

    layer norm  (y - mean(y)) / sqrt(mean((y - mean(y))**2) + eps) * weight + bias
    RMS norm    y / sqrt(mean(y**2) + eps) * weight

Means are sums over the 32 lanes of `simd.wide`, divided by the number of features; or, of a norm alone that says so,
sums in the order of NumPy's, and the rest operation by operation as there: the same bits as `LayerNorm.rows`.
"""
import numpy as np

from edgeattn.runtime.calls import separately
from edgeattn.runtime.compiler import inline, jit, task
from edgeattn.runtime.worker_pool import parallel_for

from .matmul import round_up
from .portions import portions
from .records import located, named, record
from .simd import (
    LANES,
    VIRTUAL_LANES,
    address_of,
    fma,
    load,
    pointer_to,
    splat,
    store,
    wide_first,
    wide_load,
    wide_load_first,
    wide_splat,
    wide_store_first,
    wide_sum,
)

NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2
AT_WEIGHT = 16  # where a norm's weight begins: eps, the rest of its cache line, weight and bias, each a row of scratch
# `x` and `residual`: what is read, 0 for no residual; they and `out` are rows of `width` float32, without gaps.
ADDRESSES = record("x residual out weights")
NORM = record("rows width norm as_numpy private_size")
AT_ONCE = 8  # rows that are normalized together
MEANS = 2 * AT_ONCE  # numbers that these leave: of each its mean, and the inverse of its deviation
TOGETHER = 128  # numbers that NumPy sums without cutting them in two
SUMS = 32  # halves of halves that a row as NumPy sums it can be cut into: of 2^31 features

_ZERO, _ONE = np.float32(0), np.float32(1)


@inline
def mean_of(y, at, width, kind):
    """The mean of y (width,), followed by zeros up to a whole number of VIRTUAL_LANES; 0 for RMS norm."""
    if kind != LAYER_NORM:
        return _ZERO
    total = wide_splat(_ZERO)
    for e in range(0, round_up(width, VIRTUAL_LANES), VIRTUAL_LANES):
        total = total + wide_load(y, at + e)
    return wide_sum(total) / np.float32(width)


@inline
def inverse_of(y, at, width, mean, eps):
    """1 / sqrt(mean((y - mean)**2) + eps)"""
    middle, squares = wide_splat(mean), wide_splat(_ZERO)
    for e in range(0, round_up(width, VIRTUAL_LANES), VIRTUAL_LANES):
        d = wide_first(wide_load(y, at + e) - middle, width - e)
        squares = fma(d, d, squares)
    return _ONE / np.sqrt(wide_sum(squares) / np.float32(width) + eps)


@inline
def scale_row(y, at, width, mean, inverse, weights, at_norm):
    """y = (y - mean) * inverse * weight + bias"""
    up = round_up(width, VIRTUAL_LANES)
    at_weight = at_norm + AT_WEIGHT
    at_bias = at_weight + up
    middle, factor = wide_splat(mean), wide_splat(inverse)
    for e in range(0, up, VIRTUAL_LANES):
        scaled = (wide_load(y, at + e) - middle) * factor
        store(y, at + e, fma(scaled, wide_load(weights, at_weight + e), wide_load(weights, at_bias + e)))


@task
def normalize_row(y, at, width, kind, weights, at_norm):
    """y (width,), followed by zeros up to a whole number of VIRTUAL_LANES, in place."""
    mean = mean_of(y, at, width, kind)
    inverse = inverse_of(y, at, width, mean, weights[at_norm])
    scale_row(y, at, width, mean, inverse, weights, at_norm)


@task
def normalize_rows(y, at, step, rows, width, kind, weights, at_norm, at_means):
    """normalize_row() of up to AT_ONCE rows, each step of all of them: while one waits for its root others go on.

    at_means: room in y for MEANS numbers
    """
    at_inverses = at_means + AT_ONCE
    for r in range(rows):
        y[at_means + r] = mean_of(y, at + r * step, width, kind)
    for r in range(rows):
        y[at_inverses + r] = inverse_of(y, at + r * step, width, y[at_means + r], weights[at_norm])
    for r in range(rows):
        scale_row(y, at + r * step, width, y[at_means + r], y[at_inverses + r], weights, at_norm)


@inline
def sum_of_part(y, at, width):
    """The sum of up to TOGETHER numbers: eight sums side by side, then what is left over."""
    total, begin = _ZERO, 0
    if width >= 8:
        s0, s1, s2, s3 = y[at], y[at + 1], y[at + 2], y[at + 3]
        s4, s5, s6, s7 = y[at + 4], y[at + 5], y[at + 6], y[at + 7]
        begin = width // 8 * 8
        for e in range(at + 8, at + begin, 8):
            s0, s1, s2, s3 = s0 + y[e], s1 + y[e + 1], s2 + y[e + 2], s3 + y[e + 3]
            s4, s5, s6, s7 = s4 + y[e + 4], s5 + y[e + 5], s6 + y[e + 6], s7 + y[e + 7]
        total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for e in range(at + begin, at + width):
        total = total + y[e]
    return total


@inline
def sum_as_numpy(y, at, width, at_sums):
    """The sum of a row: halves of it are summed by themselves, and halves of these, down to TOGETHER numbers.

    at_sums: room for SUMS numbers, those of halves whose other half is still to come.
    """
    total, begin = _ZERO, 0
    while begin < width:
        # The part that begins here: how often halved, and, bit by bit, which half it is.
        first, some, depth, seconds = 0, width, 0, 0
        while some > TOGETHER:
            half = some // 16 * 8
            depth, seconds = depth + 1, 2 * seconds
            if begin < first + half:
                some = half
            else:
                first, some, seconds = first + half, some - half, seconds + 1
        total = sum_of_part(y, at + begin, some)
        while seconds % 2 == 1:
            total = y[at_sums + depth] + total
            depth, seconds = depth - 1, seconds // 2
        y[at_sums + depth] = total
        begin += some
    return _ZERO + total


@task
def normalize_as_numpy(y, at, step, rows, width, kind, weights, at_norm, at_means):
    """y, up to AT_ONCE rows of (width,), in place, as `normalize_rows` otherwise.

    at_means: room in y for MEANS numbers, then SUMS, then a row
    """
    up, at_weight = round_up(width, VIRTUAL_LANES), at_norm + AT_WEIGHT
    at_bias, at_roots, at_sums = at_weight + up, at_means + AT_ONCE, at_means + MEANS
    at_squares = at_sums + SUMS
    if kind == LAYER_NORM:
        for r in range(rows):
            y[at_means + r] = sum_as_numpy(y, at + r * step, width, at_sums) / np.float32(width)
        for r in range(rows):
            for e in range(at + r * step, at + r * step + up, LANES):
                store(y, e, load(y, e) - splat(y[at_means + r]))
    for r in range(rows):
        for e in range(0, up, LANES):
            number = load(y, at + r * step + e)
            store(y, at_squares + e, number * number)
        total = sum_as_numpy(y, at_squares, width, at_sums)
        y[at_roots + r] = np.sqrt(total / np.float32(width) + weights[at_norm])
    for r in range(rows):
        for e in range(0, up, LANES):
            scaled = load(y, at + r * step + e) * (load(weights, at_weight + e) / splat(y[at_roots + r]))
            store(y, at + r * step + e, scaled + load(weights, at_bias + e))


@inline
def read_row(x, at_x, width, y, at):
    """y = x, and zeros up to a whole number of VIRTUAL_LANES."""
    whole = width // VIRTUAL_LANES * VIRTUAL_LANES
    for e in range(0, whole, VIRTUAL_LANES):
        store(y, at + e, wide_load(x, at_x + e))
    if whole < width:
        store(y, at + whole, wide_load_first(x, at_x + whole, width - whole))


@inline
def add_row(x, at_x, width, y, at):
    """y += x"""
    whole = width // VIRTUAL_LANES * VIRTUAL_LANES
    for e in range(0, whole, VIRTUAL_LANES):
        store(y, at + e, wide_load(y, at + e) + wide_load(x, at_x + e))
    if whole < width:
        store(y, at + whole, wide_load(y, at + whole) + wide_load_first(x, at_x + whole, width - whole))


@inline
def write_row(y, at, width, out, at_out):
    """out = y"""
    whole = width // VIRTUAL_LANES * VIRTUAL_LANES
    for e in range(0, whole, VIRTUAL_LANES):
        store(out, at_out + e, wide_load(y, at + e))
    if whole < width:
        wide_store_first(out, at_out + whole, wide_load(y, at + whole), width - whole)


@task
def finish_row(y, at, width, residual, row, kind, weights, at_norm, out):
    """out[row] = norm(y + residual[row]), y changes; residual and out: addresses, 0 for no residual."""
    if residual != 0:
        add_row(pointer_to(residual, np.float32), row * width, width, y, at)
    if kind != NO_NORM:
        normalize_row(y, at, width, kind, weights, at_norm)
    write_row(y, at, width, pointer_to(out, np.float32), row * width)


@task
def finish_rows(y, at, step, rows, width, residual, row, kind, weights, at_norm, at_means, out):
    """finish_row() of some rows, `step` apart, the first of which is `row` of residual and out."""
    for r in range(0, rows, AT_ONCE):
        begin, some = at + r * step, min(AT_ONCE, rows - r)
        if residual != 0:
            for i in range(some):
                add_row(pointer_to(residual, np.float32), (row + r + i) * width, width, y, begin + i * step)
        if kind != NO_NORM:
            separately(normalize_rows, (y, begin, step, some, width, kind, weights, at_norm, at_means))
        for i in range(some):
            write_row(y, begin + i * step, width, pointer_to(out, np.float32), (row + r + i) * width)


@task
def norm_part(p, a, scratch, portion, worker, part):
    """A portion of the rows."""
    own = pointer_to(scratch + 4 * worker * p.private_size, np.float32)
    x, weights, step = pointer_to(a.x, np.float32), pointer_to(a.weights, np.float32), round_up(p.width, VIRTUAL_LANES)
    end, at_means = min((part + 1) * portion, p.rows), AT_ONCE * step
    for row in range(part * portion, end, AT_ONCE):
        rows = min(AT_ONCE, end - row)
        for r in range(rows):
            read_row(x, (row + r) * p.width, p.width, own, r * step)
        if p.as_numpy != 0:
            separately(normalize_as_numpy, (own, 0, step, rows, p.width, p.norm, weights, 0, at_means))
            for r in range(rows):
                write_row(own, r * step, p.width, pointer_to(a.out, np.float32), (row + r) * p.width)
        else:
            separately(finish_rows, (own, 0, step, rows, p.width, a.residual, row, p.norm, weights, 0, at_means,
                                     a.out))


@jit
def add_norm(parameters, addresses, scratch, task_queue, count):
    """out = norm(x + residual)

    parameters NORM, addresses ADDRESSES; scratch: 32-bit elements, `private_size` for each of `count` threads.
    """
    p, a = named(parameters, NORM), located(addresses, ADDRESSES)
    portion, parts = portions(p.rows, 1, count)
    parallel_for(task_queue, parts, norm_part, p, a, address_of(scratch), portion)
