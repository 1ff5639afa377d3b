"""One vector register: its type, and what is done with one or with several lane by lane."""

from edgeattn.runtime.compiler import cgutils, intrinsic, ir, models, register_model, types
from edgeattn.runtime.isa import ISA

from . import emit
from .instruction_sets import CODE

LANES = ISA.lanes


class Vec(types.Type):
    """A vector of `lanes` elements of a scalar type."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"Vec({dtype},{lanes})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        element = emit.i1 if vec.dtype == types.boolean else manager.lookup(vec.dtype).get_data_type()
        super().__init__(manager, vec, ir.VectorType(element, vec.lanes))


F32 = Vec(types.float32, LANES)
I32 = Vec(types.int32, LANES)
I64 = Vec(types.int64, LANES)
F64 = Vec(types.float64, LANES)
MASK = Vec(types.boolean, LANES)
OF_ARRAY = {types.float32: F32, types.int32: I32, types.uint32: I32}


@intrinsic
def splat(typing, scalar):
    """v[l] = scalar"""
    vec = {types.float32: F32, types.int32: I32, types.int64: I64, types.float64: F64}.get(scalar)
    if vec is None:
        return None

    def generate(context, builder, sig, args):
        return emit.splat(builder, args[0], context.get_value_type(vec))
    return vec(scalar), generate


@intrinsic
def splat_like(typing, like, scalar):
    """v[l] = scalar, in as many lanes as a vector of that type has"""
    if scalar not in (types.float32, types.int32):
        return None
    vec = Vec(scalar, like.lanes)

    def generate(context, builder, sig, args):
        return emit.splat(builder, args[1], context.get_value_type(vec))
    return vec(like, scalar), generate


@intrinsic
def lane_index(typing):
    """v[l] = l, int32"""
    def generate(context, builder, sig, args):
        return ir.Constant(context.get_value_type(I32), list(range(LANES)))
    return I32(), generate


@intrinsic
def load(typing, array, at):
    """v[l] = array[at + l], for float32, int32 and uint32 arrays"""
    vec = OF_ARRAY[array.dtype]

    def generate(context, builder, sig, args):
        vector = context.get_value_type(vec)
        return emit.load(builder, emit.pointer(context, builder, sig.args[0], args[0], args[1], vector))
    return vec(array, types.intp), generate


@intrinsic
def broadcast(typing, array, at):
    """v[l] = array[at], at never negative, for float32, int32 and uint32 arrays"""
    vec = OF_ARRAY[array.dtype]

    def generate(context, builder, sig, args):
        element = builder.load(builder.gep(emit.data(context, builder, sig.args[0], args[0]), [args[1]]))
        return emit.splat(builder, element, context.get_value_type(vec))
    return vec(array, types.intp), generate


@intrinsic
def store(typing, array, at, v):
    """array[at + l] = v[l]"""
    def generate(context, builder, sig, args):
        emit.store(builder, args[2], emit.pointer(context, builder, sig.args[0], args[0], args[1], args[2].type))
    return types.void(array, types.intp, v), generate


@intrinsic
def fma(typing, a, b, c):
    """v[l] = a[l] * b[l] + c[l], rounded once where the machine can"""
    def generate(context, builder, sig, args):
        return emit.fma(builder, *args)
    return a(a, a, a), generate


@intrinsic
def maximum(typing, a, b):
    """v[l] = a[l] if a[l] > b[l] else b[l]: a NaN in b stays, int32 or float32"""
    def generate(context, builder, sig, args):
        if a.dtype == types.int32:
            return emit.call(builder, f"llvm.smax.v{a.lanes}i32", args[0].type, args)
        return CODE.maximum(builder, *args)
    return a(a, a), generate


@intrinsic
def smaller(typing, a, b):
    """v[l] = min(a[l], b[l]), int32"""
    def generate(context, builder, sig, args):
        return emit.call(builder, f"llvm.smin.v{a.lanes}i32", args[0].type, args)
    return a(a, a), generate


@intrinsic
def smaller_float(typing, a, b):
    """v[l] = a[l] if a[l] < b[l] else b[l]: a NaN in b stays"""
    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)
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
        return emit.call(builder, f"llvm.vector.reduce.or.v{mask.lanes}i1", emit.i1, args)
    return types.boolean(mask), generate


@intrinsic
def sum_lanes(typing, v):
    """sum over l of v[l], in any order"""
    def generate(context, builder, sig, args):
        if v.dtype == types.int32:
            return emit.call(builder, f"llvm.vector.reduce.add.v{v.lanes}i32", emit.i32, args)
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
            return emit.call(builder, f"llvm.vector.reduce.smax.v{v.lanes}i32", emit.i32, args)
        best, half = args[0], v.lanes // 2
        while half:  # LLVM's own reduction obeys the rules for NaN lane by lane
            other = emit.shuffle(builder, best, best, [(l + half) % v.lanes for l in range(v.lanes)])
            best = builder.select(builder.fcmp_ordered(">", best, other), best, other)
            half //= 2
        return builder.extract_element(best, ir.Constant(emit.i32, 0))
    return v.dtype(v), generate


@intrinsic
def first_lane(typing, v):
    """v[0]"""
    def generate(context, builder, sig, args):
        return builder.extract_element(args[0], ir.Constant(emit.i32, 0))
    return v.dtype(v), generate


def _unary(result, v, code):
    """What an intrinsic of one vector gives Numba: its signature and its code, of a builder, the vector and a type."""
    def generate(context, builder, sig, args):
        return code(builder, args[0], context.get_value_type(result))
    return result(v), generate


@intrinsic
def to_float(typing, a):
    """v[l] = float32(a[l])"""
    return _unary(F32, a, lambda b, v, t: b.sitofp(v, t))


@intrinsic
def to_double(typing, a):
    """v[l] = float64(a[l])"""
    return _unary(F64, a, lambda b, v, t: b.sitofp(v, t))


@intrinsic
def widen(typing, a):
    """v[l] = int64(a[l])"""
    return _unary(I64, a, lambda b, v, t: b.sext(v, t))


@intrinsic
def narrow(typing, a):
    """v[l] = int32(a[l]), low bits kept"""
    return _unary(I32, a, lambda b, v, t: b.trunc(v, t))


@intrinsic
def truncate(typing, a):
    """v[l] = int(a[l]) toward zero"""
    return _unary(I32, a, lambda b, v, t: b.fptosi(v, t))


@intrinsic
def truncate_double(typing, a):
    """v[l] = trunc(a[l]), float64"""
    return _unary(F64, a, lambda b, v, t: emit.call(b, f"llvm.trunc.v{LANES}f64", t, [v]))


@intrinsic
def round_to_int(typing, a):
    """v[l] = int(a[l]) to nearest, ties to even"""
    return _unary(I32, a, CODE.round_to_int)


@intrinsic
def fraction(typing, a):
    """v[l] = a[l] - floor(a[l])"""
    return _unary(F32, a, CODE.fraction)


@intrinsic
def bits_of(typing, a):
    """v[l] = the bits of float32 a[l]"""
    return _unary(Vec(types.int32, a.lanes), a, lambda b, v, t: b.bitcast(v, t))


@intrinsic
def float_of_bits(typing, a):
    """v[l] = the float32 with bits a[l]"""
    return _unary(Vec(types.float32, a.lanes), a, lambda b, v, t: b.bitcast(v, t))


@intrinsic
def double_of_bits(typing, a):
    """v[l] = the float64 with bits a[l]"""
    return _unary(F64, a, lambda b, v, t: b.bitcast(v, t))


@intrinsic
def scale_by_power(typing, a, t):
    """v[l] = a[l] * 2 ** floor(t[l]), for a[l] in [1, 2] and t[l] in [-126, 127)"""
    def generate(context, builder, sig, args):
        return CODE.scale_by_power(builder, *args)
    return a(a, t), generate
