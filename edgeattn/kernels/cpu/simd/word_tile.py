"""Tiles of products of bytes as words, by Winograd's way (1968): half of the multiplications become additions.

    (u0 + s1) (u1 + s0) = u0 s0 + u1 s1 + u0 u1 + s1 s0

The products of each operand with itself, its own, are the same in the whole row or column, and taken off once.
Bytes 0 and 2 of four are the even words, 1 and 3 the odd ones.
"""
from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .vector import I32, LANES

ADDS_FIRST = CODE.adds_first  # whether this instruction set gains by it


def own_products(codes):
    """The own products of rows of int8 codes (n, depth), depth a multiple of 4: (n,)."""
    return (codes[:, ::2].astype("int16") * codes[:, 1::2]).sum(1, dtype="int32")


@intrinsic
def split_words(typing, array, at, step, four):
    """array[at + l * step] and array[at + l * step + 1] = unsigned bytes of four[l] as even words and odd ones

    Returns v[l] = their own products.
    """
    def generate(context, builder, sig, args):
        vector, pairs = context.get_value_type(I32), ir.VectorType(emit.i64, LANES // 2)
        even, odd = CODE.prepare(builder, args[3], True)
        a, b = (builder.bitcast(words, vector) for words in (even, odd))
        position = args[1]
        for first in (0, LANES):
            both = builder.bitcast(emit.shuffle(builder, a, b, [l // 2 + l % 2 * LANES
                                                                for l in range(first, first + LANES)]), pairs)
            for i in range(LANES // 2):
                pair = builder.extract_element(both, ir.Constant(emit.i32, i))
                emit.store(builder, pair, emit.pointer(context, builder, sig.args[0], args[0], position, emit.i64))
                position = builder.add(position, args[2])
        return CODE.dot(builder, ir.Constant(vector, None), [even], [odd])
    return I32(array, types.intp, types.intp, I32), generate


@intrinsic
def tile_add_outer(typing, t, down, i0, across, at):
    """t[i][j] += down[i0 + i] * load(across, at + j * LANES), int32"""
    def generate(context, builder, sig, args):
        tile, down_, i0_, across_, at_ = args
        vector = context.get_value_type(t.vec)
        base = emit.pointer(context, builder, sig.args[3], across_, at_, vector)
        columns = [emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])) for j in range(t.columns)]
        first = builder.gep(emit.data(context, builder, sig.args[1], down_), [i0_])
        for i in range(t.rows):
            row = emit.splat(builder, builder.load(builder.gep(first, [ir.Constant(emit.i64, i)])), vector)
            for j in range(t.columns):
                k = i * t.columns + j
                value = builder.add(builder.extract_value(tile, k), builder.mul(row, columns[j]))
                tile = builder.insert_value(tile, value, k)
        return tile
    return t(t, down, types.intp, across, types.intp), generate


@intrinsic
def tile_add_columns(typing, t, across, at):
    """t[i][j] += load(across, at + j * LANES), int32"""
    def generate(context, builder, sig, args):
        tile, across_, at_ = args
        base = emit.pointer(context, builder, sig.args[1], across_, at_, context.get_value_type(t.vec))
        for j in range(t.columns):
            column = emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)]))
            for k in range(j, t.rows * t.columns, t.columns):
                tile = builder.insert_value(tile, builder.add(builder.extract_value(tile, k), column), k)
        return tile
    return t(t, across, types.intp), generate


def _multiply(context, builder, sig, args, across):
    """The tile of args plus what `across`, of each column even and odd words, adds: dots and own products."""
    t, (tile, a_array, position) = sig.args[0], args[:3]
    vector = context.get_value_type(t.vec)
    first = builder.gep(emit.data(context, builder, sig.args[1], a_array), [position])
    for i in range(t.rows):
        pair = [builder.load(builder.gep(first, [ir.Constant(emit.i64, 2 * i + number)])) for number in range(2)]
        halves = [builder.bitcast(emit.splat(builder, word, vector), across[0][0].type) for word in pair]
        for j in range(t.columns):
            k = i * t.columns + j
            value = CODE.dot_of_sums(builder, builder.extract_value(tile, k), halves, across[j])
            tile = builder.insert_value(tile, value, k)
    return tile


def _columns_of_bytes(context, builder, sig, args):
    t = sig.args[0]
    base = emit.pointer(context, builder, sig.args[3], args[3], args[4], context.get_value_type(t.vec))
    return [CODE.prepare(builder, emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, j)])), False)
            for j in range(t.columns)]


@intrinsic
def add_word_products(typing, t, a, at_a, b, at_b):
    """t[i][j] += the four bytes of a times those of b, and the own products of both

    a: pairs of words, a[at_a + 2 * i] and the one behind it; b: bytes, load(b, at_b + j * LANES)
    """
    def generate(context, builder, sig, args):
        return _multiply(context, builder, sig, args, _columns_of_bytes(context, builder, sig, args))
    return t(t, a, types.intp, b, types.intp), generate


@intrinsic
def add_word_products_and_widen(typing, t, a, at_a, b, at_b, wide, at_wide):
    """add_word_products(t, a, at_a, b, at_b); and b's words to wide

    wide[at_wide + 2 * j * LANES + l], even ones, and LANES behind that odd ones
    """
    def generate(context, builder, sig, args):
        across = _columns_of_bytes(context, builder, sig, args)
        for j, (even, odd) in enumerate(across):
            for number, words in enumerate((even, odd)):
                at = builder.add(args[6], ir.Constant(emit.i64, (2 * j + number) * LANES))
                emit.store(builder, words, emit.pointer(context, builder, sig.args[5], args[5], at, words.type))
        return _multiply(context, builder, sig, args, across)
    return t(t, a, types.intp, b, types.intp, wide, types.intp), generate


@intrinsic
def add_products_of_wide(typing, t, a, at_a, wide, at_wide):
    """add_word_products(t, a, at_a, b, at_b) of b whose words are in wide"""
    def generate(context, builder, sig, args):
        words = ir.VectorType(emit.i16, 2 * LANES)
        base = emit.pointer(context, builder, sig.args[3], args[3], args[4], words)
        loaded = [emit.load(builder, builder.gep(base, [ir.Constant(emit.i64, k)])) for k in range(2 * t.columns)]
        across = [loaded[2 * j:2 * j + 2] for j in range(t.columns)]
        return _multiply(context, builder, sig, args, across)
    return t(t, a, types.intp, wide, types.intp), generate
