"""Assembly of the tiled product for one instruction set: python tests/generated_code.py NAME [TRIPLE CPU].

Run as a program, in a process of its own: the instruction set is chosen at import, and what is generated for another
machine must not be called on this one. Nothing is executed.
"""
import sys

from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from edgeattn import isa


@global_compiler_lock
def main(name, triple=None, cpu=""):
    isa.use(name)
    from edgeattn.cpu.matmul import multiply, multiply_ahead
    from edgeattn.cpu.simd import COLUMNS, LANES, ROWS, WIDTH, tile_store, tile_zero
    from quant.export.crosscompile import assembly, compile_for

    def product(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply(tile, a, 0, depth, 1, b, 0, depth)
        tile_store(tile, out, 0, WIDTH, LANES)

    def product_ahead(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply_ahead(tile, a, 0, depth, 1, b, 0, depth, depth * WIDTH, depth)
        tile_store(tile, out, 0, WIDTH, LANES)

    if triple is None:
        compile_for("x86_64-unknown-linux-gnu", "", ",".join("+" + feature for feature in isa.ISA.needs))
    else:
        compile_for(triple, cpu)
    for dtypes in ((types.float32,) * 3, (types.int32, types.uint32, types.int32)):
        arrays = [types.Array(dtype, 1, "C") for dtype in dtypes]
        print("### float32" if dtypes[0] is types.float32 else "### bytes")
        print(assembly(product, (*arrays, types.int64)))
        if dtypes[0] is types.float32:
            print(assembly(product_ahead, (*arrays, types.int64)))


if __name__ == "__main__":
    main(*sys.argv[1:])
