"""The mean of a head's first keys, which int8 products leave out: softmax does not see what all scores share."""
from edgeattn.kernels.cuda.language import Kernel, cuda, float32, int32, shared, smaller, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    divide,
    load_f32,
    load_u8,
    maximum,
    quotient,
    read_f32,
    remainder,
    select_f,
    shuffle_f,
    store_f32,
    thread,
    times,
    times_wide,
    write_f32,
)

from .block import visible_keys

THREADS, FIRST = 128, 32
(A_K, A_MINUS, A_KEEP, A_BIAS, A_LENGTHS, A_COUNT) = range(6)
(P_HKV, P_H, P_L, P_S, P_D, P_LEFT, P_RIGHT, P_OFFSET, P_AT_END, P_LENGTHS_64, P_K_B, P_K_H, P_K_S,
 P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S, P_BIAS_B, P_BIAS_H, P_BIAS_L, P_BIAS_S, P_COUNT) = range(22)
_SMALLEST = 1e-30  # as edgeattn/kernels/cpu/key_mean.py
_INFINITY = float("inf")


@specialised
def smooth():
    """The kernel: minus (B, Hkv, D) = minus the weighted mean of the first 32 keys of k (B, Hkv, S, D) float32.

    The weight of a key is 1 / max|key|, so that none outweighs the others, and 0 where no query of any head sees it, or
    where it is not finite. Grid (B Hkv).
    """

    def smooth_kernel(a, p):
        base = shared()
        t = thread()
        key, part = int32(t & 31), int32(t >> 5)
        batch, head = quotient(block_x(), p[P_HKV]), remainder(block_x(), p[P_HKV])
        k = a[A_K] + times_wide(batch, p[P_K_B]) + times_wide(head, p[P_K_H])
        keep, bias = a[A_KEEP] + times_wide(batch, p[P_KEEP_B]), a[A_BIAS] + times_wide(batch, p[P_BIAS_B])
        length = visible_keys(a[A_LENGTHS], p[P_LENGTHS_64], batch, p[P_S])
        offset = p[P_OFFSET]
        if p[P_AT_END] != 0:
            offset = int32(length - p[P_L])
        # 1. a warp looks at every fourth query, a lane at a key; without a mask one query stands for all
        there = key < length
        if p[P_LEFT] >= 0:
            there = there & (key >= int32(offset - p[P_LEFT]))
        if p[P_RIGHT] >= 0:
            there = there & (key <= int32(p[P_L] - 1 + offset + p[P_RIGHT]))
        seen = float32(0.0)
        queries = int32(1)
        if (a[A_KEEP] != 0) | (a[A_BIAS] != 0):
            queries = times(p[P_H], p[P_L])
        for n0 in range(0, queries, 4):
            n = int32(n0 + part)
            good = there & (n < queries)
            h, q = quotient(n, p[P_L]), remainder(n, p[P_L])
            at = int32(times(h, p[P_KEEP_H]) + times(q, p[P_KEEP_L]) + times(key, p[P_KEEP_S]))
            kept = (load_u8(good & (a[A_KEEP] != 0), keep + at) != 0) | (a[A_KEEP] == 0)
            at = int32(times(h, p[P_BIAS_H]) + times(q, p[P_BIAS_L]) + times(key, p[P_BIAS_S]))
            kept = kept & (load_f32(good & (a[A_BIAS] != 0), bias + at) != float32(-_INFINITY))
            seen = select_f(good & kept, float32(1.0), seen)
        write_f32(int32(base + t * 4), seen)
        # 2. weights, in lanes, the same in every warp
        size = float32(0.0)
        for d in range(p[P_D]):
            v = load_f32(key < p[P_S], k + (times(key, p[P_K_S]) + int32(d) * 4))
            size = maximum(size, maximum(v, -v))
        cuda.syncthreads()
        for i in range(4):
            seen = maximum(seen, read_f32(int32(base + (i * 32 + key) * 4)))
        good = (seen > float32(0.0)) & (size > float32(_SMALLEST)) & (size < float32(_INFINITY))
        weight = select_f(good, divide(float32(1.0), select_f(good, size, float32(1.0))), float32(0.0))
        total = weight
        for step in range(5):
            total = total + shuffle_f(total, int32(1 << step))
        cuda.syncthreads()
        write_f32(int32(base + t * 4), divide(weight, maximum(total, float32(_SMALLEST))))
        cuda.syncthreads()
        # 3. the mean, a number of the head per thread
        for d0 in range(0, p[P_D], THREADS):
            d = int32(d0 + t)
            mean = float32(0.0)
            for s in range(smaller(p[P_S], FIRST)):
                w = read_f32(int32(base + int32(s) * 4))
                v = load_f32(d < p[P_D], k + (times(int32(s), p[P_K_S]) + d * 4))
                mean = mean + select_f(w > float32(0.0), v * w, float32(0.0))
            store_f32(d < p[P_D], a[A_MINUS] + times_wide(block_x(), times(p[P_D], 4)) + d * 4, -mean)

    return Kernel(smooth_kernel, A_COUNT, P_COUNT, THREADS, THREADS * 4)
