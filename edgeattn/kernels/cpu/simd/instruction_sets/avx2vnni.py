"""AVX2 with VNNI: one instruction multiplies unsigned by signed bytes and adds four."""
from .. import emit
from . import avx2


class Code(avx2.Code):
    """AVX2 with VNNI."""

    adds_first = in_halves = multiplies_words = False

    prepare = staticmethod(emit.as_bytes)

    def dot(self, builder, accumulator, u, s):  # noqa: D102
        t = accumulator.type
        return emit.call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * t.count}", t, [accumulator, u, s])
