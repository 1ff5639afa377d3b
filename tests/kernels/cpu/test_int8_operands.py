"""What instruction sets do with bytes in ways of their own: each function against its meaning, a plain loop.

Under the set of this process: EDGEATTN_ISA=NAME python -m pytest tests/kernels/cpu/test_int8_operands.py
"""
import numpy as np
import pytest
from numba import njit

from edgeattn.kernels.cpu import int8_operands as operands
from edgeattn.kernels.cpu.int8_views import Part
from edgeattn.kernels.cpu.simd import LANES, OFFSET, ROWS, load, store, tile_load, tile_store
from edgeattn.runtime.isa import ISA

SHIFT = 0 if ISA.amx else OFFSET
RNG = np.random.default_rng(0)


def words(*shape):
    return RNG.integers(-2**31, 2**31, shape).astype(np.int32)


def bytes_of(array):
    """Four signed bytes for each element."""
    return array.view(np.int8).reshape(*array.shape, 4).astype(np.int64)


@njit(error_model="numpy")
def _lane_terms(v, terms, total, out, kept):
    store(out, 0, operands.add_lane_term(load(v, 0), terms, 1))
    codes = load(v, 0)
    store(out, LANES, operands.sum_codes(load(total, 0), codes, codes, codes, codes))
    operands.store_lane_term(load(total, 0), kept, 0)
    store(out, 2 * LANES, operands.add_digit_sum(load(total, 0), codes))
    operands.store_digit_sum(load(total, 0), kept, LANES)
    store(out, 3 * LANES, operands.less_digit_sum(codes, terms, 0))
    store(out, 4 * LANES, operands.whole_sums(codes, 3))


def test_sums_are_corrected_by_what_operands_are_shifted_by():
    v, terms, total = words(LANES), words(2), RNG.integers(-2**20, 2**20, LANES).astype(np.int32)
    out, kept = np.zeros(5 * LANES, np.int32), np.full(LANES + 1, 7, np.int32)
    _lane_terms(v, terms, total, out, kept)
    wide, shifted = v.astype(np.int64), bool(SHIFT)
    expected = [wide + shifted * int(terms[1]), total + shifted * 4 * wide, total + SHIFT * bytes_of(v).sum(1),
                wide - shifted * int(terms[0]), wide + (0 if OFFSET else 128) * 12]
    np.testing.assert_array_equal(out, np.concatenate(expected).astype(np.int32))
    np.testing.assert_array_equal(kept[:LANES], -SHIFT * total if shifted else [7] * LANES)
    assert kept[LANES] == (total.sum() if shifted else 7)


@njit(error_model="numpy")
def _flip(array, at, count):
    operands.flip_lanes(array, at, count)


def test_flipping_adds_the_shift_to_every_byte():
    array = words(4 * LANES)
    flipped = array.copy()
    _flip(flipped, LANES, 2 * LANES)
    expected = bytes_of(array)
    expected[LANES:3 * LANES] += SHIFT
    np.testing.assert_array_equal(bytes_of(flipped) % 256, expected % 256)
    for flip, shift in ((operands.FLIP, OFFSET), (operands.LANE_FLIP, SHIFT)):
        np.testing.assert_array_equal(bytes_of(array ^ flip) % 256, (bytes_of(array) + shift) % 256)
    assert (np.int8(-5) ^ operands.BYTE_FLIP) % 256 == (OFFSET - 5) % 256
    for zero_point in (-128, -3, 0, 127):
        word = np.array([operands.zero_bytes.py_func(zero_point)], np.int64).astype(np.int32)
        np.testing.assert_array_equal(bytes_of(word) % 256, np.full((1, 4), (OFFSET + zero_point) % 256))


@njit(error_model="numpy")
def _value_terms(values, step, groups, features, terms, tile, vector):
    operands.store_value_terms(Part(values, 1), step, groups, features, Part(terms, 0))
    store(vector, 0, operands.add_feature_terms(load(vector, 0), terms, 1))
    t = tile_load(ROWS, 1, tile, 0, LANES, LANES)
    tile_store(operands.add_value_terms(t, terms, 2), tile, 0, LANES, LANES)


@pytest.mark.parametrize("groups", [1, 5])
def test_probabilities_less_128_lack_the_sums_of_the_values(groups):
    step, features = 2 * LANES, LANES + 4
    values, tile = words(1 + (groups + 1) * step), words(ROWS, LANES)
    size = operands.value_terms_size(features)
    terms = np.zeros(max(size, 1), np.int32)
    given, vector, lacking, in_lanes = tile.copy(), np.arange(LANES, dtype=np.int32), 0, 0
    _value_terms(values, step, groups, features, terms, tile.reshape(-1), vector)
    if not OFFSET:
        sums = bytes_of(values[1:1 + groups * step].reshape(groups, step)).sum((0, 2))[:features]
        np.testing.assert_array_equal(terms[:features], 128 * sums)
        lacking, in_lanes = terms[2:2 + ROWS, None], terms[1:1 + LANES]
    np.testing.assert_array_equal(tile, given + lacking)
    np.testing.assert_array_equal(vector, np.arange(LANES) + in_lanes)


@njit(error_model="numpy")
def _lacking(values, at, groups):
    return operands.lacking_sum(values, at, groups)


def test_what_a_row_lacks_is_128_times_its_sum():
    values = words(3 * LANES + 5)
    for groups in (1, LANES, 2 * LANES + 3):
        expected = 0 if OFFSET else 128 * bytes_of(values[2:2 + groups]).sum()
        assert _lacking(values, 2, groups) == expected
