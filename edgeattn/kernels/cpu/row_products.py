"""A float32 product with tokens as the rows of tiles: so few rows as there are, so that a token costs what it must.

A sum is some products at a time, the sums of these chains are summed, the bias comes last: a row gives the same bits
alone and among others.
"""
from typing import NamedTuple

from edgeattn.runtime.compiler import inline, task

from .matmul import feature_position, multiply, multiply_ahead
from .simd import COLUMNS, LANES, ROWS, WIDTH, outer_product, rank_steps, steps, tile_add, tile_store, tile_zero

TALL = 6 if LANES == 8 else ROWS  # rows of a tile: of sixteen registers three hold what it is made of
_UNEVEN = (1, 2) if TALL == 6 else (-1, -1)  # rows that would be left alone: 7 are better 4 and 3, 8 twice 4
AHEAD = 8  # elements of the next panel that a tile brings near for each of its depth, where it has four rows or more
FEW = 3  # up to so many rows wait for weights more than for sums: two panels are read at a time
NO_BIAS = -1


class Weights(NamedTuple):
    """Of a linear map, in a flat array: panels (depth, WIDTH) from data[at] on, `step` from one to the next.

    chain: products that are summed one after another; at_bias: where a bias begins, or NO_BIAS.
    """

    data: object
    at: int
    step: int
    depth: int
    chain: int
    at_bias: int


class Place(NamedTuple):
    """Where a panel's features of the product go: of row t from data[at + t * step] on, vectors `column` apart."""

    data: object
    at: int
    step: int
    column: int


@inline
def place_of(f, out):
    """The `Place` of the features from f on in Blocks."""
    at = feature_position(f, out.block, out.step)
    return Place(out.data, out.at + at, out.block, feature_position(f + LANES, out.block, out.step) - at)


@inline
def finish_chain(tile, begun, k, t, w, f, out):
    """Store a tile of the products from k on, rows from t on, features from f on; plus what is there, if begun.

    w: Weights, out: Place
    """
    to = out.at + t * out.step
    if begun or k > 0:
        tile = tile_add(tile, out.data, to, out.step, out.column)
    if w.at_bias != NO_BIAS and k + w.chain >= w.depth:
        tile = tile_add(tile, w.data, w.at_bias + f, 0, LANES)
    tile_store(tile, out.data, to, out.step, out.column)


@inline
def multiply_tile(zero, begun, x, t, w, f, out):
    """Rows of out = x w^T from t on, as many as the tile `zero` has, features from f on; plus what is there, if begun.

    x: Rows; w: Weights; out: Place
    """
    from_row, at_panel = x.at + t * x.step, w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        tile = multiply(zero, x.data, from_row + k, x.step, 1, w.data, at_panel + k * WIDTH, min(w.chain, w.depth - k))
        finish_chain(tile, begun, k, t, w, f, out)


@inline
def multiply_tile_ahead(zero, begun, x, t, w, f, out, at_next, pace):
    """multiply_tile(), while `pace` elements of w from at_next on for each of the depth are brought near."""
    from_row, at_panel = x.at + t * x.step, w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        some = min(w.chain, w.depth - k)
        tile = multiply_ahead(zero, x.data, from_row + k, x.step, 1, w.data, at_panel + k * WIDTH, some,
                              at_next + k * pace, pace * some)
        finish_chain(tile, begun, k, t, w, f, out)


@inline
def multiply_two(zero, begun, x, w, f, out, other):
    """multiply_tile() of the first rows, for the panel of f and the next one, which goes to the Place `other`."""
    count, at_panel = steps(w.data), w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        some, one, two = min(w.chain, w.depth - k), zero, zero
        at_x, at_one = x.at + k, at_panel + k * WIDTH
        at_two = at_one + w.step
        for i in range(0, some - count + 1, count):
            one = rank_steps(one, x.data, at_x + i, x.step, 1, w.data, at_one + i * WIDTH)
            two = rank_steps(two, x.data, at_x + i, x.step, 1, w.data, at_two + i * WIDTH)
        for i in range(some // count * count, some):
            one = outer_product(one, x.data, at_x + i, x.step, w.data, at_one + i * WIDTH)
            two = outer_product(two, x.data, at_x + i, x.step, w.data, at_two + i * WIDTH)
        finish_chain(one, begun, k, 0, w, f, out)
        finish_chain(two, begun, k, 0, w, f + WIDTH, other)


@task
def product_rows(begun, x, rows, w, features, out):
    """out (rows, features) = x w^T + bias, plus what is in out, if begun; x: Rows; w: Weights; out: Blocks."""
    f = 0
    if rows <= FEW:
        while f + 2 * WIDTH <= features:
            to, other = place_of(f, out), place_of(f + WIDTH, out)
            if rows == 1:
                multiply_two(tile_zero(1, COLUMNS, w.data), begun, x, w, f, to, other)
            elif rows == 2:
                multiply_two(tile_zero(2, COLUMNS, w.data), begun, x, w, f, to, other)
            elif rows == 3:
                multiply_two(tile_zero(3, COLUMNS, w.data), begun, x, w, f, to, other)
            f += 2 * WIDTH
    while f < features:
        to, t, at_next = place_of(f, out), 0, w.at + (f // WIDTH + 1) * w.step
        at_end = at_next + w.depth * WIDTH
        while t < rows:
            left = rows - t
            if left >= TALL and left - TALL not in _UNEVEN:
                pace = AHEAD if at_next < at_end else 0
                multiply_tile_ahead(tile_zero(TALL, COLUMNS, w.data), begun, x, t, w, f, to, at_next, pace)
                at_next += pace * w.depth
                t += TALL
            elif left >= 4 and left != 5:
                pace = AHEAD if at_next < at_end else 0
                multiply_tile_ahead(tile_zero(4, COLUMNS, w.data), begun, x, t, w, f, to, at_next, pace)
                at_next += pace * w.depth
                t += 4
            elif left >= 3:
                multiply_tile(tile_zero(3, COLUMNS, w.data), begun, x, t, w, f, to)
                t += 3
            elif left == 2:
                multiply_tile(tile_zero(2, COLUMNS, w.data), begun, x, t, w, f, to)
                t += 2
            else:
                multiply_tile(tile_zero(1, COLUMNS, w.data), begun, x, t, w, f, to)
                t += 1
        f += WIDTH
