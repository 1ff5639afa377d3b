"""Linear maps of rows with int8 weights, whose inputs are quantized at run time, and what follows them.

The rules of edgeattn/kernels/cpu/dynamic_rows.py, and its float operations in their order: a scale for each
token, or, of the hidden features of a feed-forward, a scale and a zero point for each GROUP of them; a few inputs whose
products are float32; a second code for the weights of some outputs. Tiles as in byte_tiles.py.
"""
from edgeattn.kernels.cuda.language import Kernel, cuda, device, float32, int32, shared, specialised
from edgeattn.kernels.cuda.ptx import (
    add,
    block_x,
    block_y,
    divide,
    float_of_bits,
    fma,
    load_b32,
    load_f32,
    maximum,
    multiply,
    nearest,
    quotient,
    remainder,
    select_f,
    select_i,
    shuffle_f,
    store_b32,
    store_f32,
    store_s8,
    thread,
    times,
    times_wide,
    to_float,
)

from .activation import ACTIVATIONS
from .byte_tiles import THREADS, TILE, TILE_BYTES, clear, multiply_s8, stage_rows

GROUP = 256  # hidden features that share a scale
MOST_APART = 4
_INFINITY, _LARGEST_FLOAT = float("inf"), 3.4028234663852886e38

# -- rows to bytes ---------------------------------------------------------------------------------------------------
ROWS = 4  # a warp per row and group
(Q_X, Q_OUT, Q_SCALE, Q_MINUS, Q_ADDRESSES) = range(5)
(Q_ROWS, Q_WIDTH, Q_UP, Q_GROUP, Q_GROUPS, Q_J0, Q_J1, Q_J2, Q_J3, Q_NUMBERS) = range(10)


@device
def largest_of_warp(x):
    """The largest number over the lanes."""
    x = maximum(x, shuffle_f(x, 16))
    x = maximum(x, shuffle_f(x, 8))
    x = maximum(x, shuffle_f(x, 4))
    x = maximum(x, shuffle_f(x, 2))
    return maximum(x, shuffle_f(x, 1))


@device
def inverse_of(levels, size):
    """What numbers are multiplied by to become codes."""
    inverse = divide(float32(levels), size)
    return select_f(inverse < float32(_LARGEST_FLOAT), inverse, float32(_LARGEST_FLOAT))


@specialised
def quantize(ranged):
    """The kernel: rows x (rows, width) float32 in C order to codes (rows, Q_UP), and scales (rows, groups).

    Features Q_J0 to Q_J3 count as 0. Without `ranged` codes are rint(x * (127 / max|x|)). With it they are those of
    [min(x, 0), max(x, 0)] in 255 steps, less 128, and Q_MINUS takes 128 less the zero point: what a code is short of.
    A row with NaN or infinity has scale NaN. Grid ceil(rows groups / 4).
    """
    RANGED = bool(ranged)

    def quantize_kernel(a, p):
        t = thread()
        lane = int32(t & 31)
        item = int32(block_x() * ROWS + (t >> 5))
        good = item < times(p[Q_ROWS], p[Q_GROUPS])
        row, first = quotient(item, p[Q_GROUPS]), times(remainder(item, p[Q_GROUPS]), p[Q_GROUP])
        x = a[Q_X] + times_wide(row, int32(p[Q_WIDTH] * 4))
        out = a[Q_OUT] + times_wide(row, p[Q_UP])
        high, low = float32(0.0), float32(0.0)
        for d0 in range(0, p[Q_GROUP], 32):
            d = int32(first + int32(d0) + lane)
            kept = (d != p[Q_J0]) & (d != p[Q_J1]) & (d != p[Q_J2]) & (d != p[Q_J3])
            v = load_f32(good & kept & (d < p[Q_WIDTH]), x + times(d, 4))
            high, low = maximum(high, v), maximum(low, -v)
        if RANGED:
            low = largest_of_warp(low)
            size = largest_of_warp(high) + low
            scale, inverse = size * float32(1 / 255), inverse_of(255.0, size)
        else:
            size = largest_of_warp(maximum(high, low))
            scale, inverse = size * float32(1 / 127), inverse_of(127.0, size)
        finite = size < float32(_INFINITY)
        shift, least = int32(0), int32(-127)
        if RANGED:
            shift, least = int32(nearest(low * inverse) - 128), int32(-128)
        for d0 in range(0, p[Q_GROUP], 32):
            d = int32(first + int32(d0) + lane)
            kept = (d != p[Q_J0]) & (d != p[Q_J1]) & (d != p[Q_J2]) & (d != p[Q_J3])
            v = load_f32(good & kept & (d < p[Q_WIDTH]), x + times(d, 4))
            code = int32(nearest(v * inverse) + shift)
            code = select_i(code > 127, int32(127), select_i(code < least, least, code))
            store_s8(good & (d < p[Q_UP]), out + times(d, 1), select_i(finite, code, int32(0)))
        there = good & (lane == 0)
        store_f32(there, a[Q_SCALE] + times_wide(item, 4), select_f(finite, scale, float_of_bits(int32(0x7FC00000))))
        if RANGED:
            store_b32(there, a[Q_MINUS] + times_wide(item, 4), select_i(finite, int32(-shift), int32(0)))

    return Kernel(quantize_kernel, Q_ADDRESSES, Q_NUMBERS, THREADS, 0)


# -- products --------------------------------------------------------------------------------------------------------
(A_X, A_W, A_SCALE, A_BIAS, A_X_SCALE, A_X_MINUS, A_SUMS, A_APART, A_APART_W, A_SECOND, A_SECOND_OF, A_FACTOR,
 A_RESIDUAL, A_OUT, A_COUNT) = range(15)
(P_ROWS, P_T, P_DEPTH, P_FEATURES, P_FEATURES_UP, P_GROUPS, P_APART, P_J0, P_J1, P_J2, P_J3, P_WIDTH, P_SECONDS,
 P_OUT_B, P_OUT_T, P_COUNT) = range(16)


@specialised
def linear_rows(activation, grouped):
    """The kernel: out = activation(x w^T scale + bias, ...) * factor + residual, float32.

    x (rows, depth) codes with scales (rows, groups), w (features up, depth) codes; depth and features up are multiples
    of 64. `grouped`: GROUP inputs share a scale, and what their codes are short of, (rows, groups) at A_X_MINUS, is
    made good by the sums (groups, features up) of the weights. A_APART: the rows (rows, P_WIDTH) in float32, of which
    P_APART features J have weights (P_APART, features up) of their own. A_SECOND (rows, P_SECONDS): the second products
    of some outputs, by A_SECOND_OF (features up), -1 for none. factor, residual (rows, features) in C order, or 0; out
    (B, P_T, features) by P_OUT_B and P_OUT_T. Grid (ceil(rows / 64), features up / 64).
    """
    GROUPED, activate = bool(grouped), ACTIVATIONS[activation]

    def linear_kernel(a, p):
        base = shared()
        w_at = int32(base + TILE_BYTES)
        t = thread()
        lane, warp = int32(t & 31), int32(t >> 5)
        rows, depth, features = p[P_ROWS], p[P_DEPTH], p[P_FEATURES]
        r0, f0 = int32(block_x() * TILE), int32(block_y() * TILE)
        row0, first = int32(r0 + warp * 16 + (lane >> 2)), int32(f0 + (lane & 3) * 2)
        c = cuda.local.array((8, 4), int32)
        sums = cuda.local.array((8, 4), float32)
        scale = cuda.local.array(2, float32)
        minus = cuda.local.array(2, int32)
        clear(c)
        for n in range(8):
            for j in range(4):
                sums[n, j] = float32(0.0)
        for e0 in range(0, depth, TILE):
            e0 = int32(e0)
            cuda.syncthreads()
            stage_rows(base, t, a[A_X] + times_wide(r0, depth) + e0, depth, int32(rows - r0))
            stage_rows(w_at, t, a[A_W] + times_wide(f0, depth) + e0, depth, TILE)
            cuda.syncthreads()
            multiply_s8(base, w_at, warp, lane, c)
            whole = ((e0 & (GROUP - TILE)) == GROUP - TILE) | (int32(e0 + TILE) == depth)
            if GROUPED and whole:
                group = int32(e0 // GROUP)
                for i in range(2):
                    row = int32(row0 + 8 * i)
                    at = times_wide(int32(times(row, p[P_GROUPS]) + group), 4)
                    scale[i] = load_f32(row < rows, a[A_X_SCALE] + at)
                    minus[i] = load_b32(row < rows, a[A_X_MINUS] + at)
                for n in range(8):
                    for j in range(4):
                        f = int32(first + n * 8 + (j & 1))
                        of_weights = load_b32(f >= 0, a[A_SUMS] + int32(times(group, p[P_FEATURES_UP]) + f) * 4)
                        v = to_float(int32(c[n, j] + times(minus[j >> 1], of_weights)))
                        if group == 0:
                            sums[n, j] = multiply(v, scale[j >> 1])
                        else:
                            sums[n, j] = fma(v, scale[j >> 1], sums[n, j])
                        c[n, j] = int32(0)
        if not GROUPED:
            for i in range(2):
                row = int32(row0 + 8 * i)
                scale[i] = load_f32(row < rows, a[A_X_SCALE] + times_wide(row, 4))
            for n in range(8):
                for j in range(4):
                    sums[n, j] = multiply(to_float(c[n, j]), scale[j >> 1])
        for n in range(8):
            for j in range(4):
                r, f = int32(row0 + 8 * (j >> 1)), int32(first + n * 8 + (j & 1))
                good = (r < rows) & (f < features)
                y = fma(sums[n, j], load_f32(good, a[A_SCALE] + f * 4), load_f32(good, a[A_BIAS] + f * 4))
                kept, w = a[A_APART] + times_wide(r, int32(p[P_WIDTH] * 4)), a[A_APART_W] + f * 4
                w_row = int32(p[P_FEATURES_UP] * 4)
                if p[P_APART] > 0:
                    y = fma(load_f32(good, kept + times(p[P_J0], 4)), load_f32(good, w), y)
                if p[P_APART] > 1:
                    y = fma(load_f32(good, kept + times(p[P_J1], 4)), load_f32(good, w + w_row), y)
                if p[P_APART] > 2:
                    y = fma(load_f32(good, kept + times(p[P_J2], 4)), load_f32(good, w + times(w_row, 2)), y)
                if p[P_APART] > 3:
                    y = fma(load_f32(good, kept + times(p[P_J3], 4)), load_f32(good, w + times(w_row, 3)), y)
                if a[A_SECOND] != 0:
                    k = load_b32(f >= 0, a[A_SECOND_OF] + f * 4)
                    more = good & (k >= 0)
                    at = times_wide(int32(times(r, p[P_SECONDS]) + k), 4)
                    y = select_f(more, add(y, load_f32(more, a[A_SECOND] + at)), y)
                y = activate(y)
                at = times_wide(r, int32(features * 4)) + f * 4
                if a[A_FACTOR] != 0:
                    y = multiply(y, load_f32(good, a[A_FACTOR] + at))
                if a[A_RESIDUAL] != 0:
                    y = add(y, load_f32(good, a[A_RESIDUAL] + at))
                to = (a[A_OUT] + times_wide(quotient(r, p[P_T]), p[P_OUT_B])
                      + times_wide(remainder(r, p[P_T]), p[P_OUT_T]))
                store_f32(good, to + f * 4, y)

    return Kernel(linear_kernel, A_COUNT, P_COUNT, THREADS, 2 * TILE_BYTES)
