"""Vectors for whole rows: sums whose order does not depend on how wide a register is, and tiles of bytes' products.

`WIDE` is a vector of 32 lanes, which every instruction set splits into registers of its own.  Element i of a row goes
to lane i % 32, and at the end the lanes are folded by halves: the same bits everywhere.
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import F32, I32, Tile, Vec, emit
from .simd.instruction_sets import CODE

VIRTUAL_LANES = 32
WIDE = Vec(types.float32, VIRTUAL_LANES)
AS_WORDS = CODE.multiplies_words  # bytes as 16-bit numbers: those of a row are widened once for all


def _first_lanes(builder, count, lanes):
    """Which lanes l are below `count`."""
    integers = ir.VectorType(emit.i32, lanes)
    return builder.icmp_signed("<", ir.Constant(integers, list(range(lanes))),
                               emit.splat(builder, builder.trunc(count, emit.i32), integers))


@intrinsic
def wide_splat(typing, scalar):
    """v[l] = scalar, float32"""
    if scalar != types.float32:
        return None

    def generate(context, builder, sig, args):
        return emit.splat(builder, args[0], context.get_value_type(WIDE))
    return WIDE(scalar), generate


@intrinsic
def wide_load(typing, array, at):
    """v[l] = array[at + l], float32"""
    def generate(context, builder, sig, args):
        return emit.load(builder, emit.pointer(context, builder, sig.args[0], *args, context.get_value_type(WIDE)))
    return WIDE(array, types.intp), generate


@intrinsic
def wide_load_first(typing, array, at, count):
    """v[l] = array[at + l] where l < count, else 0; nothing beyond is read"""
    def generate(context, builder, sig, args):
        where = emit.pointer(context, builder, sig.args[0], *args[:2], context.get_value_type(WIDE))
        return emit.load_first(builder, where, args[2])
    return WIDE(array, types.intp, types.intp), generate


@intrinsic
def wide_store_first(typing, array, at, v, count):
    """array[at + l] = v[l] where l < count; nothing beyond is touched"""
    def generate(context, builder, sig, args):
        array_, at_, value, count_ = args
        where = emit.pointer(context, builder, sig.args[0], array_, at_, value.type)
        present = _first_lanes(builder, count_, VIRTUAL_LANES)
        name = f"llvm.masked.store.v{VIRTUAL_LANES}f32.p0"
        emit.void_call(builder, name, [value, where, ir.Constant(emit.i32, 1), present])
    return types.void(array, types.intp, v, types.intp), generate


@intrinsic
def wide_first(typing, v, count):
    """u[l] = v[l] where l < count, else 0"""
    def generate(context, builder, sig, args):
        return builder.select(_first_lanes(builder, args[1], VIRTUAL_LANES), args[0], ir.Constant(args[0].type, None))
    return v(v, types.intp), generate


@intrinsic
def wide_sum(typing, v):
    """The sum of the lanes: upper half and lower half, again and again."""
    def generate(context, builder, sig, args):
        value, lanes = args[0], VIRTUAL_LANES
        while lanes > 1:
            lanes //= 2
            low, high = (emit.shuffle(builder, value, value, range(i, i + lanes)) for i in (0, lanes))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(emit.i32, 0))
    return types.float32(v), generate


@intrinsic
def smaller_float(typing, a, b):
    """v[l] = a[l] if a[l] < b[l] else b[l]: a NaN in b stays"""
    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)
    return a(a, a), generate


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
        words = ir.VectorType(ir.IntType(16), 2 * vector.count)
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
