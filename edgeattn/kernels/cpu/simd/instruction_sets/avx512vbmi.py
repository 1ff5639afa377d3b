"""AVX-512 with VBMI: bytes are looked up in registers."""

from edgeattn.runtime.compiler import ir

from .. import emit
from . import avx512vnni


class Code(avx512vnni.Code):
    """AVX-512 with VNNI and VBMI."""

    def look_up_bytes(self, builder, table, d, vector):  # noqa: D102
        # half a plane at a time, two registers; bit 7 of the index chooses between the halves
        bytes_type = ir.VectorType(emit.i8, 64)
        index = builder.bitcast(emit.transpose_bytes(builder, d), bytes_type)
        upper = builder.icmp_signed("<", index, emit.all_lanes(0, bytes_type))
        planes = []
        for j in range(4):
            places = [ir.Constant(emit.i64, 256 + 64 * j + 16 * k) for k in range(4)]
            q = [emit.load(builder, builder.bitcast(builder.gep(table, [at]), bytes_type.as_pointer()))
                 for at in places]
            low, high = (emit.call(builder, "llvm.x86.avx512.vpermi2var.qi.512", bytes_type, [q[k], index, q[k + 1]])
                         for k in (0, 2))
            planes.append(builder.select(upper, high, low))
        # bytes of the planes side by side, first to 16 and then to 32 bits
        halves = []
        for half in (0, 8):
            order = [16 * g + half + i + 64 * side for g in range(4) for i in range(8) for side in (0, 1)]
            pairs = [emit.shuffle(builder, planes[j], planes[j + 1], order) for j in (0, 2)]
            halves.append([builder.bitcast(pair, ir.VectorType(emit.i16, 32)) for pair in pairs])
        found = []
        for pairs in halves:
            for half in (0, 4):
                order = [8 * g + half + i + 32 * side for g in range(4) for i in range(4) for side in (0, 1)]
                found.append(builder.bitcast(emit.shuffle(builder, *pairs, order), vector))
        return found
