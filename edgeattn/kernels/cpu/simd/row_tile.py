"""Products of a lone row of bytes with panels of them: what is done to each weight is all there is to do.

Four bits of the row's bytes at a time, as u s = (u % 16) s + 16 (u // 16) s: the sums of two such products are at most
2 * 15 * 128, so that eight of them are words of 16 bits, and no weight is widened.
"""
from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .vector import LANES

IN_HALVES = CODE.in_halves  # whether this instruction set gains by it
HALVES_DEPTH = 8  # products that words take
_LOW_HALVES, _FOUR_BITS = 0x0F0F0F0F, 4


@intrinsic
def add_row_products(typing, t, depth, a, at_a, step, b, at_b):
    """t[0][j] += sum over k < depth of the bytes of a[at_a + k * step] times those of load(b, at_b + k * W + j * LANES)

    t of one row; depth a constant, at most HALVES_DEPTH; bytes of a unsigned, of b with signs; W = columns * LANES.
    """
    count = emit.literal(depth)

    def generate(context, builder, sig, args):
        tile, _, a_array, position, step_, b_array, at_b_ = args
        vector = context.get_value_type(t.vec)
        words = ir.VectorType(emit.i16, 2 * LANES)
        bits, halves = emit.all_lanes(_FOUR_BITS, vector), emit.all_lanes(_LOW_HALVES, vector)
        row = emit.data(context, builder, sig.args[2], a_array)
        panel = emit.pointer(context, builder, sig.args[5], b_array, at_b_, vector)
        sums = [[ir.Constant(words, None)] * 2 for _ in range(t.columns)]
        for k in range(count):
            four = emit.splat(builder, builder.load(builder.gep(row, [position])), vector)
            low, high = builder.and_(four, halves), builder.and_(builder.lshr(four, bits), halves)
            for j in range(t.columns):
                column = emit.load(builder, builder.gep(panel, [ir.Constant(emit.i64, k * t.columns + j)]))
                sums[j] = [CODE.add_words(builder, some, u, column)
                           for some, u in zip(sums[j], (low, high), strict=True)]
            position = builder.add(position, step_)
        for j in range(t.columns):
            value = builder.extract_value(tile, j)
            for some, factor in zip(sums[j], (1, 1 << _FOUR_BITS), strict=True):
                value = CODE.add_pairs(builder, value, some, factor)
            tile = builder.insert_value(tile, value, j)
        return tile
    return t(t, depth, a, types.intp, types.intp, b, types.intp), generate
