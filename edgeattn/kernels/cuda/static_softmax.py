"""Softmax of static attention: the largest code of each row, the sum of what a table has for them, and probabilities.

A thread has c (8, 4) of a tile as in static_scores.py, and of its two rows top, total and so on (2,): those of c[n, j]
at j // 2. Four neighbouring lanes share a row.
"""
import functools

from edgeattn.kernels.cuda.language import cuda, device, int32, larger
from edgeattn.kernels.cuda.ptx import (
    add,
    bits_of,
    from_lane_f,
    read_b32,
    read_f32,
    select_i,
    shuffle_i,
    store_s8,
    times,
    write_b32,
    write_s8,
)

from .byte_tiles import PITCH, TILE
from .rules import SOFTMAX
from .static_parameters import P_L, P_WEIGHTS_FIRST, P_WEIGHTS_ROW
from .static_scores import HIDDEN

E_ROW = 260  # bytes of a row of 64 numbers in shared memory: rows that follow each other meet different banks


@device
def largest_codes(c, top):
    """top = the largest code that this thread has seen of each row."""
    for n in range(8):
        for j in range(4):
            top[j >> 1] = int32(larger(top[j >> 1], c[n, j]))


@device
def largest_of_row(x):
    """Of the four lanes of a row."""
    x = int32(larger(x, shuffle_i(x, 1)))
    return int32(larger(x, shuffle_i(x, 2)))


@device
def sum_of_row(x):
    """Of the four lanes of a row."""
    x = int32(x + shuffle_i(x, 1))
    return int32(x + shuffle_i(x, 2))


@device
def table_values(table, top, c):
    """c = what the table in shared memory has for each code's distance from the row's largest; 0 of what is hidden."""
    for n in range(8):
        for j in range(4):
            there = c[n, j] != HIDDEN
            d = select_i(there, int32(top[j >> 1] - c[n, j]), int32(0))
            c[n, j] = select_i(there, read_b32(int32(table + d * 4)), int32(0))


@device
def add_in_key_order(e_at, t, row, column, c, ordered):
    """`ordered` and the 64 float32 of a row, one after the other: lane l of a warp has row l % 16 of its 16."""
    lane, warp = int32(t & 31), int32(t >> 5)
    for n in range(8):
        for j in range(4):
            to = int32(e_at + times(int32(row + 8 * (j >> 1)), E_ROW) + (column + n * 8 + (j & 1)) * 4)
            write_b32(to, c[n, j])
    cuda.syncwarp()
    from_row = int32(e_at + (warp * 16 + (lane & 15)) * E_ROW)
    for j in range(TILE):
        ordered = add(ordered, read_f32(int32(from_row + j * 4)))
    return ordered


@functools.cache
def summing(softmax):
    """A function that adds what a thread has of its rows, integers in whatever order."""
    term = SOFTMAX[softmax][1]

    @device
    def add_terms(c, total):
        for n in range(8):
            for j in range(4):
                total[j >> 1] = int32(total[j >> 1] + term(c[n, j]))

    return add_terms


@functools.cache
def preparing(softmax):
    """A function that makes the two numbers that probabilities are made with, of what a row's lanes have summed."""
    ORDERED, _, prepare, _ = SOFTMAX[softmax]

    @device
    def finish_sums(t, ordered, total, one, two):
        g = int32(int32(t & 31) >> 2)
        if ORDERED:
            for i in range(2):
                total[i] = bits_of(from_lane_f(ordered, int32(g + 8 * i)))
        else:
            for i in range(2):
                total[i] = sum_of_row(total[i])
        for i in range(2):
            one[i], two[i] = prepare(total[i])

    return finish_sums


@functools.cache
def weighing(softmax, weights):
    """A function that makes probabilities, bytes 0..255, of the table's values: to a tile in shared memory.

    Their sum of each row goes to p_sum. With `weights` they also go to the codes `to` (L, P_WEIGHTS_ROW) of the
    probabilities, unless another block, of other values, does that.
    """
    probability, WEIGHTS = SOFTMAX[softmax][3], weights

    @device
    def to_bytes(p, p_at, to, row, column, row0, column0, last, d_out, one, two, c, p_sum):
        for n in range(8):
            for j in range(4):
                byte = probability(c[n, j], one[j >> 1], two[j >> 1])
                p_sum[j >> 1] = int32(p_sum[j >> 1] + byte)
                at = int32(p_at + times(int32(row + 8 * (j >> 1)), PITCH) + column + n * 8 + (j & 1))
                write_s8(at, byte)
                if WEIGHTS:
                    r, s = int32(row0 + 8 * (j >> 1)), int32(column0 + n * 8 + (j & 1))
                    at = int32(times(r, p[P_WEIGHTS_ROW]) + p[P_WEIGHTS_FIRST] + s)
                    store_s8((r < p[P_L]) & (s < last) & (d_out == 0), to + at, int32(byte - 128))

    return to_bytes
