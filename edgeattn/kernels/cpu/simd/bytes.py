"""Vectors of bytes, four to a 32-bit lane: packing, tables, products."""
import numpy as np

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .vector import I32, LANES, OF_ARRAY


@intrinsic
def load_bytes(typing, array, at):
    """v[l] = int32(array[at + l]), for int8 and uint8 arrays"""
    signed = array.dtype.signed

    def generate(context, builder, sig, args):
        bytes_type = ir.VectorType(emit.i8, LANES)
        narrow = emit.load(builder, emit.pointer(context, builder, sig.args[0], args[0], args[1], bytes_type))
        return (builder.sext if signed else builder.zext)(narrow, context.get_value_type(I32))
    return I32(array, types.intp), generate


@intrinsic
def store_bytes(typing, array, at, v):
    """array[at + l] = v[l], each known to fit the array's int8 or uint8"""
    def generate(context, builder, sig, args):
        narrow = builder.trunc(args[2], ir.VectorType(emit.i8, LANES))
        emit.store(builder, narrow, emit.pointer(context, builder, sig.args[0], args[0], args[1], narrow.type))
    return types.void(array, types.intp, v), generate


@intrinsic
def look_up_bytes(typing, table, d):
    """four vectors, v[j][l] = table[byte j of d[l]]

    table (512,) of 32 bits: 256 entries, and the same again as `byte_planes` arranges it.
    """
    vec = OF_ARRAY[table.dtype]

    def generate(context, builder, sig, args):
        value_type = context.get_value_type(vec)
        found = CODE.look_up_bytes(builder, emit.data(context, builder, sig.args[0], args[0]), args[1], value_type)
        return context.make_tuple(builder, sig.return_type, found)
    return types.UniTuple(vec, 4)(table, d), generate


def byte_planes(table):
    """A table of 256 entries of 32 bits as `look_up_bytes` wants it: the entries, then their first bytes, second ..."""
    planes = np.ascontiguousarray(table.view(np.uint8).reshape(256, 4).T)
    return np.concatenate([table, planes.ravel().view(table.dtype)])


@intrinsic
def map_bytes(typing, table, at, v):
    """each unsigned byte of v[l] = table[at + byte], table of bytes"""
    def generate(context, builder, sig, args):
        vector = ir.VectorType(emit.i8, 4 * LANES)
        entries = builder.gep(emit.data(context, builder, sig.args[0], args[0]), [args[1]])
        found = CODE.map_bytes(builder, entries, builder.bitcast(args[2], vector))
        return builder.bitcast(found, args[2].type)
    return I32(table, types.intp, I32), generate


@intrinsic
def pack_bytes(typing, a, b, c, d, zero_point):
    """byte j of v[l] = clamp((a, b, c, d)[j][l] + zero_point, -128, 127)"""
    def generate(context, builder, sig, args):
        return emit.transpose_bytes(builder, CODE.pack(builder, args[:4], args[4]))
    return I32(I32, I32, I32, I32, types.int32), generate


@intrinsic
def join_bytes(typing, a, b, c, d):
    """byte 16 g + 4 i + j of v = clamp((a, b, c, d)[i][4 g + j], -128, 127): cheaper than any other order"""
    def generate(context, builder, sig, args):
        return CODE.pack(builder, args, ir.Constant(emit.i32, 0))
    return I32(I32, I32, I32, I32), generate


@intrinsic
def gather_byte(typing, a, b, c, d, r):
    """byte i * LANES + l of v = byte r of (a, b, c, d)[i][l]"""
    number = emit.literal(r)

    def generate(context, builder, sig, args):
        bytes_ = [builder.bitcast(v, ir.VectorType(emit.i8, 4 * LANES)) for v in args[:4]]
        pairs = [emit.shuffle(builder, *bytes_[i:i + 2], range(number, 8 * LANES, 4)) for i in (0, 2)]
        return builder.bitcast(emit.shuffle(builder, *pairs, range(4 * LANES)), args[0].type)
    return I32(I32, I32, I32, I32, r), generate


@intrinsic
def larger_bytes(typing, a, b):
    """each signed byte of v[l] = max of the two"""
    def generate(context, builder, sig, args):
        t = ir.VectorType(emit.i8, 4 * LANES)
        both = [builder.bitcast(x, t) for x in args]
        return builder.bitcast(emit.call(builder, f"llvm.smax.v{4 * LANES}i8", t, both), args[0].type)
    return I32(I32, I32), generate


@intrinsic
def subtract_bytes(typing, a, b):
    """each byte of v[l] = a - b modulo 256"""
    def generate(context, builder, sig, args):
        t = ir.VectorType(emit.i8, 4 * LANES)
        return builder.bitcast(builder.sub(*[builder.bitcast(x, t) for x in args]), args[0].type)
    return I32(I32, I32), generate


@intrinsic
def dot_bytes(typing, accumulator, u, s):
    """v[l] = accumulator[l] + sum over the four bytes of u[l] * s[l]"""
    def generate(context, builder, sig, args):
        return CODE.dot(builder, args[0], CODE.prepare(builder, args[1], True), CODE.prepare(builder, args[2], False))
    return I32(I32, I32, I32), generate
