"""From a kernel to PTX, through Numba; needs numba-cuda and libnvvm, but no GPU and no driver."""
import contextlib
import functools
import math
import threading
import warnings

import numpy as np

from edgeattn.kernels.cuda.language import Device, Instruction, bind

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def _numpy_as_numba_cuda_knows_it():
    """While numba-cuda imports its parts, some with the first kernel that is compiled.

    0.30 names np.row_stack, which NumPy 2.5 has not and NumPy 2.0 to 2.4 warn of, and NumPy warns of more in it: those
    who call this package need not hear of that.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        missing = not hasattr(np, "row_stack")
        if missing:
            np.row_stack = np.vstack  # noqa: NPY201
        try:
            yield
        finally:
            if missing:
                del np.row_stack  # noqa: NPY201


with _numpy_as_numba_cuda_knows_it():
    with contextlib.suppress(ImportError):  # a .pth file sees to that, but not in folders of PYTHONPATH
        import _numba_cuda_redirector  # noqa: F401
    from numba import cuda as numba_cuda


@functools.cache
def _letters():
    """letter -> (Numba type, LLVM type, register constraint)."""
    from llvmlite import ir
    from numba.cuda import types

    return {"i": (types.int32, ir.IntType(32), "r"), "l": (types.int64, ir.IntType(64), "l"),
            "f": (types.float32, ir.FloatType(), "f"), "d": (types.float64, ir.DoubleType(), "d"),
            "b": (types.boolean, ir.IntType(1), "r")}


def _generate(instruction, context, builder, values):
    """LLVM for one instruction; a tuple of values where it has several results."""
    from llvmlite import ir

    letters = _letters()
    word = letters["i"][1]
    if not instruction.text:  # LLVM has a form of its own, which it can fold
        if instruction.arguments.startswith("b"):
            return [builder.select(*values)]
        return [builder.bitcast(values[0], letters[instruction.results][1])]
    results = [letters[letter] for letter in instruction.results]
    values = [builder.zext(value, word) if letter == "b" else value
              for letter, value in zip(instruction.arguments, values, strict=True)]
    constraints = ["=" + row[2] for row in results] + [letters[letter][2] for letter in instruction.arguments]
    if instruction.effect:
        constraints.append("~{memory}")
    provider = [row[1] for row in results]
    returned = ir.VoidType() if not provider else provider[0] if len(provider) == 1 else ir.LiteralStructType(provider)
    asm = ir.InlineAsm(ir.FunctionType(returned, [value.type for value in values]), instruction.text,
                       ",".join(constraints), side_effect=instruction.effect)
    call = builder.call(asm, values)
    if instruction.effect:
        call.attributes.add("convergent")
    return [call] if len(provider) < 2 else [builder.extract_value(call, i) for i in range(len(provider))]


@functools.cache
def _intrinsic(instruction):
    """A Numba intrinsic with the instruction's arguments."""
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    letters = _letters()
    results = [letters[letter][0] for letter in instruction.results]
    result = types.UniTuple(results[0], len(results)) if len(results) > 1 else results[0] if results else types.void
    signature = result(*(letters[letter][0] for letter in instruction.arguments))

    def lower(context, builder, signature, values):
        made = _generate(instruction, context, builder, values)
        if not results:
            return context.get_dummy_value()
        return made[0] if len(results) == 1 else context.make_tuple(builder, signature.return_type, made)

    # Numba counts the arguments of the function it is given.
    names = ", ".join(f"a{i}" for i in range(len(instruction.arguments)))
    space = {"signature": signature, "lower": lower}
    exec(f"def typing(typingctx{', ' + names if names else ''}):\n    return signature, lower", space)
    return intrinsic(space["typing"])


@functools.cache
def _shared():
    """An intrinsic for the address of the shared memory that a launch asks for."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def shared(typingctx):
        def lower(context, builder, signature, values):
            module = builder.module
            memory = module.globals.get("shared_memory") or ir.GlobalVariable(
                module, ir.ArrayType(ir.IntType(8), 0), "shared_memory", addrspace=3)
            memory.align = 128
            return builder.ptrtoint(memory, ir.IntType(32))

        return types.int32(), lower

    return shared


def _supply(placeholder):
    from numba.cuda import types

    if isinstance(placeholder, Instruction):
        return _intrinsic(placeholder)
    if isinstance(placeholder, Device):
        return numba_cuda.jit(placeholder.function, device=True, inline="always")
    if placeholder.name == "shared":
        return _shared()
    names = {"cuda": numba_cuda, "larger": max, "smaller": min, "tanh": math.tanh, "log": math.log}
    return names.get(placeholder.name) or getattr(types, placeholder.name)


def to_ptx(kernel, capability):
    """The PTX of a kernel and the name of its entry.

    Parameters
    ----------
    kernel : Kernel
    capability : (int, int)
        Compute capability to compile for.

    Returns
    -------
    ptx, name : str
    """
    with _numpy_as_numba_cuda_knows_it():
        from numba.cuda import types

        signature = types.void(types.UniTuple(types.int64, kernel.addresses),
                               types.UniTuple(types.int32, kernel.numbers))
        ptx, _ = numba_cuda.compile_ptx(bind(kernel.function, _supply), signature, cc=capability,
                                        launch_bounds=(kernel.threads, 1))
    (name,) = (line.split("(")[0].split()[-1] for line in ptx.splitlines() if ".visible .entry" in line)
    return ptx, name
