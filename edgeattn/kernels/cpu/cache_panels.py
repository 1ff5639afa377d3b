"""A cache's bytes as panels that digits meet: keys in lanes, values with features in lanes, as `interleaved` says."""
import numpy as np

from edgeattn.runtime.compiler import inline

from .decode_blocks import BLOCK
from .digits import CHUNK
from .int8_operands import LANE_FLIP, flip_lanes
from .simd import LANES, WIDTH, interleave_rows, pointer_to, transpose_block

QUADS = BLOCK // 4


@inline
def readable(rows, at, row, size, left, copy):
    """(address, distance) of LANES rows that may be read to the end of their last chunk: in place or copied.

    rows: address; at, row, size in bytes; left: how many rows there are from the first on.
    """
    size_up = (size + CHUNK - 1) // CHUNK * CHUNK
    if size == size_up and left >= LANES or (left - LANES) * row >= size_up - size:
        return rows + at, row
    source, target = pointer_to(rows + at, np.int8), pointer_to(copy, np.int8)
    for i in range(min(left, LANES)):
        for d in range(size):
            target[i * size_up + d] = source[i * row + d]
    return copy, size_up


@inline
def key_panels(keys, row, size, count, left, deep, panels, copy):
    """`count` keys as panels (keys / WIDTH, deep, WIDTH) of four features, their highest bits flipped.

    keys, copy: addresses, of rows `size` bytes long and `row` apart, `left` of them, and of room for LANES rows.
    """
    for s in range(0, count, LANES):
        at, near_row = readable(keys, s * row, row, size, left - s, copy)
        rows, to = pointer_to(at, np.int8), s // WIDTH * (deep * WIDTH) + s % WIDTH
        for k in range(0, (size + CHUNK - 1) // CHUNK * LANES, LANES):
            transpose_block(rows, 4 * k, near_row, panels, to + k * WIDTH, WIDTH)
            for i in range(k, k + LANES):
                flip_lanes(panels, to + i * WIDTH, LANES)


@inline
def value_panels(values, row, size, count, left, panels, copy):
    """`count` values as panels (positions / WIDTH, QUADS, WIDTH) of four keys; otherwise as `key_panels`."""
    for s in range(0, count, LANES):
        at, near_row = readable(values, s * row, row, size, left - s, copy)
        rows = pointer_to(at, np.int8)
        for i in range(0, min(LANES, count - s), 4):
            for d in range(0, size, CHUNK):
                interleave_rows(rows, i * near_row + d, near_row, LANE_FLIP, panels, d * QUADS + (s + i) // 4 * WIDTH,
                                QUADS * WIDTH)


@inline
def interleaved(position):
    """The feature at a position of a context: see `interleave_rows`."""
    chunk, rest = position // CHUNK, position % CHUNK
    j, l = rest // LANES, rest % LANES
    return chunk * CHUNK + l // 4 * 16 + j * 4 + l % 4
