"""Static int8 attention of every kernel set, from codes to codes.

Tiles as in byte_tiles.py, letters as in attention.py.
"""
import functools

from edgeattn.kernels.cuda.language import Kernel, cuda, device, float32, int32, larger, shared, smaller, specialised
from edgeattn.kernels.cuda.ptx import (
    block_x,
    block_y,
    block_z,
    load_b32,
    quotient,
    remainder,
    store_s8,
    thread,
    times,
    times_wide,
    write_b32,
)

from .byte_tiles import LIST, THREADS, TILE, TILE_BYTES, clear, multiply_u8s8, stage_rows, stage_turned
from .rules import RULES, SOFTMAX, clamp_code
from .static_parameters import (
    A_CLASSES,
    A_COUNT,
    A_K,
    A_KEEP,
    A_OUT,
    A_Q,
    A_TABLE,
    A_TABLES,
    A_V,
    A_WEIGHTS,
    P_CLASS_B,
    P_CLASS_H,
    P_CONTEXT,
    P_CONTEXT_2,
    P_COUNT,
    P_D_UP,
    P_DV,
    P_DV_UP,
    P_H,
    P_HIGH,
    P_KEEP_B,
    P_KEEP_H,
    P_L,
    P_L_ROWS,
    P_LOW,
    P_OUT_B,
    P_OUT_ROW,
    P_S,
    P_S_ROWS,
    P_WEIGHTS_HEAD,
    P_WEIGHTS_ROW,
    P_ZC,
    P_ZK,
    P_ZV,
)
from .static_scores import HIDDEN, accumulate, coding, hide_masked, hide_outside, look_up, sum_queries
from .static_softmax import (
    E_ROW,
    add_in_key_order,
    largest_codes,
    largest_of_row,
    preparing,
    sum_of_row,
    summing,
    table_values,
    weighing,
)


@device
def block_addresses(a, p, q0, d_out, cached):
    """Where the queries, keys and values of a block begin."""
    D_up, S_rows = p[P_D_UP], p[P_S_ROWS]
    query = a[A_Q] + times_wide(block_y(), times(p[P_L_ROWS], D_up)) + times_wide(q0, D_up)
    key = a[A_K] + times_wide(block_y(), times(S_rows, D_up))
    value = a[A_V] + times_wide(block_y(), times(S_rows, p[P_DV_UP]))
    if cached:
        value = value + d_out
    else:
        value = value + times_wide(d_out, S_rows)
    return query, key, value


@device
def block_keys(p, q0):
    """(first, last): no query of a block sees a key before `first`, or from `last` on."""
    first = int32(larger(0, int32(q0 + p[P_LOW])) & -16)  # values are read 16 keys at a time
    last = int32(smaller(p[P_S], int32(int32(smaller(q0 + TILE, p[P_L])) + p[P_HIGH])))
    return first, last


@device
def clear_weights(p, to, row0, column, d_out):
    """The codes of 64 rows of probabilities of 0."""
    for k0 in range(0, p[P_WEIGHTS_ROW], TILE):
        for n in range(8):
            for j in range(4):
                r, s = int32(row0 + 8 * (j >> 1)), int32(k0 + column + n * 8 + (j & 1))
                store_s8((r < p[P_L]) & (s < p[P_WEIGHTS_ROW]) & (d_out == 0),
                         to + int32(times(r, p[P_WEIGHTS_ROW]) + s), int32(-128))


@functools.cache
def finishing(rule):
    """A function that writes the context o (8, 4) of 64 rows as codes, clamp(rule(o - zv p_sum) + zero point)."""
    requantize = RULES[rule]

    @device
    def write_context(p, out, row0, column, d_out, o, p_sum):
        for n in range(8):
            for j in range(4):
                row = int32(row0 + 8 * (j >> 1))
                d = int32(d_out + column + n * 8 + (j & 1))
                v = int32(o[n, j] - times(p[P_ZV], p_sum[j >> 1]))
                code = clamp_code(requantize(v, p[P_CONTEXT], p[P_CONTEXT_2]), p[P_ZC])
                store_s8((row < p[P_L]) & (d < p[P_DV]), out + int32(times(row, p[P_OUT_ROW]) + d), code)

    return write_context


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
    CACHED, WEIGHTS, ORDERED = bool(cached), bool(weights), SOFTMAX[softmax][0]
    to_codes, write_context = coding(score_rule), finishing(context_rule)
    add_terms, finish_sums, to_bytes = summing(softmax), preparing(softmax), weighing(softmax, WEIGHTS)
    AT_K, AT_V, AT_P, AT_TABLE = TILE_BYTES, 2 * TILE_BYTES, 3 * TILE_BYTES, 4 * TILE_BYTES
    AT_QSUM, AT_KSUM = AT_TABLE + 1024, AT_TABLE + 1024 + LIST
    AT_E = AT_KSUM + LIST  # (64, 65) float32, only where sums have an order
    BYTES = AT_E + (TILE * E_ROW if ORDERED else 0)

    def static_kernel(a, p):
        base = shared()
        k_at, v_at, p_at, table = int32(base + AT_K), int32(base + AT_V), int32(base + AT_P), int32(base + AT_TABLE)
        q_sums, k_sums, e_at = int32(base + AT_QSUM), int32(base + AT_KSUM), int32(base + AT_E)
        t = thread()
        lane, warp = int32(t & 31), int32(t >> 5)
        row, column = int32(warp * 16 + (lane >> 2)), int32((lane & 3) * 2)  # of a thread's c[0, 0]
        q0, d_out = int32(block_x() * TILE), int32(block_z() * TILE)
        batch, head = quotient(block_y(), p[P_H]), remainder(block_y(), p[P_H])
        query, key, value = block_addresses(a, p, q0, d_out, CACHED)
        to_weights = a[A_WEIGHTS] + times_wide(block_y(), p[P_WEIGHTS_HEAD])
        keep = a[A_KEEP] + times_wide(batch, p[P_KEEP_B]) + times_wide(head, p[P_KEEP_H])
        classes = a[A_CLASSES] + times_wide(batch, p[P_CLASS_B]) + times_wide(head, p[P_CLASS_H])
        first, last = block_keys(p, q0)
        row0 = int32(q0 + row)
        for i in range(2):
            write_b32(int32(table + t * 4 + i * 512), load_b32(t >= 0, a[A_TABLE] + (t + i * THREADS) * 4))
        write_b32(int32(q_sums + t * 4), int32(0))  # and k_sums, which follow
        stage_rows(base, t, query, p[P_D_UP], int32(p[P_L] - q0))
        cuda.syncthreads()
        if WEIGHTS:
            clear_weights(p, to_weights, row0, column, d_out)

        c = cuda.local.array((8, 4), int32)
        o = cuda.local.array((8, 4), int32)
        clear(o)
        top = cuda.local.array(2, int32)
        total = cuda.local.array(2, int32)
        one = cuda.local.array(2, int32)
        two = cuda.local.array(2, int32)
        p_sum = cuda.local.array(2, int32)
        for i in range(2):
            top[i] = int32(HIDDEN)
            total[i] = int32(0)
            p_sum[i] = int32(0)
            one[i] = int32(0)
            two[i] = int32(0)
        ordered = float32(0.0)
        if p[P_ZK] != 0:
            sum_queries(p, base, q_sums, t, query, q0)
        for step in range(3):
            for k0 in range(first, last, TILE):
                k0 = int32(k0)
                column0 = int32(k0 + column)
                # a. scores as codes
                accumulate(p, base, k_at, k_sums, t, query, key, q0, k0, last, c)
                to_codes(p, q_sums, k_sums, row, column, c)
                if a[A_TABLES] != 0:
                    look_up(p, a[A_TABLES], classes, a[A_CLASSES] != 0, row0, column0, last, c)
                if a[A_KEEP] != 0:
                    hide_masked(p, keep, row0, column0, last, c)
                hide_outside(p, q0, k0, row0, column0, last, c)
                # b. first the largest code, then the sum, then probabilities and context
                if step == 0:
                    largest_codes(c, top)
                    continue
                table_values(table, top, c)
                if step == 1:
                    if ORDERED:
                        ordered = add_in_key_order(e_at, t, row, column, c, ordered)
                    else:
                        add_terms(c, total)
                    continue
                to_bytes(p, p_at, to_weights, row, column, row0, column0, last, d_out, one, two, c, p_sum)
                if CACHED:
                    stage_turned(v_at, t, value + times_wide(k0, p[P_DV_UP]), p[P_DV_UP], int32(last - k0))
                else:
                    stage_rows(v_at, t, value + k0, p[P_S_ROWS], int32(p[P_DV_UP] - d_out))
                cuda.syncthreads()
                multiply_u8s8(p_at, v_at, warp, lane, o)
            # c. between the walks: what the four lanes of a row found
            if step == 0:
                for i in range(2):
                    top[i] = largest_of_row(top[i])
            if step == 1:
                finish_sums(t, ordered, total, one, two)
        for i in range(2):
            p_sum[i] = sum_of_row(p_sum[i])
        out = a[A_OUT] + times_wide(batch, p[P_OUT_B]) + times(head, p[P_DV])
        write_context(p, out, row0, column, d_out, o, p_sum)

    return Kernel(static_kernel, A_COUNT, P_COUNT, THREADS, BYTES)
