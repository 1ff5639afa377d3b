"""How a block of attention.py brings tiles to shared memory: its threads some rows at a time, in fours of numbers."""
import functools

from edgeattn.kernels.cuda.language import device, float32, int32, log
from edgeattn.kernels.cuda.ptx import divide, load_f32, maximum, select_f, times, write_f32

from .attention_parameters import A_KEY_SCALE, A_VALUE_SCALE, P_D, P_DV, P_K_S, P_L, P_Q_L, P_SCALE_S, P_V_S
from .fetch import fetch_codes
from .softmax import LOG2_E
from .tiles import KEYS

_SMALLEST_SCALE = 2.0**-60  # of values in int8, as of all int8 tensors


@functools.cache
def staging_queries(fetch, size, rows, chunk, wide, late, put):
    """A function that brings a tile of queries to shared memory with `put`, times `factor` unless scores are `late`."""
    STEP = 8 * rows // chunk

    @device
    def stage(p, queries_at, four_row, column, query, factor, q0, d_in):
        for i in range(0, rows, STEP):
            row = int32(four_row + i)
            at = int32(times(int32(q0 + row), p[P_Q_L]) + (d_in + column * 4) * size)
            e0, e1, e2, e3 = fetch(wide, query + at, int32(q0 + row) < p[P_L], int32(p[P_D] - d_in - column * 4))
            if not late:
                e0, e1, e2, e3 = e0 * factor, e1 * factor, e2 * factor, e3 * factor
            put(queries_at, row, column, e0, e1, e2, e3)

    return stage


@functools.cache
def staging_keys(fetch, size, scaled, chunk, threads, wide, put):
    """A function that brings a tile of keys to shared memory with `put`."""
    SHIFT = (chunk // 4).bit_length() - 1
    STEP = threads >> SHIFT

    @device
    def stage(a, p, keys_at, t, column, key, scale_at, k0, last, d_in):
        for i in range(KEYS // STEP):
            row = int32(int32(t + i * threads) >> SHIFT)
            at = int32(times(int32(k0 + row), p[P_K_S]) + (d_in + column * 4) * size)
            good = int32(k0 + row) < last
            e0, e1, e2, e3 = fetch(wide, key + at, good, int32(p[P_D] - d_in - column * 4))
            if scaled:
                w = load_f32(good, a[A_KEY_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
            put(keys_at, row, column, e0, e1, e2, e3)

    return stage


@functools.cache
def staging_values(fetch, size, scaled, chunk, threads, wide, put):
    """A function that brings a tile of values to shared memory with `put`; the sum of what that gives."""
    SHIFT, MASK = (chunk // 4).bit_length() - 1, chunk // 4 - 1
    STEP = threads >> SHIFT

    @device
    def stage(a, p, values_at, t, value, scale_at, k0, last, d_out):
        found = float32(0.0)
        column = int32(t & MASK)
        for i in range(0, KEYS, STEP):
            row = int32((t >> SHIFT) + i)
            at = int32(times(int32(k0 + row), p[P_V_S]) + (d_out + column * 4) * size)
            good = int32(k0 + row) < last
            e0, e1, e2, e3 = fetch(wide, value + at, good, int32(p[P_DV] - d_out - column * 4))
            if scaled:
                w = load_f32(good, a[A_VALUE_SCALE] + scale_at + times(int32(k0 + row), p[P_SCALE_S]))
                e0, e1, e2, e3 = e0 * w, e1 * w, e2 * w, e3 * w
            found = found + put(values_at, row, column, e0, e1, e2, e3)
        return found

    return stage


@functools.cache
def staging_turned(chunk, threads, put):
    """As `staging_values`, of int8 values that lie turned: for each of their numbers a row of keys, P_V_S bytes on."""
    STEP = threads * 4 // KEYS

    @device
    def stage(a, p, values_at, t, value, scale_at, k0, last, d_out):
        column = int32(t & 15)
        for i in range(0, chunk, STEP):
            row = int32((t >> 4) + i)
            at = int32(times(int32(d_out + row), p[P_V_S]) + k0 + column * 4)
            e0, e1, e2, e3 = fetch_codes(True, value + at, int32(k0 + column * 4) < last, int32(1))
            put(values_at, row, column, e0, e1, e2, e3)
        return float32(0.0)

    return stage


@device
def list_scales(a, p, lists, t, scale_at, k0, last):
    """Of 64 keys with int8 products, a float32 each: scale, the value's log2 of the scale, and its inverse."""
    i = int32(k0 + (t & (KEYS - 1)))
    at = int32(scale_at + times(i, p[P_SCALE_S]))
    w = load_f32((t < KEYS) & (i < last), a[A_KEY_SCALE] + at)
    size = load_f32(i < last, a[A_VALUE_SCALE] + at)
    size = maximum(size, float32(_SMALLEST_SCALE))
    value_log = float32(log(size)) * float32(LOG2_E)
    write_f32(int32(lists + t * 4), select_f(t < KEYS, w, value_log))
    inverse = select_f(size == size, divide(float32(1.0), size), float32(0.0))  # NaN shows in its log
    write_f32(int32(lists + (t + 2 * KEYS) * 4), inverse)
