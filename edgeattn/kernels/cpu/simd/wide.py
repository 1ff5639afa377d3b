"""Vectors of 32 lanes, whatever a register holds: sums of rows whose order does not depend on how wide one is.

Element i of a row goes to lane i % 32, and at the end the lanes are folded by halves: the same bits everywhere.
"""

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .vector import LANES, Vec

VIRTUAL_LANES = 32
WIDE = Vec(types.float32, VIRTUAL_LANES)


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
        emit.void_call(builder, f"llvm.masked.store.v{VIRTUAL_LANES}f32.p0",
                       [value, where, ir.Constant(emit.i32, 1), present])
    return types.void(array, types.intp, v, types.intp), generate


@intrinsic
def wide_first(typing, v, count):
    """u[l] = v[l] where l < count, else 0"""
    def generate(context, builder, sig, args):
        return builder.select(_first_lanes(builder, args[1], VIRTUAL_LANES), args[0], ir.Constant(args[0].type, None))
    return v(v, types.intp), generate


@intrinsic
def in_step(typing, v):
    """v, of whose registers none is far ahead of the others: all of them wait for a step of a polynomial together."""
    def generate(context, builder, sig, args):
        pieces = [emit.in_order(builder, emit.shuffle(builder, args[0], args[0], range(at, at + LANES)), CODE.registers)
                  for at in range(0, v.lanes, LANES)]
        while len(pieces) > 1:
            count = 2 * pieces[0].type.count
            pieces = [emit.shuffle(builder, a, b, range(count)) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
        return pieces[0]
    return v(v), generate if CODE.registers and v.lanes > LANES else lambda context, builder, sig, args: args[0]


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
