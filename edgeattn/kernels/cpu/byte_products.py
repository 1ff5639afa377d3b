"""Products of bytes, and the packing of what they multiply: by the matrix unit where there is one, else in registers.

    linear(finish, arguments, x, tokens, panels, tiles)
        finish(tile, t, f, *arguments) with every register tile of x w^T + bias: tokens from t, features from f on.
        x : Groups of `tokens` rows, or as many more as make a multiple of ROWS; `panels` : BytePanels of w and bias, as
        `pack_byte_panels` leaves w; tiles : Part, TILES_SCRATCH elements.  Where DEPTH_STEP is not 1, x.step is 1,
        the depth a multiple of it, and x holds a multiple of 16 rows.
    linear_ahead(finish, arguments, x, tokens, panels, tiles)
        The same of weights, which are brought near before they are needed; the last tile may have ROWS / 2 rows.
    row_product(finish, arguments, x, tokens, panels, tiles)
        The same with finish(tile, rows, t, f, *arguments), where a tile has `rows` rows, a constant: in registers as
        many as are left at the end, so that few tokens cost little; by the matrix unit ROWS, the last past the tokens.
    lane_product(unsigned, a, rows, b, depth4, out)
        out (rows, WIDTH) int32 = a b; the rows up to the next multiple of ROW_STEP are read and written too.
        a : Rows of signed bytes; b : Part, uint32 (depth4, WIDTH), of which what does not belong to the product is 0,
        whatever `a` holds there; depth4 a multiple of DEPTH_STEP.
        unsigned: a constant, whether b holds unsigned bytes; where not, signed ones plus LANE_SHIFT.
    digit_products(rows, digits, panels, count, depth4, out)
        out[out.at + r * out.step + l] = row r of digits, signed bytes, times column l of panels, l < count or more.
        digits, out : Rows; panels : Rows of (depth4, WIDTH), unsigned bytes of signed ones plus LANE_SHIFT.

Each of `linear`'s operands is of dtype int32 or uint32: one of each, the unsigned side uint32.
"""
import numpy as np

from edgeattn.runtime.isa import ISA

from .simd import MATRIX_ROWS, WIDTH

if ISA.amx:
    from .byte_products_matrix import (
        DEPTH_STEP,
        ROW_STEP,
        TILES_SCRATCH,
        digit_products,
        lane_product,
        linear,
        linear_ahead,
        row_product,
    )
else:
    from .byte_products_tiles import (
        DEPTH_STEP,
        ROW_STEP,
        TILES_SCRATCH,
        digit_products,
        lane_product,
        linear,
        linear_ahead,
        row_product,
    )

# DEPTH_STEP: what the depth of a product must be a multiple of, in groups of four bytes; ROW_STEP: rows written at once
READ_AHEAD = 2 * MATRIX_ROWS  # rows that a product may read past the last one

__all__ = ["DEPTH_STEP", "READ_AHEAD", "ROW_STEP", "TILES_SCRATCH", "digit_products", "lane_product", "linear",
           "linear_ahead", "pack_byte_panels", "row_product"]


def pack_byte_panels(weight):
    """int8 weight (N, depth), N a multiple of WIDTH, depth of 4 -> int32 panels (N / WIDTH, depth / 4, WIDTH)."""
    n, depth = weight.shape
    words = np.ascontiguousarray(weight).view(np.int32)  # NumPy moves words ten times as fast as four bytes each
    return words.reshape(n // WIDTH, WIDTH, depth // 4).transpose(0, 2, 1).ravel()
