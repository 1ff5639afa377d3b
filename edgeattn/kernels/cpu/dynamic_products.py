"""Products of the bytes that dynamic_rows.py makes of rows with int8 weights, and what becomes of them."""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, task

from .byte_products_tiles import multiply_near, product_of_rows
from .dynamic import COLUMNS_APART
from .dynamic_rows import WORDS
from .int8_views import Groups
from .matmul import multiply_in_chains
from .one_row import multiply_row
from .simd import (
    ADDS_FIRST,
    AS_WORDS,
    COLUMNS,
    LANES,
    WIDTH,
    fma,
    load,
    outer_product,
    outer_product_of_words,
    splat,
    store,
    tile_accumulate,
    tile_add_columns,
    tile_add_down,
    tile_add_outer,
    tile_map,
    tile_of_products,
    tile_scale,
    tile_store,
)
from .word_products import Words, product_of_words


class Panels(NamedTuple):
    """Where panels of weights are, the channels' sums, and how far behind those minus their own products."""

    at: int
    at_c: int
    own_step: int


class Sums(NamedTuple):
    """Where products go, as float32: rows from `at` on, `row` apart; begun: they are added to what is there."""

    at: int
    row: int
    begun: bool


class Finish(NamedTuple):
    """What becomes of sums y where they are the last: y s + b + x_J V_J.

    Where the scales, biases and V, rows `v_step` apart, of these channels are, how many features are `apart`, and where
    x_J of the first row is.
    """

    is_last: bool
    at_s: int
    at_b: int
    at_v: int
    v_step: int
    apart: int
    at_apart: int


@inline
def scale_and_add(y, factors, at, behind):
    """y times a scale, plus the bias `behind` it."""
    return fma(y, load(factors, at), load(factors, at + behind))


@inline
def finish_tile(tile, t, f, m, x, out, finish):
    """The products of rows from t on and channels from f on, times each row's scale, to Sums as Finish says."""
    to = out.at + t * out.row + f
    if out.begun:
        tile_accumulate(tile, m.f, x.at_scale + t, m.f, to, out.row)
    elif finish.is_last:
        y = tile_map(tile_scale(tile, m.f, x.at_scale + t), scale_and_add, m.factors, finish.at_s + f, LANES,
                     finish.at_b - finish.at_s)
        for k in range(finish.apart):
            y = outer_product(y, m.f, finish.at_apart + t * COLUMNS_APART + k, COLUMNS_APART, m.factors,
                              finish.at_v + k * finish.v_step + f)
        tile_store(y, m.f, to, out.row, LANES)
    else:
        tile_store(tile_scale(tile, m.f, x.at_scale + t), m.f, to, out.row, LANES)


@inline
def multiply_tile(tile, rows, t, f, at_next, pace, m, x, w, out, finish):
    """A tile of zeros, plus x w^T + minus c, finished: a step of product_of_rows."""
    tile, groups4 = tile_add_outer(tile, m.i, x.at_minus + t, m.weights, w.at_c + f), x.groups4
    if AS_WORDS:
        at_x, at_w = x.at + t * groups4 * WORDS, w.at + f * groups4
        for k in range(groups4):
            tile = outer_product_of_words(tile, m.i, at_x + k, WORDS * groups4, groups4, m.weights, at_w + k * WIDTH)
    else:
        tile = multiply_near(tile, Groups(m.u, x.at, groups4, 1), t, m.weights, w.at + f * groups4, groups4, at_next,
                             pace)
    finish_tile(tile, t, f, m, x, out, finish)


@inline
def multiply_lone_row(tile, rows, t, f, at_next, pace, m, x, w, out, finish):
    """multiply_tile() of one row."""
    if AS_WORDS:
        multiply_tile(tile, rows, t, f, at_next, 0, m, x, w, out, finish)
    else:
        tile, groups4 = tile_add_outer(tile, m.i, x.at_minus + t, m.weights, w.at_c + f), x.groups4
        tile = multiply_in_chains(tile, m.u, x.at + t * groups4, 1, m.weights, w.at + f * groups4, groups4)
        finish_tile(tile, t, f, m, x, out, finish)


@inline
def start_sums(tile, t, f, m, x, w, out, finish):
    """What a tile of zeros is before products are added."""
    tile = tile_add_outer(tile, m.i, x.at_minus + t, m.weights, w.at_c + f)
    return tile_add_columns(tile_add_down(tile, m.i, x.at_own + t), m.weights, w.at_c + w.own_step + f)


@inline
def finish_sums(tile, rows, t, f, m, x, w, out, finish):
    """finish_tile(), as product_of_words calls it."""
    finish_tile(tile, t, f, m, x, out, finish)


@task
def product_rows(m, x, rows, w, features, out, finish, at_wide):
    """out (rows, features) = scale (x w^T + minus c), added to what is there or finished.

    x: Codes; w: Panels (features / WIDTH, groups4, WIDTH); c (features,): sums of w; out: Sums; finish: Finish;
    at_wide: room for words
    """
    if ADDS_FIRST:
        if rows == 1:
            for f in range(0, features, WIDTH):
                tile = tile_of_products(1, COLUMNS, m.i, x.at_minus, m.weights, w.at_c + f)
                tile = multiply_row(tile, Groups(m.u, x.at, 0, 1), m.weights, w.at + f * x.groups4, x.groups4)
                finish_tile(tile, 0, f, m, x, out, finish)
            return
        product_of_words(start_sums, finish_sums, (m, x, w, out, finish), Words(m.i, x.at, x.groups4, at_wide), rows,
                         m.weights, w.at, features)
    else:
        product_of_rows(multiply_tile, multiply_lone_row, (m, x, w, out, finish), rows, features, w.at, x.groups4,
                        m.weights)


@task
def scale_rows(m, at, row_step, rows, features, finish):
    """What Finish says of sums (rows, features) at `at`, in place."""
    for r in range(rows):
        here, kept = at + r * row_step, finish.at_apart + r * COLUMNS_APART
        for f in range(0, features, LANES):
            y = fma(load(m.f, here + f), load(m.factors, finish.at_s + f), load(m.factors, finish.at_b + f))
            for k in range(finish.apart):
                y = fma(splat(m.f[kept + k]), load(m.factors, finish.at_v + k * finish.v_step + f), y)
            store(m.f, here + f, y)


@inline
def add_second(m, at, out_up, low, lows):
    """Add to channels `low` (lows,) of a row at `at` what their second ones, behind out_up channels, hold."""
    for k in range(lows):
        channel = np.int64(m.weights[low + k])
        m.f[at + channel] = m.f[at + channel] + m.f[at + out_up + k]
