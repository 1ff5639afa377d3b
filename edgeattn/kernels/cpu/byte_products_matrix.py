"""Products of bytes by the matrix unit of x86-64: what byte_products.py says, 16 groups of four bytes at a time."""

from edgeattn.runtime.compiler import inline

from .simd import (
    COLUMNS,
    LANES,
    MATRIX_ROWS,
    ROWS,
    WIDTH,
    matrix_dot,
    matrix_dot_signed,
    matrix_load,
    matrix_store,
    matrix_zero,
    tile_load,
)

_TOKENS = 2 * MATRIX_ROWS
DEPTH_STEP = 16
ROW_STEP = MATRIX_ROWS
TILES_SCRATCH = _TOKENS * WIDTH


@inline
def _multiply(x, at_x, rows, panels, f):
    """Tiles 0 to 3 of the unit = x w^T + bias, a block (_TOKENS, WIDTH) of features from f on; at least `rows` of it.

    x: Groups, _TOKENS rows from at_x on.
    """
    below = MATRIX_ROWS * x.row
    both = rows > MATRIX_ROWS
    at_weight, at_bias = panels.at + f * panels.depth4, panels.at_bias + f
    matrix_load(0, panels.bias, at_bias, 0)  # every row of the tile is the bias
    matrix_load(1, panels.bias, at_bias + 16, 0)
    if both:
        matrix_load(2, panels.bias, at_bias, 0)
        matrix_load(3, panels.bias, at_bias + 16, 0)
    for k in range(0, panels.depth4, 16):
        matrix_load(4, x.data, at_x + k, x.row)
        matrix_load(6, panels.data, at_weight + k * WIDTH, WIDTH)
        matrix_load(7, panels.data, at_weight + k * WIDTH + 16, WIDTH)
        matrix_dot(0, 4, 6, x.data, panels.data)
        matrix_dot(1, 4, 7, x.data, panels.data)
        if both:
            matrix_load(5, x.data, at_x + below + k, x.row)
            matrix_dot(2, 5, 6, x.data, panels.data)
            matrix_dot(3, 5, 7, x.data, panels.data)


@inline
def _keep(rows, out):
    """out (_TOKENS, WIDTH) = what `_multiply` computed, at least its first `rows`."""
    matrix_store(0, out.data, out.at, WIDTH)
    matrix_store(1, out.data, out.at + 16, WIDTH)
    if rows > MATRIX_ROWS:
        matrix_store(2, out.data, out.at + MATRIX_ROWS * WIDTH, WIDTH)
        matrix_store(3, out.data, out.at + MATRIX_ROWS * WIDTH + 16, WIDTH)


@inline
def linear(finish, arguments, x, tokens, panels, tiles):
    """Block by block; one is finished while the next one is multiplied."""
    blocks = (tokens + _TOKENS - 1) // _TOKENS * (panels.features // WIDTH)
    t, f, t_before, f_before = 0, 0, 0, 0
    for block in range(blocks + 1):
        if block < blocks:
            _multiply(x, x.at + t * x.row, tokens - t, panels, f)
        if block > 0:
            for i in range(0, min(_TOKENS, tokens - t_before), ROWS):
                tile = tile_load(ROWS, COLUMNS, tiles.data, tiles.at + i * WIDTH, WIDTH, LANES)
                finish(tile, t_before + i, f_before, *arguments)
        if block < blocks:
            _keep(tokens - t, tiles)
        t_before, f_before = t, f
        t += _TOKENS
        if t >= tokens:
            t = 0
            f += WIDTH


linear_ahead = linear


@inline
def _finish_rows(tile, t, f, arguments, finish):
    finish(tile, ROWS, t, f, *arguments)


@inline
def row_product(finish, arguments, x, tokens, panels, tiles):
    """The unit multiplies 16 rows in the time of one."""
    linear(_finish_rows, (arguments, finish), x, tokens, panels, tiles)


@inline
def lane_product(unsigned, a, rows, b, depth4, out):
    """Two rows of tiles at a time; b with the sign it has."""
    row, next_tile = a.step, MATRIX_ROWS * a.step
    for r in range(0, rows, 2 * MATRIX_ROWS):
        second = rows - r > MATRIX_ROWS
        here = a.at + r // MATRIX_ROWS * next_tile
        matrix_zero(0)
        matrix_zero(1)
        matrix_zero(2)
        matrix_zero(3)
        for k in range(0, depth4, 16):
            matrix_load(6, b.data, b.at + k * WIDTH, WIDTH)
            matrix_load(7, b.data, b.at + k * WIDTH + 16, WIDTH)
            matrix_load(4, a.data, here, row)
            if unsigned:
                matrix_dot(0, 4, 6, a.data, b.data)
                matrix_dot(1, 4, 7, a.data, b.data)
            else:
                matrix_dot_signed(0, 4, 6)
                matrix_dot_signed(1, 4, 7)
            if second:
                matrix_load(5, a.data, here + next_tile, row)
                if unsigned:
                    matrix_dot(2, 5, 6, a.data, b.data)
                    matrix_dot(3, 5, 7, a.data, b.data)
                else:
                    matrix_dot_signed(2, 5, 6)
                    matrix_dot_signed(3, 5, 7)
            here += 16
        to = out.at + r * WIDTH
        matrix_store(0, out.data, to, WIDTH)
        matrix_store(1, out.data, to + 16, WIDTH)
        if second:
            matrix_store(2, out.data, to + MATRIX_ROWS * WIDTH, WIDTH)
            matrix_store(3, out.data, to + MATRIX_ROWS * WIDTH + 16, WIDTH)


@inline
def digit_products(rows, digits, panels, count, depth4, out):
    """16 rows of digits at a time."""
    for column in range(0, count, WIDTH):
        at_panel = panels.at + column // WIDTH * panels.step
        for r in range(0, rows, MATRIX_ROWS):
            matrix_zero(0)
            matrix_zero(1)
            for k in range(0, depth4, 16):
                matrix_load(4, digits.data, digits.at + r * digits.step + k, digits.step)
                matrix_load(6, panels.data, at_panel + k * WIDTH, WIDTH)
                matrix_load(7, panels.data, at_panel + k * WIDTH + 16, WIDTH)
                matrix_dot_signed(0, 4, 6)
                matrix_dot_signed(1, 4, 7)
            matrix_store(0, out.data, out.at + r * out.step + column, out.step)
            matrix_store(1, out.data, out.at + r * out.step + column + 16, out.step)
