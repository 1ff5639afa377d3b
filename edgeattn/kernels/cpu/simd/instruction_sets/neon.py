"""Every ARM64 core: bytes with signs are multiplied to words of 16 bits, two of which are added in pairs."""

from edgeattn.runtime.compiler import ir

from .. import emit
from . import generic

_BYTES = ir.VectorType(emit.i8, 16)
_WORDS = ir.VectorType(emit.i16, 8)


class Code(generic.Code):
    """NEON."""

    by_lane = in_pairs = True
    registers = "w"

    def maximum(self, builder, a, b):  # noqa: D102
        return emit.call(builder, f"llvm.maximum.v{a.type.count}f32", a.type, [a, b])

    def round_to_int(self, builder, v, result):  # noqa: D102
        return emit.call(builder, "llvm.aarch64.neon.fcvtns.v4i32.v4f32", result, [v])

    def map_bytes(self, builder, entries, v):  # noqa: D102
        # 64 entries at a time; what is none of them leaves what was found before, at first zeros
        found = emit.all_lanes(0, v.type)
        for first in range(0, 256, 64):
            places = [builder.gep(entries, [ir.Constant(emit.i64, first + i)]) for i in range(0, 64, 16)]
            four = [emit.load(builder, builder.bitcast(where, v.type.as_pointer())) for where in places]
            found = emit.call(builder, "llvm.aarch64.neon.tbx4.v16i8", v.type,
                              [found, *four, builder.sub(v, emit.all_lanes(first, v.type))])
        return found

    prepare = staticmethod(emit.as_bytes)

    def dot(self, builder, accumulator, u, s):  # noqa: D102
        halves = [self._add_words(builder, None, self._multiply(builder, half, u, s)) for half in range(2)]
        return builder.add(accumulator, self.add_neighbours(builder, *halves))

    def add_two_products(self, builder, sums, half, first, second, less):
        """sums[l] += bytes 2 l and 2 l + 1 of half of u * s of the first pair (u, s), and plus or less the second's."""
        words = [self._multiply(builder, half, *pair) for pair in (first, second)]
        return self._add_words(builder, sums, (builder.sub if less else builder.add)(*words))

    def load_to_all(self, builder, where, count, vector):
        """At most four elements that follow one another, each as a vector that has it in every lane."""
        if count == 1:
            return [emit.splat(builder, builder.load(where), vector)]
        name = f"llvm.aarch64.neon.ld{count}r.v{vector.count}i32.p0"
        found = emit.call(builder, name, ir.LiteralStructType([vector] * count), [where])
        return [builder.extract_value(found, n) for n in range(count)]

    def add_neighbours(self, builder, a, b):
        """The sums of lanes 0 and 1, 2 and 3 of a, then of b."""
        return emit.call(builder, "llvm.aarch64.neon.addp.v4i32", a.type, [a, b])

    def add_bytes(self, builder, sums, v):
        """sums[l] += the sum of the four bytes with signs of v[l]."""
        words = emit.call(builder, "llvm.aarch64.neon.saddlp.v8i16.v16i8", _WORDS, [builder.bitcast(v, _BYTES)])
        return self._add_words(builder, sums, words)

    @staticmethod
    def _multiply(builder, half, u, s):
        """The products of bytes with signs, of the lower or the upper half of a register."""
        both = (builder.bitcast(v, _BYTES) for v in (u, s))
        halves = [emit.shuffle(builder, v, v, range(8 * half, 8 * half + 8)) for v in both]
        return emit.call(builder, "llvm.aarch64.neon.smull.v8i16", _WORDS, halves)

    @staticmethod
    def _add_words(builder, sums, words):
        pairs = emit.call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", ir.VectorType(emit.i32, 4), [words])
        return pairs if sums is None else builder.add(sums, pairs)
