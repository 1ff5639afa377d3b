"""Products of bytes in tiles of registers: what byte_products.py says, for all instruction sets but one."""

from edgeattn.runtime.compiler import inline

from .matmul import multiply, multiply_ahead, multiply_in_chains, pace_ahead
from .simd import COLUMNS, LANES, ROWS, WIDTH, tile_of_columns, tile_store, tile_zero

DEPTH_STEP = 1
ROW_STEP = ROWS
TILES_SCRATCH = 0
_HALF = ROWS // 2 if ROWS % 8 == 0 else ROWS  # rows of a tile that is the last: whole groups of four
_DIGITS = 3
_TWO = 2 * _DIGITS


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
def _multiply(tile, x, t, panels, f, at_next, pace):
    """tile + x w^T: as many rows of x from t on as the tile has, and the features of a panel; see multiply_ahead."""
    at_x, at_panel = x.at + t * x.row, panels.at + f * panels.depth4
    if pace > 0:
        return multiply_ahead(tile, x.data, at_x, x.row, x.step, panels.data, at_panel, panels.depth4, at_next, pace,
                              WIDTH // 2)
    return multiply(tile, x.data, at_x, x.row, x.step, panels.data, at_panel, panels.depth4)


@inline
def linear_ahead(finish, arguments, x, tokens, panels, tiles):
    """Tile by tile; the last one has half the rows where those are enough."""
    bias, at_bias, pace = panels.bias, panels.at_bias, pace_ahead(tokens, ROWS)
    for f in range(0, panels.features, WIDTH):
        t, at_next = 0, panels.at + (f + WIDTH) * panels.depth4
        while t < tokens:
            if _HALF < ROWS and tokens - t <= _HALF:
                tile = tile_of_columns(_HALF, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, 0), t, f, *arguments)
            else:
                tile = tile_of_columns(ROWS, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, pace), t, f, *arguments)
                at_next += pace * panels.depth4
            t += ROWS


@inline
def row_product(finish, arguments, x, tokens, panels, tiles):
    """Tile by tile; the last ones have as many rows as are left: four, and then three, two or one."""
    bias, at_bias, pace = panels.bias, panels.at_bias, pace_ahead(tokens, ROWS)
    for f in range(0, panels.features, WIDTH):
        t, at_next = 0, panels.at + (f + WIDTH) * panels.depth4
        while t < tokens:
            left = tokens - t
            if left >= ROWS:
                tile = tile_of_columns(ROWS, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, pace), ROWS, t, f, *arguments)
                at_next += pace * panels.depth4
                t += ROWS
            elif left >= 4:
                tile = tile_of_columns(4, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, 0), 4, t, f, *arguments)
                t += 4
            elif left == 3:
                tile = tile_of_columns(3, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, 0), 3, t, f, *arguments)
                t += 3
            elif left == 2:
                tile = tile_of_columns(2, COLUMNS, bias, at_bias + f)
                finish(_multiply(tile, x, t, panels, f, at_next, 0), 2, t, f, *arguments)
                t += 2
            else:
                tile = tile_of_columns(1, COLUMNS, bias, at_bias + f)
                tile = multiply_in_chains(tile, x.data, x.at + t * x.row, x.step, panels.data,
                                          panels.at + f * panels.depth4, panels.depth4)
                finish(tile, 1, t, f, *arguments)
                t += 1


@inline
def lane_product(unsigned, a, rows, b, depth4, out):
    """Both signs by the same instruction, which takes b as unsigned."""
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
