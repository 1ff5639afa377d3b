"""Storing tokens in an int8 cache: every row by a scale of its own, the largest magnitude over 127."""
import functools
import math

import numpy as np

from edgeattn.runtime.compiler import jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .call import PreparedCall
from .fused import portions
from .records import blank, named, packed, record
from .simd import (
    LANES,
    fma,
    load,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    splat,
    store_bytes,
    sum_lanes,
)

_LARGEST_CODE = np.float32(127)
_SMALLEST = np.finfo(np.float32).tiny
_NAN = np.float32(np.nan)
_ZERO = np.float32(0)
_ONE = np.float32(1)
# Rows of `size` numbers each; strides in elements.
STORE = record("batch heads rows size", "x_b x_h x_n codes_b codes_h codes_n scales_b scales_h scales_n")
ADDRESSES = record("x codes scales")


@task
def store_part(p, a, portion, worker, part):
    """A portion of the rows."""
    size = p.size
    whole = size // LANES * LANES
    scales = pointer_to(a.scales, np.float32)
    for row in range(part * portion, min((part + 1) * portion, p.batch * p.heads * p.rows)):
        b, h, i = row // (p.heads * p.rows), row // p.rows % p.heads, row % p.rows
        numbers = pointer_to(a.x + 4 * (b * p.x_b + h * p.x_h + i * p.x_n), np.float32)
        bytes_ = pointer_to(a.codes + b * p.codes_b + h * p.codes_h + i * p.codes_n, np.int8)
        # 1. the largest magnitude; 0, or NaN where a number is not finite
        best, poison = splat(_ZERO), splat(_ZERO)
        for d in range(0, whole, LANES):
            v = load(numbers, d)
            best = maximum(maximum(v, splat(_ZERO) - v), best)
            poison = fma(v, splat(_ZERO), poison)
        largest, unfit = max_lanes(best), sum_lanes(poison)
        for d in range(whole, size):
            largest = max(largest, abs(numbers[d]))
            unfit += numbers[d] * _ZERO
        # 2. the scale: 0 for what float32 holds only in part, NaN to be seen by whoever attends to it
        scale = largest / _LARGEST_CODE
        if not scale >= _SMALLEST:
            scale = _ZERO
        if unfit != _ZERO:
            scale = _NAN
        scales[b * p.scales_b + h * p.scales_h + i * p.scales_n] = scale
        # 3. the codes
        if unfit != _ZERO:
            for d in range(size):
                bytes_[d] = 0
            continue
        divisor = scale if scale > _ZERO else _ONE
        for d in range(0, whole, LANES):
            store_bytes(bytes_, d, round_to_int(load(numbers, d) / splat(divisor)))
        for d in range(whole, size):
            bytes_[d] = np.int8(np.rint(numbers[d] / divisor))


@jit
def store_rows(parameters, addresses, scratch, task_queue, count):
    """See `quantize_into`; on at most `count` threads that serve the task_queue.

    parameters STORE, addresses ADDRESSES; no scratch.
    """
    p, a = named(parameters, STORE), named(addresses, ADDRESSES)
    portion, parts = portions(p.batch * p.heads * p.rows, 1, count)
    parallel_for(task_queue, parts, store_part, p, a, portion)


@functools.lru_cache(256)
def _prepare(shape, x, codes, scales):
    """The `PreparedCall` of arrays of this shape and these strides."""
    p = blank(STORE)
    p.batch, p.heads, p.rows, p.size = shape
    p.x_b, p.x_h, p.x_n = (step // 4 for step in x[:3])
    p.codes_b, p.codes_h, p.codes_n = codes[:3]
    p.scales_b, p.scales_h, p.scales_n = (step // 4 for step in scales)
    return PreparedCall(store_rows, packed(p, STORE), ADDRESSES, np.float32, 0, 0, 8 * math.prod(shape))


def quantize_into(x, codes, scales):
    """x[..., d] = codes[..., d] * scales, to the nearest code, ties to even; NaN where a row is not finite.

    Parameters
    ----------
    x : (B, Hkv, n, size) float32, last dimension contiguous
    codes : (B, Hkv, n, size) int8, last dimension contiguous; written
    scales : (B, Hkv, n) float32; written
        max|x| / 127 of each row, 0 where that is no normal number.
    """
    _prepare(x.shape, x.strides, codes.strides, scales.strides)(x, codes, scales)
