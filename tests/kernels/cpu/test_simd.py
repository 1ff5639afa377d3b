"""Every vector and tile operation against its meaning as a plain loop."""
from pathlib import Path

import numpy as np
import pytest
from njit import njit

from edgeattn.kernels.cpu import matmul, simd, softmax
from edgeattn.kernels.cpu.simd import COLUMNS, HALVES_DEPTH, LANES, OFFSET, ROWS, WIDTH
from edgeattn.runtime import isa

N = LANES


@njit(error_model="numpy")
def _arithmetic(a, b, out):
    x, y = simd.load(a, 0), simd.load(b, 0)
    simd.store(out, 0, x + y)
    simd.store(out, N, x - y)
    simd.store(out, 2 * N, x * y)
    simd.store(out, 3 * N, simd.maximum(x, y))
    simd.store(out, 4 * N, simd.select(x > y, y, x))
    simd.store(out, 5 * N, simd.select(x <= y, x, simd.splat(a[0])))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_arithmetic(dtype):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-1000, 1000, N).astype(dtype) for _ in range(2))
    b[0] = a[0]
    out = np.zeros(6 * N, dtype)
    _arithmetic(a, b, out)
    for l in range(N):
        want = (a[l] + b[l], a[l] - b[l], a[l] * b[l], a[l] if a[l] > b[l] else b[l], b[l] if a[l] > b[l] else a[l],
                a[l] if a[l] <= b[l] else a[0])
        assert tuple(out[l::N]) == want


@njit(error_model="numpy")
def _larger(a, b, out):
    simd.store(out, 0, simd.maximum(simd.load(a, 0), simd.load(b, 0)))


def test_larger_keeps_a_nan_on_its_right():
    out = np.zeros(N, np.float32)
    _larger(np.zeros(N, np.float32), np.full(N, np.nan, np.float32), out)
    assert np.isnan(out).all()


@njit(error_model="numpy")
def _bits(a, out):
    x = simd.load(a, 0)
    four = simd.splat(np.int32(4))
    simd.store(out, 0, x << four)
    simd.store(out, N, x >> four)
    simd.store(out, 2 * N, simd.shift_right_logical(x, four))
    simd.store(out, 3 * N, (x & four) | (x ^ four))
    simd.store(out, 4 * N, simd.smaller(x, four))
    simd.store(out, 5 * N, x + simd.lane_index())


def test_integer_bits():
    a = np.random.default_rng(1).integers(-2**31, 2**31, N).astype(np.int32)
    out = np.zeros(6 * N, np.int32)
    _bits(a, out)
    for l, v in enumerate(a.tolist()):
        want = [v << 4, v >> 4, (v % 2**32) >> 4, (v & 4) | (v ^ 4), min(v, 4), v + l]
        assert out[l::N].tolist() == [(w + 2**31) % 2**32 - 2**31 for w in want]


@njit(error_model="numpy")
def _convert(a, rounded, cut):
    simd.store(rounded, 0, simd.round_to_int(simd.load(a, 0)))
    simd.store(cut, 0, simd.truncate(simd.load(a, 0)))


def test_rounding_to_integers():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -2.5, 1e6 + 0.5, 3.7, -3.7, 0, -0.0, 7, 8, 9.5, 10.5], np.float32)
    for start in range(0, 16, N):
        a = values[start:start + N].copy()
        rounded, cut = np.zeros(N, np.int32), np.zeros(N, np.int32)
        _convert(a, rounded, cut)
        assert rounded.tolist() == np.rint(a).tolist() and cut.tolist() == np.trunc(a).tolist()


@njit(error_model="numpy")
def _bytes(a, packed, biggest, difference, sums, u, s):
    simd.store(packed, 0, simd.pack_bytes(simd.load(a, 0), simd.load(a, N), simd.load(a, 2 * N), simd.load(a, 3 * N),
                                          np.int32(-3)))
    simd.store(biggest, 0, simd.larger_bytes(simd.load(u, 0), simd.load(s, 0)))
    simd.store(difference, 0, simd.subtract_bytes(simd.load(u, 0), simd.load(s, 0)))
    simd.store(sums, 0, simd.dot_bytes(simd.load(a, 0), simd.load(u, 0), simd.load(s, 0)))


def test_bytes_in_lanes():
    rng = np.random.default_rng(2)
    a = rng.integers(-400, 400, 4 * N).astype(np.int32)
    a[:4] = [2**31 - 1, -2**31, 40000, -40000]
    u = rng.integers(0, 256, (N, 4)).astype(np.uint8)
    s = rng.integers(-128, 128, (N, 4)).astype(np.int8)
    u[0], s[0] = 255, -128  # the largest products: an instruction that saturates pairs would show
    packed, biggest, difference, sums = (np.zeros(N, np.int32) for _ in range(4))
    _bytes(a, packed, biggest, difference, sums, u.view(np.int32).ravel(), s.view(np.int32).ravel())
    for l in range(N):
        for j in range(4):
            v = min(max(int(a[j * N + l]), -2**15), 2**15 - 1) - 3
            assert packed.view(np.int8).reshape(N, 4)[l, j] == min(max(v, -128), 127)
            assert biggest.view(np.int8).reshape(N, 4)[l, j] == max(u.view(np.int8)[l, j], s[l, j])
            assert difference.view(np.uint8).reshape(N, 4)[l, j] == (int(u[l, j]) - int(s[l, j])) % 256
        left = u[l].astype(int) if OFFSET else u.view(np.int8)[l].astype(int)
        total = int(a[l]) + int(left @ s[l].astype(int))
        assert sums[l] == (total + 2**31) % 2**32 - 2**31


@njit(error_model="numpy")
def _joined(a, numbers, joined, thirds, spread):
    a0, a1, a2, a3 = simd.load(a, 0), simd.load(a, N), simd.load(a, 2 * N), simd.load(a, 3 * N)
    simd.store(joined, 0, simd.join_bytes(a0, a1, a2, a3))
    simd.store(thirds, 0, simd.gather_byte(a0, a1, a2, a3, 2))
    simd.store(spread, 0, simd.broadcast(numbers, 1))


def test_bytes_joined_and_a_number_in_every_lane():
    a = np.random.default_rng(7).integers(-200, 200, 4 * N).astype(np.int32)
    a[1::2] *= 123_457
    joined, thirds, spread = np.zeros(N, np.int32), np.zeros(N, np.int32), np.zeros(N, np.float32)
    _joined(a, np.array([1, 2.5], np.float32), joined, thirds, spread)
    np.testing.assert_array_equal(thirds.view(np.uint8), a >> 16 & 255)
    got = joined.view(np.int8)
    for g in range(N // 4):
        for i in range(4):
            for j in range(4):
                assert got[16 * g + 4 * i + j] == np.clip(a[i * N + 4 * g + j], -128, 127)
    assert (spread == 2.5).all()


@njit(error_model="numpy")
def _product(a, b, out, depth, zero):
    tile = simd.tile_zero(ROWS, COLUMNS, zero)
    count = simd.steps(b)
    for k in range(0, depth - count + 1, count):
        tile = simd.rank_steps(tile, a, k, depth, 1, b, k * WIDTH)
    for k in range(depth // count * count, depth):
        tile = simd.outer_product(tile, a, k, depth, b, k * WIDTH)
    simd.tile_store(tile, out, 0, WIDTH, N)


def test_tile_of_floats_multiplies():
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-9, 9, s).astype(np.float32) for s in ((ROWS, 7), (7, WIDTH)))
    out = np.zeros((ROWS, WIDTH), np.float32)
    _product(a.ravel(), b.ravel(), out.ravel(), 7, out.ravel())
    np.testing.assert_array_equal(out, a @ b)


@pytest.mark.parametrize("unsigned_rows", [True, False])
def test_tile_of_bytes_multiplies(unsigned_rows):
    rng = np.random.default_rng(4)
    low, high = (0, 256) if OFFSET else (-128, 128)
    u_type = np.uint8 if OFFSET else np.int8
    ranges = [(low, high, u_type), (-128, 128, np.int8)]
    (al, ah, at), (bl, bh, bt) = ranges if unsigned_rows else ranges[::-1]
    a = rng.integers(al, ah, (ROWS, 5, 4)).astype(at)
    b = rng.integers(bl, bh, (5, WIDTH, 4)).astype(bt)
    views = (np.uint32, np.int32) if unsigned_rows else (np.int32, np.uint32)
    out = np.zeros((ROWS, WIDTH), np.int32)
    _product(a.view(views[0]).ravel(), b.view(views[1]).ravel(), out.ravel(), 5, out.ravel())
    np.testing.assert_array_equal(out, np.einsum("rkj,kwj->rw", a.astype(int), b.astype(int)))


@njit(error_model="numpy")
def _multiply(a, row_step, step, b, out, depth):
    tile = simd.tile_load(ROWS, COLUMNS, out, 0, WIDTH, N)
    simd.tile_store(matmul.multiply(tile, a, 0, row_step, step, b, 0, depth), out, 0, WIDTH, N)


@njit(error_model="numpy")
def _multiply_by_lane(a, row_step, step, b, out, depth):
    tile = simd.tile_load(ROWS, COLUMNS, out, 0, WIDTH, N)
    simd.tile_store(simd.multiply_by_lane(tile, a, 0, row_step, step, b, 0, depth), out, 0, WIDTH, N)


@njit(error_model="numpy")
def _multiply_by_lane_ahead(a, row_step, step, b, out, depth, pace):
    tile = simd.tile_load(ROWS, COLUMNS, out, 0, WIDTH, N)
    tile = simd.multiply_by_lane_ahead(tile, a, 0, row_step, step, b, 0, depth, 0, pace, WIDTH)
    simd.tile_store(tile, out, 0, WIDTH, N)


# Elements of a row that follow one another, rows that do, and neither; both only where there is one of either.
STEPS = [(11, 1), (1, ROWS + 3), (2, 2 * ROWS + 1), (1, 1)]


@pytest.mark.parametrize("row_step, step", STEPS)
@pytest.mark.parametrize("kind", ["float32", "unsigned rows", "unsigned columns"])
def test_a_product_wherever_its_rows_lie(kind, row_step, step):
    rng = np.random.default_rng(6)
    for depth in (0, 1, 2, 3, 4, 7, 10, 23):
        i, k = np.arange(ROWS)[:, None] * row_step, np.arange(depth) * step
        size = (ROWS - 1) * row_step + max(depth - 1, 0) * step + 1  # no element more than there is to be read
        if kind == "float32":
            a, b, start = (rng.integers(-9, 9, s).astype(np.float32) for s in (size, (depth, WIDTH), (ROWS, WIDTH)))
            want, views = start + a[i + k] @ b, (np.float32, np.float32)
        else:
            unsigned, signed = (np.array([0, 255]), np.array([-128, 127])) if OFFSET else (np.array([-128, 127]),) * 2
            weights = signed + [not OFFSET, 0]  # with signs on both sides the columns of signed bytes are never -128
            ends = (unsigned, weights) if kind == "unsigned rows" else (signed, unsigned)
            extreme = depth % 2 == 0  # all at the lowest or either end, or anything between
            (a, b) = (rng.choice(e, (*s, 4)) if extreme else rng.integers(e[0], e[1] + 1, (*s, 4))
                      for e, s in zip(ends, ((size,), (depth, WIDTH)), strict=True))
            if depth == 4:
                a[:], b[:] = ends[0][0] or 255, ends[1][0] or 255
            start = rng.integers(-2**20, 2**20, (ROWS, WIDTH)).astype(np.int32)
            want = start + np.einsum("rkj,kwj->rw", a[i + k], b)
            views = (np.uint32, np.int32) if kind == "unsigned rows" else (np.int32, np.uint32)
            a, b = (np.ascontiguousarray(x.astype(np.uint8)).view(v).ravel() for x, v in zip((a, b), views, strict=True))
        out, b = start.ravel().copy(), np.append(b.ravel(), np.zeros(1, b.dtype))
        _multiply(a, row_step, step, b, out, depth)
        np.testing.assert_array_equal(out.reshape(ROWS, WIDTH), want, err_msg=f"depth {depth}")
        if kind == "float32":  # as NEON multiplies them
            more = [(_multiply_by_lane_ahead, pace) for pace in (0, WIDTH)]
            if not matmul.BY_LANE:  # else it was that one
                more.append((_multiply_by_lane,))
            for multiply, *pace in more:
                out = start.ravel().copy()
                multiply(a, row_step, step, b, out, depth, *pace)
                np.testing.assert_array_equal(out.reshape(ROWS, WIDTH), want, err_msg=f"by lane, {depth}, {pace} ahead")


@njit(error_model="numpy")
def _side_by_side(a, out):
    tile = simd.tile_add_side_by_side(simd.tile_zero(ROWS, COLUMNS, a), a, 1, WIDTH + 3)
    simd.tile_store_side_by_side(tile, out, 2, WIDTH + 1)


def test_tiles_whose_vectors_lie_side_by_side():
    a = np.arange(1 + ROWS * (WIDTH + 3), dtype=np.float32)
    out = np.full(2 + ROWS * (WIDTH + 1), -1, np.float32)
    _side_by_side(a, out)
    want = np.full_like(out, -1)
    want[2:].reshape(ROWS, WIDTH + 1)[:, :WIDTH] = a[1:].reshape(ROWS, WIDTH + 3)[:, :WIDTH]
    np.testing.assert_array_equal(out, want)


@njit(error_model="numpy")
def _tile_to_bytes(a, down, out, flip):
    tile = simd.tile_add_down(simd.tile_load(ROWS, COLUMNS, a, 0, WIDTH, N), down, 1)
    simd.tile_store_bytes(tile, out, 3, COLUMNS * (N + 2), N + 2, np.int32(-3), flip)


def test_tile_to_bytes():
    rng = np.random.default_rng(4)
    a = rng.integers(-300, 300, (ROWS, COLUMNS, N)).astype(np.int32)
    a[0, 0, :4] = [2**31 - 1000, -2**31 + 1000, 40000, -40000]
    down = rng.integers(-100, 100, ROWS + 1).astype(np.int32)
    flips = np.array([1, 2, 4, -128], np.int8)
    out = np.full(3 + ROWS * COLUMNS * (N + 2), 77, np.int8)
    _tile_to_bytes(a.ravel(), down, out, flips.view(np.int32)[0])
    want = np.clip(np.clip(a.astype(np.int64) + down[1:, None, None], -2**15, 2**15 - 1) - 3, -128, 127).astype(np.int8)
    got = out[3:].reshape(ROWS, COLUMNS, N + 2)
    np.testing.assert_array_equal(got[:, :, :N], want ^ np.resize(flips, N))
    assert (out[:3] == 77).all() and (got[:, :, N:] == 77).all()


@njit(error_model="numpy")
def _few_to_bytes(a, out, others):
    simd.tile_store_bytes(simd.tile_load(1, COLUMNS, a, 0, WIDTH, N), out, 0, 0, N, np.int32(-3), np.int32(0))
    simd.tile_store_bytes(simd.tile_load(3, COLUMNS, a, 0, WIDTH, N), others, 0, WIDTH, N, np.int32(-3), np.int32(0))


def test_a_tile_of_few_rows_to_bytes():
    a = np.random.default_rng(5).integers(-200, 200, 3 * WIDTH).astype(np.int32)
    out, others = (np.full(rows * WIDTH + 9, 77, np.int8) for rows in (1, 3))
    _few_to_bytes(a, out, others)
    want = np.clip(a - 3, -128, 127).astype(np.int8)
    np.testing.assert_array_equal(others, [*want, *[77] * 9])
    np.testing.assert_array_equal(out, [*want[:WIDTH], *[77] * 9])


@njit(error_model="numpy")
def _look_up(table, index, out):
    found = simd.look_up_bytes(table, simd.load(index, 0))
    for j in range(4):
        simd.store(out, j * N, found[j])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_look_up_every_entry(dtype):
    table = np.random.default_rng(5).integers(1, 2**30, 256).astype(np.int32).view(dtype)
    wide = simd.byte_planes(table)
    out = np.zeros(4 * N, dtype)
    for start in range(0, 256, 4 * N):
        index = np.arange(start, start + 4 * N, dtype=np.uint8).reshape(4, N)
        _look_up(wide, np.ascontiguousarray(index.T).view(np.int32).ravel(), out)
        np.testing.assert_array_equal(out, table[start:start + 4 * N])


@njit(error_model="numpy")
def _map_bytes(table, v, out):
    for i in range(0, v.size, N):
        simd.store(out, i, simd.map_bytes(table, 3, simd.load(v, i)))


def test_map_every_byte():
    table = np.random.default_rng(6).permutation(300).astype(np.int8)
    places = np.random.default_rng(7).permutation(256).astype(np.uint8)
    out = np.zeros(64, np.int32)
    _map_bytes(table, places.view(np.int32), out)
    np.testing.assert_array_equal(out.view(np.int8), table[3 + places.astype(int)])


@njit
def _quotient(a, b):
    return simd.quotient(a, b)


def test_quotient():
    assert [_quotient(a, b) for a in (0, 1, 95, 96, 2**40) for b in (1, 32, 96)] == [
        a // b for a in (0, 1, 95, 96, 2**40) for b in (1, 32, 96)]


@njit(error_model="numpy")
def _transpose(a, out):
    simd.transpose_block(a, 1, N + 2, out, 2, N + 1)


@njit(error_model="numpy")
def _transpose_bytes(a, out):
    simd.transpose_block(a, 4, 4 * (N + 2), out, 2, N + 1)


def test_transpose_block():
    a = np.arange((N + 2) * (N + 2), dtype=np.float32)
    out, again = (np.full((N + 2) * (N + 2), -1, np.float32) for _ in range(2))
    _transpose(a, out)
    _transpose_bytes(a.view(np.int8), again)
    np.testing.assert_array_equal(out, again)
    want = np.full_like(out, -1)
    for i in range(N):
        for j in range(N):
            want[2 + j * (N + 1) + i] = a[1 + i * (N + 2) + j]
    np.testing.assert_array_equal(out, want)


@njit(error_model="numpy")
def _powers(x, fractions, scaled):
    for i in range(0, x.size, N):
        v = simd.load(x, i)
        r = simd.fraction(v)
        simd.store(fractions, i, r)
        simd.store(scaled, i, simd.scale_by_power(simd.splat(np.float32(1)) + r, v))


def test_fractions_and_powers_of_two():
    x = np.concatenate([np.linspace(-126, 126.9, 4096), np.arange(-126, 126)[:240], -np.logspace(-9, 1, 64)]
                       ).astype(np.float32)
    fractions, scaled = np.zeros_like(x), np.zeros_like(x)
    _powers(x, fractions, scaled)
    np.testing.assert_array_equal(fractions, x - np.floor(x))  # to nearest, by every instruction set
    np.testing.assert_array_equal(scaled, (1 + fractions) * np.exp2(np.floor(x)))
    edges = np.full(N, np.nan, np.float32)
    _powers(edges, fractions[:N], scaled[:N])
    assert np.isnan(fractions[:N]).all() and np.isnan(scaled[:N]).all()


@njit(error_model="numpy")
def _add(a, start, out):
    tile = simd.tile_load(ROWS, COLUMNS, start, 0, WIDTH, N)
    simd.prefetch(a, 5)
    simd.prefetch_first(a, 5)
    simd.tile_store(simd.tile_add(tile, a, 3, WIDTH + 1, N + 2), out, 0, WIDTH, N)


def test_tile_add():
    rng = np.random.default_rng(7)
    a = rng.standard_normal((ROWS + 1) * (WIDTH + 1) + COLUMNS * (N + 2)).astype(np.float32)
    start = rng.standard_normal((ROWS, COLUMNS, N)).astype(np.float32)
    out = np.zeros_like(start)
    _add(a, start.ravel(), out.ravel())
    for i, j in np.ndindex(ROWS, COLUMNS):
        at = 3 + i * (WIDTH + 1) + j * (N + 2)
        np.testing.assert_array_equal(out[i, j], start[i, j] + a[at:at + N])


@njit(error_model="numpy")
def _dequantize(tile, down, across, out):
    found = simd.tile_dequantize(simd.tile_load(ROWS, COLUMNS, tile, 0, WIDTH, N), down, 2, across, 1, 3 + WIDTH)
    simd.tile_store(found, out, 0, WIDTH, N)


def test_tile_to_floats():
    rng = np.random.default_rng(11)
    # numbers whose products float32 holds, so that it does not matter where it rounds
    tile, down = rng.integers(-99, 99, (ROWS, WIDTH)).astype(np.int32), rng.integers(-9, 9, 2 + ROWS).astype(np.float32)
    across, out = rng.integers(-9, 9, 3 + 2 * WIDTH).astype(np.float32), np.zeros((ROWS, WIDTH), np.float32)
    _dequantize(tile.ravel(), down, across, out.ravel())
    for i, j in np.ndindex(ROWS, WIDTH):
        assert out[i, j] == tile[i, j] * across[1 + j] * down[2 + i] + across[3 + WIDTH + j]


@njit(error_model="numpy")
def _dots(keys, queries, whole, part, folded, count):
    zero = simd.tile_zero(4, 2, keys)
    simd.tile_store(simd.tile_add_dots(zero, keys, 1, N + 3, queries, 2, N + 1), whole, 0, 2 * N, N)
    simd.tile_store(simd.tile_add_part_dots(zero, keys, 1, N + 3, queries, 2, N + 1, count), part, 0, 2 * N, N)
    simd.tile_store(simd.tile_row_sums(simd.tile_load(4, 2, whole, 0, 2 * N, N)), folded, 0, 0, N)


def test_tile_of_dot_products_and_its_sums():
    rng = np.random.default_rng(5)
    keys, queries = (rng.integers(-9, 9, size).astype(np.float32) for size in (4 * (N + 3), 2 * (N + 1) + 1))
    keys[1 + 3 * (N + 3) + 1:] = np.nan  # of the last row only one number is there
    whole, part, folded = np.zeros((4, 2, N), np.float32), np.zeros((4, 2, N), np.float32), np.zeros((2, N), np.float32)
    _dots(keys, queries, whole.ravel(), part.ravel(), folded.ravel(), 1)
    for i in range(4):
        for j in range(2):
            want = keys[1 + i * (N + 3):][:N] * queries[2 + j * (N + 1):][:N]
            np.testing.assert_array_equal(whole[i, j, :len(want)], want)
            assert part[i, j, 0] == want[0] and (part[i, j, 1:] == 0).all()
    n = N // 4
    np.testing.assert_array_equal(folded.reshape(2, 4, n), whole.swapaxes(0, 1).reshape(2, 4, n, 4).sum(-1))


@njit(error_model="numpy")
def _weighted(rows, weights, out, part, count):
    tile = simd.tile_add_rows(simd.tile_zero(2, 3, rows), rows, 1, 4 * N, weights, 1)
    simd.tile_add_to(tile, out, 0)
    simd.tile_add_to(simd.tile_add_part_rows(simd.tile_zero(2, 1, rows), rows, 1, 4 * N, weights, 1, count), part, 0)


def test_tile_of_weighted_rows():
    rng = np.random.default_rng(6)
    rows, weights = (rng.integers(-9, 9, size).astype(np.float32) for size in (8 * N + 1, 3))
    out, part = np.ones(3 * N, np.float32), np.ones(N, np.float32)
    _weighted(rows, weights, out, part, 2)
    want = 1 + weights[1:] @ rows[1:].reshape(2, 4 * N)
    np.testing.assert_array_equal(out, want[:3 * N])
    np.testing.assert_array_equal(part, np.where(np.arange(N) < 2, want[:N], 1))


@njit(error_model="numpy")
def _interleave(source, out, flip):
    simd.interleave_rows(source, 3, 5 * N, flip, out, 1, 3 * N)


@pytest.mark.parametrize("flip", [0, -0x7f7f7f80])
def test_rows_of_bytes_become_groups_of_four(flip):
    source = np.random.default_rng(7).integers(-128, 128, 20 * N + 3).astype(np.int8)
    out = np.zeros(1 + 5 * N, np.uint32)
    _interleave(source, out, np.int32(flip))
    for j in range(4):
        for l in range(N):
            four = source[3 + np.arange(4) * 5 * N + l // 4 * 16 + j * 4 + l % 4] ^ np.int8(-128 if flip else 0)
            assert out[1 + j // 2 * 3 * N + j % 2 * N + l] == four.view(np.uint32)[0]


@njit(error_model="numpy")
def _pieces(a, out):
    pointer = simd.pointer_to(simd.address_of(a) + 4, np.float32)
    out[0] = simd.first_lane(simd.load(pointer, 0))
    out[1] = pointer[1]


def test_pointers_and_the_first_lane():
    out = np.zeros(2, np.float32)
    _pieces(np.arange(1, N + 2, dtype=np.float32), out)
    assert out.tolist() == [2, 3]


@njit(error_model="numpy")
def _conversions(codes, reals, floats, doubles, wide, low, bits, same, cut, patterns):
    v, r = simd.load(codes, 0), simd.load(reals, 0)
    long = simd.widen(v) * simd.splat(np.int64(0x3FF0_0001_0003))
    simd.store(floats, 0, simd.to_float(v))
    simd.store(doubles, 0, simd.to_double(v))
    simd.store(wide, 0, long)
    simd.store(low, 0, simd.narrow(long))
    simd.store(bits, 0, simd.bits_of(r))
    simd.store(same, 0, simd.float_of_bits(simd.bits_of(r)))
    simd.store(cut, 0, simd.truncate_double(simd.to_double(v) / simd.splat(7.0)))
    simd.store(patterns, 0, simd.double_of_bits(long))


def test_conversions():
    codes = np.random.default_rng(9).integers(-2**14, 2**14, N).astype(np.int32)
    codes[:2] = [-1, 1]
    reals = (codes / np.float32(3)).astype(np.float32)
    reals[:3] = [-0.0, np.inf, 1e-45]
    out = [np.zeros(N, dtype) for dtype in (np.float32, np.float64, np.int64, np.int32, np.int32, np.float32, np.float64, np.float64)]
    _conversions(codes, reals, *out)
    long = codes.astype(np.int64) * 0x3FF0_0001_0003
    want = (codes.astype(np.float32), codes.astype(np.float64), long, long.astype(np.int32), reals.view(np.int32), reals,
            np.trunc(codes / 7.0), long.view(np.float64))
    for got, wanted in zip(out, want, strict=True):
        assert got.tobytes() == wanted.tobytes()


@njit(error_model="numpy")
def _multiply_add(a, b, c, out, found):
    x = simd.load(a, 0)
    simd.store(out, 0, simd.fma(x, simd.load(b, 0), simd.load(c, 0)))
    found[0] = simd.any_lane(x > simd.splat(np.float32(1)))


def test_multiply_add():
    a = (1 + np.arange(1, 2 * N, 2) * 2.0**-13).astype(np.float32)
    b, c, out = a, np.full(N, -1, np.float32), np.zeros(N, np.float32)
    _multiply_add(a, b, c, out, np.zeros(1, bool))
    once = (a.astype(np.float64) * b + c).astype(np.float32)  # exact in float64
    twice = (a * b + c).astype(np.float32)
    assert (once != twice).any()
    assert out.tobytes() == once.tobytes() or (isa.ISA.name == "generic" and out.tobytes() == twice.tobytes())


def test_any_lane():
    found = np.zeros(1, bool)
    for l in (None, *range(N)):
        a = np.zeros(N, np.float32)
        if l is not None:
            a[l] = 2
        _multiply_add(a, a, a, np.zeros(N, np.float32), found)
        assert found[0] == (l is not None)


@njit(error_model="numpy")
def _byte_for_byte(source, lanes, out):
    v = simd.load_bytes(source, 1)
    simd.store(lanes, 0, v)
    simd.store_bytes(out, 2, v)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_bytes_to_lanes_and_back(dtype):
    source = np.random.default_rng(10).integers(-128, 128, N + 1).astype(np.int8).view(dtype)
    source[1:3] = np.array([-128, 127], np.int8).view(dtype)
    lanes, out = np.zeros(N, np.int32), np.full(N + 3, 77, dtype)
    _byte_for_byte(source, lanes, out)
    assert lanes.tolist() == source[1:].tolist()
    assert out.tolist() == [77, 77, *source[1:].tolist(), 77]


@njit(error_model="numpy")
def _plus_parameter(v, parameters, at, plane):
    return v + simd.load(parameters, at + plane)


@njit(error_model="numpy")
def _tiles(a, parameters, columns, mapped, packed, one):
    simd.tile_store(simd.tile_of_columns(2, COLUMNS, a, 1), columns, 0, WIDTH, N)
    tile = simd.tile_load(4, COLUMNS, a, 0, WIDTH, N)
    simd.tile_store(simd.tile_map(tile, _plus_parameter, parameters, 1, N, 2), mapped, 0, WIDTH, N)
    simd.tile_store(simd.tile_pack_rows(tile, np.int32(5), np.int32(-0x7f7f7f80)), packed, 0, WIDTH, N)
    simd.store(one, 0, simd.tile_get(tile, 2, 1))


def test_rows_and_columns_of_tiles():
    rng = np.random.default_rng(11)
    a = rng.integers(-300, 300, (4, WIDTH)).astype(np.int32)
    parameters = rng.integers(-300, 300, WIDTH + 3).astype(np.int32)
    columns, mapped = np.zeros((2, WIDTH), np.int32), np.zeros((4, WIDTH), np.int32)
    packed, one = np.zeros(WIDTH, np.int32), np.zeros(N, np.int32)
    _tiles(a.ravel(), parameters, columns.ravel(), mapped.ravel(), packed, one)
    assert (columns == a.ravel()[1:1 + WIDTH]).all()
    np.testing.assert_array_equal(mapped, a + parameters[3:])
    np.testing.assert_array_equal(packed.view(np.uint8).reshape(WIDTH, 4).T,
                                  (np.clip(a + 5, -128, 127).astype(np.int8).view(np.uint8) ^ 0x80))
    assert one.tolist() == a[2, N:2 * N].tolist()


@njit(error_model="numpy")
def _wide(a, count, out):
    x = simd.wide_load(a, 1)
    simd.store(out, 0, x + simd.wide_splat(a[0]))
    simd.store(out, 32, simd.wide_load_first(a, 3, count))
    simd.store(out, 64, simd.wide_first(x, count))
    simd.wide_store_first(out, 96, x, count)
    return simd.wide_sum(x)


@pytest.mark.parametrize("count", [0, 1, 7, 31, 32, 40])
def test_wide_vectors_are_32_lanes_folded_by_halves(count):
    a, out = np.random.default_rng(count).standard_normal(40).astype(np.float32), np.full(128, 7, np.float32)
    x = a[1:33]
    total = _wide(a, count, out)
    first = np.arange(32) < count
    np.testing.assert_array_equal(out[:32], x + a[0])
    np.testing.assert_array_equal(out[32:64], np.where(first, a[3:35], 0))
    np.testing.assert_array_equal(out[64:96], np.where(first, x, 0))
    np.testing.assert_array_equal(out[96:], np.where(first, x, 7))
    while x.size > 1:
        x = x[:x.size // 2] + x[x.size // 2:]
    assert total == x[0]


@njit(error_model="numpy")
def _in_step(a, out):
    x = simd.wide_load(a, 1)
    simd.store(out, 0, simd.in_step(x + simd.splat_like(x, np.float32(3))))
    magnitude = simd.bits_of(x) & simd.splat_like(x, np.int32(0x7FFFFFFF))
    simd.store(out, 32, simd.in_step(simd.float_of_bits(magnitude)))
    simd.store(out, 64, simd.in_step(simd.splat_like(simd.load(a, 1), np.float32(5))))


def test_wide_vectors_that_wait_for_each_other_are_what_they_were():
    a, out = np.random.default_rng(7).standard_normal(40).astype(np.float32), np.zeros(64 + N, np.float32)
    _in_step(a, out)
    np.testing.assert_array_equal(out, np.concatenate((a[1:33] + np.float32(3), np.abs(a[1:33]), np.full(N, 5))))


@njit(error_model="numpy")
def _smaller_float(a, b, out):
    simd.store(out, 0, simd.smaller_float(simd.load(a, 0), simd.load(b, 0)))


def test_smaller_keeps_a_nan_on_its_right():
    a, b, out = np.arange(N, dtype=np.float32), np.full(N, 1.5, np.float32), np.zeros(N, np.float32)
    _smaller_float(a, b, out)
    np.testing.assert_array_equal(out, np.minimum(a, b))
    _smaller_float(a, np.full(N, np.nan, np.float32), out)
    assert np.isnan(out).all()


@njit(error_model="numpy")
def _scaled_tiles(down, scales, across, scaled, added):
    tile = simd.tile_of_products(2, COLUMNS, down, 1, across, 3)
    simd.tile_store(simd.tile_scale(tile, scales, 2), scaled, 0, WIDTH, N)
    simd.tile_accumulate(tile, scales, 2, added, 1, WIDTH + 1)


def test_tiles_with_a_scale_for_each_row():
    rng = np.random.default_rng(3)
    down, across = rng.integers(-300, 300, 3).astype(np.int32), rng.integers(-900, 900, WIDTH + 3).astype(np.int32)
    scales, scaled = rng.standard_normal(4).astype(np.float32), np.zeros((2, WIDTH), np.float32)
    added = rng.standard_normal(2 * WIDTH + 2).astype(np.float32)
    products, want = np.outer(down[1:], across[3:]).astype(np.float64), added.copy()
    _scaled_tiles(down, scales, across, scaled.ravel(), added)
    np.testing.assert_array_equal(scaled, (products * scales[2:, None]).astype(np.float32))
    for i in range(2):
        first = 1 + i * (WIDTH + 1)
        want[first:first + WIDTH] = (products[i] * scales[2 + i] + want[first:first + WIDTH]).astype(np.float32)
    np.testing.assert_array_equal(added, want)


@njit(error_model="numpy")
def _words(rows, weights, out):
    tile = simd.outer_product_of_words(simd.tile_zero(2, COLUMNS, weights), rows, 1, 3, 1, weights, 2)
    simd.tile_store(tile, out, 0, WIDTH, N)


@pytest.mark.skipif(not simd.AS_WORDS, reason="needs EDGEATTN_ISA avx2, or neon on ARM64")
def test_products_of_bytes_that_are_words():
    rng = np.random.default_rng(4)
    x, w = rng.integers(0, 256, (2, 4)), rng.integers(-128, 128, (WIDTH, 4))
    rows = np.zeros(7, np.int32)
    for i in range(2):
        rows[1 + 3 * i:3 + 3 * i] = np.array([x[i, [0, 2]], x[i, [1, 3]]], np.int16).ravel().view(np.int32)
    weights = np.concatenate((np.zeros(2, np.int32), w.astype(np.int8).view(np.int32).ravel()))
    found = np.zeros((2, WIDTH), np.int32)
    _words(rows, weights, found.ravel())
    np.testing.assert_array_equal(found, x @ w.T)


@njit(error_model="numpy")
def _added_to_tiles(down, across, out):
    tile = simd.tile_add_outer(simd.tile_of_columns(2, COLUMNS, across, 2), down, 1, across, 1)
    simd.tile_store(simd.tile_add_columns(tile, across, 3), out, 0, WIDTH, N)


def test_products_and_columns_are_added_to_tiles():
    down, across = np.array([9, -3, 7], np.int32), np.arange(-5, WIDTH, dtype=np.int32) ** 3
    out = np.zeros((2, WIDTH), np.int32)
    _added_to_tiles(down, across, out.ravel())
    np.testing.assert_array_equal(out, across[2:WIDTH + 2] + np.outer(down[1:], across[1:WIDTH + 1]) + across[3:WIDTH + 3])


@njit(error_model="numpy")
def _word_products(x, weights, words, wide, own, out):
    for i in range(2):
        simd.store(own, i * N, simd.split_words(words, 1 + 2 * i, 4, simd.load(x, i * N)))
    for k in range(N):
        at, zero = 1 + 4 * k, simd.tile_zero(2, COLUMNS, weights)
        first = simd.add_word_products(zero, words, at, weights, k * WIDTH)
        second = simd.add_word_products_and_widen(zero, words, at, weights, k * WIDTH, wide, 3)
        third = simd.add_products_of_wide(zero, words, at, wide, 3)
        for number, tile in enumerate((first, second, third)):
            simd.tile_store(tile, out, (3 * k + number) * 2 * WIDTH, WIDTH, N)


@pytest.mark.skipif(not simd.ADDS_FIRST, reason="needs EDGEATTN_ISA avx2")
@pytest.mark.parametrize("extreme", [False, True])
def test_products_of_words_that_are_added_first(extreme):
    rng = np.random.default_rng(6)
    x, w = rng.integers(0, 256, (2, N, 4)), rng.integers(-128, 128, (N, WIDTH, 4))
    if extreme:
        x[:], w[:] = 255, rng.choice((-128, 127), w.shape)
    words, wide, own = np.zeros(1 + 4 * N, np.int32), np.zeros(3 + 2 * WIDTH, np.int32), np.zeros((2, N), np.int32)
    out = np.zeros((N, 3, 2, WIDTH), np.int32)
    weights = w.astype(np.int8).view(np.int32).ravel()
    _word_products(x.astype(np.uint8).view(np.int32).ravel(), weights, words, wide, own.ravel(), out.ravel())
    own_x, own_w = (a[..., 0] * a[..., 1] + a[..., 2] * a[..., 3] for a in (x, w))
    np.testing.assert_array_equal(own, own_x)
    np.testing.assert_array_equal(simd.own_products(w[0].astype(np.int8)), own_w[0])
    for k in range(N):
        for tile in out[k]:
            np.testing.assert_array_equal(tile, x[:, k] @ w[k].T + own_x[:, k, None] + own_w[k])


@njit(error_model="numpy")
def _row_products(x, weights, out):
    tile = simd.tile_of_columns(1, COLUMNS, weights, 1)
    tile = simd.add_row_products(tile, HALVES_DEPTH, x, 1, 3, weights, 1)
    tile = simd.add_row_products(tile, 1, x, 1, 3, weights, 1)
    simd.tile_store(tile, out, 0, WIDTH, N)


@pytest.mark.skipif(not simd.IN_HALVES, reason="needs EDGEATTN_ISA avx2")
@pytest.mark.parametrize("x, w", [(None, None), (255, -128), (255, 127), (240, -128), (15, -128)])
def test_products_of_a_row_by_halves_of_its_bytes(x, w):
    rng, depth = np.random.default_rng(7), HALVES_DEPTH
    x = rng.integers(0, 256, (depth, 4)) if x is None else np.full((depth, 4), x)
    w = rng.integers(-128, 128, (depth, WIDTH, 4)) if w is None else np.full((depth, WIDTH, 4), w)
    row, weights = np.zeros(1 + 3 * depth, np.uint32), np.zeros(1 + depth * WIDTH, np.int32)
    row[1::3], weights[1:] = x.astype(np.uint8).view(np.uint32).ravel(), w.astype(np.int8).view(np.int32).ravel()
    found, products = np.zeros(WIDTH, np.int32), np.einsum("kb,kfb->kf", x, w)
    _row_products(row, weights, found)
    np.testing.assert_array_equal(found, weights[1:1 + WIDTH] + products.sum(0) + products[0])


@njit(error_model="numpy")
def _one_row(across, out, packed, twice):
    row = simd.tile_of_columns(1, COLUMNS, across, 1)
    simd.tile_store(simd.add_tiles(row, simd.tile_of_columns(1, COLUMNS, across, 0)), twice, 0, WIDTH, N)
    simd.tile_store(simd.tile_pack_rows(row, np.int32(5), np.int32(-0x7f7f7f80)), packed, 0, WIDTH, N)
    out[0] = simd.tile_rows(row)
    out[1] = simd.tile_rows(simd.tile_of_columns(3, COLUMNS, across, 1))


def test_a_row_alone_is_all_four_bytes():
    across, rows = np.arange(WIDTH + 1, dtype=np.int32), np.zeros(2, np.int64)
    packed, twice = np.zeros((2, WIDTH), np.int32)
    _one_row(across, rows, packed, twice)
    np.testing.assert_array_equal(twice, across[1:] + across[:-1])
    np.testing.assert_array_equal(rows, [1, 3])
    np.testing.assert_array_equal(packed.view(np.uint8).reshape(WIDTH, 4).T,
                                  [(across[1:] + 5).astype(np.uint8) ^ 0x80] * 4)


def test_every_operation_has_its_meaning_here():
    source = Path(__file__).read_text(encoding="utf-8")
    operations = [name for name, value in vars(simd).items() if type(value) is type(simd.load)]
    assert len(operations) > 50
    assert [name for name in operations if f"simd.{name}(" not in source] == []


@njit(error_model="numpy")
def _matrix(a, b, first, second, third, configuration):
    simd.matrix_configure(configuration, 0)
    simd.matrix_zero(0)
    simd.matrix_zero(1)
    simd.matrix_zero(4)
    simd.matrix_load(2, a, 1, 17)
    simd.matrix_load(3, b, 2, 18)
    simd.matrix_dot(0, 2, 3, a.view(np.uint32), b)
    simd.matrix_dot_signed(1, 2, 3)
    simd.matrix_dot(4, 2, 3, a, b.view(np.uint32))
    simd.matrix_store(0, first, 0, 16)
    simd.matrix_store(1, second, 0, 16)
    simd.matrix_store(4, third, 0, 16)
    simd.matrix_release()


@pytest.mark.skipif(not isa.ISA.amx, reason="needs a processor with AMX, and EDGEATTN_ISA not lower than avx512amx")
def test_matrix_unit():
    rng = np.random.default_rng(8)
    a, b = (rng.integers(-128, 128, (16 * step, 4)).astype(np.int8) for step in (18, 19))
    unsigned, signed, right_unsigned = (np.zeros((16, 16), np.int32) for _ in range(3))
    _matrix(a.view(np.int32).ravel(), b.view(np.int32).ravel(), unsigned.ravel(), signed.ravel(), right_unsigned.ravel(),
            np.zeros(16, np.int32))
    left = a[1:1 + 16 * 17].reshape(16, 17, 4)[:, :16]
    right = b[2:2 + 16 * 18].reshape(16, 18, 4)[:, :16]
    np.testing.assert_array_equal(signed, np.einsum("ikm,kjm->ij", left.astype(int), right.astype(int)))
    np.testing.assert_array_equal(unsigned, np.einsum("ikm,kjm->ij", left.view(np.uint8).astype(int), right.astype(int)))
    np.testing.assert_array_equal(right_unsigned,
                                  np.einsum("ikm,kjm->ij", left.astype(int), right.view(np.uint8).astype(int)))


@njit(error_model="numpy")
def _functions(x, powers, tanhs, reductions):
    for i in range(0, x.size, N):
        v = simd.load(x, i)
        simd.store(powers, i, softmax.exp2(v))
        simd.store(tanhs, i, softmax.tanh(v))
    v = simd.load(x, 0)
    reductions[0], reductions[1] = simd.sum_lanes(v), simd.max_lanes(v)


def test_exponential_and_tanh():
    x = np.concatenate([np.linspace(-110, 10, 4096), np.linspace(-2, 2, 4096)]).astype(np.float32)
    powers, tanhs, reductions = np.zeros_like(x), np.zeros_like(x), np.zeros(2, np.float32)
    _functions(x, powers, tanhs, reductions)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(powers - (exact - 2.0**-110)) / exact).max() < 2.5e-7  # 8.8e-8 of the polynomial and its roundings
    np.testing.assert_allclose(tanhs, np.tanh(x.astype(np.float64)), rtol=4e-7)
    assert abs(reductions[0] - x[:N].astype(np.float64).sum()) < 1e-2 and reductions[1] == x[:N].max()
    edges = np.resize(np.array([np.nan, -np.inf, -200], np.float32), N * 3)
    out = np.zeros_like(edges)
    _functions(edges, out, np.zeros_like(edges), reductions)
    assert np.isnan(out[0]) and out[1] == out[2] == 0


@njit(error_model="numpy")
def _rough_functions(x, powers, logarithms):
    for i in range(0, x.size, N):
        simd.store(powers, i, softmax.exp2_roughly(simd.load(x, i)))
        simd.store(logarithms, i, softmax.log2_roughly(softmax.exp2_within(simd.load(x, i))))


def test_rough_exponential_and_logarithm():
    x = np.linspace(-110, 100, 4096).astype(np.float32)
    powers, logarithms = np.zeros_like(x), np.zeros_like(x)
    _rough_functions(x, powers, logarithms)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(powers - exact) / exact).max() < 1.74e-3
    assert np.abs(logarithms - x).max() < 1.2e-4
    edges = np.resize(np.array([np.nan, -np.inf], np.float32), N)
    _rough_functions(edges, powers, logarithms)
    assert np.isnan(powers[0]) and abs(powers[1] / 2.0**-110 - 1) < 1e-3


def test_exponentials_of_a_nan_are_nan_whatever_its_payload():
    bits = np.uint32([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000, 0x7F800001, 0x7FBFFFFF, 0x7FC00001, 0xFF800001])
    x = np.resize(bits, 8 * N).view(np.float32)
    powers, rough, tanhs = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    _functions(x, powers, tanhs, np.zeros(2, np.float32))
    _rough_functions(x, rough, np.zeros_like(x))
    assert np.isnan(powers).all() and np.isnan(rough).all() and np.isnan(tanhs).all()


def test_a_forced_instruction_set_must_exist_and_be_executable():
    assert isa.choose("generic", []).name == "generic"
    assert isa.choose(None, ["avx2", "fma"]).name == "avx2"
    assert isa.choose("", ["neon", "dotprod"]).name == "neondot"
    with pytest.raises(ValueError, match="EDGEATTN_ISA must be one of avx2, generic on this CPU, got 'neon'"):
        isa.choose("neon", ["avx2", "fma"])
