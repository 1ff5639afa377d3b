"""Every ARM64 core: words are multiplied, and added in pairs."""
from .. import emit
from . import generic


class Code(generic.Code):
    """NEON."""

    def maximum(self, builder, a, b):  # noqa: D102
        return emit.call(builder, f"llvm.maximum.v{a.type.count}f32", a.type, [a, b])

    def round_to_int(self, builder, v, result):  # noqa: D102
        return emit.call(builder, "llvm.aarch64.neon.fcvtns.v4i32.v4f32", result, [v])

    prepare = staticmethod(emit.even_and_odd_bytes)

    def dot(self, builder, accumulator, u, s):  # noqa: D102
        # 255 * -128 still fits an int16: the product is exact, the pairs add into 32 bits
        for a, b in zip(u, s, strict=True):
            pairs = emit.call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", accumulator.type, [builder.mul(a, b)])
            accumulator = builder.add(accumulator, pairs)
        return accumulator
