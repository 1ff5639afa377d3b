"""Storing tokens in an int8 cache: every row by a scale of its own, the largest magnitude over 127."""
import numpy as np

from edgeattn.runtime.addresses import address
from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .call import PreparedCall
from .portions import portions
from .records import blank, located, named, packed, record, slot
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
# Keys and values: rows of key_size and value_size numbers; the first slot they go to. Strides in elements.
STORE = record("batch heads rows first key_size value_size", "k_b k_h k_n v_b v_h v_n",
               "key_codes_b key_codes_h value_codes_b value_codes_h scales_b scales_h")
ADDRESSES = record("keys values key_codes key_scales value_codes value_scales")
_FIRST = slot(STORE, "first")


@inline
def store_row(numbers, size, bytes_, scales, at):
    """The codes of a row, and its scale to scales[at]."""
    whole = size // LANES * LANES
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
    scales[at] = scale
    # 3. the codes
    if unfit != _ZERO:
        for d in range(size):
            bytes_[d] = 0
        return
    divisor = scale if scale > _ZERO else _ONE
    for d in range(0, whole, LANES):
        store_bytes(bytes_, d, round_to_int(load(numbers, d) / splat(divisor)))
    for d in range(whole, size):
        bytes_[d] = np.int8(np.rint(numbers[d] / divisor))


@task
def store_part(p, a, portion, worker, part):
    """A portion of the rows of keys, and of values."""
    for row in range(part * portion, min((part + 1) * portion, p.batch * p.heads * p.rows)):
        b, h, i = row // (p.heads * p.rows), row // p.rows % p.heads, row % p.rows
        slot, at = p.first + i, b * p.scales_b + h * p.scales_h + p.first + i
        store_row(pointer_to(a.keys + 4 * (b * p.k_b + h * p.k_h + i * p.k_n), np.float32), p.key_size,
                  pointer_to(a.key_codes + b * p.key_codes_b + h * p.key_codes_h + slot * p.key_size, np.int8),
                  pointer_to(a.key_scales, np.float32), at)
        store_row(pointer_to(a.values + 4 * (b * p.v_b + h * p.v_h + i * p.v_n), np.float32), p.value_size,
                  pointer_to(a.value_codes + b * p.value_codes_b + h * p.value_codes_h + slot * p.value_size, np.int8),
                  pointer_to(a.value_scales, np.float32), at)


@jit
def store_rows(parameters, addresses, scratch, task_queue, count):
    """See `store`; on at most `count` threads that serve the task_queue.

    parameters STORE, addresses ADDRESSES; no scratch.
    """
    p, a = named(parameters, STORE), located(addresses, ADDRESSES)
    portion, parts = portions(p.batch * p.heads * p.rows, 1, count)
    parallel_for(task_queue, parts, store_part, p, a, portion)


def store(plans, keys, values, key_codes, key_scales, value_codes, value_scales, first):
    """Put tokens into the slots of a cache from `first` on: codes[..., d] * scales = x[..., d], to the nearest code.

    Ties go to even; a row that is not finite has NaN for a scale.

    Parameters
    ----------
    plans : PlanCache
        Of this cache alone, whose arrays are the same ones in every call.
    keys, values : (B, Hkv, n, size) float32, last dimension contiguous
    key_codes, value_codes : (B, Hkv, capacity, size) int8, C order; written
    key_scales, value_scales : (B, Hkv, capacity) float32, C order; written
        max|x| / 127 of each row, 0 where that is no normal number.
    """
    key = keys.shape, keys.strides, values.strides
    call = plans.get(key) or plans.keep(key, _prepare(
        key, key_codes.shape[2], values.shape[3], tuple(map(address, (key_scales, value_codes, value_scales)))))
    call.run(keys, values, key_codes, own=(first,))


def _prepare(key, capacity, value_size, fixed):
    """The `PreparedCall` of keys of such a shape, of the strides of keys and values, and of so many slots.

    fixed : addresses of key_scales, value_codes and value_scales
    """
    (B, H, n, D), k, v = key
    p = blank(STORE, batch=B, heads=H, rows=n, key_size=D, value_size=value_size, key_codes_b=H * capacity * D,
              key_codes_h=capacity * D, value_codes_b=H * capacity * value_size, value_codes_h=capacity * value_size,
              scales_b=H * capacity, scales_h=capacity)
    (p.k_b, p.k_h, p.k_n), (p.v_b, p.v_h, p.v_n) = ([step // 4 for step in each[:3]] for each in (k, v))
    return PreparedCall(store_rows, packed(p, STORE), ADDRESSES, np.float32, 0, 0, 8 * B * H * n * (D + value_size),
                        fixed=fixed, own=_FIRST)
