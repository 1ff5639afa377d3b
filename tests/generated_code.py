"""Assembly of the tiled product for one instruction set: python tests/generated_code.py NAME [TRIPLE CPU].

Run as a program, in a process of its own: the instruction set is chosen at import, and what is generated for another
machine must not be called on this one. Nothing is executed.
"""
import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import codegen, types
from numba.core.compiler import DEFAULT_FLAGS, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys


class _Library(codegen.AOTCodeLibrary):
    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0


class _Codegen(codegen.AOTCPUCodegen):
    """Numba's code generator for another machine; what it makes is read, never run."""

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


@global_compiler_lock
def assembly(function, signature, triple, cpu, features):
    context = cpu_target.target_context
    context.refresh()
    rtsys.initialize(context)
    generator = context._internal_codegen = _Codegen(triple, cpu, features)
    context.cached_internal_func = {}
    runtime = generator.create_library("runtime")  # instead of this machine's; to link it, it must hold something
    module = runtime.create_ir_module("runtime")
    ir.IRBuilder(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "nothing").append_basic_block()).ret_void()
    runtime.add_ir_module(module)
    runtime.finalize()
    rtsys._library = runtime
    flags = DEFAULT_FLAGS.copy()
    flags.error_model = "numpy"
    return compile_extra(cpu_target.typing_context, context, function, signature, types.void, flags, {}
                         ).library.get_asm_str()


def main(name, triple=None, cpu="", features=""):
    import importlib.util
    import os
    spec = importlib.util.spec_from_file_location("tables", os.path.join(os.environ["PYTHONPATH"], "edgeattn", "isa.py"))
    isa = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isa)
    table = next(t for t in isa.TABLES if t.name == name)
    cpu_target.target_context.refresh()  # reads this machine's features
    real, llvm.get_host_cpu_features = llvm.get_host_cpu_features, lambda: dict.fromkeys(table.needs, True)
    os.environ["EDGEATTN_ISA"] = name  # the package believes in that machine when it is imported, Numba does not
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    from edgeattn.cpu.matmul import multiply, multiply_ahead
    from edgeattn.cpu.simd import COLUMNS, LANES, ROWS, WIDTH, tile_store, tile_zero
    llvm.get_host_cpu_features = real

    def product(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply(tile, a, 0, depth, 1, b, 0, depth)
        tile_store(tile, out, 0, WIDTH, LANES)

    def product_ahead(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply_ahead(tile, a, 0, depth, 1, b, 0, depth, depth * WIDTH, depth)
        tile_store(tile, out, 0, WIDTH, LANES)

    if triple is None:
        triple = "x86_64-unknown-linux-gnu"
        features = ",".join("+" + feature for feature in table.needs)
    for dtypes in ((types.float32,) * 3, (types.int32, types.uint32, types.int32)):
        arrays = [types.Array(dtype, 1, "C") for dtype in dtypes]
        print("### float32" if dtypes[0] is types.float32 else "### bytes")
        print(assembly(product, (*arrays, types.int64), triple, cpu, features))
        if dtypes[0] is types.float32:
            print(assembly(product_ahead, (*arrays, types.int64), triple, cpu, features))


if __name__ == "__main__":
    main(*sys.argv[1:])
