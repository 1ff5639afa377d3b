"""What kernels need of scalars and addresses that Python has no word for."""

from edgeattn.runtime.compiler import intrinsic, types

from . import emit


@intrinsic
def quotient(typing, a, b):
    """a // b for a >= 0 and b > 0: unlike Python's, without a branch, so that it is taken out of loops"""
    def generate(context, builder, sig, args):
        return builder.udiv(*args)
    return types.int64(types.int64, types.int64), generate


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
        return builder.ptrtoint(emit.data(context, builder, sig.args[0], args[0]), emit.i64)
    return types.int64(array), generate


@intrinsic
def prefetch(typing, array, at):
    """Nothing but a hint: array[at] will soon be read."""
    def generate(context, builder, sig, args):
        where = emit.pointer(context, builder, sig.args[0], args[0], args[1], emit.i8)
        emit.prefetch(builder, where)
    return types.void(array, types.intp), generate


@intrinsic
def prefetch_first(typing, array, at):
    """prefetch() into the first of the caches, of what will be read at once."""
    def generate(context, builder, sig, args):
        where = emit.pointer(context, builder, sig.args[0], args[0], args[1], emit.i8)
        emit.prefetch(builder, where, level=1)
    return types.void(array, types.intp), generate
