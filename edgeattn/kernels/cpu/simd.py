"""Vectors and register tiles for Numba kernels.

`Vec(dtype, lanes)` is one vector register (or a few: the compiler splits wide ones); `Tile(vec, rows, columns)` is a
block of them that stays in registers.  Arrays are one-dimensional and contiguous; positions count array elements.
What each operation means is said in its docstring as a loop over lanes `l`, and test_simd.py holds it to that.

Bytes travel four to a 32-bit lane: an array of dtype uint32 holds four unsigned bytes per element (see
`ISA.offset`), one of dtype int32 holds four signed bytes, lowest address in the lowest bits.
"""
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic, models, overload, register_model

from edgeattn.runtime.isa import ISA

LANES = ISA.lanes
ROWS = ISA.rows
COLUMNS = ISA.columns
WIDTH = LANES * COLUMNS  # queries, or features, that one tile covers
OFFSET = ISA.offset
_SCALES = ISA.x86 and LANES == 16  # AVX-512 has instructions for fractions and for powers of two

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


class Vec(types.Type):
    """A vector of `lanes` elements of a scalar type."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vec({dtype},{lanes})")


class Tile(types.Type):
    """A block of `rows` x `columns` vectors."""

    def __init__(self, vec, rows, columns):
        self.vec, self.rows, self.columns = vec, rows, columns
        super().__init__(f"Tile({vec},{rows},{columns})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        element = _I1 if vec.dtype == types.boolean else manager.lookup(vec.dtype).get_data_type()
        super().__init__(manager, vec, ir.VectorType(element, vec.lanes))


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        vector = manager.lookup(tile.vec).get_value_type()
        super().__init__(manager, tile, ir.ArrayType(vector, tile.rows * tile.columns))


F32 = Vec(types.float32, LANES)
I32 = Vec(types.int32, LANES)
I64 = Vec(types.int64, LANES)
F64 = Vec(types.float64, LANES)
MASK = Vec(types.boolean, LANES)
_OF_ARRAY = {types.float32: F32, types.int32: I32, types.uint32: I32}


# --- building blocks for the code generators -------------------------------------------------------------------

def _data(context, builder, array_type, array):
    if isinstance(array_type, types.CPointer):
        return array
    return context.make_array(array_type)(context, builder, array).data


def _pointer(context, builder, array_type, array, index, to):
    address = builder.gep(_data(context, builder, array_type, array), [index])
    return builder.bitcast(address, to.as_pointer())


def _load(builder, pointer):
    value = builder.load(pointer)
    value.align = 1
    return value


def _load_first(builder, pointer, count):
    """The first `count` elements of a vector in memory, whose others are not touched and count as zero."""
    vector = pointer.type.pointee
    present = builder.icmp_signed("<", ir.Constant(ir.VectorType(_I32, vector.count), list(range(vector.count))),
                                  _splat(builder, builder.trunc(count, _I32), ir.VectorType(_I32, vector.count)))
    return _call(builder, f"llvm.masked.load.v{vector.count}f32.p0", vector,
                 [pointer, ir.Constant(_I32, 1), present, ir.Constant(vector, None)])


def _store(builder, value, pointer):
    builder.store(value, pointer).align = 1


def _splat(builder, scalar, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(first, undefined, zeros)


def _all(value, vector_type):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _call(builder, name, result, arguments):
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _literal(value):
    if not isinstance(value, types.IntegerLiteral):
        raise RequireLiteralValue("rows, columns and positions within a tile must be constants")
    return value.literal_value


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


# --- one vector ------------------------------------------------------------------------------------------------

@intrinsic
def splat(typing, scalar):
    """v[l] = scalar"""
    vec = {types.float32: F32, types.int32: I32, types.int64: I64, types.float64: F64}.get(scalar)
    if vec is None:
        return None

    def generate(context, builder, sig, args):
        return _splat(builder, args[0], context.get_value_type(vec))
    return vec(scalar), generate


@intrinsic
def quotient(typing, a, b):
    """a // b for a >= 0 and b > 0: unlike Python's, without a branch, so that it is taken out of loops"""
    def generate(context, builder, sig, args):
        return builder.udiv(*args)
    return types.int64(types.int64, types.int64), generate


@intrinsic
def lane_index(typing):
    """v[l] = l, int32"""
    def generate(context, builder, sig, args):
        return ir.Constant(context.get_value_type(I32), list(range(LANES)))
    return I32(), generate


@intrinsic
def load(typing, array, at):
    """v[l] = array[at + l], for float32, int32 and uint32 arrays"""
    vec = _OF_ARRAY[array.dtype]

    def generate(context, builder, sig, args):
        return _load(builder, _pointer(context, builder, sig.args[0], args[0], args[1], context.get_value_type(vec)))
    return vec(array, types.intp), generate


@intrinsic
def broadcast(typing, array, at):
    """v[l] = array[at], at never negative, for float32, int32 and uint32 arrays"""
    vec = _OF_ARRAY[array.dtype]

    def generate(context, builder, sig, args):
        element = builder.load(builder.gep(_data(context, builder, sig.args[0], args[0]), [args[1]]))
        return _splat(builder, element, context.get_value_type(vec))
    return vec(array, types.intp), generate


@intrinsic
def store(typing, array, at, v):
    """array[at + l] = v[l]"""
    def generate(context, builder, sig, args):
        _store(builder, args[2], _pointer(context, builder, sig.args[0], args[0], args[1], args[2].type))
    return types.void(array, types.intp, v), generate


@intrinsic
def load_bytes(typing, array, at):
    """v[l] = int32(array[at + l]), for int8 and uint8 arrays"""
    signed = array.dtype.signed

    def generate(context, builder, sig, args):
        narrow = _load(builder, _pointer(context, builder, sig.args[0], args[0], args[1], ir.VectorType(_I8, LANES)))
        return (builder.sext if signed else builder.zext)(narrow, context.get_value_type(I32))
    return I32(array, types.intp), generate


@intrinsic
def store_bytes(typing, array, at, v):
    """array[at + l] = v[l], each known to fit the array's int8 or uint8"""
    def generate(context, builder, sig, args):
        narrow = builder.trunc(args[2], ir.VectorType(_I8, LANES))
        _store(builder, narrow, _pointer(context, builder, sig.args[0], args[0], args[1], narrow.type))
    return types.void(array, types.intp, v), generate


def _gather(context, builder, table_type, table, index, value_type):
    """v[l] = table[index[l]], index never negative"""
    base = _data(context, builder, table_type, table)
    if not (ISA.x86 and LANES >= 8):
        out = ir.Constant(value_type, ir.Undefined)
        for l in range(LANES):
            position = ir.Constant(_I32, l)
            element = builder.load(builder.gep(base, [builder.extract_element(index, position)]))
            out = builder.insert_element(out, element, position)
        return out
    wide = ir.VectorType(_I64, LANES)
    start = _splat(builder, builder.ptrtoint(base, _I64), wide)
    addresses = builder.add(start, builder.shl(builder.sext(index, wide), _all(2, wide)))
    pointers = ir.VectorType(base.type, LANES)
    mask = _all(True, ir.VectorType(_I1, LANES))
    kind = "f32" if value_type.element == ir.FloatType() else "i32"
    return _call(builder, f"llvm.masked.gather.v{LANES}{kind}.v{LANES}p0", value_type,
                 [builder.inttoptr(addresses, pointers), ir.Constant(_I32, 4), mask,
                  ir.Constant(value_type, ir.Undefined)])


@intrinsic
def look_up_bytes(typing, table, d):
    """four vectors, v[j][l] = table[byte j of d[l]]

    table (512,) of 32 bits: 256 entries, and the same again as `byte_planes` arranges it.
    """
    vec = _OF_ARRAY[table.dtype]

    def generate(context, builder, sig, args):
        value_type = context.get_value_type(vec)
        if not ISA.byte_permute:
            found = []
            for j in range(4):
                index = builder.and_(builder.lshr(args[1], _all(8 * j, args[1].type)), _all(255, args[1].type))
                found.append(_gather(context, builder, sig.args[0], args[0], index, value_type))
            return context.make_tuple(builder, sig.return_type, found)
        # half a plane at a time, two registers; bit 7 of the index chooses between the halves
        bytes_type = ir.VectorType(_I8, 64)
        index = builder.bitcast(_transpose_bytes(builder, args[1]), bytes_type)
        upper = builder.icmp_signed("<", index, _all(0, bytes_type))
        planes = []
        for j in range(4):
            places = [ir.Constant(_I64, 256 + 64 * j + 16 * k) for k in range(4)]
            q = [_load(builder, _pointer(context, builder, sig.args[0], args[0], at, bytes_type)) for at in places]
            low, high = (_call(builder, "llvm.x86.avx512.vpermi2var.qi.512", bytes_type, [q[k], index, q[k + 1]])
                         for k in (0, 2))
            planes.append(builder.select(upper, high, low))
        # bytes of the planes side by side, first to 16 and then to 32 bits
        halves = []
        for half in (0, 8):
            order = [16 * g + half + i + 64 * side for g in range(4) for i in range(8) for side in (0, 1)]
            pairs = [_shuffle(builder, planes[j], planes[j + 1], order) for j in (0, 2)]
            halves.append([builder.bitcast(pair, ir.VectorType(_I16, 32)) for pair in pairs])
        found = []
        for pairs in halves:
            for half in (0, 4):
                order = [8 * g + half + i + 32 * side for g in range(4) for i in range(4) for side in (0, 1)]
                found.append(builder.bitcast(_shuffle(builder, *pairs, order), value_type))
        return context.make_tuple(builder, sig.return_type, found)
    return types.UniTuple(vec, 4)(table, d), generate


def byte_planes(table):
    """A table of 256 entries of 32 bits as `look_up_bytes` wants it: the entries, then their first bytes, second ..."""
    planes = np.ascontiguousarray(table.view(np.uint8).reshape(256, 4).T)
    return np.concatenate([table, planes.ravel().view(table.dtype)])


@intrinsic
def fma(typing, a, b, c):
    """v[l] = a[l] * b[l] + c[l], rounded once where the machine can"""
    def generate(context, builder, sig, args):
        return _fma(builder, *args)
    return a(a, a, a), generate


def _fma(builder, a, b, c):
    return _call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


@intrinsic
def maximum(typing, a, b):
    """v[l] = a[l] if a[l] > b[l] else b[l]: a NaN in b stays, int32 or float32"""
    def generate(context, builder, sig, args):
        if a.dtype == types.int32:
            return _call(builder, f"llvm.smax.v{a.lanes}i32", args[0].type, args)
        if ISA.x86 or ISA.name == "generic":
            return builder.select(builder.fcmp_ordered(">", *args), *args)
        return _call(builder, f"llvm.maximum.v{a.lanes}f32", args[0].type, args)
    return a(a, a), generate


@intrinsic
def smaller(typing, a, b):
    """v[l] = min(a[l], b[l]), int32"""
    def generate(context, builder, sig, args):
        return _call(builder, f"llvm.smin.v{a.lanes}i32", args[0].type, args)
    return a(a, a), generate


@intrinsic
def select(typing, mask, a, b):
    """v[l] = a[l] if mask[l] else b[l]"""
    def generate(context, builder, sig, args):
        return builder.select(*args)
    return a(mask, a, a), generate


@intrinsic
def any_lane(typing, mask):
    """True if any mask[l]"""
    def generate(context, builder, sig, args):
        return _call(builder, f"llvm.vector.reduce.or.v{mask.lanes}i1", _I1, args)
    return types.boolean(mask), generate


@intrinsic
def sum_lanes(typing, v):
    """sum over l of v[l], in any order"""
    def generate(context, builder, sig, args):
        if v.dtype == types.int32:
            return _call(builder, f"llvm.vector.reduce.add.v{v.lanes}i32", _I32, args)
        zero = ir.Constant(ir.FloatType(), 0.0)
        name = f"llvm.vector.reduce.fadd.v{v.lanes}f32"
        signature = ir.FunctionType(ir.FloatType(), [zero.type, args[0].type])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        return builder.call(function, [zero, args[0]], fastmath=["reassoc"])
    return v.dtype(v), generate


@intrinsic
def max_lanes(typing, v):
    """max over l of v[l]; of float32, NaN counts for nothing or is the result"""
    def generate(context, builder, sig, args):
        if v.dtype == types.int32:
            return _call(builder, f"llvm.vector.reduce.smax.v{v.lanes}i32", _I32, args)
        best, half = args[0], v.lanes // 2
        while half:  # LLVM's own reduction obeys the rules for NaN lane by lane
            other = _shuffle(builder, best, best, [(l + half) % v.lanes for l in range(v.lanes)])
            best = builder.select(builder.fcmp_ordered(">", best, other), best, other)
            half //= 2
        return builder.extract_element(best, ir.Constant(_I32, 0))
    return v.dtype(v), generate


@intrinsic
def first_lane(typing, v):
    """v[0]"""
    def generate(context, builder, sig, args):
        return builder.extract_element(args[0], ir.Constant(_I32, 0))
    return v.dtype(v), generate


def _unary(result_of, code, doc):
    """An intrinsic of one vector; called at module level only, so that Numba's cache can name the result."""
    @intrinsic
    def operation(typing, v):
        result = result_of(v)

        def generate(context, builder, sig, args):
            return code(builder, args[0], context.get_value_type(result))
        return result(v), generate
    operation.__doc__ = doc
    return operation


def _round_to_int(builder, v, result):
    if ISA.x86 and v.type.count == 16:
        zero = ir.Constant(result, None)
        return _call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", result,
                     [v, zero, ir.Constant(_I16, -1), ir.Constant(_I32, 4)])
    if ISA.x86 and v.type.count == 8:
        return _call(builder, "llvm.x86.avx.cvt.ps2dq.256", result, [v])
    if ISA.name in ("neon", "neondot"):
        return _call(builder, "llvm.aarch64.neon.fcvtns.v4i32.v4f32", result, [v])
    rounded = _call(builder, f"llvm.roundeven.v{v.type.count}f32", v.type, [v])
    return builder.fptosi(rounded, result)


def _fraction(builder, v, result):
    if _SCALES:  # 8: no exception is raised; 1: rounded down
        zero, every = ir.Constant(result, None), ir.Constant(_I16, -1)
        return _call(builder, "llvm.x86.avx512.mask.reduce.ps.512", result,
                     [v, ir.Constant(_I32, 8 + 1), zero, every, ir.Constant(_I32, 4)])
    return builder.fsub(v, _call(builder, f"llvm.floor.v{v.type.count}f32", v.type, [v]))


to_float = _unary(lambda v: F32, lambda b, v, t: b.sitofp(v, t), "v[l] = float32(a[l])")
to_double = _unary(lambda v: F64, lambda b, v, t: b.sitofp(v, t), "v[l] = float64(a[l])")
widen = _unary(lambda v: I64, lambda b, v, t: b.sext(v, t), "v[l] = int64(a[l])")
narrow = _unary(lambda v: I32, lambda b, v, t: b.trunc(v, t), "v[l] = int32(a[l]), low bits kept")
truncate = _unary(lambda v: I32, lambda b, v, t: b.fptosi(v, t), "v[l] = int(a[l]) toward zero")
round_to_int = _unary(lambda v: I32, _round_to_int, "v[l] = int(a[l]) to nearest, ties to even")
bits_of = _unary(lambda v: I32, lambda b, v, t: b.bitcast(v, t), "v[l] = the bits of float32 a[l]")
float_of_bits = _unary(lambda v: F32, lambda b, v, t: b.bitcast(v, t), "v[l] = the float32 with bits a[l]")
double_of_bits = _unary(lambda v: F64, lambda b, v, t: b.bitcast(v, t), "v[l] = the float64 with bits a[l]")
fraction = _unary(lambda v: F32, _fraction, "v[l] = a[l] - floor(a[l]), rounded to nearest or down")
truncate_double = _unary(lambda v: F64, lambda b, v, t: _call(b, f"llvm.trunc.v{v.type.count}f64", t, [v]),
                         "v[l] = trunc(a[l]), float64")


def _binary(integer, real):
    @intrinsic
    def operation(typing, a, b):
        name = integer if a.dtype in (types.int32, types.int64) or a.dtype == types.boolean else real

        def generate(context, builder, sig, args):
            return getattr(builder, name)(*args)
        return a(a, a), generate
    return operation


def _comparison(symbol):
    @intrinsic
    def operation(typing, a, b):
        def generate(context, builder, sig, args):
            if a.dtype in (types.int32, types.int64):
                return builder.icmp_signed(symbol, *args)
            return builder.fcmp_ordered(symbol, *args)
        return MASK(a, a), generate
    return operation


_add, _sub, _mul = _binary("add", "fadd"), _binary("sub", "fsub"), _binary("mul", "fmul")
_div, _and, _or, _xor = _binary("sdiv", "fdiv"), _binary("and_", None), _binary("or_", None), _binary("xor", None)
_shl, _shr = _binary("shl", None), _binary("ashr", None)
_lt, _le, _gt, _ge, _eq = (_comparison("<"), _comparison("<="), _comparison(">"), _comparison(">="),
                           _comparison("=="))
shift_right_logical = _binary("lshr", None)


@intrinsic
def scale_by_power(typing, a, t):
    """v[l] = a[l] * 2 ** floor(t[l]), for a[l] in [1, 2] and t[l] in [-126, 127)"""
    def generate(context, builder, sig, args):
        value, power = args
        if _SCALES:
            return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", value.type,
                         [value, power, ir.Constant(value.type, None), ir.Constant(_I16, -1), ir.Constant(_I32, 4)])
        integer = context.get_value_type(I32)
        whole = builder.fptosi(_call(builder, f"llvm.floor.v{LANES}f32", power.type, [power]), integer)
        bits = builder.add(builder.bitcast(value, integer), builder.shl(whole, _all(23, integer)))
        return builder.bitcast(bits, value.type)
    return a(a, t), generate


def _is_pair(a, b):
    return isinstance(a, Vec) and a == b


@overload(operator.add)
def _o_add(a, b):
    return (lambda a, b: _add(a, b)) if _is_pair(a, b) else None


@overload(operator.sub)
def _o_sub(a, b):
    return (lambda a, b: _sub(a, b)) if _is_pair(a, b) else None


@overload(operator.mul)
def _o_mul(a, b):
    return (lambda a, b: _mul(a, b)) if _is_pair(a, b) else None


@overload(operator.truediv)
def _o_div(a, b):
    return (lambda a, b: _div(a, b)) if _is_pair(a, b) else None


@overload(operator.and_)
def _o_and(a, b):
    return (lambda a, b: _and(a, b)) if _is_pair(a, b) else None


@overload(operator.or_)
def _o_or(a, b):
    return (lambda a, b: _or(a, b)) if _is_pair(a, b) else None


@overload(operator.xor)
def _o_xor(a, b):
    return (lambda a, b: _xor(a, b)) if _is_pair(a, b) else None


@overload(operator.lshift)
def _o_shl(a, b):
    return (lambda a, b: _shl(a, b)) if _is_pair(a, b) else None


@overload(operator.rshift)
def _o_shr(a, b):
    return (lambda a, b: _shr(a, b)) if _is_pair(a, b) else None


@overload(operator.lt)
def _o_lt(a, b):
    return (lambda a, b: _lt(a, b)) if _is_pair(a, b) else None


@overload(operator.le)
def _o_le(a, b):
    return (lambda a, b: _le(a, b)) if _is_pair(a, b) else None


@overload(operator.gt)
def _o_gt(a, b):
    return (lambda a, b: _gt(a, b)) if _is_pair(a, b) else None


@overload(operator.ge)
def _o_ge(a, b):
    return (lambda a, b: _ge(a, b)) if _is_pair(a, b) else None


@overload(operator.eq)
def _o_eq(a, b):
    return (lambda a, b: _eq(a, b)) if _is_pair(a, b) else None


# --- bytes -----------------------------------------------------------------------------------------------------

def _pack(builder, vectors, zero_point):
    """Four int32 vectors to one vector of bytes: saturate16, add zero point saturating, saturate8.

    Groups of four lanes stay together: byte 16 g + 4 c + i is lane 4 g + i of vector c.
    """
    n = vectors[0].type.count
    bytes_type = ir.VectorType(_I8, 4 * n)
    words_type = ir.VectorType(_I16, 2 * n)
    word_zero = _splat(builder, builder.trunc(zero_point, _I16), words_type)
    if ISA.x86 and n in (8, 16):
        words, half = (("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packsswb.512") if n == 16 else
                       ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packsswb"))
        pairs = [_call(builder, words, words_type, vectors[i:i + 2]) for i in (0, 2)]
        pairs = [_call(builder, f"llvm.sadd.sat.v{2 * n}i16", words_type, [p, word_zero]) for p in pairs]
        return builder.bitcast(_call(builder, half, bytes_type, pairs), ir.VectorType(_I32, n))
    # four lanes: NEON
    pairs = []
    for i in (0, 2):
        joined = _shuffle(builder, vectors[i], vectors[i + 1], range(8))
        pairs.append(_call(builder, "llvm.sadd.sat.v8i16", words_type, [_saturate(builder, joined, _I16), word_zero]))
    return builder.bitcast(_saturate(builder, _shuffle(builder, *pairs, range(16)), _I8), ir.VectorType(_I32, n))


def _saturate(builder, v, to):
    n, bits = v.type.count, v.type.element.width
    low, high = -(1 << (to.width - 1)), (1 << (to.width - 1)) - 1
    v = _call(builder, f"llvm.smax.v{n}i{bits}", v.type, [v, _all(low, v.type)])
    v = _call(builder, f"llvm.smin.v{n}i{bits}", v.type, [v, _all(high, v.type)])
    return builder.trunc(v, ir.VectorType(to, n))


def _transpose_bytes(builder, v):
    """Within each group of four lanes: byte j of lane i becomes byte i of lane j."""
    n = v.type.count
    as_bytes = builder.bitcast(v, ir.VectorType(_I8, 4 * n))
    order = [16 * g + 4 * j + i for g in range(n // 4) for i in range(4) for j in range(4)]
    return builder.bitcast(_shuffle(builder, as_bytes, as_bytes, order), v.type)


@intrinsic
def pack_bytes(typing, a, b, c, d, zero_point):
    """byte j of v[l] = clamp((a, b, c, d)[j][l] + zero_point, -128, 127)"""
    def generate(context, builder, sig, args):
        return _transpose_bytes(builder, _pack(builder, args[:4], args[4]))
    return I32(I32, I32, I32, I32, types.int32), generate


@intrinsic
def join_bytes(typing, a, b, c, d):
    """byte 16 g + 4 i + j of v = clamp((a, b, c, d)[i][4 g + j], -128, 127): cheaper than any other order"""
    def generate(context, builder, sig, args):
        return _pack(builder, args, ir.Constant(_I32, 0))
    return I32(I32, I32, I32, I32), generate


@intrinsic
def gather_byte(typing, a, b, c, d, r):
    """byte i * LANES + l of v = byte r of (a, b, c, d)[i][l]"""
    number = _literal(r)

    def generate(context, builder, sig, args):
        bytes_ = [builder.bitcast(v, ir.VectorType(_I8, 4 * LANES)) for v in args[:4]]
        pairs = [_shuffle(builder, *bytes_[i:i + 2], range(number, 8 * LANES, 4)) for i in (0, 2)]
        return builder.bitcast(_shuffle(builder, *pairs, range(4 * LANES)), args[0].type)
    return I32(I32, I32, I32, I32, r), generate


@intrinsic
def larger_bytes(typing, a, b):
    """each signed byte of v[l] = max of the two"""
    def generate(context, builder, sig, args):
        t = ir.VectorType(_I8, 4 * LANES)
        both = [builder.bitcast(x, t) for x in args]
        return builder.bitcast(_call(builder, f"llvm.smax.v{4 * LANES}i8", t, both), args[0].type)
    return I32(I32, I32), generate


@intrinsic
def subtract_bytes(typing, a, b):
    """each byte of v[l] = a - b modulo 256"""
    def generate(context, builder, sig, args):
        t = ir.VectorType(_I8, 4 * LANES)
        return builder.bitcast(builder.sub(*[builder.bitcast(x, t) for x in args]), args[0].type)
    return I32(I32, I32), generate


# --- four-way dot products: u unsigned bytes (or offset 0: signed), s signed bytes -------------------------------

def _prepare(builder, v, unsigned):
    """What one operand needs before it is multiplied, done once per operand and not once per product."""
    n = v.type.count
    if ISA.dot in ("vpdpbusd", "sdot"):
        return builder.bitcast(v, ir.VectorType(_I8, 4 * n))
    if ISA.dot == "plain":
        bytes_ = []
        for j in range(4):
            if unsigned:
                byte = builder.and_(builder.lshr(v, _all(8 * j, v.type)), _all(255, v.type))
            else:
                byte = builder.ashr(builder.shl(v, _all(24 - 8 * j, v.type)), _all(24, v.type))
            bytes_.append(byte)
        return bytes_
    words = builder.bitcast(v, ir.VectorType(_I16, 2 * n))
    eight = _all(8, words.type)
    if unsigned:
        return builder.and_(words, _all(255, words.type)), builder.lshr(words, eight)
    return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)


def _dot(builder, accumulator, u, s):
    t = accumulator.type
    n = t.count
    if ISA.dot == "vpdpbusd":
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * n}", t, [accumulator, u, s])
    if ISA.dot == "sdot":
        return _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", t, [accumulator, u, s])
    if ISA.dot == "vpmaddwd":
        for a, b in zip(u, s, strict=False):
            accumulator = builder.add(accumulator, _call(builder, "llvm.x86.avx2.pmadd.wd", t, [a, b]))
        return accumulator
    if ISA.dot == "sadalp":  # 255 * -128 still fits an int16: the product is exact, the pairs add into 32 bits
        for a, b in zip(u, s, strict=False):
            pairs = _call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", t, [builder.mul(a, b)])
            accumulator = builder.add(accumulator, pairs)
        return accumulator
    for a, b in zip(u, s, strict=False):
        accumulator = builder.add(accumulator, builder.mul(a, b))
    return accumulator


@intrinsic
def dot_bytes(typing, accumulator, u, s):
    """v[l] = accumulator[l] + sum over the four bytes of u[l] * s[l]"""
    def generate(context, builder, sig, args):
        return _dot(builder, args[0], _prepare(builder, args[1], True), _prepare(builder, args[2], False))
    return I32(I32, I32, I32), generate


# --- tiles -----------------------------------------------------------------------------------------------------

@intrinsic
def tile_of_columns(typing, rows, columns, array, at):
    """t[i][j] = load(array, at + j * LANES)"""
    tile = Tile(_OF_ARRAY[array.dtype], _literal(rows), _literal(columns))

    def generate(context, builder, sig, args):
        vector = context.get_value_type(tile.vec)
        base = _pointer(context, builder, sig.args[2], args[2], args[3], vector)
        across = [_load(builder, builder.gep(base, [ir.Constant(_I64, j)])) for j in range(tile.columns)]
        out = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for k in range(tile.rows * tile.columns):
            out = builder.insert_value(out, across[k % tile.columns], k)
        return out
    return tile(rows, columns, array, types.intp), generate


@intrinsic
def tile_add_down(typing, t, down, i0):
    """u[i][j] = t[i][j] + splat(down[i0 + i]), int32"""
    def generate(context, builder, sig, args):
        tile = args[0]
        first = builder.gep(_data(context, builder, sig.args[1], args[1]), [args[2]])
        for i in range(t.rows):
            row = builder.load(builder.gep(first, [ir.Constant(_I64, i)]))
            row = _splat(builder, row, context.get_value_type(t.vec))
            for k in range(i * t.columns, (i + 1) * t.columns):
                tile = builder.insert_value(tile, builder.add(builder.extract_value(tile, k), row), k)
        return tile
    return t(t, down, types.intp), generate


@intrinsic
def tile_zero(typing, rows, columns, like):
    """t[i][j] = 0, of the kind of vector that `like` (an array) loads"""
    tile = Tile(_OF_ARRAY[like.dtype], _literal(rows), _literal(columns))

    def generate(context, builder, sig, args):
        return ir.Constant(context.get_value_type(tile), None)
    return tile(rows, columns, like), generate


def _rank_one(context, builder, sig, args):
    t, a, b = sig.args[0], sig.args[1], sig.args[4]
    tile, a_array, at_a_, step, b_array, at_b_ = args
    vector = context.get_value_type(t.vec)
    real = t.vec.dtype == types.float32
    base = _pointer(context, builder, b, b_array, at_b_, vector)
    across = [_load(builder, builder.gep(base, [ir.Constant(_I64, j)])) for j in range(t.columns)]
    if not real:
        across = [_prepare(builder, v, b.dtype == types.uint32) for v in across]
    first = _data(context, builder, a, a_array)
    position = at_a_
    for i in range(t.rows):
        row = _splat(builder, builder.load(builder.gep(first, [position])), vector)
        if not real:
            row = _prepare(builder, row, a.dtype == types.uint32)
        for j in range(t.columns):
            k = i * t.columns + j
            accumulator = builder.extract_value(tile, k)
            if real:
                value = _fma(builder, row, across[j], accumulator)
            elif a.dtype == types.uint32:
                value = _dot(builder, accumulator, row, across[j])
            else:
                value = _dot(builder, accumulator, across[j], row)
            tile = builder.insert_value(tile, value, k)
        if i + 1 < t.rows:
            position = builder.add(position, step)
    return tile


def _may_multiply(t, a, b):
    return t.vec is F32 or (a.dtype == types.uint32) != (b.dtype == types.uint32)


@intrinsic
def outer_product(typing, t, a, at_a, row_step, b, at_b):
    """t[i][j] += splat(a[at_a + i * row_step]) * load(b, at_b + j * LANES)

    float32 arrays multiply; integer ones take the four-way dot product of bytes, and exactly one of `a` and `b`
    must be of dtype uint32, the unsigned side.
    """
    if not _may_multiply(t, a, b):
        return None
    return t(t, a, types.intp, types.intp, b, types.intp), _rank_one


def _steps(array_type):
    return ISA.steps[array_type.dtype != types.float32]


@intrinsic
def steps(typing, like):
    """How many updates `rank_steps` makes with arrays of this kind."""
    def generate(context, builder, sig, args):
        return ir.Constant(_I64, _steps(like))
    return types.intp(like), generate


@intrinsic
def rank_steps(typing, t, a, at_a, row_step, step, b, at_b):
    """outer_product(t, a, at_a + k * step, row_step, b, at_b + k * WIDTH) for every k in range(steps(b))"""
    if not _may_multiply(t, a, b):
        return None

    def generate(context, builder, sig, args):
        tile, a_array, at_a_, row_step_, step_, b_array, at_b_ = args
        one = t(t, a, types.intp, types.intp, b, types.intp)
        for k in range(_steps(b)):
            tile = _rank_one(context, builder, one, (tile, a_array, at_a_, row_step_, b_array, at_b_))
            if k + 1 < _steps(b):
                at_a_, at_b_ = builder.add(at_a_, step_), builder.add(at_b_, ir.Constant(_I64, LANES * t.columns))
        return tile
    return t(t, a, types.intp, types.intp, types.intp, b, types.intp), generate


@intrinsic
def tile_load(typing, rows, columns, array, at, row_step, column_step):
    """t[i][j] = load(array, at + i * row_step + j * column_step)"""
    tile = Tile(_OF_ARRAY[array.dtype], _literal(rows), _literal(columns))

    def generate(context, builder, sig, args):
        vector = context.get_value_type(tile.vec)
        out = ir.Constant(context.get_value_type(tile), ir.Undefined)
        position = args[3]
        for i in range(tile.rows):
            here = position
            for j in range(tile.columns):
                value = _load(builder, _pointer(context, builder, sig.args[2], args[2], here, vector))
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
                _store(builder, value, _pointer(context, builder, sig.args[1], array_, here, value.type))
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
                value = _load(builder, _pointer(context, builder, sig.args[1], array_, here, vector))
                tile = builder.insert_value(tile, builder.fadd(builder.extract_value(tile, k), value), k)
                here = builder.add(here, column_step_)
            position = builder.add(position, row_step_)
        return tile
    return t(t, array, types.intp, types.intp, types.intp), generate


@intrinsic
def prefetch(typing, array, at):
    """Nothing but a hint: array[at] will soon be read."""
    def generate(context, builder, sig, args):
        where = _pointer(context, builder, sig.args[0], args[0], args[1], _I8)
        # to be read, into the second-level cache, data
        arguments = [where, *(ir.Constant(_I32, value) for value in (0, 2, 1))]
        signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0"), arguments)
    return types.void(array, types.intp), generate


@intrinsic
def tile_store_bytes(typing, t, array, at, row_step, column_step, zero_point, flip):
    """array[at + i * row_step + j * column_step + l] = clamp(t[i][j][l] + zero_point, -128, 127) ^ byte l % 4 of flip

    array of bytes; rows * columns a multiple of 4.
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
        quarter = ir.VectorType(_I32, LANES // 4)
        for k in range(0, t.rows * t.columns, 4):
            packed = _pack(builder, [builder.extract_value(tile, k + c) for c in range(4)], zero)
            packed = builder.xor(packed, _splat(builder, flip_, packed.type))
            packed = _shuffle(builder, packed, packed, [4 * g + c for c in range(4) for g in range(LANES // 4)])
            for c in range(4):
                part = _shuffle(builder, packed, packed, range(c * quarter.count, (c + 1) * quarter.count))
                _store(builder, part, _pointer(context, builder, sig.args[1], array_, positions[k + c], quarter))
    return types.void(t, array, types.intp, types.intp, types.intp, types.int32, types.int32), generate


@intrinsic
def tile_pack_rows(typing, t, zero_point, flip):
    """byte r of p[i][j][l] = clamp(t[4 i + r][j][l] + zero_point, -128, 127) ^ byte r of flip"""
    packed = Tile(I32, t.rows // 4, t.columns)

    def generate(context, builder, sig, args):
        out = ir.Constant(context.get_value_type(packed), ir.Undefined)
        for i in range(packed.rows):
            for j in range(packed.columns):
                four = [builder.extract_value(args[0], (4 * i + r) * t.columns + j) for r in range(4)]
                bytes_ = _transpose_bytes(builder, _pack(builder, four, args[1]))
                bytes_ = builder.xor(bytes_, _splat(builder, args[2], bytes_.type))
                out = builder.insert_value(out, bytes_, i * packed.columns + j)
        return out
    return packed(t, types.int32, types.int32), generate


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
            [_load(builder, builder.gep(_pointer(context, builder, sig.args[3], args[3], at, vector),
                                        [ir.Constant(_I64, j)])) for j in range(t.columns)] for at in args[4:])
        first = builder.gep(_data(context, builder, sig.args[1], args[1]), [args[2]])
        out = ir.Constant(context.get_value_type(result), ir.Undefined)
        for i in range(t.rows):
            row = _splat(builder, builder.load(builder.gep(first, [ir.Constant(_I64, i)])), vector)
            for j in range(t.columns):
                value = builder.sitofp(builder.extract_value(args[0], i * t.columns + j), vector)
                value = _fma(builder, builder.fmul(value, factors[j]), row, terms[j])
                out = builder.insert_value(out, value, i * t.columns + j)
        return out
    return result(t, down, types.intp, across, types.intp, types.intp), generate


@intrinsic
def interleave_rows(typing, source, at, row_step, flip, target, to, panel_step):
    """byte r of target[to + j // 2 * panel_step + j % 2 * LANES + l] = source[at + r * row_step + f] ^ byte of flip

    for r < 4, j < 4 and f = l // 4 * 16 + j * 4 + l % 4: four rows of 4 LANES bytes become vectors of groups of
    four.  source of 8-bit elements, target of 32-bit ones.
    """
    def generate(context, builder, sig, args):
        vector = ir.VectorType(_I8, 4 * LANES)
        rows, position = [], args[1]
        for _ in range(4):
            rows.append(_load(builder, _pointer(context, builder, sig.args[0], args[0], position, vector)))
            position = builder.add(position, args[2])

        pairs = [[_zip(builder, *rows[i:i + 2], 1, half) for i in (0, 2)] for half in range(2)]
        groups = [_zip(builder, *pair, 2, half) for pair in pairs for half in range(2)]
        whole = ir.VectorType(_I32, LANES)
        flips = _splat(builder, args[3], whole)
        for j, group in enumerate(groups):
            here = args[5] if j < 2 else builder.add(args[5], args[6])
            here = builder.add(here, ir.Constant(_I64, j % 2 * LANES))
            _store(builder, builder.xor(builder.bitcast(group, whole), flips),
                   _pointer(context, builder, sig.args[4], args[4], here, whole))
    return types.void(source, types.intp, types.intp, types.int32, target, types.intp, types.intp), generate


def _add_dots(context, builder, sig, args):
    """tile_add_dots; with an eighth argument only that many lanes."""
    t = sig.args[0]
    tile, keys, at_k, k_row, queries, at_q, q_row = args[:7]
    vector = context.get_value_type(t.vec)

    def row(number, array, at):
        pointer = _pointer(context, builder, sig.args[number], array, at, vector)
        return _load_first(builder, pointer, args[7]) if len(args) == 8 else _load(builder, pointer)

    across = []
    for _ in range(t.columns):
        across.append(row(4, queries, at_q))
        at_q = builder.add(at_q, q_row)
    for i in range(t.rows):
        down = row(1, keys, at_k)
        for j in range(t.columns):
            k = i * t.columns + j
            tile = builder.insert_value(tile, _fma(builder, down, across[j], builder.extract_value(tile, k)), k)
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
    first = builder.gep(_data(context, builder, sig.args[4], weights), [at_weights])
    for i in range(t.rows):
        weight = _splat(builder, builder.load(builder.gep(first, [ir.Constant(_I64, i)])), vector)
        row = _pointer(context, builder, sig.args[1], array, position, vector)
        for j in range(t.columns):
            here = builder.gep(row, [ir.Constant(_I64, j)])
            value = _load_first(builder, here, args[6]) if len(args) == 7 else _load(builder, here)
            k = i * t.columns + j
            tile = builder.insert_value(tile, _fma(builder, weight, value, builder.extract_value(tile, k)), k)
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
def tile_add_to(typing, t, array, at):
    """array[at + j * LANES + l] += sum over i of t[i][j][l]"""
    def generate(context, builder, sig, args):
        vector = context.get_value_type(t.vec)
        base = _pointer(context, builder, sig.args[1], args[1], args[2], vector)
        for j in range(t.columns):
            rows = [builder.extract_value(args[0], i * t.columns + j) for i in range(t.rows)]
            while len(rows) > 1:
                rows = [builder.fadd(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
            where = builder.gep(base, [ir.Constant(_I64, j)])
            _store(builder, builder.fadd(_load(builder, where), rows[0]), where)
    return types.void(t, array, types.intp), generate


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
                rows = [builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))
                        for a, b in zip(rows[::2], rows[1::2], strict=True)]
            out = builder.insert_value(out, rows[0], j)
        return out
    return sums(t), generate


@intrinsic
def tile_get(typing, t, i, j):
    """t[i][j]"""
    k = _literal(i) * t.columns + _literal(j)

    def generate(context, builder, sig, args):
        return builder.extract_value(args[0], k)
    return t.vec(t, i, j), generate


def _zip(builder, a, b, size, half):
    """Within groups of 16 bytes: pieces of `size` elements of a and b in turn, from the low half or the high one."""
    n = a.type.count
    group = 128 // a.type.element.width
    return _shuffle(builder, a, b, [g + half * group // 2 + e + i + which * n for g in range(0, n, group)
                                    for e in range(0, group // 2, size) for which in range(2) for i in range(size)])


@intrinsic
def transpose_block(typing, source, at, row_step, target, to, target_step):
    """target[to + j * target_step + i] = source[at + i * row_step + j], a LANES by LANES block of 32-bit elements

    source may hold bytes: at and row_step then count bytes.
    """
    def generate(context, builder, sig, args):
        quarter, vector = ir.VectorType(_I32, 4), ir.VectorType(_I32, LANES)
        bytes_ = sig.args[0].dtype.bitwidth // 8
        starts, position = [], args[1]
        for _ in range(LANES):
            starts.append(position)
            position = builder.add(position, args[2])
        columns_ = []
        for j in range(0, LANES, 4):  # rows i, 4 + i, 8 + i, ... side by side, which loads do; then four by four
            rows = []
            for i in range(4):
                row = ir.Constant(vector, ir.Undefined)
                for g in range(LANES // 4):
                    where = builder.add(starts[4 * g + i], ir.Constant(_I64, 4 * j // bytes_))
                    four = _load(builder, _pointer(context, builder, sig.args[0], args[0], where, quarter))
                    wide = _shuffle(builder, four, four, [l % 4 for l in range(LANES)])
                    row = _shuffle(builder, row, wide, [LANES + l if l // 4 == g else l for l in range(LANES)])
                rows.append(row)
            for half in range(2):
                pairs = [_zip(builder, rows[k], rows[k + 1], 1, half) for k in (0, 2)]
                columns_ += [_zip(builder, *pairs, 2, which) for which in range(2)]
        position = args[4]
        for column in columns_:
            _store(builder, column, _pointer(context, builder, sig.args[3], args[3], position, vector))
            position = builder.add(position, args[5])
    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@intrinsic
def pointer_to(typing, address, like):
    """An unchecked pointer at an integer address, to elements of the scalar type `like` or of an array's dtype.

    To be used as an array.
    """
    pointer = types.CPointer(like.instance_type if isinstance(like, types.NumberClass) else like.dtype)

    def generate(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))
    return pointer(types.int64, like), generate


@intrinsic
def address_of(typing, array):
    """The address of an array's first element."""
    def generate(context, builder, sig, args):
        return builder.ptrtoint(_data(context, builder, sig.args[0], args[0]), _I64)
    return types.int64(array), generate


# --- the matrix unit of x86-64: eight tiles of 16 rows by 64 bytes ------------------------------------------------

MATRIX_ROWS = 16
_BYTE_POINTER = _I8.as_pointer()


def _void_call(builder, name, arguments):
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


@intrinsic
def matrix_configure(typing, array, at):
    """Give all eight tiles 16 rows of 64 bytes; array[at:at + 16], int32, is overwritten with the description."""
    description = bytes([1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)

    def generate(context, builder, sig, args):
        if not ISA.amx:
            return
        where = _pointer(context, builder, sig.args[0], args[0], args[1], ir.ArrayType(_I8, 64))
        _store(builder, ir.Constant(ir.ArrayType(_I8, 64), bytearray(description)), where)
        _void_call(builder, "llvm.x86.ldtilecfg", [builder.bitcast(where, _BYTE_POINTER)])
    return types.void(array, types.intp), generate


@intrinsic
def matrix_release(typing):
    """Say that the tiles are no longer needed."""
    def generate(context, builder, sig, args):
        if ISA.amx:
            _void_call(builder, "llvm.x86.tilerelease", [])
    return types.void(), generate


@intrinsic
def matrix_load(typing, t, array, at, row_step):
    """tile t, row i = the 64 bytes from array[at + i * row_step] on; array of 32-bit elements"""
    number = _literal(t)

    def generate(context, builder, sig, args):
        if not ISA.amx:
            return
        where = _pointer(context, builder, sig.args[1], args[1], args[2], _I8)
        step = builder.mul(args[3], ir.Constant(_I64, 4))
        _void_call(builder, "llvm.x86.tileloadd64", [ir.Constant(_I8, number), where, step])
    return types.void(t, array, types.intp, types.intp), generate


@intrinsic
def matrix_zero(typing, t):
    """tile t = 0"""
    number = _literal(t)

    def generate(context, builder, sig, args):
        if ISA.amx:
            _void_call(builder, "llvm.x86.tilezero", [ir.Constant(_I8, number)])
    return types.void(t), generate


@intrinsic
def matrix_store(typing, t, array, at, row_step):
    """array[at + i * row_step :][:16] = tile t, row i; array of 32-bit elements"""
    number = _literal(t)

    def generate(context, builder, sig, args):
        if not ISA.amx:
            return
        where = _pointer(context, builder, sig.args[1], args[1], args[2], _I8)
        step = builder.mul(args[3], ir.Constant(_I64, 4))
        _void_call(builder, "llvm.x86.tilestored64", [ir.Constant(_I8, number), where, step])
    return types.void(t, array, types.intp, types.intp), generate


@intrinsic
def matrix_dot(typing, c, a, b, of_a, of_b):
    """c[i][j] += sum over k, m of byte a[i][4 k + m] * byte b[k][4 j + m], j < 16, k < 16

    `of_a` and `of_b` are the arrays the two tiles came from: exactly one must be of dtype uint32, the unsigned side.
    """
    if (of_a.dtype == types.uint32) == (of_b.dtype == types.uint32):
        return None
    instruction = "llvm.x86.tdpbusd" if of_a.dtype == types.uint32 else "llvm.x86.tdpbsud"
    return types.void(c, a, b, of_a, of_b), _matrix_dot(instruction, c, a, b)


@intrinsic
def matrix_dot_signed(typing, c, a, b):
    """c[i][j] += sum over k, m of signed byte a[i][4 k + m] * signed byte b[k][4 j + m], j < 16, k < 16"""
    return types.void(c, a, b), _matrix_dot("llvm.x86.tdpbssd", c, a, b)


def _matrix_dot(instruction, *tiles):
    numbers = [_literal(t) for t in tiles]

    def generate(context, builder, sig, args):
        if ISA.amx:
            _void_call(builder, instruction, [ir.Constant(_I8, n) for n in numbers])
    return generate
