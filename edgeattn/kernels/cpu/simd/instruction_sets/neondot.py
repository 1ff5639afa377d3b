"""NEON with the dot product of ARMv8.2: one instruction multiplies signed bytes and adds four."""
from .. import emit
from . import neon


class Code(neon.Code):
    """NEON with the dot product."""

    in_pairs = False

    def dot(self, builder, accumulator, u, s):  # noqa: D102
        return emit.call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", accumulator.type, [accumulator, u, s])
