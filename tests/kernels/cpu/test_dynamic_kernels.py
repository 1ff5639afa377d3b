"""The parts of the dynamic int8 kernels, and what they promise: little scratch, smooth keys."""
import numpy as np
import pytest
from numba import njit

import edgeattn
import quant
from edgeattn.kernels.cpu.byte_products import ROW_STEP, TILES_SCRATCH, lane_product, pack_byte_panels, row_product
from edgeattn.kernels.cpu.dynamic import STEP, quantize_rows
from edgeattn.kernels.cpu.int8_operands import FLIP, LANE_SHIFT
from edgeattn.kernels.cpu.int8_views import BytePanels, Groups, Part, scratch_at
from edgeattn.kernels.cpu.projection_dynamic import join_depth
from edgeattn.kernels.cpu.records import NO_MASKS
from edgeattn.kernels.cpu.simd import (
    LANES,
    OFFSET,
    ROWS,
    WIDTH,
    address_of,
    matrix_configure,
    matrix_release,
    tile_store,
)
from edgeattn.kernels.cpu.views import Rows
from edgeattn.runtime.isa import ISA
from edgeattn.runtime.jit import inline


@njit(error_model="numpy")
def _lane_products(a, a_row, rows, b, depth4, scratch, mixed, signed):
    matrix_configure(scratch, 0)
    lane_product(True, Rows(a, 0, a_row), rows, Part(b, 0), depth4, Part(mixed, 0))
    lane_product(False, Rows(a, 0, a_row), rows, Part(b, 0), depth4, Part(signed, 0))
    matrix_release()


@pytest.mark.parametrize("rows", [1, ROW_STEP, ROW_STEP + 1, 40, 64])
@pytest.mark.parametrize("depth4", [16, 48])
def test_products_with_lanes(rows, depth4):
    rng = np.random.default_rng(rows + depth4)
    rows_up = -(-rows // ROW_STEP) * ROW_STEP
    a = rng.integers(-128, 128, (rows_up + 16, depth4, 4)).astype(np.int8)
    b = rng.integers(0, 256, (depth4, WIDTH, 4)).astype(np.uint8)
    results = [np.full((rows_up + 1, WIDTH), 7, np.int32) for _ in range(2)]
    _lane_products(a.view(np.int32).ravel(), depth4, rows, b.view(np.uint32).ravel(), depth4,
                   np.zeros(16, np.int32), *(r.ravel() for r in results))
    wide, unsigned = a[:rows].astype(int), b.astype(int)
    signed = b.view(np.int8).astype(int)
    mixed = np.einsum("rkj,kwj->rw", wide, unsigned if OFFSET else signed)  # where offset is 0, all bytes are signed
    plain = np.einsum("rkj,kwj->rw", wide, unsigned if LANE_SHIFT else signed)
    for got, wanted in zip(results, (mixed, plain), strict=True):
        np.testing.assert_array_equal(got[:rows], wanted)
        assert (got[rows_up:] == 7).all()


@inline
def _keep_rows(tile, rows, t, f, tokens, out, features, edge):
    tile_store(tile, edge, 0, WIDTH, LANES)
    for i in range(min(rows, tokens - t)):
        for j in range(WIDTH):
            out[(t + i) * features + f + j] += edge[i * WIDTH + j]


@njit(error_model="numpy")
def _row_products(x, depth4, tokens, panels, bias, features, out, tiles, edge):
    matrix_configure(tiles, 0)
    row_product(_keep_rows, (tokens, out, features, edge), Groups(x, 0, depth4, 1), tokens,
                BytePanels(panels, 0, bias, 0, features, depth4), Part(tiles, 0))
    matrix_release()


def test_products_of_any_number_of_rows():
    rng, depth4, features = np.random.default_rng(3), 16, 2 * WIDTH
    w = rng.integers(-128, 128, (features, 4 * depth4)).astype(np.int8)
    bias = rng.integers(-9999, 9999, features).astype(np.int32)
    for tokens in range(1, 34):
        codes = rng.integers(-128, 128, (tokens, 4 * depth4)).astype(np.int8)
        x = np.zeros((64 if ISA.amx else tokens, depth4), np.uint32)  # the matrix unit reads whole blocks
        x[:tokens] = codes.view(np.uint32) ^ np.uint32(np.int64(FLIP) & 0xFFFFFFFF)
        out = np.zeros((tokens + 1, features), np.int32)
        _row_products(x.ravel(), depth4, tokens, pack_byte_panels(w), bias, features, out.ravel(),
                      np.zeros(TILES_SCRATCH + 16, np.int32), np.zeros(ROWS * WIDTH, np.int32))
        exact = (codes.astype(int) + OFFSET) @ w.T.astype(int) + bias
        np.testing.assert_array_equal(out[:tokens], exact)  # added up: every row once
        assert not out[tokens:].any()


@njit(error_model="numpy")
def _quantized_rows(x, E, tokens, rows, out, scales, private):
    quantize_rows(Part(x, 0), E, tokens, rows, np.int32(0), Part(out, 0), Part(scales, 0), scratch_at(address_of(private)), 0, rows)


@pytest.mark.parametrize("E", [1, 5, STEP - 1, STEP, STEP + 3, 200])
def test_every_token_is_quantized_by_its_own_largest_number(E):
    rng = np.random.default_rng(E)
    tokens, rows = 3, -(-5 // LANES) * LANES
    x = (rng.standard_normal((tokens, E)) * [[1], [1000], [0]]).astype(np.float32)
    depth = -(-E // STEP) * STEP
    out, scales = np.full((rows, depth // 4), 9, np.int32), np.zeros(rows, np.float32)
    _quantized_rows(x.ravel(), E, tokens, rows, out.ravel(), scales, np.zeros(rows + STEP, np.int32))
    largest = np.abs(x).max(1)
    np.testing.assert_allclose(scales[:tokens], largest / 127, rtol=1e-6)
    inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    np.testing.assert_array_equal(out.view(np.int8)[:tokens], join_depth(np.rint(x * inverse[:, None]).astype(np.int8)))
    assert (out[tokens:] == 9).all() and not scales[tokens:].any()  # nothing reads rows that are not there
    x[0, -1] = np.nan
    _quantized_rows(x.ravel(), E, tokens, rows, out.ravel(), scales, np.zeros(rows + STEP, np.int32))
    assert np.isnan(scales[0]) and np.isfinite(scales[1:]).all()


def make(rng, H=4, Hkv=4, D=16, Dv=16, E=64, out=True):
    def weight(o, i):
        return (rng.standard_normal((o, i)) / np.sqrt(i)).astype(np.float32)

    return edgeattn.MultiHeadAttention(H, weight(H * D, E), weight(Hkv * D, E), weight(Hkv * Dv, E),
                                       weight(E, H * Dv) if out else None, num_kv_heads=Hkv)


def sqnr(exact, got):
    exact, got = exact.astype(np.float64), got.astype(np.float64)
    return 10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum())


@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"key_padding_mask": np.arange(90)[None] < 60}],
                         ids=["all", "causal", "padding"])
def test_an_offset_that_all_keys_share_costs_no_accuracy(masks):
    rng = np.random.default_rng(11)
    plain = make(rng)
    k_weight = plain.k_weight.copy()
    k_weight[:, :32] *= 6
    layer = edgeattn.MultiHeadAttention(4, plain.q_weight, k_weight, plain.v_weight, plain.out_weight)
    dynamic = quant.quantize(layer, scheme="dynamic")
    x = rng.standard_normal((1, 90, 64)).astype(np.float32)
    apart, offset = x.copy(), x.copy()
    apart[..., :32], offset[..., :32] = 0, 3  # the second: 18 times what tells the keys apart, in all keys alike
    without, with_it = (sqnr(layer(x, keys, x, **masks), dynamic(x, keys, x, **masks)) for keys in (apart, offset))
    assert with_it > without - 1  # without smoothing it costs 8 dB


def test_one_large_key_does_not_move_all_others():
    rng = np.random.default_rng(12)
    layer = make(rng)
    x = rng.standard_normal((1, 40, 64)).astype(np.float32)
    memory = x.copy()
    memory[0, 3] *= 1000
    keep = np.arange(40)[None] != 3
    dynamic = quant.quantize(layer, scheme="dynamic")
    assert sqnr(layer(x, memory, x, attn_mask=keep), dynamic(x, memory, x, attn_mask=keep)) > 30
    for other in (np.nan, np.inf, -1e30):  # what no query sees has no part in the mean
        memory[0, 3] = other
        np.testing.assert_array_equal(dynamic(x, memory, x, attn_mask=keep), dynamic(x, x, x, attn_mask=keep))


def test_scratch_of_a_large_layer_stays_below_a_mebibyte():
    kernel = quant.quantize(make(np.random.default_rng(13), 12, 12, 32, 32, 384), scheme="dynamic").fused_kernel
    for masked in (False, True):
        call, longer = (kernel._plan(1, n, n, True, True, ((1, 1, 1, n), None, None, None, None) if masked else NO_MASKS)
                        for n in (512, 4096))
        assert 4 * (call.shared + call.private) < 2**20
        assert longer.shared < 8.1 * call.shared  # grows as the sequence does
        assert masked or longer.private == call.private
