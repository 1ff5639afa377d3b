"""Products of bytes in tiles of registers: what byte_products.py says, for all instruction sets but one."""
import numpy as np

from edgeattn.runtime.jit import inline

from .matmul import multiply
from .simd import COLUMNS, LANES, ROWS, WIDTH, tile_of_columns, tile_store, tile_zero

DEPTH_STEP = 1
ROW_STEP = ROWS
TILES_SCRATCH = 0
_DIGITS = 3
_TWO = 2 * _DIGITS


def pack_byte_rows(weight):
    """int8 weight (N, depth), N a multiple of ROW_STEP, depth of 4 -> int32: the rows one after the other."""
    return np.ascontiguousarray(weight).view(np.int32).ravel()


@inline
def linear(finish, arguments, x, tokens, panels, tiles):
    """Tile by tile, as finished."""
    for f in range(0, panels.features, WIDTH):
        at_panel = panels.at + f * panels.depth4
        for t in range(0, tokens, ROWS):
            tile = tile_of_columns(ROWS, COLUMNS, panels.bias, panels.at_bias + f)
            tile = multiply(tile, x.data, x.at + t * x.row, x.row, x.step, panels.data, at_panel, panels.depth4)
            finish(tile, t, f, *arguments)


@inline
def lane_product(unsigned, packed, a, rows, b, depth4, out):
    """Both signs by the same instruction, which takes b as unsigned; packed rows lie as others do."""
    for r in range(0, rows, ROWS):
        tile = tile_zero(ROWS, COLUMNS, out.data)
        tile = multiply(tile, a.data, a.at + r * a.step, a.step, 1, b.data, b.at, depth4)
        tile_store(tile, out.data, out.at + r * WIDTH, WIDTH, LANES)


@inline
def digit_products(rows, digits, panels, count, depth4, out):
    """The digits of two numbers at a time, then of the last one."""
    for column in range(0, count, WIDTH):
        at_panel = panels.at + column // WIDTH * panels.step
        r = 0
        while r + _TWO <= rows:
            found = multiply(tile_zero(_TWO, COLUMNS, digits.data), digits.data, digits.at + r * digits.step,
                             digits.step, 1, panels.data, at_panel, depth4)
            tile_store(found, out.data, out.at + r * out.step + column, out.step, LANES)
            r += _TWO
        if r < rows:
            found = multiply(tile_zero(_DIGITS, COLUMNS, digits.data), digits.data, digits.at + r * digits.step,
                             digits.step, 1, panels.data, at_panel, depth4)
            tile_store(found, out.data, out.at + r * out.step + column, out.step, LANES)
