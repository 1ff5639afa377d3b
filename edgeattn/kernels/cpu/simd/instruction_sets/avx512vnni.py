"""AVX-512 with VNNI: sixteen lanes, and an instruction for powers of two.

That for fractions, VREDUCEPS, rounds down, where others round to nearest: bytes would differ.
"""

from edgeattn.runtime.compiler import ir

from .. import emit
from . import avx2vnni

_EVERY = ir.Constant(emit.i16, -1)
_CURRENT_ROUNDING = ir.Constant(emit.i32, 4)


class Code(avx2vnni.Code):
    """AVX-512 with VNNI."""

    registers = "v"
    words, half = "llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packsswb.512"
    shuffle_bytes = "llvm.x86.avx512.pshuf.b.512"

    def round_to_int(self, builder, v, result):  # noqa: D102
        return emit.call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", result,
                         [v, ir.Constant(result, None), _EVERY, _CURRENT_ROUNDING])

    def scale_by_power(self, builder, value, power):  # noqa: D102
        return emit.call(builder, "llvm.x86.avx512.mask.scalef.ps.512", value.type,
                         [value, power, ir.Constant(value.type, None), _EVERY, _CURRENT_ROUNDING])
