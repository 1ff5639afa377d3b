"""The float32 and dynamic kernels against float64."""
import numpy as np
import oracle_kernels as oracle
import pytest

from edgeattn import threads
from edgeattn.kernels.cpu import fused, layer_float32, portions
from edgeattn.kernels.cpu.functional_float32 import attention
from edgeattn.kernels.cpu.layer_dynamic import DynamicLayer
from edgeattn.kernels.cpu.layer_float32 import FloatLayer, group_size
from edgeattn.kernels.cpu.matmul import padded_head
from edgeattn.kernels.cpu.records import NO_MASKS, KernelMask
from edgeattn.kernels.cpu.row_products import CHAIN
from edgeattn.kernels.cpu.simd import LANES, ROWS, WIDTH

# B, L, S, E, H, Hkv, D, Dv, Eo: lengths around the tile and the query block, odd sizes, D != Dv, L != S
SHAPES = [(1, 32, 32, 64, 4, 4, 16, 16, 64), (2, 33, 9, 24, 3, 3, 8, 8, 24), (1, 7, 70, 20, 4, 2, 5, 3, 11),
          (1, 1, 1, 16, 1, 1, 16, 16, 16), (1, 31, 300, 64, 8, 2, 8, 4, 64), (1, 130, 130, 96, 4, 4, 24, 40, 70)]


def make_layer(rng, E, H, Hkv, D, Dv, Eo):
    def weight(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
    return (weight(H * D, E), weight(Hkv * D, E), weight(Hkv * Dv, E), weight(Eo, H * Dv),
            *(rng.standard_normal(n).astype(np.float32) for n in (H * D, Hkv * D, Hkv * Dv, Eo)))


def mask_cases(rng, B, H, L, S):
    keep = rng.random((B, 1, L, S)) > 0.4
    keep[:, :, 0] = False
    bias = rng.standard_normal((H, L, S)).astype(np.float32)
    yield {}
    yield dict(keep=keep)
    yield dict(keep=np.ascontiguousarray(keep[:, :, -1:]))
    yield dict(bias=bias)
    yield dict(bias=bias[0])
    yield dict(band=(-10**6, S - L))
    yield dict(band=(-3, 2))
    yield dict(keep=keep, bias=bias, band=(-50, 10))
    yield dict(band=(S, S + 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_layer(shape):
    B, L, S, E, H, Hkv, D, Dv, Eo = shape
    rng = np.random.default_rng(L)
    weights = make_layer(rng, E, H, Hkv, D, Dv, Eo)
    layer = FloatLayer(H, Hkv, weights[:4], weights[4:], D ** -0.5)
    x = [rng.standard_normal((B, n, E)).astype(np.float32) for n in (L, S, S)]
    for masks in mask_cases(rng, B, H, L, S):
        around = np.full((B + 2, L, Eo), 77, np.float32)
        layer(*x, around[1:-1], KernelMask(**masks))
        np.testing.assert_allclose(around[1:-1], oracle.layer(*x, weights, H, Hkv, **masks), atol=3e-6)
        assert (around[0] == 77).all() and (around[-1] == 77).all()


def check_numbers_of_threads(layer, x, B, L, masks):
    results = []
    for count in (1, 2, 3, 5):
        threads.set_num_threads(count)
        results.append(layer(*x, np.full((B, L, layer.output_dim), 77, np.float32), KernelMask(**masks)))
    threads.set_num_threads(1)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("B, L, S, E, H, Hkv, D, Dv, Eo", [
    *SHAPES, (1, 32, 32, 128, 4, 4, 32, 32, 128), (2, 5, 40, 64, 8, 8, 16, 16, 100), (1, 90, 60, 64, 6, 3, 8, 24, 64),
    (1, 1, 500, 128, 4, 4, 64, 16, 30), (1, 32, 2000, 96, 8, 8, 40, 40, 96), (2, 33, 40, 32, 24, 24, 8, 3, 30)])
def test_any_number_of_threads_gives_the_same_bits(B, L, S, E, H, Hkv, D, Dv, Eo, monkeypatch):
    """Whether they take blocks of queries, or, where there are few of these, heads."""
    monkeypatch.setattr(threads, "SMALLEST_SHARED_WORK", 0)
    rng = np.random.default_rng(L)
    weights = make_layer(rng, E, H, Hkv, D, Dv, Eo)
    layers = FloatLayer(H, Hkv, weights[:4], weights[4:], 0.3), FloatLayer(H, Hkv, (*weights[:3], None), (*weights[4:7], None), 0.3)
    x = [rng.standard_normal((B, n, E)).astype(np.float32) for n in (L, S, S)]
    for layer in layers:
        for masks in mask_cases(rng, B, H, L, S):
            check_numbers_of_threads(layer, x, B, L, masks)


@pytest.mark.parametrize("B, L, S, E, H, Hkv, D, Dv", [
    (1, 1, 1, 64, 4, 4, 32, 32), (1, 33, 70, 64, 4, 4, 16, 32), (1, 70, 33, 96, 6, 3, 32, 16), (1, 40, 40, 40, 5, 5, 20, 12),
    (5, 20, 20, 64, 4, 2, 32, 32)])
def test_any_number_of_threads_gives_the_same_bytes(B, L, S, E, H, Hkv, D, Dv, monkeypatch):
    """Whether they take batch entries, blocks of tokens, or heads; with other inputs for queries, and the same."""
    monkeypatch.setattr(threads, "SMALLEST_SHARED_WORK", 0)
    rng = np.random.default_rng(L)
    weights = make_layer(rng, E, H, Hkv, D, Dv, 70)
    layers = (DynamicLayer(H, Hkv, weights[:4], weights[4:], 0.3),
              DynamicLayer(H, Hkv, (*weights[:3], None), (*weights[4:7], None), 0.3))
    q, k = (rng.standard_normal((B, n, E)).astype(np.float32) for n in (L, S))
    for layer in layers:
        for x in [(q, k, k), (q, q, q)] if L == S else [(q, k, k)]:
            for masks in list(mask_cases(rng, B, H, L, S))[:7:2]:
                check_numbers_of_threads(layer, x, B, L, masks)


@pytest.mark.parametrize("heads, unit, count, at_once", [
    (12, 1, 1, 12), (12, 1, 2, 6), (12, 1, 3, 4), (12, 1, 4, 3), (12, 1, 5, 3), (12, 4, 2, 8), (4, 1, 2, 2), (1, 1, 2, 1)])
def test_heads_are_shared_evenly(heads, unit, count, at_once):
    assert portions.heads_at_once.py_func(heads, unit, count) == at_once


@pytest.mark.parametrize("E, H, L", [(384, 12, 512), (384, 4, 300), (384, 8, 60), (256, 8, 77), (64, 8, 1024), (60, 5, 90), (400, 2, 50)])
def test_layers_in_groups_of_heads(E, H, L, monkeypatch):
    """Heads that are projected and attended to a few at a time add up in the output, with and without masks.

    To the same bits however few: how many follows from the number of keys, which grows from step to step of a cache.
    """
    rng = np.random.default_rng(L)
    D = E // H
    weights = make_layer(rng, E, H, H, D, D, E)
    layer = FloatLayer(H, H, weights[:4], weights[4:], D ** -0.5)
    x = [rng.standard_normal((1, L, E)).astype(np.float32)] * 3
    keep, usual = rng.random((1, H, 1, L)) > 0.2, layer_float32.GROUP
    for masks in ({}, dict(band=(-10**6, 0)), dict(keep=keep), dict(keep=keep[:, :1])):
        found = []
        for most in (2**30, usual, 1):
            monkeypatch.setattr(layer_float32, "GROUP", most)
            layer._plans.clear()
            layer._alike.clear()
            found.append(layer(*x, np.empty_like(x[0]), KernelMask(**masks)))
            np.testing.assert_array_equal(found[-1], found[0])
        np.testing.assert_allclose(found[0], oracle.layer(*x, weights, H, H, **masks), atol=3e-6)


@pytest.mark.parametrize("E, H", [(64, 4), (64, 8), (128, 8), (256, 4), (384, 4), (384, 8), (384, 12)])
def test_scratch_does_not_grow_with_queries_and_holds_few_heads(E, H):
    D = E // H
    weights = make_layer(np.random.default_rng(0), E, H, H, D, D, E)
    layer = FloatLayer(H, H, weights[:4], weights[4:], D ** -0.5)

    def sizes(L, S, masked=False):
        call = layer._plan(1, L, S, ((1, 1, 1, S), None, None, None, None) if masked else NO_MASKS)
        return call.shared, call.private

    block = fused.QUERIES
    assert sizes(block, 512) == sizes(16384, 512) and sizes(block, 512, True) == sizes(16384, 512, True)
    Dp = padded_head(D)
    unit = -(-CHAIN // Dp)  # heads that fill a chain of the output, and a panel of features
    for S in (1, 64, 512, 4096, 16384):
        shared, private = sizes(block, S)
        largest = max(layer_float32.GROUP, unit * 2 * S * Dp)  # keys and values of as many heads
        assert shared <= largest + (S + ROWS) * 4 * max(Dp, WIDTH)
        assert private == sizes(block, 1)[1] or group_size(S, 1, H, Dp, Dp) < H
        assert private <= sizes(block, 1)[1]
        assert 0 <= sizes(block, S, True)[1] - private <= S * WIDTH + 16
    if LANES == 16:  # what the other instruction sets need less of lanes they have in tokens
        shared, private = sizes(512, 512)
        assert 4 * (shared + private) < 2**20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_layer(shape):
    B, L, S, E, H, Hkv, D, Dv, Eo = shape
    rng = np.random.default_rng(L)
    weights = make_layer(rng, E, H, Hkv, D, Dv, Eo)
    layer = DynamicLayer(H, Hkv, weights[:4], weights[4:], D ** -0.5)
    x = [rng.standard_normal((B, n, E)).astype(np.float32) for n in (L, S, S)]
    for masks in mask_cases(rng, B, H, L, S):
        got = layer(*x, np.zeros((B, L, Eo), np.float32), KernelMask(**masks))
        want = oracle.layer(*x, weights, H, Hkv, **masks)
        # Three roundings to 8 bits in a row, each at most half a step of 1/127 of its row's largest value.
        assert np.sqrt(((got - want) ** 2).mean() / (want ** 2).mean()) < 0.03


@pytest.mark.parametrize("sizes", [(5, 5, 20, 12, 70), (4, 2, 16, 32, 70)], ids=["any heads", "heads of whole vectors"])
@pytest.mark.parametrize("kind, error", [(FloatLayer, 1e-5), (DynamicLayer, 0.03)])
def test_every_small_number_of_tokens(sizes, kind, error):
    rng, (H, Hkv, D, Dv, E) = np.random.default_rng(4), sizes
    weights = make_layer(rng, E, H, Hkv, D, Dv, E)
    layer = kind(H, Hkv, weights[:4], weights[4:], D ** -0.5)
    for L in range(1, 34):
        x = rng.standard_normal((2, L, E)).astype(np.float32)
        got = layer(x, x, x, np.zeros((2, L, E), np.float32))
        want = oracle.layer(x, x, x, weights, H, Hkv)
        assert np.sqrt(((got - want) ** 2).mean() / (want ** 2).mean()) < error
        alone = np.ascontiguousarray(x[1:])
        np.testing.assert_array_equal(layer(alone, alone, alone, np.zeros((1, L, E), np.float32)), got[1:])


@pytest.mark.parametrize("shape", SHAPES + [(1, 3, 700, 8, 2, 1, 64, 64, 8), (1, 40, 70, 8, 2, 1, 80, 64, 8)], ids=str)
def test_attention_on_given_arrays(shape):
    B, L, S, _, H, Hkv, D, Dv, _ = shape
    rng = np.random.default_rng(S)
    q = rng.standard_normal((B, L, H, D)).astype(np.float32).transpose(0, 2, 1, 3)
    k = rng.standard_normal((B, Hkv, S, D)).astype(np.float32)
    v = rng.standard_normal((B, S, Hkv, Dv)).astype(np.float32).transpose(0, 2, 1, 3)
    cases = list(mask_cases(rng, B, H, L, S)) + [dict(softcap=2.0), dict(softcap=3.0, band=(-20, 0)),
                                                 dict(lengths=np.arange(B, dtype=np.int64) * 3)]
    for masks in cases:
        around = np.full((B, L, H + 2, Dv), 77, np.float32)
        out = around.transpose(0, 2, 1, 3)[:, 1:-1]
        given = dict(masks)
        softcap, lengths = given.pop("softcap", 0.0), given.pop("lengths", None)
        attention(q, k, v, out, D ** -0.5, softcap, KernelMask(**given), lengths)
        np.testing.assert_allclose(out, oracle.attention(q, k, v, D ** -0.5, **masks), atol=3e-6)
        assert (around[:, :, 0] == 77).all() and (around[:, :, -1] == 77).all()
