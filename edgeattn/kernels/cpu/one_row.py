"""Products of one row of bytes, a token: they wait for weights, each of which comes by once.

A row gives the same sums as among others, integers without rounding.
"""
from edgeattn.runtime.compiler import inline

from .byte_products import linear_ahead
from .matmul import multiply_in_chains
from .simd import (
    COLUMNS,
    HALVES_DEPTH,
    IN_HALVES,
    WIDTH,
    add_row_products,
    prefetch,
    tile_of_columns,
)

_NEAR = 32 * WIDTH  # how far ahead weights are brought near


@inline
def multiply_row(tile, x, panels, at_panel, depth4):
    """tile (1, COLUMNS) + x w^T of the features of a panel (depth4, WIDTH); x: Groups of one row, unsigned bytes."""
    if IN_HALVES:
        whole = depth4 // HALVES_DEPTH * HALVES_DEPTH
        for k in range(0, whole, HALVES_DEPTH):
            here = at_panel + k * WIDTH
            for i in range(HALVES_DEPTH):
                prefetch(panels, here + i * WIDTH + _NEAR)
            tile = add_row_products(tile, HALVES_DEPTH, x.data, x.at + k * x.step, x.step, panels, here)
        for k in range(whole, depth4):
            tile = add_row_products(tile, 1, x.data, x.at + k * x.step, x.step, panels, at_panel + k * WIDTH)
        return tile
    return multiply_in_chains(tile, x.data, x.at, x.step, panels, at_panel, depth4)


@inline
def row_times_panel(x, panels, f):
    """A tile (1, COLUMNS) of x w^T + bias, the features from f on; panels: BytePanels."""
    tile = tile_of_columns(1, COLUMNS, panels.bias, panels.at_bias + f)
    return multiply_row(tile, x, panels.data, panels.at + f * panels.depth4, panels.depth4)


@inline
def product_of_row(finish, arguments, x, panels):
    """byte_products.row_product of one row."""
    for f in range(0, panels.features, WIDTH):
        finish(row_times_panel(x, panels, f), 1, 0, f, *arguments)


@inline
def linear_of_row(finish, arguments, x, panels):
    """byte_products.linear of one row, whose tiles have that row alone."""
    for f in range(0, panels.features, WIDTH):
        finish(row_times_panel(x, panels, f), 0, f, *arguments)


@inline
def linear_of_tokens(finish, arguments, x, tokens, panels, tiles):
    """byte_products.linear_ahead, by `linear_of_row` where it is of one token."""
    if tokens == 1:
        linear_of_row(finish, arguments, x, panels)
    else:
        linear_ahead(finish, arguments, x, tokens, panels, tiles)
