"""Pieces of LLVM's language that the code generators of intrinsics put together."""
from edgeattn.runtime.compiler import cgutils, ir, types

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


def data(context, builder, array_type, array):
    """Where the elements of an array lie, or what a pointer points to."""
    if isinstance(array_type, types.CPointer):
        return array
    return context.make_array(array_type)(context, builder, array).data


def pointer(context, builder, array_type, array, index, to):
    """Where an element of an array lies, as a pointer to values of the type `to`."""
    address = builder.gep(data(context, builder, array_type, array), [index])
    return builder.bitcast(address, to.as_pointer())


def load(builder, pointer):
    """A value from memory, however it is aligned."""
    value = builder.load(pointer)
    value.align = 1
    return value


def load_first(builder, pointer, count):
    """The first `count` elements of a vector in memory, whose others are not touched and count as zero."""
    vector = pointer.type.pointee
    present = builder.icmp_signed("<", ir.Constant(ir.VectorType(i32, vector.count), list(range(vector.count))),
                                  splat(builder, builder.trunc(count, i32), ir.VectorType(i32, vector.count)))
    return call(builder, f"llvm.masked.load.v{vector.count}f32.p0", vector,
                [pointer, ir.Constant(i32, 1), present, ir.Constant(vector, None)])


def store(builder, value, pointer):
    """A value to memory, however that is aligned."""
    builder.store(value, pointer).align = 1


def splat(builder, scalar, vector_type):
    """A scalar in every lane."""
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(i32, 0))
    zeros = ir.Constant(ir.VectorType(i32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(first, undefined, zeros)


def all_lanes(value, vector_type):
    """A constant number in every lane."""
    return ir.Constant(vector_type, [value] * vector_type.count)


def call(builder, name, result, arguments):
    """A call of a function that LLVM knows by its name."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def void_call(builder, name, arguments):
    """The same without a result."""
    call(builder, name, ir.VoidType(), arguments)


def prefetch(builder, pointer, level=2):
    """A hint: what lies there will soon be read; into which cache it shall come, 1 or 2."""
    pointer = builder.bitcast(pointer, i8.as_pointer())
    # to be read, how near, data
    void_call(builder, "llvm.prefetch.p0", [pointer, *(ir.Constant(i32, value) for value in (0, 4 - level, 1))])


def unknown(builder, number):
    """The same 64-bit integer in a register, of which the compiler does not know how it was computed."""
    return builder.asm(ir.FunctionType(i64, [i64]), "", "=r,0", [number], side_effect=False)


def in_order(builder, value, kind):
    """The same value, not computed before those that this was asked for earlier; kind: the letter of its registers."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", f"={kind},0", [value], side_effect=True)


def literal(value):
    """The number that an argument is known to be when its function is compiled."""
    if not isinstance(value, types.IntegerLiteral):
        from numba.core.errors import RequireLiteralValue

        raise RequireLiteralValue("rows, columns and positions within a tile must be constants")
    return value.literal_value


def shuffle(builder, a, b, lanes):
    """The lanes of a and b, counted one after the other, in the order given."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))


def zip_elements(builder, a, b, size, half):
    """Within groups of 16 bytes: pieces of `size` elements of a and b in turn, from the low half or the high one."""
    n = a.type.count
    group = 128 // a.type.element.width
    return shuffle(builder, a, b, [g + half * group // 2 + e + i + which * n for g in range(0, n, group)
                                   for e in range(0, group // 2, size) for which in range(2) for i in range(size)])


def transpose_bytes(builder, v):
    """Within each group of four lanes: byte j of lane i becomes byte i of lane j."""
    n = v.type.count
    rows = builder.bitcast(v, ir.VectorType(i8, 4 * n))
    order = [16 * g + 4 * j + i for g in range(n // 4) for i in range(4) for j in range(4)]
    return builder.bitcast(shuffle(builder, rows, rows, order), v.type)


def fma(builder, a, b, c):
    """a * b + c of float32 vectors, rounded once where the machine can."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


def saturate(builder, v, to):
    """A vector of integers clamped to the range of a narrower type, in that type."""
    n, bits = v.type.count, v.type.element.width
    low, high = -(1 << (to.width - 1)), (1 << (to.width - 1)) - 1
    v = call(builder, f"llvm.smax.v{n}i{bits}", v.type, [v, all_lanes(low, v.type)])
    v = call(builder, f"llvm.smin.v{n}i{bits}", v.type, [v, all_lanes(high, v.type)])
    return builder.trunc(v, ir.VectorType(to, n))


def as_bytes(builder, v, unsigned):
    """The bytes of a vector of 32-bit lanes, as products of bytes read them, unsigned or not."""
    return builder.bitcast(v, ir.VectorType(i8, 4 * v.type.count))


def even_and_odd_bytes(builder, v, unsigned):
    """The bytes of a vector as two vectors of 16-bit words, zero-extended where they are unsigned."""
    words = builder.bitcast(v, ir.VectorType(i16, 2 * v.type.count))
    eight = all_lanes(8, words.type)
    if unsigned:
        return builder.and_(words, all_lanes(255, words.type)), builder.lshr(words, eight)
    return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)
