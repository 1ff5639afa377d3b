"""What is done number by number: means over heads, gates, sums; and rows taken by their numbers."""
from edgeattn.kernels.cuda.language import Kernel, float32, int32, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    divide,
    float_of_bits,
    load_b32,
    load_f32,
    quotient,
    remainder,
    select_f,
    store_f32,
    thread,
    times,
    times_wide,
)

from .softmax import LOG2_E, exp2

THREADS = 128

# -- mean over heads -------------------------------------------------------------------------------------------------
(M_X, M_OUT, M_ADDRESSES) = range(3)
(M_SIZE, M_H, M_ROW, M_HEADS, M_NUMBERS) = range(5)


@specialised
def mean_of_heads():
    """The kernel: out (B, L, S) = the mean of x (B, H, L, S) over H, float32 in C order; M_ROW counts L S.

    M_HEADS has the bits of float32 H. Grid ceil(B L S / 128).
    """

    def mean_kernel(a, p):
        n = int32(block_x() * THREADS + thread())
        good = n < p[M_SIZE]
        at = a[M_X] + times_wide(int32(times(quotient(n, p[M_ROW]), p[M_H])), int32(p[M_ROW] * 4))
        at = at + times(remainder(n, p[M_ROW]), 4)
        total = float32(0.0)
        for h in range(p[M_H]):
            total = total + load_f32(good, at + times_wide(int32(h), int32(p[M_ROW] * 4)))
        store_f32(good, a[M_OUT] + times_wide(n, 4), divide(total, float_of_bits(p[M_HEADS])))

    return Kernel(mean_kernel, M_ADDRESSES, M_NUMBERS, THREADS, 0)


# -- gate ------------------------------------------------------------------------------------------------------------
(G_GATE, G_X, G_ADDRESSES) = range(3)
(G_SIZE, G_T, G_WIDTH, G_X_B, G_X_T, G_NUMBERS) = range(6)


@specialised
def gate():
    """The kernel: x (B, T, width) *= sigmoid(gate), gate (B, T, width) in C order, x by its strides; float32.

    Grid ceil(B T width / 128).
    """

    def gate_kernel(a, p):
        n = int32(block_x() * THREADS + thread())
        good = n < p[G_SIZE]
        row, d = quotient(n, p[G_WIDTH]), remainder(n, p[G_WIDTH])
        to = (a[G_X] + times_wide(quotient(row, p[G_T]), p[G_X_B]) + times_wide(remainder(row, p[G_T]), p[G_X_T])
              + times(d, 4))
        power = load_f32(good, a[G_GATE] + times_wide(n, 4)) * float32(-LOG2_E)
        power = select_f(power > float32(127.0), float32(127.0), power)
        y = divide(load_f32(good, to), float32(1.0) + exp2(power))
        store_f32(good, to, y)

    return Kernel(gate_kernel, G_ADDRESSES, G_NUMBERS, THREADS, 0)


# -- sum -------------------------------------------------------------------------------------------------------------
(S_X, S_Y, S_OUT, S_ADDRESSES) = range(4)
(S_SIZE, S_T, S_WIDTH, S_OUT_B, S_OUT_T, S_NUMBERS) = range(6)


@specialised
def add_rows():
    """The kernel: out (B, T, width) = x + y, both (B, T, width) in C order, out by its strides; float32.

    Grid ceil(B T width / 128).
    """

    def add_kernel(a, p):
        n = int32(block_x() * THREADS + thread())
        good = n < p[S_SIZE]
        row = quotient(n, p[S_WIDTH])
        to = (a[S_OUT] + times_wide(quotient(row, p[S_T]), p[S_OUT_B]) + times_wide(remainder(row, p[S_T]), p[S_OUT_T])
              + times(remainder(n, p[S_WIDTH]), 4))
        at = times_wide(n, 4)
        store_f32(good, to, load_f32(good, a[S_X] + at) + load_f32(good, a[S_Y] + at))

    return Kernel(add_kernel, S_ADDRESSES, S_NUMBERS, THREADS, 0)


# -- rows by their numbers -------------------------------------------------------------------------------------------
(T_X, T_ROWS, T_OUT, T_ADDRESSES) = range(4)


@specialised
def take_rows():
    """The kernel: out[r] = x[rows[r]], zeros for a number below 0; x (..., width) float32 and rows int32 in C order.

    Numbers and grid as `add_rows`.
    """

    def take_kernel(a, p):
        n = int32(block_x() * THREADS + thread())
        good = n < p[S_SIZE]
        row, d = quotient(n, p[S_WIDTH]), times(remainder(n, p[S_WIDTH]), 4)
        to = a[T_OUT] + times_wide(quotient(row, p[S_T]), p[S_OUT_B]) + times_wide(remainder(row, p[S_T]), p[S_OUT_T])
        taken = load_b32(good, a[T_ROWS] + times_wide(row, 4))
        x = a[T_X] + times_wide(taken, int32(p[S_WIDTH] * 4))
        store_f32(good, to + d, load_f32(good & (taken >= 0), x + d))

    return Kernel(take_kernel, T_ADDRESSES, S_NUMBERS, THREADS, 0)
