"""float32 projections: y = x w^T + bias, the heads written apart, up to three (query, key, value) in one launch.

A block has 64 tokens and 64 features, 32 numbers of depth at a time, in the tiles of attention.py.
"""
from edgeattn.kernels.cuda.language import Kernel, cuda, float32, int32, shared, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    block_y,
    block_z,
    load_f32,
    quotient,
    remainder,
    store_f32,
    thread,
    times,
    times_wide,
)

from .activation import ACTIVATIONS
from .fetch import fetch_float32
from .multiply_adds import multiply_tiles, write_column

TILE, DEPTH, THREADS = 64, 32, 128
# One of each per projection, three projections: where z = 0, 1, 2.
(A_X, A_W, A_BIAS, A_OUT) = range(0, 12, 3)
A_COUNT, (A_FACTOR, A_RESIDUAL) = 12, (12, 13)
(P_ROWS, P_T, P_X_ROW, P_DEPTH, P_FEATURES, P_HEAD, P_OUT_B, P_OUT_H, P_OUT_T) = range(0, 27, 3)
P_COUNT = 27


@specialised
def linear(wide, activation=None):
    """The kernel: out[b, h, t, d] = sum over e of x[b t, e] w[h D + d, e] + bias[h D + d].

    Grid (ceil(rows / 64), ceil(features / 64), projections). `wide`: depth, and x's rows, are multiples of four numbers
    and 16-byte aligned. Weights are (features, depth) in C order; bias may be absent (0).
    With an `activation` of one projection: activation(out) * factor + residual, both (rows, features) in C order, or 0.
    """
    WIDE, FOLLOWED = bool(wide), activation is not None
    activate = ACTIVATIONS[activation or "identity"]

    def linear_kernel(a, p):
        base = shared()
        w_at = int32(base + TILE * DEPTH * 4)
        t, z = thread(), block_z()
        tx, ty = int32(t & 15), int32(t >> 4)
        r0, f0 = int32(block_x() * TILE), int32(block_y() * TILE)
        x, w, bias, out = a[A_X], a[A_W], a[A_BIAS], a[A_OUT]
        rows, tokens, x_row, depth = p[P_ROWS], p[P_T], p[P_X_ROW], p[P_DEPTH]
        features, size = p[P_FEATURES], p[P_HEAD]
        out_b, out_h, out_t = p[P_OUT_B], p[P_OUT_H], p[P_OUT_T]
        if z == 1:
            x, w, bias, out = a[A_X + 1], a[A_W + 1], a[A_BIAS + 1], a[A_OUT + 1]
            rows, tokens, x_row, depth = p[P_ROWS + 1], p[P_T + 1], p[P_X_ROW + 1], p[P_DEPTH + 1]
            features, size = p[P_FEATURES + 1], p[P_HEAD + 1]
            out_b, out_h, out_t = p[P_OUT_B + 1], p[P_OUT_H + 1], p[P_OUT_T + 1]
        if z == 2:
            x, w, bias, out = a[A_X + 2], a[A_W + 2], a[A_BIAS + 2], a[A_OUT + 2]
            rows, tokens, x_row, depth = p[P_ROWS + 2], p[P_T + 2], p[P_X_ROW + 2], p[P_DEPTH + 2]
            features, size = p[P_FEATURES + 2], p[P_HEAD + 2]
            out_b, out_h, out_t = p[P_OUT_B + 2], p[P_OUT_H + 2], p[P_OUT_T + 2]
        sums = cuda.local.array((8, 4), float32)
        left = cuda.local.array(8, float32)
        right = cuda.local.array(4, float32)
        for i in range(8):
            for j in range(4):
                sums[i, j] = float32(0.0)
        if (r0 < rows) & (f0 < features):
            for e0 in range(0, depth, DEPTH):
                e0 = int32(e0)
                cuda.syncthreads()
                for i in range(4):
                    row, column = int32((t + i * THREADS) >> 3), int32((t + i * THREADS) & 7)
                    gone = int32(depth - e0 - column * 4)
                    v0, v1, v2, v3 = fetch_float32(WIDE, x + (times(int32(r0 + row), x_row) + (e0 + column * 4) * 4),
                                                   int32(r0 + row) < rows, gone)
                    write_column(base, TILE * 4, row, column, v0, v1, v2, v3)
                    v0, v1, v2, v3 = fetch_float32(WIDE, w + (times(int32(f0 + row), int32(depth * 4))
                                                              + (e0 + column * 4) * 4),
                                                   int32(f0 + row) < features, gone)
                    write_column(w_at, TILE * 4, row, column, v0, v1, v2, v3)
                cuda.syncthreads()
                multiply_tiles(base, TILE * 4, w_at, DEPTH // 4, tx, ty, left, right, sums)
            for j in range(4):
                f = int32(f0 + tx * 4 + j)
                offset = load_f32((f < features) & (bias != 0), bias + f * 4)
                to_f = int32(times(quotient(f, size), out_h) + remainder(f, size) * 4)
                for i in range(8):
                    r = int32(r0 + ty * 8 + i)
                    to = int32(times(quotient(r, tokens), out_b) + times(remainder(r, tokens), out_t) + to_f)
                    y = sums[i, j] + offset
                    if FOLLOWED:
                        good, at = (r < rows) & (f < features), times_wide(r, int32(features * 4)) + f * 4
                        y = activate(y)
                        if a[A_FACTOR] != 0:
                            y = y * load_f32(good, a[A_FACTOR] + at)
                        if a[A_RESIDUAL] != 0:
                            y = y + load_f32(good, a[A_RESIDUAL] + at)
                    store_f32((r < rows) & (f < features), out + to, y)

    return Kernel(linear_kernel, A_COUNT + (2 if FOLLOWED else 0), P_COUNT, THREADS, 2 * TILE * DEPTH * 4)
