"""Calls of parts of a kernel that stay calls: the compiler would copy a part into every place that uses it."""
from edgeattn.runtime.compiler import cgutils, intrinsic


@intrinsic
def separately(typing, function, arguments):
    """function(*arguments), a `task` that returns nothing, in machine code that all its calls in a kernel share."""
    signature = typing.resolve_function_type(function, arguments.types, {})
    if signature is None:
        return None

    def generate(context, builder, sig, args):
        compiled = function.dispatcher.get_compile_result(signature)
        context.add_linking_libs([compiled.library])
        callee = context.declare_function(builder.module, compiled.fndesc)
        values = cgutils.unpack_tuple(builder, args[1], len(signature.args))
        values = [context.cast(builder, value, given, wanted)
                  for value, given, wanted in zip(values, arguments.types, signature.args, strict=True)]
        _, result = context.call_conv.call_function(builder, callee, sig.return_type, signature.args, values,
                                                    attrs=("noinline",))
        return result
    return signature.return_type(function, arguments), generate
