"""A register tile: rows by columns of vectors that stay in registers while products are added to them."""

from edgeattn.runtime.compiler import intrinsic, ir, models, register_model, types
from edgeattn.runtime.isa import ISA

from . import emit
from .instruction_sets import CODE
from .vector import F32, I32, LANES, OF_ARRAY

ROWS = ISA.rows
COLUMNS = ISA.columns
WIDTH = LANES * COLUMNS  # queries, or features, that one tile covers


class Tile(types.Type):
    """A block of `rows` x `columns` vectors."""

    def __init__(self, vec, rows, columns):
        self.vec, self.rows, self.columns = vec, rows, columns
        super().__init__(f"Tile({vec},{rows},{columns})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        vector = manager.lookup(tile.vec).get_value_type()
        super().__init__(manager, tile, ir.ArrayType(vector, tile.rows * tile.columns))


@intrinsic
def tile_zero(typing, rows, columns, like):
    """t[i][j] = 0, of the kind of vector that `like` (an array) loads"""
    tile = Tile(OF_ARRAY[like.dtype], emit.literal(rows), emit.literal(columns))

    def generate(context, builder, sig, args):
        return ir.Constant(context.get_value_type(tile), None)
    return tile(rows, columns, like), generate


@intrinsic
def tile_of_columns(typing, rows, columns, array, at):
    """t[i][j] = load(array, at + j * LANES)"""
    tile = Tile(OF_ARRAY[array.dtype], emit.literal(rows), emit.literal(columns))

    def generate(context, builder, sig, args):
        vector = context.get_value_type(tile.vec)
        base = emit.pointer(context, builder, sig.args[2], args[2], args[3], vector)
        across = [emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])) for j in range(tile.columns)]
        out = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for k in range(tile.rows * tile.columns):
            out = builder.insert_value(out, across[k % tile.columns], k)
        return out
    return tile(rows, columns, array, types.intp), generate


@intrinsic
def tile_load(typing, rows, columns, array, at, row_step, column_step):
    """t[i][j] = load(array, at + i * row_step + j * column_step)"""
    tile = Tile(OF_ARRAY[array.dtype], emit.literal(rows), emit.literal(columns))

    def generate(context, builder, sig, args):
        vector = context.get_value_type(tile.vec)
        out = ir.Constant(context.get_value_type(tile), ir.Undefined)
        position = args[3]
        for i in range(tile.rows):
            here = position
            for j in range(tile.columns):
                value = emit.load(builder, emit.pointer(context, builder, sig.args[2], args[2], here, vector))
                out = builder.insert_value(out, value, i * tile.columns + j)
                here = builder.add(here, args[5])
            position = builder.add(position, args[4])
        return out
    return tile(rows, columns, array, types.intp, types.intp, types.intp), generate


@intrinsic
def tile_store(typing, t, array, at, row_step, column_step):
    """store(array, at + i * row_step + j * column_step, t[i][j])"""
    def generate(context, builder, sig, args):
        tile, array_, position, row_step_, column_step_ = args
        for i in range(t.rows):
            here = position
            for j in range(t.columns):
                value = builder.extract_value(tile, i * t.columns + j)
                emit.store(builder, value, emit.pointer(context, builder, sig.args[1], array_, here, value.type))
                here = builder.add(here, column_step_)
            position = builder.add(position, row_step_)
    return types.void(t, array, types.intp, types.intp, types.intp), generate


@intrinsic
def tile_add(typing, t, array, at, row_step, column_step):
    """t[i][j] += load(array, at + i * row_step + j * column_step)"""
    def generate(context, builder, sig, args):
        tile, array_, position, row_step_, column_step_ = args
        vector = context.get_value_type(t.vec)
        for i in range(t.rows):
            here = position
            for j in range(t.columns):
                k = i * t.columns + j
                value = emit.load(builder, emit.pointer(context, builder, sig.args[1], array_, here, vector))
                tile = builder.insert_value(tile, builder.fadd(builder.extract_value(tile, k), value), k)
                here = builder.add(here, column_step_)
            position = builder.add(position, row_step_)
        return tile
    return t(t, array, types.intp, types.intp, types.intp), generate


@intrinsic
def add_tiles(typing, t, u):
    """t[i][j] + u[i][j], int32"""
    def generate(context, builder, sig, args):
        out = args[0]
        for k in range(t.rows * t.columns):
            out = builder.insert_value(out, builder.add(*[builder.extract_value(tile, k) for tile in args]), k)
        return out
    return t(t, u), generate


@intrinsic
def tile_add_to(typing, t, array, at):
    """array[at + j * LANES + l] += sum over i of t[i][j][l]"""
    def generate(context, builder, sig, args):
        vector = context.get_value_type(t.vec)
        base = emit.pointer(context, builder, sig.args[1], args[1], args[2], vector)
        for j in range(t.columns):
            rows = [builder.extract_value(args[0], i * t.columns + j) for i in range(t.rows)]
            while len(rows) > 1:
                rows = [builder.fadd(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
            where = builder.gep(base, [ir.Constant(emit.i64, j)])
            emit.store(builder, builder.fadd(emit.load(builder, where), rows[0]), where)
    return types.void(t, array, types.intp), generate


@intrinsic
def tile_add_down(typing, t, down, i0):
    """u[i][j] = t[i][j] + splat(down[i0 + i]), int32"""
    def generate(context, builder, sig, args):
        tile = args[0]
        first = builder.gep(emit.data(context, builder, sig.args[1], args[1]), [args[2]])
        for i in range(t.rows):
            row = builder.load(builder.gep(first, [ir.Constant(emit.i64, i)]))
            row = emit.splat(builder, row, context.get_value_type(t.vec))
            for k in range(i * t.columns, (i + 1) * t.columns):
                tile = builder.insert_value(tile, builder.add(builder.extract_value(tile, k), row), k)
        return tile
    return t(t, down, types.intp), generate


@intrinsic
def tile_rows(typing, t):
    """How many rows t has."""
    def generate(context, builder, sig, args):
        return ir.Constant(emit.i64, t.rows)
    return types.intp(t), generate


@intrinsic
def tile_get(typing, t, i, j):
    """t[i][j]"""
    k = emit.literal(i) * t.columns + emit.literal(j)

    def generate(context, builder, sig, args):
        return builder.extract_value(args[0], k)
    return t.vec(t, i, j), generate


def _rank_one(context, builder, sig, args):
    t, a, b = sig.args[0], sig.args[1], sig.args[4]
    tile, a_array, at_a_, step, b_array, at_b_ = args
    vector = context.get_value_type(t.vec)
    real = t.vec.dtype == types.float32
    base = emit.pointer(context, builder, b, b_array, at_b_, vector)
    across = [emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])) for j in range(t.columns)]
    if not real:
        across = [CODE.prepare(builder, v, b.dtype == types.uint32) for v in across]
    first = emit.data(context, builder, a, a_array)
    position = at_a_
    for i in range(t.rows):
        row = emit.splat(builder, builder.load(builder.gep(first, [position])), vector)
        if not real:
            row = CODE.prepare(builder, row, a.dtype == types.uint32)
        for j in range(t.columns):
            k = i * t.columns + j
            accumulator = builder.extract_value(tile, k)
            if real:
                value = emit.fma(builder, row, across[j], accumulator)
            elif a.dtype == types.uint32:
                value = CODE.dot(builder, accumulator, row, across[j])
            else:
                value = CODE.dot(builder, accumulator, across[j], row)
            tile = builder.insert_value(tile, value, k)
        if i + 1 < t.rows:
            position = builder.add(position, step)
    return tile


def may_multiply(t, a, b):
    """Whether arrays of these types have products that a tile takes."""
    return t.vec is F32 or (a.dtype == types.uint32) != (b.dtype == types.uint32)


@intrinsic
def outer_product(typing, t, a, at_a, row_step, b, at_b):
    """t[i][j] += splat(a[at_a + i * row_step]) * load(b, at_b + j * LANES)

    float32 arrays multiply; integer ones take the four-way dot product of bytes, and exactly one of `a` and `b`
    must be of dtype uint32, the unsigned side.
    """
    if not may_multiply(t, a, b):
        return None
    return t(t, a, types.intp, types.intp, b, types.intp), _rank_one


def _steps(array_type):
    return ISA.steps[array_type.dtype != types.float32]


@intrinsic
def steps(typing, like):
    """How many updates `rank_steps` makes with arrays of this kind."""
    def generate(context, builder, sig, args):
        return ir.Constant(emit.i64, _steps(like))
    return types.intp(like), generate


@intrinsic
def rank_steps(typing, t, a, at_a, row_step, step, b, at_b):
    """outer_product(t, a, at_a + k * step, row_step, b, at_b + k * WIDTH) for every k in range(steps(b))"""
    if not may_multiply(t, a, b):
        return None

    def generate(context, builder, sig, args):
        tile, a_array, at_a_, row_step_, step_, b_array, at_b_ = args
        one = t(t, a, types.intp, types.intp, b, types.intp)
        for k in range(_steps(b)):
            tile = _rank_one(context, builder, one, (tile, a_array, at_a_, row_step_, b_array, at_b_))
            if k + 1 < _steps(b):
                at_a_, at_b_ = builder.add(at_a_, step_), builder.add(at_b_, ir.Constant(emit.i64, LANES * t.columns))
        return tile
    return t(t, a, types.intp, types.intp, types.intp, b, types.intp), generate


def _add_dots(context, builder, sig, args):
    """tile_add_dots; with an eighth argument only that many lanes."""
    t = sig.args[0]
    tile, keys, at_k, k_row, queries, at_q, q_row = args[:7]
    vector = context.get_value_type(t.vec)

    def row(number, array, at):
        pointer = emit.pointer(context, builder, sig.args[number], array, at, vector)
        return emit.load_first(builder, pointer, args[7]) if len(args) == 8 else emit.load(builder, pointer)

    across = []
    for _ in range(t.columns):
        across.append(row(4, queries, at_q))
        at_q = builder.add(at_q, q_row)
    for i in range(t.rows):
        down = row(1, keys, at_k)
        for j in range(t.columns):
            k = i * t.columns + j
            tile = builder.insert_value(tile, emit.fma(builder, down, across[j], builder.extract_value(tile, k)), k)
        at_k = builder.add(at_k, k_row)
    return tile


@intrinsic
def tile_add_dots(typing, t, keys, at_k, k_row, queries, at_q, q_row):
    """t[i][j][l] += keys[at_k + i * k_row + l] * queries[at_q + j * q_row + l], float32"""
    return t(t, keys, types.intp, types.intp, queries, types.intp, types.intp), _add_dots


@intrinsic
def tile_add_part_dots(typing, t, keys, at_k, k_row, queries, at_q, q_row, count):
    """tile_add_dots for the lanes l < count, 0 < count < LANES; nothing beyond is read"""
    return t(t, keys, types.intp, types.intp, queries, types.intp, types.intp, types.intp), _add_dots


def _add_rows(context, builder, sig, args):
    """tile_add_rows; with a seventh argument only that many lanes."""
    t = sig.args[0]
    tile, array, position, step, weights, at_weights = args[:6]
    vector = context.get_value_type(t.vec)
    first = builder.gep(emit.data(context, builder, sig.args[4], weights), [at_weights])
    for i in range(t.rows):
        weight = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
        row = emit.pointer(context, builder, sig.args[1], array, position, vector)
        for j in range(t.columns):
            here = builder.gep(row, [ir.Constant(emit.i64, j)])
            value = emit.load_first(builder, here, args[6]) if len(args) == 7 else emit.load(builder, here)
            k = i * t.columns + j
            tile = builder.insert_value(tile, emit.fma(builder, weight, value, builder.extract_value(tile, k)), k)
        position = builder.add(position, step)
    return tile


@intrinsic
def tile_add_rows(typing, t, array, at, row_step, weights, at_weights):
    """t[i][j] += weights[at_weights + i] * array[at + i * row_step + j * LANES + l], float32"""
    return t(t, array, types.intp, types.intp, weights, types.intp), _add_rows


@intrinsic
def tile_add_part_rows(typing, t, array, at, row_step, weights, at_weights, count):
    """tile_add_rows of one column for the lanes l < count, 0 < count < LANES; nothing beyond is read"""
    return t(t, array, types.intp, types.intp, weights, types.intp, types.intp), _add_rows


@intrinsic
def tile_row_sums(typing, t):
    """s[0][j][i * n + m] = sum of t[i][j][m * rows : (m + 1) * rows], n = LANES / rows; rows a power of two"""
    sums = Tile(t.vec, 1, t.columns)
    even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)

    def generate(context, builder, sig, args):
        out = ir.Constant(context.get_value_type(sums), ir.Undefined)
        for j in range(t.columns):
            rows = [builder.extract_value(args[0], i * t.columns + j) for i in range(t.rows)]
            while len(rows) > 1:  # neighbouring lanes of two vectors add up into one vector
                rows = [builder.fadd(emit.shuffle(builder, a, b, even), emit.shuffle(builder, a, b, odd))
                        for a, b in zip(rows[::2], rows[1::2], strict=True)]
            out = builder.insert_value(out, rows[0], j)
        return out
    return sums(t), generate


@intrinsic
def tile_map(typing, t, function, parameters, at, column_step, plane):
    """t[i][j] = function(t[i][j], parameters, at + j * column_step, plane)"""
    sig = typing.resolve_function_type(function, (t.vec, parameters, types.intp, types.intp), {})
    if sig is None:
        return None
    result = Tile(sig.return_type, t.rows, t.columns)

    def generate(context, builder, signature, args):
        tile, _, array, position, step, plane_ = args
        compiled = context.get_function(function, sig)
        context.add_linking_libs(getattr(compiled, "libs", ()))
        positions = [position]
        for _j in range(1, t.columns):
            positions.append(builder.add(positions[-1], step))
        out = ir.Constant(context.get_value_type(result), ir.Undefined)
        for k in range(t.rows * t.columns):
            value = compiled(builder, (builder.extract_value(tile, k), array, positions[k % t.columns], plane_))
            out = builder.insert_value(out, value, k)
        return out
    return result(t, function, parameters, types.intp, types.intp, types.intp), generate


@intrinsic
def tile_dequantize(typing, t, down, i0, across, j0, k0):
    """f[i][j] = fma(float32(t[i][j]) * load(across, j0 + j * LANES), down[i0 + i], load(across, k0 + j * LANES))"""
    result = Tile(F32, t.rows, t.columns)

    def generate(context, builder, sig, args):
        vector = context.get_value_type(F32)
        factors, terms = (
            [emit.load(builder, builder.gep(emit.pointer(context, builder, sig.args[3], args[3], at, vector),
                                        [ir.Constant(emit.i64, j)])) for j in range(t.columns)] for at in args[4:])
        first = builder.gep(emit.data(context, builder, sig.args[1], args[1]), [args[2]])
        out = ir.Constant(context.get_value_type(result), ir.Undefined)
        for i in range(t.rows):
            row = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
            for j in range(t.columns):
                value = builder.sitofp(builder.extract_value(args[0], i * t.columns + j), vector)
                value = emit.fma(builder, builder.fmul(value, factors[j]), row, terms[j])
                out = builder.insert_value(out, value, i * t.columns + j)
        return out
    return result(t, down, types.intp, across, types.intp, types.intp), generate


@intrinsic
def tile_store_bytes(typing, t, array, at, row_step, column_step, zero_point, flip):
    """array[at + i * row_step + j * column_step + l] = clamp(t[i][j][l] + zero_point, -128, 127) ^ byte l % 4 of flip

    array of bytes
    """
    def generate(context, builder, sig, args):
        tile, array_, position, row_step_, column_step_, zero, flip_ = args
        positions = []
        for _ in range(t.rows):
            here = position
            for _ in range(t.columns):
                positions.append(here)
                here = builder.add(here, column_step_)
            position = builder.add(position, row_step_)
        quarter = ir.VectorType(emit.i32, LANES // 4)
        last = t.rows * t.columns - 1
        for k in range(0, last + 1, 4):
            packed = CODE.pack(builder, [builder.extract_value(tile, min(k + c, last)) for c in range(4)], zero)
            packed = builder.xor(packed, emit.splat(builder, flip_, packed.type))
            packed = emit.shuffle(builder, packed, packed, [4 * g + c for c in range(4) for g in range(LANES // 4)])
            for c in range(min(4, last + 1 - k)):
                part = emit.shuffle(builder, packed, packed, range(c * quarter.count, (c + 1) * quarter.count))
                where = emit.pointer(context, builder, sig.args[1], array_, positions[k + c], quarter)
                emit.store(builder, part, where)
    return types.void(t, array, types.intp, types.intp, types.intp, types.int32, types.int32), generate


@intrinsic
def tile_pack_rows(typing, t, zero_point, flip):
    """byte r of p[i][j][l] = clamp(t[4 i + r][j][l] + zero_point, -128, 127) ^ byte r of flip

    of whole fours of rows, or of one row, which is that of all four bytes
    """
    packed = Tile(I32, max(t.rows // 4, 1), t.columns)

    def generate(context, builder, sig, args):
        out = ir.Constant(context.get_value_type(packed), ir.Undefined)
        for i in range(packed.rows):
            for j in range(packed.columns):
                four = [builder.extract_value(args[0], min(4 * i + r, t.rows - 1) * t.columns + j) for r in range(4)]
                bytes_ = emit.transpose_bytes(builder, CODE.pack(builder, four, args[1]))
                bytes_ = builder.xor(bytes_, emit.splat(builder, args[2], bytes_.type))
                out = builder.insert_value(out, bytes_, i * packed.columns + j)
        return out
    return packed(t, types.int32, types.int32), generate
