"""Layer norm and RMS norm of rows: the float operations of edgeattn/kernels/cpu/norm.py, in their order.

A lane of a warp has every 32nd number of a row, as there, and sums are folded by halves.
"""
from edgeattn.kernels.cuda.language import Kernel, device, float32, int32, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    divide,
    float_of_bits,
    fma,
    load_f32,
    multiply,
    quotient,
    remainder,
    select_f,
    shuffle_f,
    square_root,
    store_f32,
    thread,
    times,
    times_wide,
)

THREADS, ROWS = 128, 4  # a warp per row
(A_X, A_WEIGHT, A_BIAS, A_OUT, A_COUNT) = range(5)
(P_ROWS, P_T, P_WIDTH, P_WIDTH_BITS, P_EPS, P_OUT_B, P_OUT_T, P_COUNT) = range(8)


@device
def sum_of_warp(x):
    """The sum over the lanes: halves are added, again and again."""
    x = x + shuffle_f(x, 16)
    x = x + shuffle_f(x, 8)
    x = x + shuffle_f(x, 4)
    x = x + shuffle_f(x, 2)
    return x + shuffle_f(x, 1)


@specialised
def norm(kind):
    """The kernel of "layer_norm" or "rms_norm": out = norm(x), x (rows, width) float32 in C order.

    out : (B, P_T, width), by P_OUT_B and P_OUT_T; P_WIDTH_BITS and P_EPS have the bits of float32; the bias may be
    absent (0). Grid ceil(rows / 4).
    """
    LAYER = kind == "layer_norm"

    def norm_kernel(a, p):
        t = thread()
        lane = int32(t & 31)
        row = int32(block_x() * ROWS + (t >> 5))
        good, width = row < p[P_ROWS], float_of_bits(p[P_WIDTH_BITS])
        x = a[A_X] + times_wide(row, int32(p[P_WIDTH] * 4))
        mean = float32(0.0)
        if LAYER:
            total = float32(0.0)
            for d0 in range(0, p[P_WIDTH], 32):
                d = int32(d0 + lane)
                total = total + load_f32(good & (d < p[P_WIDTH]), x + d * 4)
            mean = divide(sum_of_warp(total), width)
        squares = float32(0.0)
        for d0 in range(0, p[P_WIDTH], 32):
            d = int32(d0 + lane)
            there = good & (d < p[P_WIDTH])
            v = select_f(there, load_f32(there, x + d * 4) - mean, float32(0.0))
            squares = fma(v, v, squares)
        variance = divide(sum_of_warp(squares), width)
        inverse = divide(float32(1.0), square_root(variance + float_of_bits(p[P_EPS])))
        out = (a[A_OUT] + times_wide(quotient(row, p[P_T]), p[P_OUT_B])
               + times_wide(remainder(row, p[P_T]), p[P_OUT_T]))
        for d0 in range(0, p[P_WIDTH], 32):
            d = int32(d0 + lane)
            there = good & (d < p[P_WIDTH])
            v = multiply(load_f32(there, x + d * 4) - mean, inverse)
            bias = load_f32(there & (a[A_BIAS] != 0), a[A_BIAS] + times(d, 4))
            store_f32(there, out + d * 4, fma(v, load_f32(there, a[A_WEIGHT] + times(d, 4)), bias))

    return Kernel(norm_kernel, A_COUNT, P_COUNT, THREADS, 0)
