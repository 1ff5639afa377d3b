"""Tiles that tensor cores multiply: what the threads of a warp hold, 16 queries, and the product of two tiles."""
import functools

from edgeattn.kernels.cuda.language import device, int32
from edgeattn.kernels.cuda.ptx import read_matrices, times


@device
def fragment_place(t):
    """Of warps, 16 queries each."""
    lane = int32(t & 31)
    pair = int32((lane & 3) * 2)
    return int32((t >> 5) * 16 + (lane >> 2)), pair, pair


@device
def fragment_row(r):
    """Own queries are 8 apart."""
    return 8 * r


@device
def fragment_column(k):
    """Own keys and values are pairs 8 apart."""
    return 8 * (k >> 1) + (k & 1)


@device
def nothing_to_share(to, t, s):
    """The probabilities stay with the threads that found them."""


@functools.cache
def products(mma, depth, pitch):
    """c (2, 16) += 16 rows of the warp in one tile times the 64 rows of another, `depth` steps of 32 bytes."""

    @device
    def multiply(left, right, t, c):
        lane, warp = int32(t & 31), int32(t >> 5)
        a_at = int32(left + times(int32(warp * 16 + (lane & 15)), pitch) + (lane >> 4) * 16)
        b_at = int32(right + times(int32((lane & 7) + ((lane >> 4) << 3)), pitch) + ((lane >> 3) & 1) * 16)
        for k in range(depth):
            a0, a1, a2, a3 = read_matrices(int32(a_at + k * 32))
            for n in range(4):
                b0, b1, b2, b3 = read_matrices(int32(b_at + n * 16 * pitch + k * 32))
                c[0, 4 * n], c[0, 4 * n + 1], c[1, 4 * n], c[1, 4 * n + 1] = mma(
                    a0, a1, a2, a3, b0, b1, c[0, 4 * n], c[0, 4 * n + 1], c[1, 4 * n], c[1, 4 * n + 1])
                c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3] = mma(
                    a0, a1, a2, a3, b2, b3, c[0, 4 * n + 2], c[0, 4 * n + 3], c[1, 4 * n + 2], c[1, 4 * n + 3])

    return multiply
