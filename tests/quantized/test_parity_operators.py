"""Operator by operator: the rules of every kernel set against its runtime, on single-operator files."""

import functools

import numpy as np
import pytest
import tflite_graphs
from arrays import codes
from runtimes import each_runtime

from edgeattn import arithmetic
from edgeattn.arithmetic import KERNEL_SETS, REQUANTIZE, SOFTMAX
from edgeattn.quantized import QuantizedLinear, TensorQuantization
from quant.runtimes import RUNTIMES

REPEATS = range(40)

pytestmark = each_runtime


def tensor(rng, symmetric=False):
    return TensorQuantization(np.float32(10 ** rng.uniform(-3, 0)), 0 if symmetric else int(rng.integers(-128, 128)))


def pair(t):
    return t.scale, t.zero_point


def product(lhs, lhs_zero_point, rhs, rhs_zero_point):
    return (lhs.astype(np.int64) - lhs_zero_point) @ (rhs.astype(np.int64) - rhs_zero_point)


def requantize(rule, acc, real, zero_point):
    q31, shift = (a.astype(np.int64) for a in arithmetic.fixed_point(real))
    return arithmetic.to_code(REQUANTIZE[rule](acc, q31, shift, real), zero_point)


def output_for(acc, real_per_acc, rng):
    """An output quantization under which most, not all, accumulators keep within int8."""
    spread = float(np.std(acc)) or 1.0
    return TensorQuantization(
        np.float32(spread * real_per_acc * 10 ** rng.uniform(-2.2, -1.2)), int(rng.integers(-60, 60))
    )


def test_fully_connected(name):
    for seed in REPEATS:
        rng = np.random.default_rng(seed)
        rows, inner, outer = (int(n) for n in rng.integers(1, 130, 3))
        x, x_q = codes(rng, 1, rows, inner), tensor(rng)
        scale = (10 ** rng.uniform(-4, -2, outer)).astype(np.float32)
        weight = rng.integers(-127, 128, (outer, inner)).astype(np.int8)
        bias = rng.integers(-5000, 5000, outer).astype(np.int32) if seed % 3 else None
        acc = product(x, x_q.zero_point, weight.T, 0) + (0 if bias is None else bias)
        y_q = output_for(acc, float(x_q.scale) * float(np.median(scale)), rng)
        rule = KERNEL_SETS[name].fully_connected
        expected = requantize(
            rule, acc, arithmetic.fully_connected_multiplier(rule, x_q.scale, scale, y_q.scale), y_q.zero_point
        )
        file = tflite_graphs.fully_connected(x.shape, x_q, QuantizedLinear(weight, scale, bias), y_q)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [x])[0], expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("adj_y", [True, False])
def test_batch_matmul(name, adj_y, symmetric):
    for seed in REPEATS:
        rng = np.random.default_rng(100 + seed)
        rows, inner, columns = (int(n) for n in rng.integers(1, 70, 3))
        lhs, rhs = codes(rng, 2, 3, rows, inner), codes(rng, 2, 3, inner, columns)
        lhs_q, rhs_q = tensor(rng), tensor(rng, symmetric)
        if not symmetric and rhs_q.zero_point == 0:
            rhs_q = TensorQuantization(rhs_q.scale, 7)
        acc = product(lhs, lhs_q.zero_point, rhs, rhs_q.zero_point)
        y_q = output_for(acc, float(lhs_q.scale) * float(rhs_q.scale), rng)
        row = KERNEL_SETS[name]
        rule = row.batch_matmul if symmetric else row.batch_matmul_asymmetric
        expected = requantize(
            rule,
            acc,
            arithmetic.batch_matmul_multiplier(rule, row.precision, lhs_q.scale, rhs_q.scale, y_q.scale),
            y_q.zero_point,
        )
        given = np.ascontiguousarray(rhs.swapaxes(-1, -2)) if adj_y else rhs
        file = tflite_graphs.batch_matmul(lhs.shape, lhs_q, given.shape, rhs_q, y_q, adj_y=adj_y)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [lhs, given])[0], expected)


@pytest.mark.parametrize("operator", ["mul", "add"])
def test_elementwise(name, operator):
    # all 65536 pairs of codes at once
    lhs, rhs = (grid.astype(np.int8).reshape(1, 256, 256) for grid in np.mgrid[-128:128, -128:128])
    for seed in REPEATS:
        rng = np.random.default_rng(200 + seed)
        a, b = tensor(rng), tensor(rng)
        if operator == "add":  # XNNPACK takes ratios of scales from 2**-10 to 2**8 only
            b = TensorQuantization(a.scale * np.float32(10 ** rng.uniform(-1, 1)), b.zero_point)
        reach = float(a.scale * b.scale) * 128 if operator == "mul" else float(max(a.scale, b.scale))
        out = TensorQuantization(np.float32(reach * 10 ** rng.uniform(-0.3, 0.8)), int(rng.integers(-128, 128)))
        row = KERNEL_SETS[name]
        function = (
            functools.partial(arithmetic.mul_codes, row.mul, row.precision)
            if operator == "mul"
            else functools.partial(arithmetic.add_codes, row.add)
        )
        expected = function(lhs, pair(a), rhs, pair(b), pair(out))
        file = getattr(tflite_graphs, operator)(lhs.shape, a, rhs.shape, b, out)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [lhs, rhs])[0], expected)


@pytest.mark.parametrize("operator", ["mul", "add"])
@pytest.mark.parametrize("power", [-9.5, -10.5, -16, -30, -125])
def test_elementwise_of_scales_far_apart(name, operator, power):
    # XNNPACK leaves these to LiteRT's own kernels; multipliers may come out as 0
    lhs, rhs = (grid.astype(np.int8).reshape(1, 256, 256) for grid in np.mgrid[-128:128, -128:128])
    row = KERNEL_SETS[name]
    for seed in range(2):
        rng = np.random.default_rng(600 + seed)
        b, out = tensor(rng), tensor(rng)
        scale = 2.0**power * rng.uniform(0.5, 1) * float(out.scale) / (1 if operator == "add" else float(b.scale))
        out = (out.scale, out.zero_point)
        if power < -100:  # a mask of float32's lowest number in the range
            scale, out = scale * 2.0**100, (out[0] * np.float32(2.0**100), out[1])
        if operator == "add":
            b = TensorQuantization(np.float32(out[0] * rng.uniform(0.5, 1)), b.zero_point)
        a, out = TensorQuantization(np.float32(scale), 5), TensorQuantization(*out)
        if operator == "mul":
            expected = arithmetic.mul_codes(row.mul, row.precision, lhs, pair(a), rhs, pair(b), pair(out))
        else:
            expected = arithmetic.add_codes(row.add, lhs, pair(a), rhs, pair(b), pair(out))
        file = getattr(tflite_graphs, operator)(lhs.shape, a, rhs.shape, b, out)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [lhs, rhs])[0], expected)


def test_a_mul_below_xnnpack_s_range_next_to_a_tie(name):
    # 200 * 200 / 80000: XNNPACK's rule would round this half to 0, LiteRT's own kernels do not
    lhs, rhs = (grid.astype(np.int8).reshape(1, 256, 256) for grid in np.mgrid[-128:128, -128:128])
    a, one = TensorQuantization(1 / 80000, -128), TensorQuantization(1, -128)
    row = KERNEL_SETS[name]
    expected = arithmetic.mul_codes(row.mul, row.precision, lhs, pair(a), rhs, pair(one), pair(one))
    np.testing.assert_array_equal(RUNTIMES[name].run(tflite_graphs.mul(lhs.shape, a, rhs.shape, one, one), [lhs, rhs])[0],
                                  expected)


def test_softmax(name):
    rule = SOFTMAX[KERNEL_SETS[name].softmax]
    for seed in REPEATS:
        rng = np.random.default_rng(300 + seed)
        x, q = codes(rng, 1, 5, int(rng.integers(1, 300))), tensor(rng)
        if seed % 8 == 0:  # of a mask of large numbers in the range
            q = TensorQuantization(np.float32(10 ** rng.uniform(1, 36)), q.zero_point)
        table = rule.table(q.scale)
        expected = np.empty(x.shape, np.int8)
        for i, row in enumerate(x[0].tolist()):
            e = [table[max(row) - code] if table.dtype == np.float32 else int(table[max(row) - code]) for code in row]
            total = rule.zero
            for value in e:
                total = type(rule.zero)(total + rule.weight(value))
            expected[0, i] = [min(int(rule.probability(value, total)), 255) - 128 for value in e]
        np.testing.assert_array_equal(RUNTIMES[name].run(tflite_graphs.softmax(x.shape, q), [x])[0], expected)


def test_select(name):
    for seed in REPEATS:
        rng = np.random.default_rng(400 + seed)
        x, q = codes(rng, 2, 3, 7, int(rng.integers(1, 40))), tensor(rng)
        keep = rng.random(x.shape) < 0.5
        file = tflite_graphs.select(keep, x.shape, q, -128)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [x])[0], np.where(keep, x, np.int8(-128)))


@pytest.mark.parametrize("operator", ["fully_connected", "batch_matmul", "batch_matmul_asymmetric", "mul"])
def test_multipliers_next_to_a_tie(name, operator):
    # Scales whose ratio is a power of two, or off by the last bit: then every odd accumulator of a power of two lies on
    # or beside a tie, and the precision in which a runtime multiplies scales shows.
    row = KERNEL_SETS[name]
    rule = getattr(row, operator)
    for seed in REPEATS:
        rng = np.random.default_rng(500 + seed)
        a, b = (np.float32(10 ** rng.uniform(-2, -1)) for _ in range(2))
        power = 2.0 ** rng.integers(6, 9)
        above = np.float64(a) * np.float64(b) * power * (1 + 2.0**-24)
        y = np.float32(above) if seed % 2 else a * b * np.float32(power)
        x_q, y_q = TensorQuantization(a, 0), TensorQuantization(y, 0)
        b_q = TensorQuantization(b, 3 if operator == "batch_matmul_asymmetric" else 0)
        x, rhs = codes(rng, 1, 60, 40), codes(rng, 1, 40, 60) // 16
        acc = product(x, 0, rhs, b_q.zero_point)
        if operator == "mul":
            x, rhs = (grid.astype(np.int8).reshape(1, 256, 256) for grid in np.mgrid[-128:128, -128:128])
            expected = arithmetic.mul_codes(rule, row.precision, x, pair(x_q), rhs, pair(b_q), pair(y_q))
            inputs, file = [x, rhs], tflite_graphs.mul(x.shape, x_q, rhs.shape, b_q, y_q)
        elif operator == "fully_connected":
            real = arithmetic.fully_connected_multiplier(rule, a, np.full(60, b), y)
            linear = QuantizedLinear(np.ascontiguousarray(rhs[0].T), np.full(60, b, np.float32))
            expected = requantize(rule, acc, real, 0)
            inputs, file = [x], tflite_graphs.fully_connected(x.shape, x_q, linear, y_q)
        else:
            expected = requantize(rule, acc, arithmetic.batch_matmul_multiplier(rule, row.precision, a, b, y), 0)
            inputs, file = [x, rhs], tflite_graphs.batch_matmul(x.shape, x_q, rhs.shape, b_q, y_q, adj_y=False)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, inputs)[0], expected)


def test_quantize_of_codes(name):
    """Every code, at ratios of scales within and beyond XNNPACK's, and at both ends of them."""
    row, x = KERNEL_SETS[name], np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
    for seed in REPEATS:
        rng = np.random.default_rng(600 + seed)
        ratio = [np.exp(rng.normal() / 5), np.exp(rng.uniform(-6, 8)), 2.0 ** (8 if seed % 8 < 4 else -7),
                 2.0 ** (8 if seed % 8 < 4 else -7) * (1 + rng.normal() * 1e-3)][seed % 4]
        x_q = tensor(rng)
        y_q = TensorQuantization(np.float32(x_q.scale * ratio), int(rng.integers(-128, 128)))
        file = tflite_graphs.unary("QUANTIZE", x.shape, x_q, y_q, {}, 1)
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [x])[0],
                                      arithmetic.convert_codes(row.convert, x, pair(x_q), pair(y_q)))
