"""Tiles of products of bytes, as rows that have scales and zero points of their own need them."""

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .tile import Tile
from .vector import F32, I32

# Whether bytes are multiplied as 16-bit words: then those of a row are widened once, not for each product.
AS_WORDS = CODE.prepare is emit.even_and_odd_bytes


@intrinsic
def tile_of_products(typing, rows, columns, down, i0, across, at):
    """t[i][j] = down[i0 + i] * load(across, at + j * LANES), int32"""
    tile = Tile(I32, emit.literal(rows), emit.literal(columns))

    def generate(context, builder, sig, args):
        vector = context.get_value_type(I32)
        base = emit.pointer(context, builder, sig.args[4], args[4], args[5], vector)
        columns_ = [emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])) for j in range(tile.columns)]
        first = builder.gep(emit.data(context, builder, sig.args[2], args[2]), [args[3]])
        out = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for i in range(tile.rows):
            row = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
            for j in range(tile.columns):
                out = builder.insert_value(out, builder.mul(row, columns_[j]), i * tile.columns + j)
        return out
    return tile(rows, columns, down, types.intp, across, types.intp), generate


@intrinsic
def tile_accumulate(typing, t, down, i0, out, at, row_step):
    """out[at + i * row_step + j * LANES + l] = fma(float32(t[i][j][l]), down[i0 + i], the same of out)"""
    def generate(context, builder, sig, args):
        vector = context.get_value_type(F32)
        first = builder.gep(emit.data(context, builder, sig.args[1], args[1]), [args[2]])
        position = args[4]
        for i in range(t.rows):
            row = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
            base = emit.pointer(context, builder, sig.args[3], args[3], position, vector)
            for j in range(t.columns):
                where = builder.gep(base, [ir.Constant(emit.i64, j)])
                value = builder.sitofp(builder.extract_value(args[0], i * t.columns + j), vector)
                emit.store(builder, emit.fma(builder, value, row, emit.load(builder, where)), where)
            position = builder.add(position, args[5])
    return types.void(t, down, types.intp, out, types.intp, types.intp), generate


@intrinsic
def tile_scale(typing, t, down, i0):
    """f[i][j] = float32(t[i][j]) * down[i0 + i]"""
    result = Tile(F32, t.rows, t.columns)

    def generate(context, builder, sig, args):
        vector = context.get_value_type(F32)
        first = builder.gep(emit.data(context, builder, sig.args[1], args[1]), [args[2]])
        out = ir.Constant(context.get_value_type(result), ir.Undefined)
        for i in range(t.rows):
            row = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
            for k in range(i * t.columns, (i + 1) * t.columns):
                value = builder.fmul(builder.sitofp(builder.extract_value(args[0], k), vector), row)
                out = builder.insert_value(out, value, k)
        return out
    return result(t, down, types.intp), generate


@intrinsic
def outer_product_of_words(typing, t, a, at_a, row_step, plane, b, at_b):
    """outer_product(t, a, at_a, row_step, b, at_b) with the bytes of a as 16-bit numbers, where AS_WORDS

    Bytes 0 and 2 of four are the halves of a[at_a + i * row_step], 1 and 3 those of what lies `plane` further.
    """
    def generate(context, builder, sig, args):
        tile, a_array, position, step, plane_, b_array, at_b_ = args
        vector = context.get_value_type(t.vec)
        words = ir.VectorType(emit.i16, 2 * vector.count)
        base = emit.pointer(context, builder, b, b_array, at_b_, vector)
        across = [CODE.prepare(builder, emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])), False)
                  for j in range(t.columns)]
        first = emit.data(context, builder, a, a_array)
        for i in range(t.rows):
            halves = [builder.bitcast(emit.splat(builder, builder.load(builder.gep(first, [at])), vector), words)
                      for at in (position, builder.add(position, plane_))]
            for j in range(t.columns):
                k = i * t.columns + j
                value = CODE.dot(builder, builder.extract_value(tile, k), halves, across[j])
                tile = builder.insert_value(tile, value, k)
            position = builder.add(position, step)
        return tile
    return t(t, a, types.intp, types.intp, types.intp, b, types.intp), generate
