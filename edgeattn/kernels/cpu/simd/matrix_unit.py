"""The matrix unit of x86-64: eight tiles of 16 rows by 64 bytes. Without one these do nothing, and are not called."""

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE

MATRIX_ROWS = 16


@intrinsic
def matrix_configure(typing, array, at):
    """Give all eight tiles 16 rows of 64 bytes; array[at:at + 16], int32, is overwritten with the description."""
    def generate(context, builder, sig, args):
        CODE.matrix_configure(builder, emit.pointer(context, builder, sig.args[0], args[0], args[1], emit.i8))
    return types.void(array, types.intp), generate


@intrinsic
def matrix_release(typing):
    """Say that the tiles are no longer needed."""
    def generate(context, builder, sig, args):
        CODE.matrix_call(builder, "llvm.x86.tilerelease", [])
    return types.void(), generate


@intrinsic
def matrix_load(typing, t, array, at, row_step):
    """tile t, row i = the 64 bytes from array[at + i * row_step] on; array of 32-bit elements"""
    number = emit.literal(t)

    def generate(context, builder, sig, args):
        where = emit.pointer(context, builder, sig.args[1], args[1], args[2], emit.i8)
        step = builder.mul(args[3], ir.Constant(emit.i64, 4))
        CODE.matrix_call(builder, "llvm.x86.tileloadd64", [ir.Constant(emit.i8, number), where, step])
    return types.void(t, array, types.intp, types.intp), generate


@intrinsic
def matrix_zero(typing, t):
    """tile t = 0"""
    number = emit.literal(t)

    def generate(context, builder, sig, args):
        CODE.matrix_call(builder, "llvm.x86.tilezero", [ir.Constant(emit.i8, number)])
    return types.void(t), generate


@intrinsic
def matrix_store(typing, t, array, at, row_step):
    """array[at + i * row_step :][:16] = tile t, row i; array of 32-bit elements"""
    number = emit.literal(t)

    def generate(context, builder, sig, args):
        where = emit.pointer(context, builder, sig.args[1], args[1], args[2], emit.i8)
        step = builder.mul(args[3], ir.Constant(emit.i64, 4))
        CODE.matrix_call(builder, "llvm.x86.tilestored64", [ir.Constant(emit.i8, number), where, step])
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
    numbers = [emit.literal(t) for t in tiles]

    def generate(context, builder, sig, args):
        CODE.matrix_call(builder, instruction, [ir.Constant(emit.i8, n) for n in numbers])
    return generate
