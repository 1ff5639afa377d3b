"""Tiles of int8 codes: how a block brings them to shared memory, and multiplies them on the tensor cores (sm_80).

Tiles are 64 rows of 64 bytes, 80 bytes apart in shared memory so that eight rows meet different banks. A block has four
warps of 16 rows; lane l of a warp holds, with g = l // 4 and t = l % 4, rows g and g + 8 and columns 8 n + 2 t and the
next, n = 0..7.
"""
import functools

from edgeattn.kernels.cuda.language import cuda, device, int32
from edgeattn.kernels.cuda.ptx import (
    dot_bytes,
    load_b32,
    load_b32x4,
    load_u8,
    mma_s8,
    mma_u8s8,
    read_b32,
    read_matrices,
    shuffle_i,
    times,
    write_b32,
    write_b32x4,
    write_s8,
)

TILE, PITCH, THREADS = 64, 80, 128
TILE_BYTES = TILE * PITCH
LIST = TILE * 4  # bytes of one number per row
_ONES = 0x01010101


@device
def stage_rows(to, t, address, row_bytes, rows):
    """64 rows of 64 bytes to shared memory, 16 bytes at a time; rows past `rows` become zeros."""
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
def stage_bytes_wide(to, t, address, row_bytes, rows, left):
    """As `stage_bytes`, 16 bytes at a time; `left` is a multiple of 16."""
    for i in range(2):
        row, part = int32((t + i * THREADS) >> 2), int32((t + i * THREADS) & 3)
        at = address + int32(times(row, row_bytes) + part * 16)
        w0, w1, w2, w3 = load_b32x4((row < rows) & (part * 16 < left), at)
        write_b32x4(int32(to + row * PITCH + part * 16), w0, w1, w2, w3)


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


@functools.cache
def product(mma):
    """A function: c (8, 4) += 16 rows of the warp in one tile times the 64 rows of another, 64 bytes deep."""

    @device
    def multiply(left, right, warp, lane, c):
        a_at = int32(left + (warp * 16 + (lane & 15)) * PITCH + (lane >> 4) * 16)
        b_at = int32(right + ((lane & 7) + ((lane >> 4) << 3)) * PITCH + ((lane >> 3) & 1) * 16)
        for k in range(2):
            a0, a1, a2, a3 = read_matrices(int32(a_at + k * 32))
            for n in range(4):
                b0, b1, b2, b3 = read_matrices(int32(b_at + n * 16 * PITCH + k * 32))
                c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3] = mma(
                    a0, a1, a2, a3, b0, b1, c[2 * n, 0], c[2 * n, 1], c[2 * n, 2], c[2 * n, 3])
                c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3] = mma(
                    a0, a1, a2, a3, b2, b3, c[2 * n + 1, 0], c[2 * n + 1, 1], c[2 * n + 1, 2], c[2 * n + 1, 3])

    return multiply


multiply_s8, multiply_u8s8 = product(mma_s8), product(mma_u8s8)  # codes times codes, bytes 0..255 times codes


@device
def clear(c):
    """c (8, 4) = 0."""
    for n in range(8):
        for j in range(4):
            c[n, j] = int32(0)


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
