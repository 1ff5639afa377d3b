"""Products of NEON: four elements come by one load, and each of them is multiplied as a lane of what was loaded."""

from edgeattn.runtime.compiler import intrinsic, ir, types

from . import emit
from .instruction_sets import CODE
from .tile import may_multiply
from .vector import LANES

BY_LANE = CODE.by_lane
_FOUR = 4  # elements of a load
_LINE = 16  # elements of four bytes in a cache line


def _loop(builder, turns, state, body):
    """What a list of values has become after body(number, values) for every number in range(turns)."""
    before = builder.block
    turn, after = (builder.append_basic_block(name) for name in ("turn", "after"))
    nothing = ir.Constant(emit.i64, 0)
    builder.cbranch(builder.icmp_signed(">", turns, nothing), turn, after)
    builder.position_at_end(turn)
    number, *values = (builder.phi(value.type) for value in (nothing, *state))
    found = [builder.add(number, ir.Constant(emit.i64, 1)), *body(number, list(values))]
    end = builder.block
    builder.cbranch(builder.icmp_signed("<", found[0], turns), turn, after)
    for phi, first, last in zip((number, *values), (nothing, *state), found, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, end)
    builder.position_at_end(after)
    return [_either(builder, (before, first), (end, last)) for first, last in zip(state, found[1:], strict=True)]


def _either(builder, *ways):
    """The value of the block that control came from."""
    phi = builder.phi(ways[0][1].type)
    for block, value in ways:
        phi.add_incoming(value, block)
    return phi


def _times(builder, tile, t, rows, across):
    """The vectors of a tile, t[i][j] += rows[i] * across[j]."""
    out = []
    for i, row in enumerate(rows):
        for j, column in enumerate(across):
            accumulator = tile[i * t.columns + j]
            if t.vec.dtype == types.float32:
                out.append(emit.fma(builder, row, column, accumulator))
            else:  # both have signs
                out.append(CODE.dot(builder, accumulator, *(CODE.prepare(builder, v, False) for v in (column, row))))
    return out


class _Product:
    """A tile, t[i][j] += a[at_a + i * row_step + k * step] * b[at_b + k * WIDTH + j * LANES + l], as code for it."""

    def __init__(self, context, builder, sig, args):
        self.builder, self.tile, self.a, self.b = builder, sig.args[0], sig.args[1], sig.args[5]
        _, a, at_a, self.row_step, self.step, b, at_b = args[:7]
        self.vector = context.get_value_type(self.tile.vec)
        self.pairs = CODE.in_pairs and self.tile.vec.dtype == types.int32
        self.any_codes = self.b.dtype == types.uint32  # else b holds weights, none of them -128
        # Depths of one turn: of elements that follow one another, of adjacent rows, and of what lies anywhere.
        self.turn = {"depth": 2 if self.pairs else _FOUR, "rows": 2, "any": 2}
        self.first = builder.gep(emit.data(context, builder, self.a, a), [at_a])
        self.down = [builder.mul(self.number(i), self.row_step) for i in range(self.tile.rows)]
        if not self.pairs:  # else the compiler adds step after step in the loop, to save registers
            self.down = [emit.unknown(builder, each) for each in self.down]
        self.panel = emit.pointer(context, builder, self.b, b, at_b, self.vector)

    def number(self, value):
        return ir.Constant(emit.i64, value)

    def across(self, k):
        """The vectors of b at depth k."""
        columns = self.tile.columns
        here = self.builder.gep(self.panel, [self.builder.mul(k, self.number(columns))])
        return [emit.load(self.builder, self.builder.gep(here, [self.number(j)])) for j in range(columns)]

    def at(self, i, k):
        """Where row i is at depth k."""
        builder = self.builder
        return builder.gep(builder.gep(self.first, [builder.mul(k, self.step)]), [self.down[i]])

    def some(self, where, count):
        """A few elements, each as a vector that has it in every lane."""
        vector = ir.VectorType(self.vector.element, count)
        found = emit.load(self.builder, self.builder.bitcast(where, vector.as_pointer()))
        return [emit.shuffle(self.builder, found, found, [lane] * LANES) for lane in range(count)]

    def rows(self, k, rows, adjacent):
        """Rows at depth k, each in every lane; four by one load where they are adjacent."""
        if adjacent and len(rows) % _FOUR == 0:
            return [row for i in rows[::_FOUR] for row in self.some(self.at(i, k), _FOUR)]
        return [emit.splat(self.builder, self.builder.load(self.at(i, k)), self.vector) for i in rows]

    def depths(self, k, rows, way, along):
        """(rows, vectors of b) at the depths from k on that one turn multiplies; along: k elements, in bytes."""
        builder = self.builder
        depths = [builder.add(k, self.number(d)) for d in range(self.turn[way])]
        if way == "depth":
            places = [builder.bitcast(builder.gep(self.first, [self.down[i]]), emit.i8.as_pointer()) for i in rows]
            down = zip(*[self.some(builder.gep(place, [along]), self.turn[way]) for place in places], strict=True)
        else:
            down = [self.rows(depth, rows, way == "rows") for depth in depths]
        return zip(down, [self.across(depth) for depth in depths], strict=True)

    def one_by_one(self, tile, way, depth, ahead):
        """All depths, each added to the tile on its own; two turns at a time, whose counting and hints are shared."""
        builder, every, size = self.builder, range(self.tile.rows), self.turn[way]
        turns, one, nothing = self.turns(depth, way), self.number(1), self.number(0)

        def turn(k, along, state):
            for down, across in self.depths(k, every, way, along):
                state = _times(builder, state, self.tile, down, across)
            return state

        def pair(number, state):
            k, (*state, along) = builder.mul(number, self.number(2 * size)), state
            if ahead:
                ahead(k, 2 * size)
            state = turn(k, along, state)
            if way == "depth":
                # Unknown, else the compiler loads rows of both turns in pairs, for which there are too few registers.
                along = emit.unknown(builder, builder.add(along, self.number(4 * size)))
                after = builder.add(along, self.number(4 * size))
            else:
                after = along
            return [*turn(builder.add(k, self.number(size)), along, state), after]

        def last(_, state):
            k = builder.mul(builder.sub(turns, one), self.number(size))
            return turn(k, builder.mul(k, self.number(4)), state)

        *tile, _ = _loop(builder, builder.ashr(turns, one), [*tile, nothing], pair)
        return self.rest(_loop(builder, builder.and_(turns, one), tile, last), way, depth, every)

    def turns(self, depth, way):
        return self.builder.ashr(depth, self.number(self.turn[way].bit_length() - 1))

    def rest(self, tile, way, depth, rows):
        """The depths that are left after whole turns."""
        left = self.builder.and_(depth, self.number(self.turn[way] - 1))
        done = self.builder.sub(depth, left)

        def turn(number, state):
            k = self.builder.add(done, number)
            return _times(self.builder, state, self.tile, self.rows(k, rows, way == "rows"), self.across(k))

        return _loop(self.builder, left, tile, turn)

    def in_pairs(self, tile, way, depth):
        """Two depths of bytes at a time: their products fit 16 bits, both, and are added to the sums in one piece.

        But for twice -128 times -128, which weights exclude. Where b may be anything the second is subtracted, with the
        complement of a, -1 - a. That adds, in all rows alike, the sum of those b, which is taken off. Half of the sums
        of a column are in one lane, half in the next.
        """
        builder, columns, size = self.builder, self.tile.columns, self.turn[way]
        zero, turns = ir.Constant(self.vector, None), self.turns(depth, way)
        lacking = self.lacking(turns, size) if self.any_codes else None
        for begin in range(0, self.tile.rows, _FOUR):
            rows = range(begin, min(begin + _FOUR, self.tile.rows))
            count = 2 * columns * len(rows)

            def turn(number, state, rows=rows, count=count):
                k = builder.mul(number, self.number(size))
                sums, places = state[:count], state[count:]
                first, second = self.across(k), self.across(builder.add(k, self.number(1)))
                found = [self.spread(place, len(rows) // len(places), way) for place in places]
                for i, (one, two) in enumerate(pair for down, _ in found for pair in down):
                    if self.any_codes:
                        two = builder.not_(two)
                    for j in range(columns):
                        for half in range(2):
                            at = 2 * (i * columns + j) + half
                            sums[at] = CODE.add_two_products(builder, sums[at], half, (first[j], one), (second[j], two),
                                                             self.any_codes)
                # The compiler does not know how they go on: else it counts all of them up in its own way, and unrolls.
                return [*sums, *[emit.in_order(builder, place, "r") for _, place in found]]

            state = _loop(builder, turns, [*[zero] * count, *self.places(rows, way)], turn)
            for n in range(columns * len(rows)):
                sums = CODE.add_neighbours(builder, *state[2 * n:2 * n + 2])
                at = begin * columns + n
                if self.any_codes:
                    sums = builder.sub(sums, lacking[n % columns])
                tile[at] = builder.add(tile[at], sums)
        return self.rest(tile, way, depth, range(self.tile.rows))

    def lacking(self, turns, size):
        """Of each vector of b the sums of the bytes that were multiplied by a complement."""
        builder, one = self.builder, self.number(1)

        def turn(number, sums):
            second = self.across(builder.add(builder.mul(number, self.number(size)), one))
            return [CODE.add_bytes(builder, *each) for each in zip(sums, second, strict=True)]

        return _loop(builder, turns, [ir.Constant(self.vector, None)] * self.tile.columns, turn)

    def places(self, rows, way):
        """Where a loop over the depths finds some rows, addresses: one for all of them where four come by one load."""
        rows = rows[:1] if way == "rows" and len(rows) == _FOUR else rows
        return [self.builder.ptrtoint(self.at(i, self.number(0)), emit.i64) for i in rows]

    def spread(self, place, count, way):
        """(of `count` rows from a place on the depths of a turn, each in every lane; the place of the next turn)."""
        builder, size, found = self.builder, self.turn[way], []
        element = self.vector.element.as_pointer()
        if way == "depth":
            where, after = builder.inttoptr(place, element), builder.add(place, self.number(4 * size))
            if self.any_codes:  # a load to all lanes needs registers that follow one another: here there are too few
                return [self.some(where, size)], after
            return [CODE.load_to_all(builder, where, size, self.vector)], after
        for _ in range(size):
            found.append(self.some(builder.inttoptr(place, element), count))
            place = builder.add(place, builder.mul(self.step, self.number(4)))
        return list(zip(*found, strict=True)), place

    def code(self, tile, depth, ahead=None):
        """The tile of all depths, in the way that the steps allow."""
        builder, one, ends = self.builder, self.number(1), []
        after = builder.append_basic_block("multiplied")
        for way, possible in (("depth", self.step), ("rows", self.row_step), ("any", None)):
            otherwise = None
            if possible is not None:
                here, otherwise = (builder.append_basic_block(name) for name in (f"by_{way}", "otherwise"))
                builder.cbranch(builder.icmp_signed("==", possible, one), here, otherwise)
                builder.position_at_end(here)
            found = (self.in_pairs(list(tile), way, depth) if self.pairs
                     else self.one_by_one(list(tile), way, depth, ahead if way == "depth" else None))
            ends.append((builder.block, found))
            builder.branch(after)
            if otherwise:
                builder.position_at_end(otherwise)
        builder.position_at_end(after)
        return [_either(builder, *[(block, found[n]) for block, found in ends]) for n in range(len(tile))]


def _multiply(context, builder, sig, args):
    """multiply_by_lane; with two more arguments what is ahead is brought near, if it is anything."""
    t, depth = sig.args[0], args[7]
    product = _Product(context, builder, sig, args)
    tile = [builder.extract_value(args[0], n) for n in range(t.rows * t.columns)]
    if len(args) == 8:
        tile = product.code(tile, depth)
    else:
        start = emit.pointer(context, builder, sig.args[5], args[5], args[8], product.vector.element)

        def ahead(k, depths):
            first, end = builder.mul(k, args[9]), builder.mul(args[10], ir.Constant(emit.i64, depths))
            for at in range(0, depths * LANES * t.columns, _LINE):  # `most` is known when all of this is compiled
                line = ir.Constant(emit.i64, at)
                with builder.if_then(builder.icmp_signed("<", line, end)):
                    emit.prefetch(builder, builder.gep(start, [builder.add(first, line)]))

        near, nothing, after = (builder.append_basic_block(name) for name in ("ahead", "nothing_ahead", "multiplied"))
        builder.cbranch(builder.icmp_signed("!=", args[9], ir.Constant(emit.i64, 0)), near, nothing)
        ends = []
        for block, way in ((near, ahead), (nothing, None)):
            builder.position_at_end(block)
            found = product.code(list(tile), depth, way)
            ends.append((builder.block, found))
            builder.branch(after)
        builder.position_at_end(after)
        tile = [_either(builder, *[(block, found[n]) for block, found in ends]) for n in range(len(tile))]
    out = ir.Constant(context.get_value_type(t), ir.Undefined)
    for n, value in enumerate(tile):
        out = builder.insert_value(out, value, n)
    return out


@intrinsic
def multiply_by_lane(typing, t, a, at_a, row_step, step, b, at_b, depth):
    """outer_product(t, a, at_a + k * step, row_step, b, at_b + k * WIDTH) for every k in range(depth)

    b of dtype int32: weights, no byte of which is -128.
    """
    if not may_multiply(t, a, b):
        return None
    return t(t, a, types.intp, types.intp, types.intp, b, types.intp, types.intp), _multiply


@intrinsic
def multiply_by_lane_ahead(typing, t, a, at_a, row_step, step, b, at_b, depth, at_next, pace, most):
    """multiply_by_lane(), while b[at_next : at_next + depth * pace] is brought near; pace <= most <= WIDTH"""
    if not may_multiply(t, a, b):
        return None
    return t(t, a, types.intp, types.intp, types.intp, b, *[types.intp] * 5), _multiply


def _rows_of(context, builder, sig, args, t):
    """Of each row of a tile where its vectors lie, one behind the other, `array`, `at` and `row_step` the last args.

    Each place follows from the one before: the compiler would keep all of them, on the stack, from call to call.
    """
    vector = context.get_value_type(t.vec)
    place = builder.ptrtoint(emit.pointer(context, builder, sig.args[-3], *args[-3:-1], vector), emit.i64)
    step = builder.mul(args[-1], ir.Constant(emit.i64, 4))
    for _ in range(t.rows):
        place = emit.in_order(builder, place, "r")
        row = builder.inttoptr(place, vector.as_pointer())
        yield [builder.gep(row, [ir.Constant(emit.i64, j)]) for j in range(t.columns)]
        place = builder.add(place, step)


@intrinsic
def tile_add_side_by_side(typing, t, array, at, row_step):
    """tile_add(t, array, at, row_step, LANES)"""
    def generate(context, builder, sig, args):
        tile = args[0]
        for i, row in enumerate(_rows_of(context, builder, sig, args, t)):
            for j, where in enumerate(row):
                k = i * t.columns + j
                value = builder.fadd(builder.extract_value(tile, k), emit.load(builder, where))
                tile = builder.insert_value(tile, value, k)
        return tile
    return t(t, array, types.intp, types.intp), generate


@intrinsic
def tile_store_side_by_side(typing, t, array, at, row_step):
    """tile_store(t, array, at, row_step, LANES)"""
    def generate(context, builder, sig, args):
        for i, row in enumerate(_rows_of(context, builder, sig, args, t)):
            for j, where in enumerate(row):
                emit.store(builder, builder.extract_value(args[0], i * t.columns + j), where)
    return types.void(t, array, types.intp, types.intp), generate
