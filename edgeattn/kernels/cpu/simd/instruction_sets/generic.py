"""Any machine: in LLVM's own words, four lanes wide."""

from edgeattn.runtime.compiler import ir

from .. import emit


class Code:
    """What the intrinsics write where instruction sets differ."""

    adds_first = False  # words are added before they are multiplied, see word_tile.py
    multiplies_words = False  # bytes only after they have been widened, at a cost that is worth saving
    by_lane = False  # a vector times one lane of another, as `lane_products` has it
    in_pairs = False  # there, bytes at two depths at a time
    registers = ""  # those of vectors, by the letter that LLVM has for them; none: their order is the compiler's

    def maximum(self, builder, a, b):
        """`vector.maximum` of floats."""
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    def round_to_int(self, builder, v, result):
        """`vector.round_to_int`."""
        rounded = emit.call(builder, f"llvm.roundeven.v{v.type.count}f32", v.type, [v])
        return builder.fptosi(rounded, result)

    def fraction(self, builder, v, result):
        """`vector.fraction`."""
        return builder.fsub(v, emit.call(builder, f"llvm.floor.v{v.type.count}f32", v.type, [v]))

    def scale_by_power(self, builder, value, power):
        """`vector.scale_by_power`."""
        n = value.type.count
        integer = ir.VectorType(emit.i32, n)
        whole = builder.fptosi(emit.call(builder, f"llvm.floor.v{n}f32", power.type, [power]), integer)
        bits = builder.add(builder.bitcast(value, integer), builder.shl(whole, emit.all_lanes(23, integer)))
        return builder.bitcast(bits, value.type)

    def gather(self, builder, base, index, vector):
        """v[l] = base[index[l]], index never negative."""
        out = ir.Constant(vector, ir.Undefined)
        for l in range(vector.count):
            position = ir.Constant(emit.i32, l)
            element = builder.load(builder.gep(base, [builder.extract_element(index, position)]))
            out = builder.insert_element(out, element, position)
        return out

    def look_up_bytes(self, builder, table, d, vector):
        """`bytes.look_up_bytes`: a list of four, from the table of 32-bit entries."""
        found = []
        for j in range(4):
            index = builder.and_(builder.lshr(d, emit.all_lanes(8 * j, d.type)), emit.all_lanes(255, d.type))
            found.append(self.gather(builder, table, index, vector))
        return found

    def map_bytes(self, builder, entries, v):
        """`bytes.map_bytes`, of a vector of bytes."""
        for i in range(v.type.count):
            at = ir.Constant(emit.i32, i)
            byte = builder.zext(builder.extract_element(v, at), emit.i64)
            v = builder.insert_element(v, builder.load(builder.gep(entries, [byte])), at)
        return v

    def pack(self, builder, vectors, zero_point):
        """Four int32 vectors to one vector of bytes: saturate16, add zero point saturating, saturate8.

        Groups of four lanes stay together: byte 16 g + 4 c + i is lane 4 g + i of vector c.
        """
        words_type = ir.VectorType(emit.i16, 8)
        word_zero = emit.splat(builder, builder.trunc(zero_point, emit.i16), words_type)
        pairs = []
        for i in (0, 2):
            joined = emit.shuffle(builder, vectors[i], vectors[i + 1], range(8))
            pairs.append(emit.call(builder, "llvm.sadd.sat.v8i16", words_type,
                                   [emit.saturate(builder, joined, emit.i16), word_zero]))
        return builder.bitcast(emit.saturate(builder, emit.shuffle(builder, *pairs, range(16)), emit.i8),
                               vectors[0].type)

    def prepare(self, builder, v, unsigned):
        """What one operand of `dot` needs before it is multiplied, done once per operand and not once per product."""
        bytes_ = []
        for j in range(4):
            if unsigned:
                byte = builder.and_(builder.lshr(v, emit.all_lanes(8 * j, v.type)), emit.all_lanes(255, v.type))
            else:
                byte = builder.ashr(builder.shl(v, emit.all_lanes(24 - 8 * j, v.type)), emit.all_lanes(24, v.type))
            bytes_.append(byte)
        return bytes_

    def dot(self, builder, accumulator, u, s):
        """`bytes.dot_bytes` of two operands that are prepared: u unsigned (or, where offset is 0, signed), s signed."""
        for a, b in zip(u, s, strict=True):
            accumulator = builder.add(accumulator, builder.mul(a, b))
        return accumulator

    def matrix_configure(self, builder, where):
        """`matrix_unit.matrix_configure`, the 64 bytes at a pointer: nothing without a matrix unit."""

    def matrix_call(self, builder, instruction, arguments):
        """An instruction of the matrix unit: nothing without one."""
