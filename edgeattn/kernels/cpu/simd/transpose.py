"""Blocks of memory turned round through registers."""

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .vector import LANES


@intrinsic
def interleave_rows(typing, source, at, row_step, flip, target, to, panel_step):
    """byte r of target[to + j // 2 * panel_step + j % 2 * LANES + l] = source[at + r * row_step + f] ^ byte of flip

    for r < 4, j < 4 and f = l // 4 * 16 + j * 4 + l % 4: four rows of 4 LANES bytes become vectors of groups of
    four.  source of 8-bit elements, target of 32-bit ones.
    """
    def generate(context, builder, sig, args):
        vector = ir.VectorType(emit.i8, 4 * LANES)
        rows, position = [], args[1]
        for _ in range(4):
            rows.append(emit.load(builder, emit.pointer(context, builder, sig.args[0], args[0], position, vector)))
            position = builder.add(position, args[2])

        pairs = [[emit.zip_elements(builder, *rows[i:i + 2], 1, half) for i in (0, 2)] for half in range(2)]
        groups = [emit.zip_elements(builder, *pair, 2, half) for pair in pairs for half in range(2)]
        whole = ir.VectorType(emit.i32, LANES)
        flips = emit.splat(builder, args[3], whole)
        for j, group in enumerate(groups):
            here = args[5] if j < 2 else builder.add(args[5], args[6])
            here = builder.add(here, ir.Constant(emit.i64, j % 2 * LANES))
            emit.store(builder, builder.xor(builder.bitcast(group, whole), flips),
                   emit.pointer(context, builder, sig.args[4], args[4], here, whole))
    return types.void(source, types.intp, types.intp, types.int32, target, types.intp, types.intp), generate


@intrinsic
def transpose_block(typing, source, at, row_step, target, to, target_step):
    """target[to + j * target_step + i] = source[at + i * row_step + j], a LANES by LANES block of 32-bit elements

    source may hold bytes: at and row_step then count bytes.
    """
    def generate(context, builder, sig, args):
        quarter, vector = ir.VectorType(emit.i32, 4), ir.VectorType(emit.i32, LANES)
        bytes_ = sig.args[0].dtype.bitwidth // 8
        starts, position = [], args[1]
        for _ in range(LANES):
            starts.append(position)
            position = builder.add(position, args[2])
        columns_ = []
        for j in range(0, LANES, 4):  # rows i, 4 + i, 8 + i, ... side by side, which loads do; then four by four
            rows = []
            for i in range(4):
                row = ir.Constant(vector, ir.Undefined)
                for g in range(LANES // 4):
                    where = builder.add(starts[4 * g + i], ir.Constant(emit.i64, 4 * j // bytes_))
                    four = emit.load(builder, emit.pointer(context, builder, sig.args[0], args[0], where, quarter))
                    wide = emit.shuffle(builder, four, four, [l % 4 for l in range(LANES)])
                    row = emit.shuffle(builder, row, wide, [LANES + l if l // 4 == g else l for l in range(LANES)])
                rows.append(row)
            for half in range(2):
                pairs = [emit.zip_elements(builder, rows[k], rows[k + 1], 1, half) for k in (0, 2)]
                columns_ += [emit.zip_elements(builder, *pairs, 2, which) for which in range(2)]
        position = args[4]
        for column in columns_:
            emit.store(builder, column, emit.pointer(context, builder, sig.args[3], args[3], position, vector))
            position = builder.add(position, args[5])
    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate
