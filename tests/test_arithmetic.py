"""Every rounding and softmax rule against the integer oracle: edges first, then random, exhaustively where 8-bit."""

import decimal
import itertools

import numpy as np
import pytest
import reference_int8

from edgeattn import arithmetic

rng = np.random.default_rng(20260901)
POWERS = [2**i + d for i in range(32) for d in (-2, -1, 0, 1, 2)]
ACCUMULATORS = (
    sorted({a for p in POWERS for a in (p, -p) if -(2**31) <= a < 2**31})
    + rng.integers(-(2**31), 2**31, 300).tolist()
    + rng.integers(-40000, 40000, 300).tolist()
)
REALS = [
    0.0,
    2.0**-33,
    2.0**-32,
    2.0**-31,
    0.25,
    0.5,
    1 - 2.0**-33,
    1 - 2.0**-24,
    0.75,
    *(10 ** rng.uniform(-7, -0.01, 40)),
]


def test_multipliers_equal_the_oracle():
    for real in [*REALS, 1.0, 1.5, 2.0, 3.999999999999, 1000.0]:
        assert arithmetic.quantize_multiplier(real) == reference_int8.multiplier(real)


@pytest.mark.parametrize("rule", arithmetic.REQUANTIZE)
@pytest.mark.parametrize("real", REALS)
def test_requantization_equals_the_oracle(rule, real):
    real = float(np.float32(real)) if rule == "float_rne" else float(real)
    expected = [reference_int8.requantize(rule, a, real) for a in ACCUMULATORS]
    q31, shift = arithmetic.quantize_multiplier(real)
    array = arithmetic.REQUANTIZE[rule](np.array(ACCUMULATORS, np.int64), q31, shift, real)
    assert [int(v) for v in array] == expected


@pytest.mark.parametrize("rule", ["double", "ruy", "single"])
@pytest.mark.parametrize("real", [1.0, 1.25, 3.7, 1000.3])
def test_multipliers_of_one_and_more_shift_left_first(rule, real):
    q31, shift = arithmetic.quantize_multiplier(real)
    for acc in [a for a in ACCUMULATORS if abs(a) < 2**20]:
        assert arithmetic.REQUANTIZE[rule](acc, q31, shift, real) == reference_int8.requantize(rule, acc, real)


def test_the_rules_differ_where_they_should():
    # halves tell them apart: -1.5 by each rule
    q31, shift = arithmetic.quantize_multiplier(0.5)
    rounded = {name: int(rule(-3, q31, shift, 0.5)) for name, rule in arithmetic.REQUANTIZE.items()}
    assert rounded == {"double": -1, "ruy": -1, "single": -1, "float64": -2, "float_rne": -2}
    q31, shift = arithmetic.quantize_multiplier(0.25)
    rounded = {name: int(rule(-6, q31, shift, 0.25)) for name, rule in arithmetic.REQUANTIZE.items()}
    assert rounded == {"double": -2, "ruy": -1, "single": -1, "float64": -2, "float_rne": -2}


QUANTIZATIONS = [
    ((0.05, 3), (0.02, 0), (0.07, -5)),
    ((0.1, -128), (0.00098, -128), (0.0001, 0)),
    ((1.0, 0), (1.0, 0), (1.0, 0)),
]
BEYOND_XNNPACK = [
    ((0.0003, 7), (0.03, -3), (0.9, 1)),
    ((0.1, 7), (9.3e35, 127), (9.3e35, 127)),
    ((0.1, 7), (0.002, -128), (9.3e35, 127)),
]
ALL_PAIRS = np.array(list(itertools.product(range(-128, 128), repeat=2)), np.int8)


def sample_of_pairs():
    return [ALL_PAIRS[i] for i in rng.choice(len(ALL_PAIRS), 4000, replace=False)]


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("rule", ["double", "ruy", "float_rne"])
@pytest.mark.parametrize("a,b,out", QUANTIZATIONS + BEYOND_XNNPACK)
def test_mul_equals_the_oracle(a, b, out, rule, precision):
    pairs = sample_of_pairs() if rule != "double" or (a, b, out) in BEYOND_XNNPACK else ALL_PAIRS
    got = arithmetic.mul_codes(rule, precision, np.array(pairs)[:, 0], a, np.array(pairs)[:, 1], b, out)
    expected = [reference_int8.mul(rule, int(x), a, int(y), b, out, precision) for x, y in pairs]
    assert got.tolist() == expected


@pytest.mark.parametrize("rule", ["xnn_add", "double", "ruy"])
@pytest.mark.parametrize("a,b,out", QUANTIZATIONS + BEYOND_XNNPACK)
def test_add_equals_the_oracle(a, b, out, rule):
    pairs = sample_of_pairs() if rule != "xnn_add" or (a, b, out) in BEYOND_XNNPACK else ALL_PAIRS
    got = arithmetic.add_codes(rule, np.array(pairs)[:, 0], a, np.array(pairs)[:, 1], b, out)
    assert got.tolist() == [reference_int8.add(rule, int(x), a, int(y), b, out) for x, y in pairs]


SCALES = [2.0**-12, 0.003, 0.0127, 0.05, 0.11, 0.4999, 1.0, 2.7, 16.0]


def row_of(rule, row, scale):
    softmax = arithmetic.SOFTMAX[rule]
    table = softmax.table(scale).tolist() if rule != "lut_f32" else softmax.table(scale)
    e = [table[max(row) - c] for c in row]
    total = softmax.zero
    for value in e:
        total = type(softmax.zero)(total + softmax.weight(value))
    return [min(int(softmax.probability(value, total)), 255) - 128 for value in e]


def expected_row(rule, row, scale):
    if rule == "fixed":
        return reference_int8.softmax_fixed(row, scale)
    return getattr(reference_int8, f"softmax_{rule}")(row, arithmetic.lut_f32_table(scale))


@pytest.mark.parametrize("rule", arithmetic.SOFTMAX)
@pytest.mark.parametrize("scale", SCALES)
def test_softmax_equals_the_oracle(rule, scale):
    rows = [[5], [-128], [127, -128], [0] * 300, list(range(-128, 128)), [127] + [-128] * 700]
    rows += [rng.integers(-128, 128, rng.integers(2, 200)).tolist() for _ in range(8)]
    rows += [[0, -d] for d in range(129)] + [[127, 127 - d] for d in range(129, 256)]  # every difference
    for row in rows:
        assert row_of(rule, row, scale) == expected_row(rule, row, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_exponentials_are_rounded_to_the_last_bit_or_nearly(scale):
    table = arithmetic.lut_f32_table(scale)
    assert table.dtype == np.float32 and table[0] == 1
    for d in range(1, 256):
        exact = decimal.Decimal(float(-np.float32(scale) * np.float32(d))).exp()
        ulp = decimal.Decimal(float(np.spacing(table[d])))
        assert abs(decimal.Decimal(float(table[d])) - exact) <= ulp * decimal.Decimal("0.51")


def test_every_set_names_rules_that_exist():
    assert list(arithmetic.KERNEL_SETS) == [
        "litert",
        "litert-arm",
        "litert-builtin",
        "litert-reference",
        "tflite-runtime",
        "tflm",
    ]
    for row in arithmetic.KERNEL_SETS.values():
        assert {row.fully_connected, row.batch_matmul, row.batch_matmul_asymmetric, row.mul} <= set(
            arithmetic.REQUANTIZE
        )
        assert row.add == "xnn_add" or row.add in arithmetic.REQUANTIZE
        assert row.softmax in arithmetic.SOFTMAX


def test_an_unknown_set_is_refused_with_the_list():
    with pytest.raises(ValueError, match="arithmetic must be one of 'litert', 'litert-arm'.*got 'xnnpack'"):
        arithmetic.kernel_set("xnnpack")
