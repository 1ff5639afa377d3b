"""AVX-512 with AMX: a matrix unit multiplies bytes."""

from edgeattn.runtime.compiler import ir

from .. import emit
from . import avx512vbmi

# palette 1; 64 bytes a row, 16 rows, of all eight tiles
_DESCRIPTION = bytes([1, 0] + [0] * 14 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)


class Code(avx512vbmi.Code):
    """AVX-512 with VNNI, VBMI and AMX."""

    def matrix_configure(self, builder, where):  # noqa: D102
        to = builder.bitcast(where, ir.ArrayType(emit.i8, 64).as_pointer())
        emit.store(builder, ir.Constant(ir.ArrayType(emit.i8, 64), bytearray(_DESCRIPTION)), to)
        emit.void_call(builder, "llvm.x86.ldtilecfg", [builder.bitcast(to, emit.i8.as_pointer())])

    matrix_call = staticmethod(emit.void_call)
