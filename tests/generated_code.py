"""Assembly of inner loops for one instruction set: python tests/generated_code.py NAME [TRIPLE CPU].

Run as a program, in a process of its own: the instruction set is chosen at import, and what is generated for another
machine must not be called on this one. Nothing is executed.
"""
import sys

from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from edgeattn.runtime import isa


@global_compiler_lock
def main(name, triple=None, cpu=""):
    isa.use(name)
    from edgeattn.kernels.cpu.matmul import multiply, multiply_ahead
    from edgeattn.kernels.cpu.requantize import RULES
    from edgeattn.kernels.cpu.simd import COLUMNS, LANES, ROWS, WIDTH, load, splat, store, tile_store, tile_zero
    from edgeattn.kernels.cpu.softmax import exp2
    from quant.export.crosscompile import assembly, compile_for

    def product(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply(tile, a, 0, depth, 1, b, 0, depth)
        tile_store(tile, out, 0, WIDTH, LANES)

    def product_ahead(a, b, out, depth):
        tile = tile_zero(ROWS, COLUMNS, b)
        tile = multiply_ahead(tile, a, 0, depth, 1, b, 0, depth, depth * WIDTH, 1, WIDTH)
        tile_store(tile, out, 0, WIDTH, LANES)

    def exponentials(a, out, highest):
        for i in range(0, out.size, LANES):
            store(out, i, exp2(load(a, i) - splat(highest)))

    def requantization(rule):
        def requantize(a, out, parameters):
            for i in range(0, out.size, LANES):
                store(out, i, rule(load(a, i), parameters, 0, LANES))
        return requantize

    if triple is None:
        compile_for("x86_64-unknown-linux-gnu", "", ",".join("+" + feature for feature in isa.ISA.needs))
    else:
        compile_for(triple, cpu)
    floats, codes, unsigned = (types.Array(dtype, 1, "C") for dtype in (types.float32, types.int32, types.uint32))
    functions = {"product float32": (product, (floats, floats, floats, types.int64)),
                 "product float32 ahead": (product_ahead, (floats, floats, floats, types.int64)),
                 "product int8": (product, (codes, unsigned, codes, types.int64)),
                 "product int8 of weights": (product, (unsigned, codes, codes, types.int64)),
                 "exponentials": (exponentials, (floats, floats, types.float32))}
    for rule, function in RULES.items():
        functions[f"requantization {rule}"] = (requantization(function), (codes, codes, codes))
    for title, (function, arguments) in functions.items():
        print(f"### {title}\n{assembly(function, arguments)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
