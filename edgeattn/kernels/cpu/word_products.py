"""Products of bytes as words, as simd.word_tile says, where ADDS_FIRST: tile by tile, panel by panel.

The first tile of a panel leaves its words for the others.
"""
import numpy as np

from edgeattn.runtime.compiler import NamedTuple, inline, register_jitable

from .matmul import round_up
from .simd import (
    ADDS_FIRST,
    COLUMNS,
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    add_products_of_wide,
    add_word_products,
    add_word_products_and_widen,
    lane_index,
    load,
    own_products,
    prefetch,
    select,
    splat,
    split_words,
    sum_lanes,
    tile_add_columns,
    tile_add_down,
    tile_zero,
)

_NEAR = 32 * WIDTH  # how far ahead bytes are brought near


class Words(NamedTuple):
    """Tiles of ROWS rows of depth4 pairs of words, in data from `at` on: of each depth the pairs of a tile's rows.

    Pair k of row r is at `at` + 2 * ((r // ROWS * depth4 + k) * ROWS + r % ROWS), in the last tile too.
    at_wide: where in data the words of a panel go, 2 * depth4 * WIDTH elements.
    """

    data: object
    at: int
    depth4: int
    at_wide: int


@inline
def split_row(source, at, depth4, data, at_words, row, at_own):
    """Four bytes an element (depth4,) to a row of Words, and minus the sum of their own products; depth4 >= LANES."""
    none, to = splat(np.int32(0)), at_words + 2 * (row // ROWS * depth4 * ROWS + row % ROWS)
    own, whole = none, depth4 // LANES * LANES
    for i in range(0, whole, LANES):
        own = own + split_words(data, to + 2 * ROWS * i, 2 * ROWS, load(source, at + i))
    if whole < depth4:  # the last ones, among them some that have been counted
        i = depth4 - LANES
        more = split_words(data, to + 2 * ROWS * i, 2 * ROWS, load(source, at + i))
        own = own + select(lane_index() < splat(np.int32(whole - i)), none, more)
    data[at_own] = -sum_lanes(own)


def terms_of(codes):
    """What is added to products of rows of int8 codes (n, depth) with bytes plus OFFSET: (n,) for the OFFSET.

    Behind these, where ADDS_FIRST, minus the rows' own products.
    """
    terms = -OFFSET * codes.sum(1, dtype=np.int32)
    return np.concatenate((terms, -own_products(codes))) if ADDS_FIRST else terms


@register_jitable
def rows_of_words(rows, depth4):
    """Elements that rows of words take."""
    return 2 * depth4 * round_up(rows, ROWS) if ADDS_FIRST else 0


@register_jitable
def panel_of_words(depth4):
    """Elements that the words of a panel take."""
    return 2 * depth4 * WIDTH if ADDS_FIRST else 0


@register_jitable
def words_scratch(rows, depth4):
    """Elements that rows of words take, what each adds, and the words of a panel."""
    return round_up(rows, 16) + rows_of_words(rows, depth4) + panel_of_words(depth4) if ADDS_FIRST else 0


# Two depths stand in one turn of each loop: fewer instructions beside those that multiply.

@inline
def _of_bytes(start, finish, arguments, zero, rows, x, w, at_w, f):
    tile = start(zero, 0, f, *arguments)
    for k in range(0, x.depth4, 2):
        at_x, at = x.at + 2 * ROWS * k, at_w + k * WIDTH
        prefetch(w, at + _NEAR)
        tile = add_word_products(tile, x.data, at_x, w, at)
        prefetch(w, at + WIDTH + _NEAR)
        tile = add_word_products(tile, x.data, at_x + 2 * ROWS, w, at + WIDTH)
    finish(tile, rows, 0, f, *arguments)


@inline
def _of_words(start, finish, arguments, zero, rows, x, t, f):
    tile = start(zero, t, f, *arguments)
    for k in range(0, x.depth4, 2):
        at_x, at_wide = x.at + 2 * (t * x.depth4 + ROWS * k), x.at_wide + 2 * k * WIDTH
        tile = add_products_of_wide(tile, x.data, at_x, x.data, at_wide)
        tile = add_products_of_wide(tile, x.data, at_x + 2 * ROWS, x.data, at_wide + 2 * WIDTH)
    finish(tile, rows, t, f, *arguments)


@inline
def _widen(start, finish, arguments, zero, x, w, at_w, f):
    tile = start(zero, 0, f, *arguments)
    for k in range(0, x.depth4, 2):
        at_x, at, at_wide = x.at + 2 * ROWS * k, at_w + k * WIDTH, x.at_wide + 2 * k * WIDTH
        prefetch(w, at + _NEAR)
        tile = add_word_products_and_widen(tile, x.data, at_x, w, at, x.data, at_wide)
        prefetch(w, at + WIDTH + _NEAR)
        tile = add_word_products_and_widen(tile, x.data, at_x + 2 * ROWS, w, at + WIDTH, x.data, at_wide + 2 * WIDTH)
    finish(tile, ROWS, 0, f, *arguments)


@inline
def product_of_words(start, finish, arguments, x, rows, w, at_w, features):
    """finish(tile, rows, t, f, *arguments) with every tile of start(zeros, t, f, *arguments) + x w^T + own products.

    x: Words, of two rows or more: one_row.py has one; w: panels (features / WIDTH, depth4, WIDTH) of bytes from at_w on
    """
    like = x.data
    for f in range(0, features, WIDTH):
        at_panel = at_w + f * x.depth4
        if rows > ROWS:
            t = ROWS
            _widen(start, finish, arguments, tile_zero(ROWS, COLUMNS, like), x, w, at_panel, f)
            while t + ROWS <= rows:
                _of_words(start, finish, arguments, tile_zero(ROWS, COLUMNS, like), ROWS, x, t, f)
                t += ROWS
            if rows - t == 3:
                _of_words(start, finish, arguments, tile_zero(3, COLUMNS, like), 3, x, t, f)
            elif rows - t == 2:
                _of_words(start, finish, arguments, tile_zero(2, COLUMNS, like), 2, x, t, f)
            elif rows - t == 1:
                _of_words(start, finish, arguments, tile_zero(1, COLUMNS, like), 1, x, t, f)
        elif rows == 4:
            _of_bytes(start, finish, arguments, tile_zero(4, COLUMNS, like), 4, x, w, at_panel, f)
        elif rows == 3:
            _of_bytes(start, finish, arguments, tile_zero(3, COLUMNS, like), 3, x, w, at_panel, f)
        else:
            _of_bytes(start, finish, arguments, tile_zero(2, COLUMNS, like), 2, x, w, at_panel, f)


@inline
def _start_with_bias(tile, t, f, data, at_own, panels, own_step, finish, arguments):
    tile = tile_add_columns(tile_add_down(tile, data, at_own + t), panels.bias, panels.at_bias + f)
    return tile_add_columns(tile, panels.bias, panels.at_bias + own_step + f)


@inline
def _finish_with(tile, rows, t, f, data, at_own, panels, own_step, finish, arguments):
    finish(tile, rows, t, f, *arguments)


@inline
def row_product_of_words(finish, arguments, x, at_own, rows, panels, own_step):
    """byte_products.row_product of Words, whose minus own products are in x.data from at_own on.

    own_step: how far behind the bias minus the weights' own products are.
    """
    product_of_words(_start_with_bias, _finish_with, (x.data, at_own, panels, own_step, finish, arguments), x, rows,
                     panels.data, panels.at, panels.features)
