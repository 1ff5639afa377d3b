"""Static int8 attention of every kernel set, from codes to codes.

Tiles as in byte_tiles.py, letters as in attention.py.
"""
from edgeattn.kernels.cuda.language import Kernel, cuda, float32, int32, larger, shared, smaller, specialised
from edgeattn.kernels.cuda.ptx import (
    add,
    bits_of,
    block_x,
    block_y,
    block_z,
    from_lane_f,
    load_b32,
    load_s8,
    load_u8,
    quotient,
    read_b32,
    read_f32,
    remainder,
    select_i,
    shuffle_i,
    store_s8,
    thread,
    times,
    times_wide,
    write_b32,
    write_s8,
)

from .byte_tiles import (
    LIST,
    PITCH,
    THREADS,
    TILE,
    TILE_BYTES,
    clear,
    multiply_s8,
    multiply_u8s8,
    row_sums,
    stage_rows,
    stage_turned,
)
from .rules import RULES, SOFTMAX, clamp_code

(A_Q, A_K, A_V, A_OUT, A_TABLE, A_KEEP, A_CLASSES, A_TABLES, A_WEIGHTS, A_COUNT) = range(10)
(P_H, P_L, P_S, P_D, P_DV, P_D_UP, P_DV_UP, P_L_ROWS, P_S_ROWS, P_ZQ, P_ZK, P_ZV, P_ZS, P_ZC, P_SCORE, P_SCORE_2,
 P_CONTEXT, P_CONTEXT_2, P_LOW, P_HIGH, P_OUT_B, P_OUT_ROW, P_KEEP_B, P_KEEP_H, P_KEEP_L, P_KEEP_S,
 P_CLASS_B, P_CLASS_H, P_CLASS_L, P_CLASS_S, P_WEIGHTS_HEAD, P_WEIGHTS_ROW, P_WEIGHTS_FIRST, P_COUNT) = range(34)


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
