"""The static int8 layer of the CUDA target, in the emulator: equality with integer arithmetic, always."""
import cuda_cases
import numpy as np
import oracle_kernels as oracle
import pytest
from cuda_cases import seen
from cuda_emulated import long_form
from kernels_under_test import ASYMMETRIC, MULTIPLIERS, RULE_SETS, SYMMETRIC, accumulators, make_layer

from edgeattn.kernels.cuda import driver as driver_module
from edgeattn.kernels.cuda.language import Kernel, int32, specialised
from edgeattn.kernels.cuda.ptx import load_b32, store_b32, thread
from edgeattn.kernels.cuda.rules import RULES, planes

# B, L, S, E, D, heads, Dv, Eo: around 16, 64 and 16-byte rows, several pieces of D and Dv, one query
SHAPES = [(2, 5, 9, 7, 8, 2, 5, 6), (1, 40, 70, 33, 16, 2, 20, 40), (1, 17, 65, 64, 72, 1, 66, 64), (1, 1, 130, 16, 16, 1, 16, 3)]
ZERO_POINTS = {"symmetric": SYMMETRIC, "asymmetric": ASYMMETRIC}


pytestmark = pytest.mark.usefixtures("device")


def run(parts, heads, rules, x, keep=None, band=None, lut_index=None, score_luts=None):
    linears, tensors, table = parts
    layer = cuda_cases.static_layer(heads, linears, tensors, *rules[:3], table, rules[3])
    B, L, _ = x[0].shape
    outputs = len(linears.get("output", linears["value"])[0])
    out = driver_module.driver().array(np.full((B, L, outputs), 99, np.int8))
    cuda_cases.run_static(layer, [seen(array) for array in x], out, keep=seen(keep), band=band, lut_index=seen(lut_index),
                          score_luts=seen(score_luts))
    want = oracle.static_layer(*x, heads, linears, tensors, rules[:3], rules[3], table, keep=keep, band=band,
                               lut_index=lut_index, score_luts=score_luts)
    np.testing.assert_array_equal(out.numpy(), want)


def check_shape(shape, rules, zero_points):
    rng = np.random.default_rng(5)
    B, L, S, E, D, heads, Dv, Eo = shape
    _, *parts = make_layer(rng, heads, E, D, Dv, Eo, zero_points, rules[:3], rules[3])
    run(parts, heads, rules, [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)])


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("rules", RULE_SETS, ids="-".join)
def test_every_rule_set_equals_integer_arithmetic(rules, zero_points):
    check_shape((1, 17, 20, 7, 8, 2, 5, 6), rules, ZERO_POINTS[zero_points])


@pytest.mark.parametrize("rules", [
    pytest.param(rules, id="-".join(rules), marks=[long_form] if n else []) for n, rules in enumerate(RULE_SETS)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_equals_integer_arithmetic(shape, rules):
    check_shape(shape, rules, ASYMMETRIC)


@pytest.mark.parametrize("softmax", ["lut_f32", "lut_u16", "fixed"])
def test_a_dropped_key_is_not_there(softmax):
    rng = np.random.default_rng(6)
    rules = (*(("double",) * 3 if softmax == "fixed" else ("float_rne",) * 3), softmax)
    B, L, S, E, D, heads, Dv, Eo = 1, 5, 70, 7, 8, 2, 5, 6
    _, *parts = make_layer(rng, heads, E, D, Dv, Eo, ASYMMETRIC, rules[:3], softmax)
    x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
    keep = rng.random((B, heads, L, S)) > 0.5
    keep[:, :, 0] = False
    masks = [dict(keep=keep), dict(keep=keep[:, :1], band=(-5, 3))]
    if softmax == "lut_f32":  # which keys there are is found before the softmax
        masks += [dict(keep=keep[:1, :1, :1]), dict(band=(-S, 0)), dict(band=(-2, 1)), dict(band=(S, S + 5))]
    for some in masks:
        run(parts, heads, rules, x, **some)


def test_a_band_may_begin_at_any_key():
    rng = np.random.default_rng(12)
    rules = (*("double",) * 3, "fixed")
    _, *parts = make_layer(rng, 1, 7, 8, 5, 6, SYMMETRIC, rules[:3], rules[3])
    run(parts, 1, rules, [rng.integers(-128, 128, (1, 67, 7)).astype(np.int8)] * 3, band=(-5, 0))


def test_score_tables():
    rng = np.random.default_rng(7)
    rules = (*("float_rne",) * 3, "lut_f32")
    B, L, S, E, D, heads, Dv, Eo = SHAPES[1]
    _, *parts = make_layer(rng, heads, E, D, Dv, Eo, SYMMETRIC, rules[:3], "lut_f32")
    x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
    score_luts = rng.integers(-128, 128, (3, 256)).astype(np.int8)
    run(parts, heads, rules, x, score_luts=score_luts)
    run(parts, heads, rules, x, score_luts=score_luts, lut_index=rng.integers(0, 3, (B, 1, L, S)).astype(np.uint8))


def test_without_an_output_projection_the_codes_of_the_heads_are_the_result():
    rng = np.random.default_rng(8)
    rules = (*("float_rne",) * 3, "lut_f32")
    _, linears, tensors, table = make_layer(rng, 2, 16, 8, 12, 10, SYMMETRIC, rules[:3], "lut_f32")
    del linears["output"]
    x = rng.integers(-128, 128, (2, 9, 16)).astype(np.int8)
    run((linears, tensors, table), 2, rules, [x, x, x])


@specialised
def apply_rule(name):
    """out[i] = rule(acc[i], first, second), 32 at a time."""
    rule = RULES[name]

    def apply(a, p):
        at = thread() * 4
        store_b32(at >= 0, a[1] + at, int32(rule(load_b32(at >= 0, a[0] + at), p[0], p[1])))

    return Kernel(apply, 2, 2, 32, 0)


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_equals_the_rule_on_python_integers(name, device):
    for m in MULTIPLIERS:
        values = accumulators(m)
        values = np.append(values, np.zeros(-len(values) % 32, np.int32))
        scale = np.float32(m) if name == "float_rne" else np.float64(m)
        first, second = (int(x) for x in planes(name, [scale])[:, 0])
        for some in values.reshape(-1, 32):
            acc, got = device.array(some), device.empty((32,), np.int32)
            device.launch(apply_rule(name), (1, 1, 1), [acc.pointer, got.pointer], [first, second], 0)
            np.testing.assert_array_equal(got.numpy(), oracle.scaled(name, some, m))
