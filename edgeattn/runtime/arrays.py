"""Arrays of compiled code at an address, which nobody frees."""
from edgeattn.runtime.compiler import intrinsic, ir, types

_I64 = ir.IntType(64)


def array_of(context, builder, array_type, pointer, size):
    """An array of `size` elements from a pointer on."""
    from numba.np.arrayobj import populate_array  # brings what only compiling needs

    array = context.make_array(array_type)(context, builder)
    item = ir.Constant(_I64, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
    populate_array(array, data=builder.bitcast(pointer, array.data.type), shape=[size], strides=[item], itemsize=item,
                   meminfo=None)
    return array._getvalue()


@intrinsic
def array_at(typing, address, size, dtype):
    """The `size` elements of a dtype from an address on."""
    array_type = types.Array(dtype.instance_type, 1, "C")

    def generate(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return array_of(context, builder, array_type, pointer, args[1])
    return array_type(types.int64, types.int64, dtype), generate
