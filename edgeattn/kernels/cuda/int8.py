"""int8 on the tensor cores (sm_80): projections, static attention of every kernel set, and dynamic attention.

Tiles are 64 rows of 64 bytes, 80 bytes apart in shared memory so that eight rows meet different banks. A block has four
warps of 16 rows; lane l of a warp holds, with g = l // 4 and t = l % 4, rows g and g + 8 and columns 8 n + 2 t and the
next, n = 0..7. Letters as in attention.py. Projections leave queries and keys as (B, H, T, D padded to 64) with zeros
behind D, and values turned, (B, H, D padded to 64, S padded to 64), so that attention reads whole 16 bytes.
"""
from edgeattn.kernels.cuda.language import Kernel, cuda, device, float32, int32, larger, shared, smaller, specialised
from edgeattn.kernels.cuda.ptx import (
    add,
    bits_of,
    block_x,
    block_y,
    block_z,
    dot_bytes,
    fma,
    from_lane_f,
    load_b32,
    load_b32x4,
    load_f32,
    load_s8,
    load_u8,
    mma_s8,
    mma_u8s8,
    quotient,
    read_b32,
    read_f32,
    read_matrices,
    remainder,
    select_i,
    shuffle_i,
    store_f32,
    store_s8,
    thread,
    times,
    times_wide,
    to_float,
    write_b32,
    write_b32x4,
    write_s8,
)

from .rules import RULES, SOFTMAX, clamp_code

TILE, PITCH, THREADS = 64, 80, 128
TILE_BYTES = TILE * PITCH
LIST = TILE * 4  # bytes of one number per row
_ONES = 0x01010101
_MINUS_INFINITY = float("-inf")
_LOG2_E = 1.4426950408889634


@device
def stage_rows(to, t, address, row_bytes, rows, wide):
    """64 rows of 64 bytes to shared memory; rows past `rows` become zeros. `wide`: 16 bytes at a time, else one."""
    for i in range(2):
        row, part = int32((t + i * THREADS) >> 2), int32((t + i * THREADS) & 3)
        at = address + int32(times(row, row_bytes) + part * 16)
        w0, w1, w2, w3 = load_b32x4(row < rows, at)
        write_b32x4(int32(to + row * PITCH + part * 16), w0, w1, w2, w3)


@device
def stage_bytes(to, t, address, row_bytes, rows, left):
    """As `stage_rows`, from any address, the first `left` bytes of each row."""
    for i in range(8):
        row, word = int32((t + i * THREADS) >> 4), int32((t + i * THREADS) & 15)
        at = address + int32(times(row, row_bytes) + word * 4)
        good = row < rows
        b0 = load_u8(good & (word * 4 < left), at)
        b1 = load_u8(good & (word * 4 + 1 < left), at + 1)
        b2 = load_u8(good & (word * 4 + 2 < left), at + 2)
        b3 = load_u8(good & (word * 4 + 3 < left), at + 3)
        write_b32(int32(to + row * PITCH + word * 4), int32(b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)))


@device
def stage_turned(to, t, address, row_bytes, rows):
    """64 rows of 64 bytes, turned, to shared memory; rows past `rows` become zeros."""
    for i in range(8):
        n = int32(t + i * THREADS)
        row, word = int32((n & 3) + ((n >> 5) << 2) & 63), int32(((n >> 2) & 7) + ((n >> 9) << 3))
        codes = load_b32(row < rows, address + int32(times(row, row_bytes) + word * 4))
        at = int32(to + word * 4 * PITCH + row)
        for j in range(4):
            write_s8(int32(at + j * PITCH), int32(codes >> (8 * j)))


@device
def multiply_s8(left, right, warp, lane, c):
    """c (8, 4) += 16 rows of the warp in one tile times the 64 rows of another, 64 bytes deep."""
    a_at = int32(left + (warp * 16 + (lane & 15)) * PITCH + (lane >> 4) * 16)
    b_at = int32(right + ((lane & 7) + ((lane >> 4) << 3)) * PITCH + ((lane >> 3) & 1) * 16)
    for k in range(2):
        a0, a1, a2, a3 = read_matrices(int32(a_at + k * 32))
        for n in range(4):
            b0, b1, b2, b3 = read_matrices(int32(b_at + n * 16 * PITCH + k * 32))
            c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3] = mma_s8(
                a0, a1, a2, a3, b0, b1, c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3])
            c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3] = mma_s8(
                a0, a1, a2, a3, b2, b3, c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3])


@device
def multiply_u8s8(left, right, warp, lane, c):
    """As `multiply_s8`, the left tile unsigned."""
    a_at = int32(left + (warp * 16 + (lane & 15)) * PITCH + (lane >> 4) * 16)
    b_at = int32(right + ((lane & 7) + ((lane >> 4) << 3)) * PITCH + ((lane >> 3) & 1) * 16)
    for k in range(2):
        a0, a1, a2, a3 = read_matrices(int32(a_at + k * 32))
        for n in range(4):
            b0, b1, b2, b3 = read_matrices(int32(b_at + n * 16 * PITCH + k * 32))
            c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3] = mma_u8s8(
                a0, a1, a2, a3, b0, b1, c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3])
            c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3] = mma_u8s8(
                a0, a1, a2, a3, b2, b3, c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3])


@device
def clear(c):
    """c (8, 4) = 0."""
    for n in range(8):
        for j in range(4):
            c[n, j] = int32(0)


# -- projections -----------------------------------------------------------------------------------------------------
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
                stage_rows(w_at, t, w + times_wide(f0, w_row) + e0, w_row, TILE, True)
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


@device
def stage_bytes_wide(to, t, address, row_bytes, rows, left):
    """As `stage_bytes`, 16 bytes at a time; `left` is a multiple of 16."""
    for i in range(2):
        row, part = int32((t + i * THREADS) >> 2), int32((t + i * THREADS) & 3)
        at = address + int32(times(row, row_bytes) + part * 16)
        w0, w1, w2, w3 = load_b32x4((row < rows) & (part * 16 < left), at)
        write_b32x4(int32(to + row * PITCH + part * 16), w0, w1, w2, w3)


# -- static attention ------------------------------------------------------------------------------------------------

(A_Q, A_K, A_V, A_OUT, A_TABLE, A_KEEP, A_CLASSES, A_TABLES, A_WEIGHTS, A_COUNT) = range(10)
(P_H, P_L, P_S, P_D, P_DV, P_D_UP, P_DV_UP, P_L_ROWS, P_S_ROWS, P_ZQ, P_ZK, P_ZV, P_ZS, P_ZC, P_SCORE, P_SCORE_2,
 P_CONTEXT, P_CONTEXT_2, P_LOW, P_HIGH, P_OUT_B, P_OUT_ROW, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_CLASS_B, P_CLASS_H, P_CLASS_L, P_CLASS_S, P_WEIGHTS_HEAD, P_WEIGHTS_ROW, P_WEIGHTS_FIRST, P_COUNT) = range(34)


@device
def row_sums(tile, sums, t):
    """sums[row] += the sum of a tile's 64 codes per row; two threads a row."""
    row, half = int32(t >> 1), int32(t & 1)
    total = int32(0)
    for word in range(8):
        total = dot_bytes(read_b32(int32(tile + row * PITCH + half * 32 + word * 4)), int32(_ONES), total)
    total = int32(total + shuffle_i(total, 1))
    total = int32(total + read_b32(int32(sums + row * 4)))
    cuda.syncwarp()
    write_b32(int32(sums + row * 4), total)


@specialised
def static_attention(score_rule, context_rule, softmax, cached=False, weights=False):
    """The kernel of static int8 attention, equal to the named rules bit for bit.

    Keys are walked three times: for the largest code of each row, for the sum (lut_f32 adds float32 in key order, one
    thread per row), and for the probabilities and the context. Scores are computed anew each time: no row is too long.
    Grid (ceil(L / 64), B H, padded Dv / 64). q (B, H, L rows, D up), k (B, H, S rows, D up), v (B, H, Dv up, S rows)
    or, `cached`, (B, H, S rows, Dv up), out (B, L, H Dv) codes; table (256,) 32 bits; keep, classes as masks; tables
    (n, 256) int8. With `weights` A_WEIGHTS, (B H, ...) rows of P_WEIGHTS_ROW bytes, takes the codes of the
    probabilities: of the keys from column P_WEIGHTS_FIRST on, and of 0 elsewhere.
    """
    CACHED, WEIGHTS = bool(cached), bool(weights)
    requantize_score, requantize_context = RULES[score_rule], RULES[context_rule]
    ORDERED, term, prepare, probability = SOFTMAX[softmax]
    AT_K, AT_V, AT_P, AT_TABLE = TILE_BYTES, 2 * TILE_BYTES, 3 * TILE_BYTES, 4 * TILE_BYTES
    AT_QSUM, AT_KSUM = AT_TABLE + 1024, AT_TABLE + 1024 + LIST
    AT_E = AT_KSUM + LIST  # (64, 65) float32, only where sums have an order
    E_ROW = 260
    BYTES = AT_E + (TILE * E_ROW if ORDERED else 0)

    def static_kernel(a, p):
        base = shared()
        k_at, v_at, p_at, table = int32(base + AT_K), int32(base + AT_V), int32(base + AT_P), int32(base + AT_TABLE)
        q_sums, k_sums, e_at = int32(base + AT_QSUM), int32(base + AT_KSUM), int32(base + AT_E)
        t = thread()
        lane, warp = int32(t & 31), int32(t >> 5)
        g, tg = int32(lane >> 2), int32(lane & 3)
        q0 = int32(block_x() * TILE)
        batch, head = quotient(block_y(), p[P_H]), remainder(block_y(), p[P_H])
        d_out = int32(block_z() * TILE)
        L, D_up, S_rows = p[P_L], p[P_D_UP], p[P_S_ROWS]
        query = a[A_Q] + times_wide(block_y(), times(p[P_L_ROWS], D_up)) + times_wide(q0, D_up)
        key = a[A_K] + times_wide(block_y(), times(S_rows, D_up))
        value = a[A_V] + times_wide(block_y(), times(S_rows, p[P_DV_UP]))
        if CACHED:
            value = value + d_out
        else:
            value = value + times_wide(d_out, S_rows)
        to_weights = a[A_WEIGHTS] + times_wide(block_y(), p[P_WEIGHTS_HEAD])
        keep = a[A_KEEP] + times_wide(batch, p[P_KEEP_B]) + times_wide(head, p[P_KEEP_H])
        classes = a[A_CLASSES] + times_wide(batch, p[P_CLASS_B]) + times_wide(head, p[P_CLASS_H])
        zq, zk, zv = p[P_ZQ], p[P_ZK], p[P_ZV]
        first = int32(larger(0, int32(q0 + p[P_LOW])) & -16)  # values are read 16 keys at a time
        last = int32(smaller(p[P_S], int32(int32(smaller(q0 + TILE, L)) + p[P_HIGH])))
        row0 = int32(q0 + warp * 16 + g)
        for i in range(2):
            write_b32(int32(table + t * 4 + i * 512), load_b32(t >= 0, a[A_TABLE] + (t + i * THREADS) * 4))
        write_b32(int32(q_sums + t * 4), int32(0))  # and k_sums, which follow
        stage_rows(base, t, query, D_up, int32(L - q0), True)
        cuda.syncthreads()

        if WEIGHTS:
            for k0 in range(0, p[P_WEIGHTS_ROW], TILE):
                for n in range(8):
                    for j in range(4):
                        row, column = int32(row0 + 8 * (j >> 1)), int32(k0 + n * 8 + tg * 2 + (j & 1))
                        store_s8((row < L) & (column < p[P_WEIGHTS_ROW]) & (d_out == 0),
                                 to_weights + int32(times(row, p[P_WEIGHTS_ROW]) + column), int32(-128))

        c = cuda.local.array((8, 4), int32)
        o = cuda.local.array((8, 4), int32)
        clear(o)
        top = cuda.local.array(2, int32)
        total = cuda.local.array(2, int32)
        one = cuda.local.array(2, int32)
        two = cuda.local.array(2, int32)
        p_sum = cuda.local.array(2, int32)
        for i in range(2):
            top[i] = int32(-32768)
            total[i] = int32(0)
            p_sum[i] = int32(0)
            one[i] = int32(0)
            two[i] = int32(0)
        ordered = float32(0.0)
        if zk != 0:
            for d0 in range(0, D_up, TILE):
                d0 = int32(d0)
                if D_up > TILE:
                    cuda.syncthreads()
                    stage_rows(base, t, query + d0, D_up, int32(L - q0), True)
                    cuda.syncthreads()
                row_sums(base, q_sums, t)
            cuda.syncthreads()
        for step in range(3):
            for k0 in range(first, last, TILE):
                k0 = int32(k0)
                # a. accumulators of the scores, D in pieces
                clear(c)
                for d0 in range(0, D_up, TILE):
                    d0 = int32(d0)
                    cuda.syncthreads()
                    if D_up > TILE:
                        stage_rows(base, t, query + d0, D_up, int32(L - q0), True)
                    stage_rows(k_at, t, key + times_wide(k0, D_up) + d0, D_up, int32(last - k0), True)
                    if (zq != 0) & (d0 == 0):
                        write_b32(int32(k_sums + (t >> 1) * 4), int32(0))
                    cuda.syncthreads()
                    multiply_s8(base, k_at, warp, lane, c)
                    if zq != 0:
                        row_sums(k_at, k_sums, t)
                if zq != 0:
                    cuda.syncthreads()
                # b. codes, -32768 for a key that is not there
                constant = int32(times(p[P_D], times(zq, zk)))
                for n in range(8):
                    for j in range(4):
                        row = int32(warp * 16 + g + 8 * (j >> 1))
                        column = int32(n * 8 + tg * 2 + (j & 1))
                        v = int32(c[n, j] + constant)
                        if zk != 0:
                            v = int32(v - times(zk, read_b32(int32(q_sums + row * 4))))
                        if zq != 0:
                            v = int32(v - times(zq, read_b32(int32(k_sums + column * 4))))
                        c[n, j] = clamp_code(requantize_score(v, p[P_SCORE], p[P_SCORE_2]), p[P_ZS])
                if a[A_TABLES] != 0:
                    for n in range(8):
                        for j in range(4):
                            row = int32(row0 + 8 * (j >> 1))
                            column = int32(k0 + n * 8 + tg * 2 + (j & 1))
                            at = int32(times(row, p[P_CLASS_L]) + times(column, p[P_CLASS_S]))
                            there = (row < L) & (column < last)
                            kind = load_u8(there & (a[A_CLASSES] != 0), classes + at)
                            c[n, j] = load_s8(there, a[A_TABLES] + int32(kind * 256 + c[n, j] + 128))
                if a[A_KEEP] != 0:
                    for n in range(8):
                        for j in range(4):
                            row = int32(row0 + 8 * (j >> 1))
                            column = int32(k0 + n * 8 + tg * 2 + (j & 1))
                            at = int32(times(row, p[P_KEEP_L]) + times(column, p[P_KEEP_S]))
                            seen = load_u8((row < L) & (column < last), keep + at) != 0
                            c[n, j] = select_i(seen, c[n, j], int32(-32768))
                edge = (int32(k0 + TILE) > last) | (int32(q0 + TILE - 1 + p[P_LOW]) > k0) | (
                    int32(q0 + p[P_HIGH]) < int32(k0 + TILE - 1))
                if edge:
                    for n in range(8):
                        for j in range(4):
                            row = int32(row0 + 8 * (j >> 1))
                            column = int32(k0 + n * 8 + tg * 2 + (j & 1))
                            seen = (column < last) & (column >= int32(row + p[P_LOW])) & (
                                column <= int32(row + p[P_HIGH]))
                            c[n, j] = select_i(seen, c[n, j], int32(-32768))
                # c. first the largest code, then the sum, then probabilities and context
                if step == 0:
                    for n in range(8):
                        for j in range(4):
                            top[j >> 1] = int32(larger(top[j >> 1], c[n, j]))
                    continue
                for n in range(8):
                    for j in range(4):
                        there = c[n, j] != -32768
                        d = select_i(there, int32(top[j >> 1] - c[n, j]), int32(0))
                        c[n, j] = select_i(there, read_b32(int32(table + d * 4)), int32(0))
                if step == 1:
                    if ORDERED:
                        for n in range(8):
                            for j in range(4):
                                row = int32(warp * 16 + g + 8 * (j >> 1))
                                write_b32(int32(e_at + times(row, E_ROW) + (n * 8 + tg * 2 + (j & 1)) * 4), c[n, j])
                        cuda.syncwarp()
                        from_row = int32(e_at + (warp * 16 + (lane & 15)) * E_ROW)
                        for j in range(TILE):
                            ordered = add(ordered, read_f32(int32(from_row + j * 4)))
                    else:
                        for n in range(8):
                            for j in range(4):
                                total[j >> 1] = int32(total[j >> 1] + term(c[n, j]))
                    continue
                for n in range(8):
                    for j in range(4):
                        byte = probability(c[n, j], one[j >> 1], two[j >> 1])
                        p_sum[j >> 1] = int32(p_sum[j >> 1] + byte)
                        row = int32(warp * 16 + g + 8 * (j >> 1))
                        write_s8(int32(p_at + times(row, PITCH) + n * 8 + tg * 2 + (j & 1)), byte)
                        if WEIGHTS:
                            row, column = int32(row0 + 8 * (j >> 1)), int32(k0 + n * 8 + tg * 2 + (j & 1))
                            at = int32(times(row, p[P_WEIGHTS_ROW]) + p[P_WEIGHTS_FIRST] + column)
                            store_s8((row < L) & (column < last) & (d_out == 0), to_weights + at, int32(byte - 128))
                if CACHED:
                    stage_turned(v_at, t, value + times_wide(k0, p[P_DV_UP]), p[P_DV_UP], int32(last - k0))
                else:
                    stage_rows(v_at, t, value + k0, S_rows, int32(p[P_DV_UP] - d_out), True)
                cuda.syncthreads()
                multiply_u8s8(p_at, v_at, warp, lane, o)
            # d. between the walks: what the four lanes of a row found
            if step == 0:
                for i in range(2):
                    top[i] = int32(larger(top[i], shuffle_i(top[i], 1)))
                    top[i] = int32(larger(top[i], shuffle_i(top[i], 2)))
            if step == 1:
                if ORDERED:
                    for i in range(2):
                        total[i] = bits_of(from_lane_f(ordered, int32(g + 8 * i)))
                else:
                    for i in range(2):
                        total[i] = int32(total[i] + shuffle_i(total[i], 1))
                        total[i] = int32(total[i] + shuffle_i(total[i], 2))
                for i in range(2):
                    one[i], two[i] = prepare(total[i])
        for i in range(2):
            p_sum[i] = int32(p_sum[i] + shuffle_i(p_sum[i], 1))
            p_sum[i] = int32(p_sum[i] + shuffle_i(p_sum[i], 2))
        # e. context codes
        out = a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times(head, p[P_DV])
        for n in range(8):
            for j in range(4):
                row = int32(row0 + 8 * (j >> 1))
                d = int32(d_out + n * 8 + tg * 2 + (j & 1))
                v = int32(o[n, j] - times(zv, p_sum[j >> 1]))
                code = clamp_code(requantize_context(v, p[P_CONTEXT], p[P_CONTEXT_2]), p[P_ZC])
                store_s8((row < L) & (d < p[P_DV]), out + int32(times(row, p[P_OUT_ROW]) + d), code)

    return Kernel(static_kernel, A_COUNT, P_COUNT, THREADS, BYTES)
