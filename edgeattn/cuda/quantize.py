"""Rows of float32 to int8 codes with a scale each, or as they are: into a cache, or between a dynamic layer's steps."""
from edgeattn.cuda.language import Kernel, float32, int32, specialised
from edgeattn.cuda.ptx import (
    block_x,
    divide,
    float_of_bits,
    load_f32,
    maximum,
    nearest,
    quotient,
    remainder,
    select_f,
    select_i,
    shuffle_f,
    store_f32,
    store_s8,
    thread,
    times,
    times_wide,
)

THREADS, ROWS = 128, 4  # a warp per row
(A_X, A_OUT, A_SCALE, A_COUNT) = range(4)
(P_ROWS, P_H, P_T, P_D, P_UP, P_X_B, P_X_H, P_X_T, P_OUT_B, P_OUT_H, P_OUT_T, P_OUT_D, P_SCALE_B, P_SCALE_H, P_SCALE_T,
 P_COUNT) = range(16)
_LARGEST = float("inf")
_TINY = 1.1754943508222875e-38  # the smallest normal float32


@specialised
def store_rows(to_int8):
    """The kernel: out[b, h, t, :] = x[b, h, t, :], x (B, H, T, D) float32 with neighbours along D.

    With `to_int8` codes rint(x / scale), scale = max|x| / 127 to A_SCALE, zeros for D <= d < P_UP; a row of zeros or of
    scales below normal float32 has scale 0, a row with NaN or infinity scale NaN and codes 0.
    Grid ceil(B H T / 4).
    """
    INT8 = bool(to_int8)

    def store_kernel(a, p):
        t = thread()
        lane = int32(t & 31)
        row = int32(block_x() * ROWS + (t >> 5))
        good = row < p[P_ROWS]
        i = remainder(row, p[P_T])
        head = remainder(quotient(row, p[P_T]), p[P_H])
        batch = quotient(quotient(row, p[P_T]), p[P_H])
        x = a[A_X] + times_wide(batch, p[P_X_B]) + times_wide(head, p[P_X_H]) + times_wide(i, p[P_X_T])
        out = a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times_wide(head, p[P_OUT_H]) + times_wide(i, p[P_OUT_T])
        if INT8:
            largest = float32(0.0)
            for d0 in range(0, p[P_D], 32):
                v = load_f32(good & (int32(d0 + lane) < p[P_D]), x + (d0 + lane) * 4)
                largest = maximum(largest, maximum(v, -v))
            largest = maximum(largest, shuffle_f(largest, 16))
            largest = maximum(largest, shuffle_f(largest, 8))
            largest = maximum(largest, shuffle_f(largest, 4))
            largest = maximum(largest, shuffle_f(largest, 2))
            largest = maximum(largest, shuffle_f(largest, 1))
            scale = divide(largest, float32(127.0))
            scale = select_f(scale < float32(_TINY), float32(0.0), scale)
            finite = largest < float32(_LARGEST)
            scale = select_f(finite, scale, float_of_bits(int32(0x7FC00000)))
            safe = select_f(scale > float32(0.0), scale, float32(1.0))
            for d0 in range(0, p[P_UP], 32):
                d = int32(d0 + lane)
                v = load_f32(good & (d < p[P_D]), x + d * 4)
                code = nearest(divide(v, safe))
                code = select_i(code > 127, int32(127), select_i(code < -127, int32(-127), code))
                store_s8(good & (d < p[P_UP]), out + times(d, p[P_OUT_D]), select_i(finite, code, int32(0)))
            to = a[A_SCALE] + times_wide(batch, p[P_SCALE_B]) + times_wide(head, p[P_SCALE_H])
            store_f32(good & (lane == 0), to + times(i, p[P_SCALE_T]), scale)
        else:
            for d0 in range(0, p[P_D], 32):
                d = int32(d0 + lane)
                there = good & (d < p[P_D])
                store_f32(there, out + d * 4, load_f32(there, x + d * 4))

    return Kernel(store_kernel, A_COUNT, P_COUNT, THREADS, 0)
