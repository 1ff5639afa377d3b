"""A float32 product with tokens as the rows of tiles: so few rows as there are, so that a token costs what it must."""
from typing import NamedTuple

from edgeattn.runtime.compiler import inline, task

from .matmul import multiply, multiply_ahead
from .simd import COLUMNS, LANES, ROWS, WIDTH, tile_add, tile_store, tile_zero

TALL = 6 if LANES == 8 else ROWS  # rows of a tile: of sixteen registers three hold what it is made of
_UNEVEN = (1, 2) if TALL == 6 else (-1, -1)  # rows that would be left alone: 7 are better 4 and 3, 8 twice 4
AHEAD = 8  # elements of the next panel that a tile brings near for each of its depth, where it has four rows or more


class Weights(NamedTuple):
    """Of a linear map, in a flat array: panels (depth, WIDTH) from data[at] on, `step` from one to the next.

    chain: products that are summed one after another.
    """

    data: object
    at: int
    step: int
    depth: int
    chain: int


@inline
def multiply_tile(zero, begun, x, t, w, f, out):
    """Rows of out = x w^T from t on, as many as the tile `zero` has, features from f on; plus what is there, if begun.

    x, out: Rows; w: Weights
    """
    from_row, at_panel, to = x.at + t * x.step, w.at + f // WIDTH * w.step, out.at + t * out.step + f
    for k in range(0, max(w.depth, 1), w.chain):
        tile = multiply(zero, x.data, from_row + k, x.step, 1, w.data, at_panel + k * WIDTH, min(w.chain, w.depth - k))
        if begun or k > 0:
            tile = tile_add(tile, out.data, to, out.step, LANES)
        tile_store(tile, out.data, to, out.step, LANES)


@inline
def multiply_tile_ahead(zero, begun, x, t, w, f, out, at_next, pace):
    """multiply_tile(), while `pace` elements of w from at_next on for each of the depth are brought near."""
    from_row, at_panel, to = x.at + t * x.step, w.at + f // WIDTH * w.step, out.at + t * out.step + f
    for k in range(0, max(w.depth, 1), w.chain):
        some = min(w.chain, w.depth - k)
        tile = multiply_ahead(zero, x.data, from_row + k, x.step, 1, w.data, at_panel + k * WIDTH, some,
                              at_next + k * pace, pace * some)
        if begun or k > 0:
            tile = tile_add(tile, out.data, to, out.step, LANES)
        tile_store(tile, out.data, to, out.step, LANES)


@task
def product_rows(begun, x, rows, w, features, out):
    """out (rows, features) = x w^T, plus what is in out, if begun; x, out: Rows; w: Weights."""
    for f in range(0, features, WIDTH):
        t, at_next = 0, w.at + (f // WIDTH + 1) * w.step
        at_end = at_next + w.depth * WIDTH
        while t < rows:
            left = rows - t
            if left >= TALL and left - TALL not in _UNEVEN:
                pace = AHEAD if at_next < at_end else 0
                multiply_tile_ahead(tile_zero(TALL, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace)
                at_next += pace * w.depth
                t += TALL
            elif left >= 4 and left != 5:
                pace = AHEAD if at_next < at_end else 0
                multiply_tile_ahead(tile_zero(4, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace)
                at_next += pace * w.depth
                t += 4
            elif left >= 3:
                multiply_tile(tile_zero(3, COLUMNS, w.data), begun, x, t, w, f, out)
                t += 3
            elif left == 2:
                multiply_tile(tile_zero(2, COLUMNS, w.data), begun, x, t, w, f, out)
                t += 2
            else:
                multiply_tile(tile_zero(1, COLUMNS, w.data), begun, x, t, w, f, out)
                t += 1
