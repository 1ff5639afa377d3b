"""Products of bytes in tiles of registers: what byte_products.py says, for all instruction sets but one."""

from edgeattn.runtime.compiler import inline

from .matmul import multiply, multiply_ahead, multiply_in_chains, pace_ahead
from .simd import COLUMNS, LANES, ROWS, WIDTH, tile_add_columns, tile_of_columns, tile_store, tile_zero

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
def product_of_rows(step, step_of_row, arguments, rows, features, at_panels, depth4, like):
    """step(tile, rows, t, f, at_next, pace, *arguments) for every tile, zeros of the dtype of `like`, of a product.

    The last ones have as many rows as are left: four, and then three, two or one, which is step_of_row's. Meanwhile a
    step brings near what of the panels, which begin at at_panels, lies at at_next: see multiply_ahead.
    """
    pace = pace_ahead(rows, ROWS)
    for f in range(0, features, WIDTH):
        t, at_next = 0, at_panels + (f + WIDTH) * depth4
        while t < rows:
            left = rows - t
            if left >= ROWS:
                step(tile_zero(ROWS, COLUMNS, like), ROWS, t, f, at_next, pace, *arguments)
                at_next += pace * depth4
                t += ROWS
            elif left >= 4:
                step(tile_zero(4, COLUMNS, like), 4, t, f, at_next, 0, *arguments)
                t += 4
            elif left == 3:
                step(tile_zero(3, COLUMNS, like), 3, t, f, at_next, 0, *arguments)
                t += 3
            elif left == 2:
                step(tile_zero(2, COLUMNS, like), 2, t, f, at_next, 0, *arguments)
                t += 2
            else:
                step_of_row(tile_zero(1, COLUMNS, like), 1, t, f, at_next, 0, *arguments)
                t += 1


@inline
def multiply_near(tile, x, t, panels, at_panel, depth4, at_next, pace):
    """tile + x w^T: as many rows of Groups x from t on as the tile has, and the features of a panel."""
    at_x = x.at + t * x.row
    if pace > 0:
        return multiply_ahead(tile, x.data, at_x, x.row, x.step, panels, at_panel, depth4, at_next, pace, WIDTH // 2)
    return multiply(tile, x.data, at_x, x.row, x.step, panels, at_panel, depth4)


@inline
def _row_step(tile, rows, t, f, at_next, pace, x, panels, finish, arguments):
    tile = tile_add_columns(tile, panels.bias, panels.at_bias + f)
    tile = multiply_near(tile, x, t, panels.data, panels.at + f * panels.depth4, panels.depth4, at_next, pace)
    finish(tile, rows, t, f, *arguments)


@inline
def _lone_row_step(tile, rows, t, f, at_next, pace, x, panels, finish, arguments):
    tile = tile_add_columns(tile, panels.bias, panels.at_bias + f)
    tile = multiply_in_chains(tile, x.data, x.at + t * x.row, x.step, panels.data, panels.at + f * panels.depth4,
                              panels.depth4)
    finish(tile, 1, t, f, *arguments)


@inline
def row_product(finish, arguments, x, tokens, panels, tiles):
    """Tile by tile, as finished."""
    product_of_rows(_row_step, _lone_row_step, (x, panels, finish, arguments), tokens, panels.features, panels.at,
                    panels.depth4, panels.bias)


@inline
def linear_ahead(finish, arguments, x, tokens, panels, tiles):
    """Tile by tile; the last one has half the rows where those are enough."""
    pace = pace_ahead(tokens, ROWS)
    for f in range(0, panels.features, WIDTH):
        t, at_panel, at_next = 0, panels.at + f * panels.depth4, panels.at + (f + WIDTH) * panels.depth4
        while t < tokens:
            if _HALF < ROWS and tokens - t <= _HALF:
                tile = tile_of_columns(_HALF, COLUMNS, panels.bias, panels.at_bias + f)
                finish(multiply_near(tile, x, t, panels.data, at_panel, panels.depth4, at_next, 0), t, f, *arguments)
            else:
                tile = tile_of_columns(ROWS, COLUMNS, panels.bias, panels.at_bias + f)
                finish(multiply_near(tile, x, t, panels.data, at_panel, panels.depth4, at_next, pace), t, f, *arguments)
                at_next += pace * panels.depth4
            t += ROWS


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
