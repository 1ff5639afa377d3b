"""Projections of int8 codes, up to three in one launch, to codes or to float32.

Tiles as in byte_tiles.py, letters as in attention.py. Queries and keys are left as (B, H, T, D padded to 64) with zeros
behind D, and values turned, (B, H, D padded to 64, S padded to 64), so that attention reads whole 16 bytes.
"""
from edgeattn.kernels.cuda.language import Kernel, cuda, device, int32, shared, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    block_y,
    block_z,
    fma,
    load_b32,
    load_f32,
    load_s8,
    quotient,
    remainder,
    select_i,
    store_f32,
    store_s8,
    thread,
    times,
    times_wide,
    to_float,
)

from .byte_tiles import THREADS, TILE, TILE_BYTES, clear, multiply_s8, stage_bytes, stage_bytes_wide, stage_rows
from .rules import RULES, clamp_code

# One of each per projection, up to three: where z = 0, 1, 2.
(L_X, L_W, L_BIAS, L_FIRST, L_SECOND, L_OUT, L_X_SCALE, L_TABLE) = range(0, 24, 3)
L_ADDRESSES = 24
(L_ROWS, L_T, L_X_ROW, L_DEPTH, L_W_ROW, L_FEATURES, L_HEAD, L_HEAD_UP, L_STORED, L_ZERO,
 L_OUT_B, L_OUT_H, L_OUT_T, L_OUT_D) = range(0, 42, 3)
L_NUMBERS = 42


@device
def pick(z, first, second, third):
    """The one of three that belongs to projection z."""
    if z == 0:
        return first
    if z == 1:
        return second
    return third


@specialised
def linear_int8(rule, wide, looked_up=False):
    """The kernel of up to three projections on int8 codes.

    out[b, h, t, d] = clamp(rule(x[b t] . w[h D + d] + bias) + zero point), zeros for D <= d < L_STORED; with
    `rule` None float32 (x . w) * x_scale[b t] * w_scale + bias, w_scale and bias float32 at L_FIRST and L_BIAS.
    Grid (ceil(rows / 64), heads * padded D / 64, projections). x (rows, depth), w (features and depth padded to 64s),
    bias with the input's zero point already in it. `wide`: x has rows of whole, aligned 16 bytes.
    `looked_up`: codes c of a projection with a table, int8 (256,) at L_TABLE, become what it has at c + 128.
    """
    WIDE, STATIC, LOOKED_UP = bool(wide), rule is not None, bool(looked_up)
    requantize = RULES[rule] if STATIC else RULES["float_rne"]

    def linear_kernel(a, p):
        base = shared()
        w_at = int32(base + TILE_BYTES)
        t, z = thread(), block_z()
        lane, warp = int32(t & 31), int32(t >> 5)
        x, w = pick(z, a[L_X], a[L_X + 1], a[L_X + 2]), pick(z, a[L_W], a[L_W + 1], a[L_W + 2])
        bias = pick(z, a[L_BIAS], a[L_BIAS + 1], a[L_BIAS + 2])
        first = pick(z, a[L_FIRST], a[L_FIRST + 1], a[L_FIRST + 2])
        second = pick(z, a[L_SECOND], a[L_SECOND + 1], a[L_SECOND + 2])
        out = pick(z, a[L_OUT], a[L_OUT + 1], a[L_OUT + 2])
        x_scale = pick(z, a[L_X_SCALE], a[L_X_SCALE + 1], a[L_X_SCALE + 2])
        rows = pick(z, p[L_ROWS], p[L_ROWS + 1], p[L_ROWS + 2])
        tokens = pick(z, p[L_T], p[L_T + 1], p[L_T + 2])
        x_row = pick(z, p[L_X_ROW], p[L_X_ROW + 1], p[L_X_ROW + 2])
        depth = pick(z, p[L_DEPTH], p[L_DEPTH + 1], p[L_DEPTH + 2])
        w_row = pick(z, p[L_W_ROW], p[L_W_ROW + 1], p[L_W_ROW + 2])
        features = pick(z, p[L_FEATURES], p[L_FEATURES + 1], p[L_FEATURES + 2])
        size = pick(z, p[L_HEAD], p[L_HEAD + 1], p[L_HEAD + 2])
        size_up = pick(z, p[L_HEAD_UP], p[L_HEAD_UP + 1], p[L_HEAD_UP + 2])
        stored = pick(z, p[L_STORED], p[L_STORED + 1], p[L_STORED + 2])
        zero_point = pick(z, p[L_ZERO], p[L_ZERO + 1], p[L_ZERO + 2])
        out_b = pick(z, p[L_OUT_B], p[L_OUT_B + 1], p[L_OUT_B + 2])
        out_h = pick(z, p[L_OUT_H], p[L_OUT_H + 1], p[L_OUT_H + 2])
        out_t = pick(z, p[L_OUT_T], p[L_OUT_T + 1], p[L_OUT_T + 2])
        out_d = pick(z, p[L_OUT_D], p[L_OUT_D + 1], p[L_OUT_D + 2])
        r0, f0 = int32(block_x() * TILE), int32(block_y() * TILE)
        c = cuda.local.array((8, 4), int32)
        clear(c)
        if (r0 < rows) & (f0 < features):
            for e0 in range(0, depth, TILE):
                e0 = int32(e0)
                cuda.syncthreads()
                here = x + times_wide(r0, x_row) + e0
                if WIDE:
                    # past the depth the weights are zeros, so what stands there in x is not seen
                    stage_bytes_wide(base, t, here, x_row, int32(rows - r0), int32(depth - e0))
                else:
                    stage_bytes(base, t, here, x_row, int32(rows - r0), int32(depth - e0))
                stage_rows(w_at, t, w + times_wide(f0, w_row) + e0, w_row, TILE)
                cuda.syncthreads()
                multiply_s8(base, w_at, warp, lane, c)
            for n in range(8):
                for j in range(4):
                    r = int32(r0 + warp * 16 + (lane >> 2) + 8 * (j >> 1))
                    f = int32(f0 + n * 8 + (lane & 3) * 2 + (j & 1))
                    head = quotient(f, size_up)
                    d = int32(f - times(head, size_up))
                    to = int32(times(quotient(r, tokens), out_b) + times(head, out_h)
                               + times(remainder(r, tokens), out_t) + times(d, out_d))
                    good = (r < rows) & (f < features) & (d < stored)
                    if STATIC:
                        v = int32(c[n, j] + load_b32(good, bias + f * 4))
                        v = requantize(v, load_b32(good, first + f * 4), load_b32(good, second + f * 4))
                        code = clamp_code(v, zero_point)
                        if LOOKED_UP:
                            table = pick(z, a[L_TABLE], a[L_TABLE + 1], a[L_TABLE + 2])
                            has = table != 0
                            code = select_i(has, load_s8(good & has, table + int32(code + 128)), code)
                        store_s8(good, out + to, select_i(d < size, code, int32(0)))
                    else:
                        y = to_float(c[n, j]) * load_f32(r < rows, x_scale + r * 4)
                        y = fma(y, load_f32(good, first + f * 4), load_f32(good, bias + f * 4))
                        store_f32(good, out + to, y)

    return Kernel(linear_kernel, L_ADDRESSES, L_NUMBERS, THREADS, 2 * TILE_BYTES)
