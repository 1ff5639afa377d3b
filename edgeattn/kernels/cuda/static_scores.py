"""Scores of static attention: the accumulators of a tile, their codes, and what masks hide of them.

A thread has c (8, 4) of a tile of 64 queries and 64 keys, as in byte_tiles.py: c[n, j] is row `row` + 8 (j // 2) and
column `column` + 8 n + j % 2, both of the tile; `row0` and `column0` are the same counted from the first query and key.
"""
import functools

from edgeattn.kernels.cuda.language import cuda, device, int32
from edgeattn.kernels.cuda.ptx import load_s8, load_u8, read_b32, select_i, times, times_wide, write_b32

from .byte_tiles import TILE, clear, multiply_s8, row_sums, stage_rows
from .rules import RULES, clamp_code
from .static_parameters import (
    P_CLASS_L,
    P_CLASS_S,
    P_D,
    P_D_UP,
    P_HIGH,
    P_KEEP_L,
    P_KEEP_S,
    P_L,
    P_LOW,
    P_SCORE,
    P_SCORE_2,
    P_ZK,
    P_ZQ,
    P_ZS,
)

HIDDEN = -32768  # in place of the code of a key that is not to be seen


@device
def sum_queries(p, q_at, q_sums, t, query, q0):
    """q_sums[row] = the sum of each query's codes; the tile of queries that is there at the end is the last of D."""
    D_up = p[P_D_UP]
    for d0 in range(0, D_up, TILE):
        d0 = int32(d0)
        if D_up > TILE:
            cuda.syncthreads()
            stage_rows(q_at, t, query + d0, D_up, int32(p[P_L] - q0))
            cuda.syncthreads()
        row_sums(q_at, q_sums, t)
    cuda.syncthreads()


@device
def accumulate(p, q_at, k_at, k_sums, t, query, key, q0, k0, last, c):
    """c = the products of the tiles' queries and keys, D in pieces; k_sums[column] = the sum of each key's codes.

    Keys from `last` on count as zeros. The queries stay where they are one piece; sums are made where somebody asks.
    """
    D_up, zq = p[P_D_UP], p[P_ZQ]
    lane, warp = int32(t & 31), int32(t >> 5)
    clear(c)
    for d0 in range(0, D_up, TILE):
        d0 = int32(d0)
        cuda.syncthreads()
        if D_up > TILE:
            stage_rows(q_at, t, query + d0, D_up, int32(p[P_L] - q0))
        stage_rows(k_at, t, key + times_wide(k0, D_up) + d0, D_up, int32(last - k0))
        if (zq != 0) & (d0 == 0):
            write_b32(int32(k_sums + (t >> 1) * 4), int32(0))
        cuda.syncthreads()
        multiply_s8(q_at, k_at, warp, lane, c)
        if zq != 0:
            row_sums(k_at, k_sums, t)
    if zq != 0:
        cuda.syncthreads()


@functools.cache
def coding(rule):
    """A function that makes codes of accumulators, c = clamp(rule((q - zq) . (k - zk)) + zero point)."""
    requantize = RULES[rule]

    @device
    def to_codes(p, q_sums, k_sums, row, column, c):
        zq, zk = p[P_ZQ], p[P_ZK]
        constant = int32(times(p[P_D], times(zq, zk)))
        for n in range(8):
            for j in range(4):
                v = int32(c[n, j] + constant)
                if zk != 0:
                    v = int32(v - times(zk, read_b32(int32(q_sums + int32(row + 8 * (j >> 1)) * 4))))
                if zq != 0:
                    v = int32(v - times(zq, read_b32(int32(k_sums + int32(column + n * 8 + (j & 1)) * 4))))
                c[n, j] = clamp_code(requantize(v, p[P_SCORE], p[P_SCORE_2]), p[P_ZS])

    return to_codes


@device
def look_up(p, tables, classes, has_classes, row0, column0, last, c):
    """Put in the place of each code what the table of its class has for it: tables (n, 256), classes (L, S) or none."""
    for n in range(8):
        for j in range(4):
            row, column = int32(row0 + 8 * (j >> 1)), int32(column0 + n * 8 + (j & 1))
            at = int32(times(row, p[P_CLASS_L]) + times(column, p[P_CLASS_S]))
            there = (row < p[P_L]) & (column < last)
            kind = load_u8(there & has_classes, classes + at)
            c[n, j] = load_s8(there, tables + int32(kind * 256 + c[n, j] + 128))


@device
def hide_masked(p, keep, row0, column0, last, c):
    """Hide what a mask (L, S) of bytes has a 0 for."""
    for n in range(8):
        for j in range(4):
            row, column = int32(row0 + 8 * (j >> 1)), int32(column0 + n * 8 + (j & 1))
            at = int32(times(row, p[P_KEEP_L]) + times(column, p[P_KEEP_S]))
            seen = load_u8((row < p[P_L]) & (column < last), keep + at) != 0
            c[n, j] = select_i(seen, c[n, j], int32(HIDDEN))


@device
def hide_outside(p, q0, k0, row0, column0, last, c):
    """Hide keys outside row + P_LOW <= column <= row + P_HIGH, and from `last` on, in tiles that have such."""
    edge = (int32(k0 + TILE) > last) | (int32(q0 + TILE - 1 + p[P_LOW]) > k0) | (
        int32(q0 + p[P_HIGH]) < int32(k0 + TILE - 1))
    if edge:
        for n in range(8):
            for j in range(4):
                row, column = int32(row0 + 8 * (j >> 1)), int32(column0 + n * 8 + (j & 1))
                seen = (column < last) & (column >= int32(row + p[P_LOW])) & (column <= int32(row + p[P_HIGH]))
                c[n, j] = select_i(seen, c[n, j], int32(HIDDEN))
