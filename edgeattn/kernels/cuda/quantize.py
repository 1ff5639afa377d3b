"""Rows of float32 to int8 codes with a scale each, or as they are: into a cache, or for int8 products."""
from edgeattn.kernels.cuda.language import Kernel, float32, int32, specialised
from edgeattn.kernels.cuda.ptx import (
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
(A_X, A_OUT, A_SCALE, A_MINUS, A_COUNT) = range(5)
(P_ROWS, P_H, P_T, P_D, P_UP, P_FACTOR, P_X_B, P_X_H, P_X_T, P_OUT_B, P_OUT_H, P_OUT_T, P_OUT_D, P_SCALE_B, P_SCALE_H,
 P_SCALE_T, P_COUNT) = range(17)
_LARGEST = float("inf")
_LARGEST_FLOAT = 3.4028234663852886e38
_TINY = 1.1754943508222875e-38  # the smallest normal float32


@specialised
def store_rows(rule):
    """The kernel: out[b, h, t, :] = x[b, h, t, :], x (B, H, T, D) float32 with neighbours along D.

    With a `rule` int8 codes, a scale per row to A_SCALE, and zeros for D <= d < P_UP; a row with NaN or infinity has
    scale NaN and codes 0. "cache": codes rint(x / scale), scale = max|x| / 127, 0 for a row of zeros or of scales below
    normal float32, as edgeattn/kv_cache.py. "dynamic": of x' = (x + A_MINUS (B, H, D), where given) * P_FACTOR the
    codes rint(x' * (127 / max|x'|)), scale = max|x'| * (1 / 127), as edgeattn/kernels/cpu/dynamic.py. "fixed": codes
    rint(x / P_FACTOR) and no scales; infinity saturates, NaN has code 0.
    Grid ceil(B H T / 4).
    """
    INT8, DYNAMIC, FIXED = rule is not None, rule == "dynamic", rule == "fixed"

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
            factor = float_of_bits(p[P_FACTOR])
            minus = a[A_MINUS] + times_wide(int32(times(batch, p[P_H]) + head), int32(p[P_D] * 4))
            largest = float32(0.0)
            for d0 in range(0, 0 if FIXED else p[P_D], 32):
                d = int32(d0 + lane)
                v = load_f32(good & (d < p[P_D]), x + d * 4)
                if DYNAMIC:
                    v = (v + load_f32(good & (d < p[P_D]) & (a[A_MINUS] != 0), minus + d * 4)) * factor
                largest = maximum(largest, maximum(v, -v))
            largest = maximum(largest, shuffle_f(largest, 16))
            largest = maximum(largest, shuffle_f(largest, 8))
            largest = maximum(largest, shuffle_f(largest, 4))
            largest = maximum(largest, shuffle_f(largest, 2))
            largest = maximum(largest, shuffle_f(largest, 1))
            finite = largest < float32(_LARGEST)
            if DYNAMIC:
                scale = largest * float32(1 / 127)
                inverse = divide(float32(127.0), largest)
                inverse = select_f(inverse < float32(_LARGEST_FLOAT), inverse, float32(_LARGEST_FLOAT))
            elif FIXED:
                divisor = factor
            else:
                scale = divide(largest, float32(127.0))
                scale = select_f(scale < float32(_TINY), float32(0.0), scale)
                divisor = select_f(scale > float32(0.0), scale, float32(1.0))
            for d0 in range(0, p[P_UP], 32):
                d = int32(d0 + lane)
                v = load_f32(good & (d < p[P_D]), x + d * 4)
                if DYNAMIC:
                    v = (v + load_f32(good & (d < p[P_D]) & (a[A_MINUS] != 0), minus + d * 4)) * factor
                    code = nearest(v * inverse)
                else:
                    code = nearest(divide(v, divisor))
                code = select_i(code > 127, int32(127), select_i(code < -127, int32(-127), code))
                store_s8(good & (d < p[P_UP]), out + times(d, p[P_OUT_D]), select_i(finite, code, int32(0)))
            if not FIXED:
                to = a[A_SCALE] + times_wide(batch, p[P_SCALE_B]) + times_wide(head, p[P_SCALE_H])
                scale = select_f(finite, scale, float_of_bits(int32(0x7FC00000)))
                store_f32(good & (lane == 0), to + times(i, p[P_SCALE_T]), scale)
        else:
            for d0 in range(0, p[P_D], 32):
                d = int32(d0 + lane)
                there = good & (d < p[P_D])
                store_f32(there, out + d * 4, load_f32(there, x + d * 4))

    return Kernel(store_kernel, A_COUNT, P_COUNT, THREADS, 0)
