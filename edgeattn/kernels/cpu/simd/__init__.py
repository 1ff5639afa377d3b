"""Vectors and register tiles for Numba kernels.

`Vec(dtype, lanes)` is one vector register (or a few: the compiler splits wide ones); `Tile(vec, rows, columns)` is a
block of them that stays in registers.  Arrays are one-dimensional and contiguous; positions count array elements.
What each operation means is said in its docstring as a loop over lanes `l`, and test_simd.py holds it to that.
`instruction_sets` has what each of them does in its own way.

Bytes travel four to a 32-bit lane: an array of dtype uint32 holds four unsigned bytes per element (see
`ISA.offset`), one of dtype int32 holds four signed bytes, lowest address in the lowest bits.
"""
from edgeattn.runtime.isa import ISA

from .byte_tile import (
    AS_WORDS,
    outer_product_of_words,
    tile_accumulate,
    tile_of_products,
    tile_scale,
)
from .bytes import (
    byte_planes,
    dot_bytes,
    gather_byte,
    join_bytes,
    larger_bytes,
    load_bytes,
    look_up_bytes,
    map_bytes,
    pack_bytes,
    store_bytes,
    subtract_bytes,
)
from .lane_products import (
    BY_LANE,
    multiply_by_lane,
    multiply_by_lane_ahead,
    tile_add_side_by_side,
    tile_store_side_by_side,
)
from .matrix_unit import (
    MATRIX_ROWS,
    matrix_configure,
    matrix_dot,
    matrix_dot_signed,
    matrix_load,
    matrix_release,
    matrix_store,
    matrix_zero,
)
from .operators import (
    shift_right_logical,
)
from .row_tile import (
    HALVES_DEPTH,
    IN_HALVES,
    add_row_products,
)
from .scalar import (
    address_of,
    pointer_to,
    prefetch,
    prefetch_first,
    quotient,
)
from .tile import (
    COLUMNS,
    ROWS,
    WIDTH,
    Tile,
    add_tiles,
    outer_product,
    rank_steps,
    steps,
    tile_add,
    tile_add_dots,
    tile_add_down,
    tile_add_part_dots,
    tile_add_part_rows,
    tile_add_rows,
    tile_add_to,
    tile_dequantize,
    tile_get,
    tile_load,
    tile_map,
    tile_of_columns,
    tile_pack_rows,
    tile_row_sums,
    tile_rows,
    tile_store,
    tile_store_bytes,
    tile_zero,
)
from .transpose import (
    interleave_rows,
    transpose_block,
)
from .vector import (
    F32,
    F64,
    I32,
    I64,
    LANES,
    MASK,
    Vec,
    any_lane,
    bits_of,
    broadcast,
    double_of_bits,
    first_lane,
    float_of_bits,
    fma,
    fraction,
    lane_index,
    load,
    max_lanes,
    maximum,
    narrow,
    round_to_int,
    scale_by_power,
    select,
    smaller,
    smaller_float,
    splat,
    splat_like,
    store,
    sum_lanes,
    to_double,
    to_float,
    truncate,
    truncate_double,
    widen,
)
from .wide import (
    VIRTUAL_LANES,
    WIDE,
    in_step,
    wide_first,
    wide_load,
    wide_load_first,
    wide_splat,
    wide_store_first,
    wide_sum,
)
from .word_tile import (
    ADDS_FIRST,
    add_products_of_wide,
    add_word_products,
    add_word_products_and_widen,
    own_products,
    split_words,
    tile_add_columns,
    tile_add_outer,
)

OFFSET = ISA.offset
