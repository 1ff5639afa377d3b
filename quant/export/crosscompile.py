"""Machine code of Numba functions for another processor; nothing of it is run here.

For a process of its own: every function compiled from then on, callees too, is code for the other machine, and calling
one is a crash. Which instruction set the kernels are written for is `edgeattn.runtime.isa.use`'s business, before they
are
imported.

This leans on names that Numba keeps to itself: its code generator for ahead-of-time compilation, the context's slot
for a code generator, the runtime's library. quant.export.bundle names the versions with which it is known to work.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import codegen, types
from numba.core.compiler import DEFAULT_FLAGS, Compiler, compile_extra
from numba.core.registry import cpu_target
from numba.core.runtime import nrtdynmod, rtsys


class _Library(codegen.AOTCodeLibrary):
    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


class _Generator(codegen.AOTCPUCodegen):
    """Numba's code generator for a machine that is not this one."""

    _library_class = _Library

    def __init__(self, triple, cpu, features):
        self._triple = triple
        codegen.initialize_llvm()
        self._data_layout, self._loopvect, self._opt_level = None, False, 0
        self._cpu_name, self._tm_features = cpu, features
        target = llvm.Target.from_triple(triple)
        self._tm = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default")
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._llvm_module = llvm.parse_assembly(str(self._create_empty_module("generated")))
        self._rtlinker = self._engine = None

    def _create_empty_module(self, name):
        module = super()._create_empty_module(name)
        module.triple = self._triple
        return module

    def _add_module(self, module):
        pass

    def set_env(self, env_name, env):
        pass


def compile_for(triple: str, cpu: str, features: str = "") -> None:
    """From here on, compile for the machine that LLVM calls so."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    context = cpu_target.target_context
    context.refresh()
    rtsys.initialize(context)
    translate_for(triple, cpu, features)
    context.cached_internal_func = {}
    # Numba's counting of references, which views of arrays go through; nothing here owns memory that it would free.
    module, library = nrtdynmod.create_nrt_module(context)
    builder = ir.IRBuilder(module.globals["NRT_MemInfo_call_dtor"].append_basic_block())
    builder.call(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "llvm.trap"), [])
    builder.unreachable()
    library.add_ir_module(module)
    library.finalize()
    rtsys._library = library


def translate_for(triple: str, cpu: str, features: str = "") -> None:
    """From here on, make machine code for that processor, also of parts compiled before for another like it."""
    cpu_target.target_context._internal_codegen = _Generator(triple, cpu, features)


def compile_function(function, arguments, returns=types.void, pipeline=Compiler):
    """Numba's compile result of a plain function for argument types, with the flags of our kernels.

    pipeline : the compiler; with `edgeattn.runtime.jit.PartCompiler` the result is optimized where it is linked
    """
    flags = DEFAULT_FLAGS.copy()
    flags.error_model = "numpy"
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    return compile_extra(cpu_target.typing_context, cpu_target.target_context, function, arguments, returns, flags, {},
                         pipeline_class=pipeline)


def assembly(function, arguments) -> str:
    """The assembly of a plain function for argument types."""
    return compile_function(function, arguments).library.get_asm_str()


def emit(exports) -> bytes:
    """An object file with functions that C can call.

    Parameters
    ----------
    exports : mapping of str to compile result or None
        Each becomes a C function of that name, its arguments and result as they are in Numba. None: a function that
        does nothing, to link against.
    """
    context = cpu_target.target_context
    library = context._internal_codegen.create_library("exports")
    module = library.create_ir_module("exports")
    for name, compiled in exports.items():
        kinds = [ir.VoidType()]
        if compiled is not None:
            signature = compiled.signature
            kinds = [context.get_value_type(kind) for kind in (signature.return_type, *signature.args)]
        exported = ir.Function(module, ir.FunctionType(kinds[0], kinds[1:]), name)
        builder = ir.IRBuilder(exported.append_basic_block())
        if compiled is None:
            builder.ret_void()
            continue
        callee = context.declare_function(module, compiled.fndesc)
        _, value = context.call_conv.call_function(
            builder, callee, signature.return_type, signature.args, exported.args)
        builder.ret(value)
        library.add_linking_library(compiled.library)
    library.add_ir_module(module)
    library.finalize()
    # What another object has by the same name, a helper compiled there, may be another function.
    for value in (*library._final_module.functions, *library._final_module.global_variables):
        if not value.is_declaration and value.name not in exports:
            value.linkage = "internal"
    return library.emit_native_object()
