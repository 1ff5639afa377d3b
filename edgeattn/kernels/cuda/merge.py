"""Joining what several splits of the keys gave for the same queries."""
from edgeattn.kernels.cuda.language import Kernel, device, float32, int32, larger, log, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    divide,
    fma,
    load_f32,
    maximum,
    quotient,
    remainder,
    select_f,
    store_f16,
    store_f32,
    thread,
    times,
)

from .softmax import exp2

THREADS = 128
(A_PART, A_LARGEST, A_SUMS, A_OUT, A_LSE, A_COUNT) = range(6)
(P_ROWS, P_DV, P_SPLITS, P_L, P_H, P_OUT_B, P_OUT_H, P_OUT_L, P_COUNT) = range(9)
_LN_2 = 0.6931471805599453
_MINUS_INFINITY = float("-inf")


@device
def store_f32_or_f16(half, good, address, value):
    """Store one number in the result's format."""
    if half:
        store_f16(good, address, value)
    else:
        store_f32(good, address, value)


@specialised
def merge(out_format):
    """The kernel: out = the mean of the splits' results, weighted by 2**(largest - the largest of all) * sum.

    Grid ceil(rows * Dv / 128): a thread per number of the result, and one per row where Dv is 0. `rows` counts B H L.
    """
    HALF, SIZE = out_format == "float16", 2 if out_format == "float16" else 4

    def merge_kernel(a, p):
        # part (splits, B H L, Dv)  largest, sums (splits, B H L), to base 2  out (B, H, L, Dv)  lse (B H L)
        n = int32(block_x() * THREADS + thread())
        size = int32(larger(p[P_DV], 1))
        row, d = quotient(n, size), remainder(n, size)
        good = row < p[P_ROWS]
        stored = good & (d < p[P_DV])
        best = float32(_MINUS_INFINITY)
        for split in range(p[P_SPLITS]):
            found = load_f32(good, a[A_LARGEST] + times(int32(times(int32(split), p[P_ROWS]) + row), 4))
            best = maximum(best, found)
        base = select_f(best == float32(_MINUS_INFINITY), float32(0.0), best)
        total, mixed = float32(0.0), float32(0.0)
        for split in range(p[P_SPLITS]):
            at = int32(times(int32(split), p[P_ROWS]) + row)
            found = load_f32(good, a[A_LARGEST] + times(at, 4))
            weight = exp2(found - base) * load_f32(good, a[A_SUMS] + times(at, 4))
            total = total + weight
            part = load_f32(stored, a[A_PART] + times(int32(times(at, p[P_DV]) + d), 4))
            mixed = fma(weight, part, mixed)
        none = total == float32(0.0)
        result = select_f(none, float32(0.0), divide(mixed, select_f(none, float32(1.0), total)))
        head = quotient(row, p[P_L])
        i = remainder(row, p[P_L])
        at = int32(times(quotient(head, p[P_H]), p[P_OUT_B]) + times(remainder(head, p[P_H]), p[P_OUT_H])
                   + times(i, p[P_OUT_L]) + d * SIZE)
        store_f32_or_f16(HALF, stored, a[A_OUT] + at, result)
        if a[A_LSE] != 0:
            store_f32(good & (d == 0), a[A_LSE] + times(row, 4),
                      select_f(none, float32(_MINUS_INFINITY), float32(log(total)) + base * float32(_LN_2)))

    return Kernel(merge_kernel, A_COUNT, P_COUNT, THREADS, 0)
