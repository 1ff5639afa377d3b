"""A float32 product with tokens as the rows of tiles: so few rows as there are, so that a token costs what it must.

A sum is some products at a time, the sums of these chains are summed, the bias comes last: a row gives the same bits
alone and among others.
"""
from edgeattn.runtime.compiler import NamedTuple, inline, task

from .matmul import feature_position, multiply_ahead
from .simd import (
    BY_LANE,
    COLUMNS,
    LANES,
    ROWS,
    WIDTH,
    outer_product,
    rank_steps,
    steps,
    tile_add,
    tile_add_side_by_side,
    tile_store,
    tile_store_side_by_side,
    tile_zero,
)

CHAIN = 128  # products of a linear map that are summed one after another: longer chains round more, and have fewer ends
TALL = 6 if LANES == 8 else ROWS  # rows of a tile at most: of sixteen registers three hold what it is made of
# Weights are brought near before they are needed: those of the next panel while a panel is multiplied, evenly by all
# tiles of it; by a lone tile, which reads weights as fast as memory has them, those so many elements on, so that the
# first cache holds them until then.
AHEAD = 4096
SPREAD = 4 if BY_LANE else 2  # so many tiles that each has few weights to bring near, in tall ones by fewer hints
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
    to, has_more, is_last = out.at + t * out.step, begun or k > 0, w.at_bias != NO_BIAS and k + w.chain >= w.depth
    if BY_LANE and out.column == LANES:
        if has_more:
            tile = tile_add_side_by_side(tile, out.data, to, out.step)
        if is_last:
            tile = tile_add(tile, w.data, w.at_bias + f, 0, LANES)
        tile_store_side_by_side(tile, out.data, to, out.step)
        return
    if has_more:
        tile = tile_add(tile, out.data, to, out.step, out.column)
    if is_last:
        tile = tile_add(tile, w.data, w.at_bias + f, 0, LANES)
    tile_store(tile, out.data, to, out.step, out.column)


@inline
def multiply_tile(zero, begun, x, t, w, f, out, at_next, pace, most):
    """Rows of out = x w^T from t on, as many as the tile `zero` has, features from f on; plus what is there, if begun.

    Meanwhile `pace` elements of w from at_next on, at most `most`, come near for each of the depth.
    x: Rows; w: Weights; out: Place
    """
    from_row, at_panel = x.at + t * x.step, w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        some = min(w.chain, w.depth - k)
        tile = multiply_ahead(zero, x.data, from_row + k, x.step, 1, w.data, at_panel + k * WIDTH, some,
                              at_next + k * pace, pace, most)
        finish_chain(tile, begun, k, t, w, f, out)


@inline
def multiply_some(high, tiles, begun, x, t, w, f, out, at_next, pace):
    """multiply_tile() of `high` rows, at most TALL; tiles: how many bring weights near."""
    if high == TALL and tiles >= SPREAD:
        multiply_tile(tile_zero(TALL, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH // SPREAD)
    elif TALL >= 8 and high == 8:
        multiply_tile(tile_zero(8, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif TALL >= 7 and high == 7:
        multiply_tile(tile_zero(7, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif TALL >= 6 and high == 6:
        multiply_tile(tile_zero(6, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif TALL >= 5 and high == 5:
        multiply_tile(tile_zero(5, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif high == 4:
        multiply_tile(tile_zero(4, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif high == 3:
        multiply_tile(tile_zero(3, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    elif high == 2:
        multiply_tile(tile_zero(2, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)
    else:
        multiply_tile(tile_zero(1, COLUMNS, w.data), begun, x, t, w, f, out, at_next, pace, WIDTH)


@inline
def multiply_two(zero, begun, x, w, f, out):
    """multiply_tile() of the first row for two panels, from that of f on; out: Blocks."""
    count, at_panel = steps(w.data), w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        some, p0, p1 = min(w.chain, w.depth - k), zero, zero
        for i in range(k, k + some - count + 1, count):
            a, b = x.at + i, at_panel + i * WIDTH
            p0 = rank_steps(p0, x.data, a, x.step, 1, w.data, b)
            p1 = rank_steps(p1, x.data, a, x.step, 1, w.data, b + w.step)
        for i in range(k + some // count * count, k + some):
            a, b = x.at + i, at_panel + i * WIDTH
            p0 = outer_product(p0, x.data, a, x.step, w.data, b)
            p1 = outer_product(p1, x.data, a, x.step, w.data, b + w.step)
        finish_chain(p0, begun, k, 0, w, f, place_of(f, out))
        finish_chain(p1, begun, k, 0, w, f + WIDTH, place_of(f + WIDTH, out))


@inline
def multiply_four(zero, begun, x, w, f, out):
    """multiply_tile() of the first row for four panels, from that of f on; out: Blocks."""
    count, at_panel = steps(w.data), w.at + f // WIDTH * w.step
    for k in range(0, max(w.depth, 1), w.chain):
        some, p0, p1, p2, p3 = min(w.chain, w.depth - k), zero, zero, zero, zero
        for i in range(k, k + some - count + 1, count):
            a, b = x.at + i, at_panel + i * WIDTH
            p0 = rank_steps(p0, x.data, a, x.step, 1, w.data, b)
            p1 = rank_steps(p1, x.data, a, x.step, 1, w.data, b + w.step)
            p2 = rank_steps(p2, x.data, a, x.step, 1, w.data, b + 2 * w.step)
            p3 = rank_steps(p3, x.data, a, x.step, 1, w.data, b + 3 * w.step)
        for i in range(k + some // count * count, k + some):
            a, b = x.at + i, at_panel + i * WIDTH
            p0 = outer_product(p0, x.data, a, x.step, w.data, b)
            p1 = outer_product(p1, x.data, a, x.step, w.data, b + w.step)
            p2 = outer_product(p2, x.data, a, x.step, w.data, b + 2 * w.step)
            p3 = outer_product(p3, x.data, a, x.step, w.data, b + 3 * w.step)
        finish_chain(p0, begun, k, 0, w, f, place_of(f, out))
        finish_chain(p1, begun, k, 0, w, f + WIDTH, place_of(f + WIDTH, out))
        finish_chain(p2, begun, k, 0, w, f + 2 * WIDTH, place_of(f + 2 * WIDTH, out))
        finish_chain(p3, begun, k, 0, w, f + 3 * WIDTH, place_of(f + 3 * WIDTH, out))


@task
def product_rows(begun, x, rows, w, features, out):
    """out (rows, features) = x w^T + bias, plus what is in out, if begun; x: Rows; w: Weights; out: Blocks."""
    f = 0
    while rows == 1 and f + 2 * WIDTH <= features:  # which waits for weights alone: several streams of them come faster
        if f + 4 * WIDTH <= features:
            multiply_four(tile_zero(1, COLUMNS, w.data), begun, x, w, f, out)
            f += 4 * WIDTH
        else:
            multiply_two(tile_zero(1, COLUMNS, w.data), begun, x, w, f, out)
            f += 2 * WIDTH
    tiles = (rows + TALL - 1) // TALL
    pace, on = (WIDTH + tiles - 1) // tiles, min(w.depth * WIDTH, AHEAD) if tiles == 1 else w.step
    while f < features:
        to, t, at_next = place_of(f, out), 0, w.at + f // WIDTH * w.step + on
        for left in range(tiles, 0, -1):
            high = (rows - t + left - 1) // left  # all alike: 7 rows in tiles of 6 are 4 and 3
            multiply_some(high, tiles, begun, x, t, w, f, to, at_next, pace)
            at_next += pace * w.depth
            t += high
        f += WIDTH
