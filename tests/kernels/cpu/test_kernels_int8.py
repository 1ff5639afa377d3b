"""The static int8 layer kernel against operator-by-operator integer arithmetic: equality, always."""
import copy

import numpy as np
import oracle_kernels as oracle
import pytest
from kernels_under_test import (
    ASYMMETRIC,
    MULTIPLIERS,
    RULE_SETS,
    SYMMETRIC,
    accumulators,
    apply_linear,
    apply_linear_ahead,
    make_layer,
    run_cached,
    scaled,
    static_kernel,
)

from edgeattn.kernels.cpu.byte_products import DEPTH_STEP, TILES_SCRATCH, pack_byte_panels
from edgeattn.kernels.cpu.layer_int8 import plan
from edgeattn.kernels.cpu.matmul import round_up
from edgeattn.kernels.cpu.requantize import RULES
from edgeattn.kernels.cpu.simd import OFFSET, ROWS, WIDTH

SHAPES = [(1, 1, 1, 4, 4, 1, 1, 3), (2, 5, 9, 7, 8, 2, 5, 6), (1, 33, 31, 20, 24, 3, 8, 12), (1, 40, 70, 33, 16, 2, 20, 40),
          (1, 45, 37, 64, 16, 4, 16, 64),  # whole groups for the matrix unit
          (1, 2, 150, 8, 48, 1, 8, 4),  # heads that fill no whole number of vectors, keys that come in two goes
          (2, 1, 150, 20, 24, 3, 8, 12), (1, 1, 6, 9, 4, 35, 5, 7),  # one query, which a cache serves by another kernel
          (2, 1, 1, 70, 16, 3, 16, 41), (1, 17, 1, 33, 8, 2, 24, 8),  # one token, and one left in a block of queries
          (1, 4, 12, 36, 16, 2, 16, 70), (1, 12, 3, 33, 8, 2, 8, 32)]  # tiles of half the rows, of each of the two


def run(layer, linears, tensors, table, heads, rules, softmax, x, **masks):
    out = np.full((x[0].shape[0], x[0].shape[1], layer.output_dim), 99, np.int8)
    layer(*x, out, **masks)
    want = oracle.static_layer(*x, heads, linears, tensors, rules, softmax, table, **masks)
    np.testing.assert_array_equal(out, want)
    out[:] = 99
    run_cached(layer, *x, out, **masks)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("zero_points", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rules", RULE_SETS, ids="-".join)
def test_every_rule_set_equals_integer_arithmetic(rules, zero_points):
    rng = np.random.default_rng(5)
    for B, L, S, E, D, heads, Dv, Eo in SHAPES:
        layer, *parts = make_layer(rng, heads, E, D, Dv, Eo, zero_points, rules[:3], rules[3])
        x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
        run(layer, *parts, heads, rules[:3], rules[3], x)


def test_a_lone_query_without_an_output_projection():
    rng, rules = np.random.default_rng(12), ("float_rne",) * 3
    _, linears, tensors, table = make_layer(rng, 3, 24, 8, 8, 24, ASYMMETRIC, rules, "lut_f32")
    del linears["output"]
    layer = static_kernel(3, linears, tensors, *rules, table, "lut_f32")
    x = [rng.integers(-128, 128, (2, n, 24)).astype(np.int8) for n in (1, 6, 6)]
    run(layer, linears, tensors, table, 3, rules, "lut_f32", x)


@pytest.mark.parametrize("softmax", ["lut_f32", "lut_u16", "fixed"])
def test_a_dropped_key_is_not_there(softmax):
    rng = np.random.default_rng(6)
    rules = ("double", "double", "double") if softmax == "fixed" else ("float_rne",) * 3
    for B, L, S, E, D, heads, Dv, Eo in SHAPES:
        layer, *parts = make_layer(rng, heads, E, D, Dv, Eo, ASYMMETRIC, rules, softmax)
        x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
        keep = rng.random((B, heads, L, S)) > 0.5
        keep[:, :, 0] = False
        for masks in (dict(keep=keep), dict(keep=keep[:, :1]), dict(keep=keep[0, 0, :1]), dict(band=(-S, 0)),
                      dict(band=(-2, 1)), dict(keep=keep[:, 0, :, :][:, None], band=(-5, 3)), dict(band=(S, S + 5))):
            run(layer, *parts, heads, rules, softmax, x, **{
                n: np.ascontiguousarray(m) if n == "keep" else m for n, m in masks.items()})


def test_score_tables():
    rng = np.random.default_rng(7)
    rules = ("float_rne",) * 3
    for B, L, S, E, D, heads, Dv, Eo in SHAPES:
        layer, *parts = make_layer(rng, heads, E, D, Dv, Eo, SYMMETRIC, rules, "lut_f32")
        x = [rng.integers(-128, 128, (B, n, E)).astype(np.int8) for n in (L, S, S)]
        score_luts = rng.integers(-128, 128, (3, 256)).astype(np.int8)
        lut_index = rng.integers(0, 3, (B, 1, L, S)).astype(np.uint8)
        run(layer, *parts, heads, rules, "lut_f32", x, score_luts=score_luts)
        run(layer, *parts, heads, rules, "lut_f32", x, score_luts=score_luts, lut_index=lut_index)


def test_inputs_are_not_modified_and_sentinels_stay():
    rng = np.random.default_rng(8)
    layer, *_ = make_layer(rng, 2, 12, 8, 8, 10, SYMMETRIC, ("float_rne",) * 3, "lut_f32")
    x = rng.integers(-128, 128, (1, 13, 12)).astype(np.int8)
    x.flags.writeable = False
    around = np.full((3, 13, 10), 77, np.int8)
    layer(x, x, x, around[1:2])
    assert (around[0] == 77).all() and (around[2] == 77).all()


def test_scratch_grows_with_the_keys_and_knows_no_queries():
    layer, *_ = make_layer(np.random.default_rng(11), 12, 384, 32, 32, 384, SYMMETRIC, ("float_rne",) * 3, "lut_f32")

    def sizes(L, S):
        """Bytes for all threads together, and for each."""
        return 4 * np.array(plan(copy.copy(layer.parameters), 1, L, S))

    assert sizes(512, 512).sum() < 2**20
    for S in (64, 512, 4096):
        np.testing.assert_array_equal(sizes(1, S), sizes(4096, S))
    step = sizes(1, 4096) - sizes(1, 2048)
    np.testing.assert_array_equal(sizes(1, 8192) - sizes(1, 4096), 2 * step)
    # for each key: its codes, those of its value with a head to spare, 12 sums; and for each query of a block a score
    # and a byte of mask
    assert tuple(step // 2048) == (384 + 384 + 32 + 12 * 4, 2 * WIDTH)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 12, 13, 20])
def test_a_product_of_few_tokens_equals_integer_products(tokens):
    rng = np.random.default_rng(tokens)
    for panels, depth4 in ((2, DEPTH_STEP), (1, 5 * DEPTH_STEP), (24, 96), (10, 16)):
        rows, features = round_up(tokens, 32), panels * WIDTH
        x = rng.integers(-128, 128, (rows, depth4 * 4)).astype(np.int8)
        w = rng.integers(-127, 128, (features, depth4 * 4)).astype(np.int8)
        bias = rng.integers(-10**6, 10**6, features).astype(np.int32)
        out = np.zeros((rows, features), np.int32)
        codes = (x.view(np.uint8) ^ (OFFSET and 128)).view(np.uint32).ravel()
        apply_linear_ahead(codes, depth4, tokens, pack_byte_panels(w), bias, features, depth4, out.ravel(),
                           np.zeros(max(TILES_SCRATCH, 16), np.int32))
        exact = (x.astype(int) + OFFSET) @ w.astype(int).T + bias
        np.testing.assert_array_equal(out[:tokens], exact[:tokens])


@pytest.mark.parametrize("name", sorted(RULES))
def test_vector_rule_equals_the_rule_on_python_integers(name):
    for m in MULTIPLIERS:
        values = accumulators(m)
        np.testing.assert_array_equal(scaled(name, values, m), oracle.scaled(name, values, m))


@pytest.mark.parametrize("unsigned_rows", [True, False])
def test_linear_equals_integer_products(unsigned_rows):
    rng = np.random.default_rng(10)
    for tokens, panels, depth4 in ((ROWS, 1, DEPTH_STEP), (32, 2, 3 * DEPTH_STEP), (48 + ROWS, 1, 16), (64, 3, 32)):
        rows, features = round_up(tokens, 32), panels * WIDTH
        kinds = (np.uint8, np.int8) if unsigned_rows and OFFSET else (np.int8, np.uint8 if OFFSET else np.int8)
        low, high = zip(*((np.iinfo(kind).min, np.iinfo(kind).max + 1) for kind in kinds), strict=True)
        x = rng.integers(low[0], high[0], (rows, depth4 * 4 + 8)).astype(kinds[0])
        w = rng.integers(low[1], high[1], (features, depth4 * 4)).astype(kinds[1])
        bias = rng.integers(-10**6, 10**6, features).astype(np.int32)
        out = np.zeros((tokens, features), np.int32)
        views = (np.uint32, np.int32) if unsigned_rows else (np.int32, np.uint32)
        apply_linear(x.view(views[0]).ravel(), depth4 + 2, tokens, pack_byte_panels(w.view(np.int8)).view(views[1]), bias,
                     features, depth4, out.ravel(), np.zeros(max(TILES_SCRATCH, 16), np.int32))
        np.testing.assert_array_equal(out, x[:tokens, :depth4 * 4].astype(int) @ w.astype(int).T + bias)
