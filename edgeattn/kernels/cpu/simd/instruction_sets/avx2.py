"""AVX2 with fused multiply-add: eight lanes; words are multiplied, and added in pairs."""

from edgeattn.runtime.compiler import ir

from .. import emit
from . import generic


class Code(generic.Code):
    """AVX2."""

    adds_first = True  # two ports multiply, four add
    multiplies_words = True
    registers = "x"
    words, half = "llvm.x86.avx2.packssdw", "llvm.x86.avx2.packsswb"
    shuffle_bytes = "llvm.x86.avx2.pshuf.b"

    def maximum(self, builder, a, b):
        """By the instruction: LLVM makes slow stores under a mask of a choice that replaces a or b."""
        if a.type.count != 8:
            return super().maximum(builder, a, b)
        return emit.call(builder, "llvm.x86.avx.max.ps.256", a.type, [a, b])

    def round_to_int(self, builder, v, result):  # noqa: D102
        return emit.call(builder, "llvm.x86.avx.cvt.ps2dq.256", result, [v])

    def gather(self, builder, base, index, vector):  # noqa: D102
        n = vector.count
        wide = ir.VectorType(emit.i64, n)
        start = emit.splat(builder, builder.ptrtoint(base, emit.i64), wide)
        addresses = builder.add(start, builder.shl(builder.sext(index, wide), emit.all_lanes(2, wide)))
        pointers = ir.VectorType(base.type, n)
        every = emit.all_lanes(True, ir.VectorType(emit.i1, n))
        kind = "f32" if vector.element == ir.FloatType() else "i32"
        return emit.call(builder, f"llvm.masked.gather.v{n}{kind}.v{n}p0", vector,
                         [builder.inttoptr(addresses, pointers), ir.Constant(emit.i32, 4), every,
                          ir.Constant(vector, ir.Undefined)])

    def map_bytes(self, builder, entries, v):  # noqa: D102
        # sixteen entries at a time, by the lower half of a byte; the bits of its upper half choose, each as a sign
        n, none = v.type.count, emit.all_lanes(0, v.type)
        sixteen = ir.VectorType(emit.i8, 16)
        lower = builder.and_(v, emit.all_lanes(15, v.type))
        words = builder.bitcast(v, ir.VectorType(emit.i16, n // 2))
        shifted = [builder.bitcast(builder.shl(words, emit.all_lanes(left, words.type)), v.type)
                   for left in (3, 2, 1, 0)]
        signs = [builder.icmp_signed("<", bits, none) for bits in shifted]

        def chosen(first, count):
            if count == 1:
                where = builder.gep(entries, [ir.Constant(emit.i64, 16 * first)])
                some = emit.load(builder, builder.bitcast(where, sixteen.as_pointer()))
                some = emit.shuffle(builder, some, some, [i % 16 for i in range(n)])
                return emit.call(builder, self.shuffle_bytes, v.type, [some, lower])
            below, above = chosen(first, count // 2), chosen(first + count // 2, count // 2)
            return builder.select(signs[count.bit_length() - 2], above, below)
        return chosen(0, 16)

    def pack(self, builder, vectors, zero_point):  # noqa: D102
        n = vectors[0].type.count
        words_type = ir.VectorType(emit.i16, 2 * n)
        word_zero = emit.splat(builder, builder.trunc(zero_point, emit.i16), words_type)
        pairs = [emit.call(builder, self.words, words_type, vectors[i:i + 2]) for i in (0, 2)]
        pairs = [emit.call(builder, f"llvm.sadd.sat.v{2 * n}i16", words_type, [p, word_zero]) for p in pairs]
        return builder.bitcast(emit.call(builder, self.half, ir.VectorType(emit.i8, 4 * n), pairs), vectors[0].type)

    prepare = staticmethod(emit.even_and_odd_bytes)

    def dot(self, builder, accumulator, u, s):  # noqa: D102
        for a, b in zip(u, s, strict=True):
            pairs = emit.call(builder, "llvm.x86.avx2.pmadd.wd", accumulator.type, [a, b])
            accumulator = builder.add(accumulator, pairs)
        return accumulator

    def dot_of_sums(self, builder, accumulator, u, s):
        """Even and odd words of two operands: what `dot` adds, and both own products, as `word_tile` says."""
        sums = builder.add(u[0], s[1]), builder.add(u[1], s[0])
        return builder.add(accumulator, emit.call(builder, "llvm.x86.avx2.pmadd.wd", accumulator.type, sums))
