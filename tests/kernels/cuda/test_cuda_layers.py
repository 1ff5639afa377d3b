"""Layers and caches on the GPU, in the emulator, beside the same ones on the CPU."""
import numpy as np
import pytest
import reference
from cuda_cases import layer_oracle
from cuda_cases import on_device as put
from cuda_emulated import emulated_only, long_form
from tflite_graphs import random_scaling

import edgeattn
import quant
from edgeattn import cli
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.kernels.cuda import driver as driver_module
from edgeattn.kernels.cuda import launch_graph
from edgeattn.layers.attention import forward
from edgeattn.masks import resolve_mask
from edgeattn.ops import Sequences

pytestmark = pytest.mark.usefixtures("device")
# Which rules a set has is for kernels alone, and test_cuda_int8.py runs them under those of all: one of each softmax here.
SETS = [pytest.param(name, marks=[] if name in ("litert", "litert-arm", "tflm") else long_form) for name in KERNEL_SETS]


def parameters(rng, heads=2, kv_heads=1, E=24, D=8, Dv=12, Eo=20, kdim=None):
    shapes = {"q": (heads * D, E), "k": (kv_heads * D, kdim or E), "v": (kv_heads * Dv, kdim or E), "out": (Eo, heads * Dv)}
    found = {f"{name}_weight": rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
             for name, shape in shapes.items()}
    return found | {f"{name}_bias": rng.standard_normal(shape[0], np.float32) * np.float32(0.1)
                    for name, shape in shapes.items()}


def as_accurate(got, weights, heads, kv_heads, x, context=None, **masks):
    key = x if context is None else context
    want = [reference.multi_head_attention(weights, heads, x, key, key, num_kv_heads=kv_heads, dtype=dtype, **masks)[0]
            for dtype in (np.float64, np.float32)]
    # projections sum in one chain, as on the CPU: README, Limits
    assert np.abs(got - want[0]).max() <= 5 * np.abs(want[1] - want[0]).max() + 4 * np.spacing(np.float32(np.abs(want[0]).max()))


def test_float_layer():
    rng = np.random.default_rng(1)
    weights = parameters(rng)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    placed = layer.to("cuda")
    assert placed.to("cuda") is placed and placed.to("cpu") is layer and layer.to("cpu") is layer
    x = rng.standard_normal((2, 37, 24), np.float32)
    result = placed(put(x))
    assert isinstance(result, driver_module.DeviceArray)
    as_accurate(result.numpy(), weights, 2, 1, x)
    causal = reference.visible(2, 2, 37, 37, causal=True)
    out = put(np.zeros((2, 37, 20), np.float32))
    assert placed(put(x), is_causal=True, out=out) is out
    as_accurate(out.numpy(), weights, 2, 1, x, permitted=causal)


def test_numpy_arrays_are_copied_there_and_back():
    rng = np.random.default_rng(2)
    weights = parameters(rng, kdim=15)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    x, context = rng.standard_normal((5, 24), np.float32), rng.standard_normal((9, 15), np.float32)
    padding = np.arange(9) < 7
    result = layer.to("cuda")(x, context, key_padding_mask=padding)
    assert type(result) is np.ndarray
    as_accurate(result[None], weights, 2, 1, x[None], context[None], permitted=np.broadcast_to(padding, (1, 2, 5, 9)))
    out = np.empty((5, 20))
    assert layer.to("cuda")(x.astype(np.float64), context, key_padding_mask=padding, out=out) is out
    np.testing.assert_array_equal(out, result)


@pytest.mark.parametrize("shape", [(2, 2, 5, 9), (5, 9), (1, 2, 1, 1), (9,)])
def test_a_mask_and_padding_together(shape):
    rng = np.random.default_rng(12)
    weights = parameters(rng)
    placed = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1).to("cuda")
    x, context = rng.standard_normal((2, 5, 24), np.float32), rng.standard_normal((2, 9, 24), np.float32)
    keep, padding = rng.random(shape) < 0.7, np.arange(9) < np.array([[6], [9]])
    permitted = np.broadcast_to(keep & padding[:, None, None], (2, 2, 5, 9))
    got = placed(put(x), put(context), attn_mask=put(keep), key_padding_mask=put(padding)).numpy()
    as_accurate(got, weights, 2, 1, x, context, permitted=permitted)
    np.testing.assert_array_equal(placed(x, context, attn_mask=keep, key_padding_mask=padding), got)


def test_a_query_without_keys_gets_the_bias():
    rng = np.random.default_rng(3)
    layer = edgeattn.MultiHeadAttention(2, **parameters(rng), num_kv_heads=1)
    got = layer.to("cuda")(rng.standard_normal((1, 3, 24), np.float32), np.zeros((1, 0, 24), np.float32))
    np.testing.assert_array_equal(got, np.broadcast_to(layer.out_bias, (1, 3, 20)))
    assert layer.to("cuda")(np.zeros((0, 3, 24), np.float32)).shape == (0, 3, 20)


def int8_layer(rng, **options):
    layer = edgeattn.MultiHeadAttention(2, **parameters(rng, kv_heads=2))
    x = rng.standard_normal((2, 19, 24), np.float32)
    int8 = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "is_causal": True}]), **options)
    return int8, int8.quantize_input(x)


@pytest.mark.parametrize("arithmetic", SETS)
def test_static_layer_equals_integer_arithmetic(arithmetic):
    int8, codes = int8_layer(np.random.default_rng(4), arithmetic=arithmetic)
    placed = int8.to("cuda")
    np.testing.assert_array_equal(placed.run_int8(put(codes)).numpy(), layer_oracle(int8, codes))
    np.testing.assert_array_equal(placed.run_int8(codes, is_causal=True), layer_oracle(int8, codes, band=(-19, 0)))
    carried = int8.with_mask(np.tri(19, dtype=bool))
    np.testing.assert_array_equal(carried.to("cuda").run_int8(codes), layer_oracle(carried, codes))


@long_form
@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
def test_static_layer_equals_the_cpu(arithmetic):
    int8, codes = int8_layer(np.random.default_rng(4), arithmetic=arithmetic)
    np.testing.assert_array_equal(int8.to("cuda").run_int8(put(codes)).numpy(), int8.run_int8(codes))


def in_steps(layer, x, seen):
    """(result, probabilities) codes of a layer that attends from the codes x to themselves, where `seen`, by NumPy."""
    mask = resolve_mask((len(x), layer.num_heads, x.shape[1], x.shape[1]), seen)
    record = {}
    return forward(Int8Ops(layer, record), layer, x, x, x, Sequences([mask])), record["probabilities"]


@pytest.mark.parametrize("arithmetic", SETS)
def test_probabilities_of_a_static_layer(arithmetic):
    rng = np.random.default_rng(14)
    int8, codes = int8_layer(rng, arithmetic=arithmetic)
    keep = rng.random((2, 1, 19, 19)) < 0.7
    keep[0, 0, 5] = False
    result, weights = int8.to("cuda").run_int8(put(codes), attn_mask=put(keep), window_size=(9, 3), need_weights=True)
    seen = keep & reference.visible(2, 1, 19, 19, window=(9, 3))
    for ours, wanted in zip((result, weights), in_steps(int8, codes, seen), strict=True):
        np.testing.assert_array_equal(ours.numpy(), wanted)
    carried = int8.with_mask(np.tri(19, dtype=bool))
    for ours, wanted in zip(carried.to("cuda").run_int8(codes, need_weights=True),
                            in_steps(carried, codes, None), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(("arithmetic", "window"), [
    pytest.param(name, window, marks=[] if name == "litert" or window and name == "tflm" else long_form)
    for name in KERNEL_SETS for window in (None, 7)])
def test_static_decoding_gives_the_bits_of_the_whole(arithmetic, window):
    rng = np.random.default_rng(15)
    int8, codes = int8_layer(rng, arithmetic=arithmetic)
    placed, cache = int8.to("cuda"), edgeattn.KVCache.for_layer(int8, 2, 11 if window else 20, window=window).to("cuda")
    keep = rng.random((2, 1, 19, 19)) < 0.8
    parts, probabilities = [], np.full((2, 2, 19, 19), 77, np.int8)
    chunks = ((0, 8), (8, 18), (18, 19))  # with a window the second comes in two pieces
    for begin, end in chunks:
        part, got = placed.run_int8(put(codes[:, begin:end]), kv_cache=cache, is_causal=True, need_weights=True,
                                    attn_mask=put(keep[:, :, begin:end, :end]))
        probabilities[:, :, begin:end, :end] = got.numpy()
        parts.append(part.numpy())
    seen = keep & reference.visible(2, 1, 19, 19, causal=True, window=(-1 if window is None else window - 1, -1))
    result, wanted = in_steps(int8, codes, seen)
    np.testing.assert_array_equal(np.concatenate(parts, 1), result)
    for begin, end in chunks:
        np.testing.assert_array_equal(probabilities[:, :, begin:end, :end], wanted[:, :, begin:end, :end])


def test_static_decoding_of_many_tokens_and_sizes():
    rng = np.random.default_rng(16)
    layer = edgeattn.MultiHeadAttention(1, **parameters(rng, heads=1, D=70, Dv=66))
    x = rng.standard_normal((1, 90, 24), np.float32)
    int8 = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "is_causal": True}]))
    codes = int8.quantize_input(x)
    cache = edgeattn.KVCache.for_layer(int8, 1, 100).to("cuda")
    got = [int8.to("cuda").run_int8(codes[:, begin:end], kv_cache=cache, is_causal=True)
           for begin, end in ((0, 70), (70, 89), (89, 90))]
    np.testing.assert_array_equal(np.concatenate(got, 1), in_steps(int8, codes, np.tri(90, dtype=bool))[0])
    again = int8.to("cuda")(x[:, 89:], kv_cache=cache, window_size=(70, 0))
    assert np.isfinite(again).all() and cache.length == 91


@pytest.mark.parametrize("arithmetic", SETS)
@pytest.mark.parametrize("which", [("query",), ("key",), ("query", "key")], ids="-".join)
def test_queries_and_keys_by_a_table(arithmetic, which):
    """MUL by a constant, and the cache holds what comes of it."""
    rng = np.random.default_rng(18)
    int8, codes = int8_layer(rng, arithmetic=arithmetic)
    ops = {f"{name}_ops": (random_scaling(rng, int8.tensors[name], symmetric=name == "key"),) for name in which}
    int8 = int8._replace(**ops)
    result, _ = in_steps(int8, codes, None)
    assert (result != in_steps(int8._replace(**dict.fromkeys(ops, ())), codes, None)[0]).any()
    np.testing.assert_array_equal(int8.to("cuda").run_int8(put(codes)).numpy(), result)
    cache = edgeattn.KVCache.for_layer(int8, 2, 20).to("cuda")
    got = [int8.to("cuda").run_int8(codes[:, begin:end], kv_cache=cache, is_causal=True)
           for begin, end in ((0, 8), (8, 18), (18, 19))]
    np.testing.assert_array_equal(np.concatenate(got, 1), in_steps(int8, codes, np.tri(19, dtype=bool))[0])


@long_form
@pytest.mark.parametrize("arithmetic", KERNEL_SETS)
def test_static_decoding_equals_the_cpu(arithmetic):
    int8, codes = int8_layer(np.random.default_rng(17), arithmetic=arithmetic)
    caches = [edgeattn.KVCache.for_layer(int8, 2, 12, window=6).to(device) for device in ("cpu", "cuda")]
    for begin, end in ((0, 3), (3, 12), (12, 13), (13, 19)):
        cpu, gpu = (layer.run_int8(codes[:, begin:end], kv_cache=cache, is_causal=True, need_weights=True)
                    for layer, cache in zip((int8, int8.to("cuda")), caches, strict=True))
        for ours, theirs in zip(gpu, cpu, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_static_layer_on_reals():
    rng = np.random.default_rng(5)
    layer = edgeattn.MultiHeadAttention(2, **parameters(rng, kv_heads=2))
    x = rng.standard_normal((1, 9, 24), np.float32)
    int8 = quant.quantize(layer, quant.calibrate(layer, [x]))
    keep = np.tri(9, dtype=bool)
    codes = layer_oracle(int8, int8.quantize_input(x), keep=keep)
    np.testing.assert_array_equal(int8.to("cuda")(x, attn_mask=keep), int8.dequantize_output(codes))
    with pytest.raises(TypeError, match="query must be a NumPy array, or int8 codes on the device given to run_int8"):
        int8.to("cuda")(put(x))
    with pytest.raises(TypeError, match="query must be int8 on CUDA, got dtype float32"):
        int8.to("cuda").run_int8(put(x))
    with pytest.raises(TypeError, match="kv_cache must be on the GPU"):
        int8.to("cuda").run_int8(put(int8.quantize_input(x)), kv_cache=edgeattn.KVCache.for_layer(int8, 1, 9))
    placed, own, other = int8.to("cuda"), *(put(int8.quantize_input(sign * x)) for sign in (1, -1))
    for key in (other, own, other):  # the last one is like a known call
        if key is own:
            placed.run_int8(own, key)
            continue
        with pytest.raises(ValueError, match="key must be left out: this layer was quantized with query as its key"):
            placed.run_int8(own, key)
    other = edgeattn.KVCache(1, 2, 9, 8, value_dim=12, dtype="int8", scales=(1, 1)).to("cuda")
    with pytest.raises(ValueError, match="kv_cache must have this layer's scales"):
        int8.to("cuda").run_int8(put(int8.quantize_input(x)), kv_cache=other)
    with pytest.raises(TypeError, match="attn_mask must be bool for int8"):
        int8.to("cuda").run_int8(put(int8.quantize_input(x)), attn_mask=put(np.zeros((9, 9), np.float32)))


def dynamic_layer(rng):
    """(float weights, the dynamic layer, its inputs, a mask, what float64 gives)."""
    weights = parameters(rng)
    layer = quant.quantize(edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1), scheme="dynamic")
    x, context = rng.standard_normal((2, 33, 24), np.float32), rng.standard_normal((2, 37, 24), np.float32)
    keep = rng.random((33, 37)) < 0.7
    want = reference.multi_head_attention(weights, 2, x, context, context, np.broadcast_to(keep, (2, 2, 33, 37)),
                                          num_kv_heads=1)[0]
    return layer, x, context, keep, want


def test_dynamic_layer():
    layer, x, context, keep, want = dynamic_layer(np.random.default_rng(10))
    got = layer.to("cuda")(put(x), put(context), attn_mask=put(keep)).numpy()
    assert np.linalg.norm(got - want) < 0.015 * np.linalg.norm(want)
    x[0, 3, 5] = np.nan
    got = layer.to("cuda")(x, is_causal=True)
    assert np.isnan(got[0, 3:]).all() and np.isfinite(got[0, :3]).all() and np.isfinite(got[1]).all()


def test_dynamic_layer_with_every_option():
    rng = np.random.default_rng(13)
    layer = edgeattn.MultiHeadAttention(2, **parameters(rng), num_kv_heads=1)
    x, slopes = put(3 * rng.standard_normal((1, 70, 24), np.float32)), put(np.array([0.1, 0.02], np.float32))
    options = dict(softcap=1.5, alibi_slopes=slopes, window_size=(40, -1), is_causal=True,
                   attn_mask=put(rng.standard_normal((70, 70), np.float32)))
    exact = layer.to("cuda")(x, **options).numpy()
    got = quant.quantize(layer, scheme="dynamic").to("cuda")(x, **options).numpy()
    assert np.linalg.norm(got - exact) < 0.03 * np.linalg.norm(exact)
    free = layer.to("cuda")(x, **options | {"softcap": 0.0}).numpy()
    assert np.linalg.norm(free - exact) > 0.1 * np.linalg.norm(exact)  # the softcap matters here


@long_form
def test_dynamic_layer_is_as_close_as_the_cpus():
    layer, x, context, keep, want = dynamic_layer(np.random.default_rng(10))
    got, cpu = layer.to("cuda")(x, context, attn_mask=keep), layer(x, context, attn_mask=keep)
    assert np.abs(got - want).mean() <= 1.1 * np.abs(cpu - want).mean()


def as_held(x, dtype):
    """What a cache gives back of the rows of x."""
    if dtype == "float32":
        return x
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scale > 0, scale, np.float32(1))) * scale


def filled(dtype):
    """A cache on the CPU, one on the GPU, and the keys and values to append to both, in parts."""
    rng = np.random.default_rng(6)
    cpu = edgeattn.KVCache(2, 2, 80, 8, value_dim=12, dtype=dtype)
    parts = []
    for tokens in (3, 1, 66):
        k, v = rng.standard_normal((2, 2, tokens, 8), np.float32), rng.standard_normal((2, 2, tokens, 12), np.float32)
        k[0, 0, 0] = 0
        v[1, 1, 0, 3] = np.nan
        parts.append((k, v))
    gpu = cpu.to("cuda")
    for k, v in parts:
        gpu.append(put(k), put(v))
    gpu.truncate(68)
    return cpu, gpu, parts, rng.standard_normal((2, 4, 2, 8), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cache_holds_what_it_is_given(dtype):
    cpu, gpu, parts, q = filled(dtype)
    assert gpu.to("cuda") is gpu and gpu.nbytes == cpu.nbytes and len(gpu) == 68
    held = [as_held(np.concatenate(part, 2)[:, :, :68], dtype) for part in zip(*parts, strict=True)]
    for ours, wanted in zip(gpu.held(), held, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    want = reference.attention(q, *held, reference.visible(2, 4, 2, 68, causal=True, alignment="lower_right"))[0]
    np.testing.assert_allclose(gpu.attend(put(q), is_causal=True).numpy(), want, rtol=1e-5, atol=1e-6)


@long_form
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cache_holds_what_the_cpu_holds(dtype):
    cpu, gpu, parts, q = filled(dtype)
    for k, v in parts:
        cpu.append(k, v)
    cpu.truncate(68)
    for ours, theirs in zip(gpu.held(), cpu.held(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(gpu.attend(put(q), is_causal=True).numpy(), cpu.attend(q, is_causal=True), rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize("scheme", ["float32", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_decoding_through_a_cache_gives_what_the_whole_gives(dtype, scheme):
    rng = np.random.default_rng(7)
    weights = parameters(rng)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    if scheme == "dynamic":
        layer = quant.quantize(layer, scheme="dynamic")
    placed, cache = layer.to("cuda"), edgeattn.KVCache(1, 1, 20, 8, value_dim=12, dtype=dtype).to("cuda")
    x = rng.standard_normal((1, 9, 24), np.float32)
    parts = [placed(put(x[:, begin:end]), kv_cache=cache, is_causal=True).numpy()
             for begin, end in ((0, 4), (4, 5), (5, 9))]
    assert cache.length == 9
    whole = reference.multi_head_attention(weights, 2, x, x, x, reference.visible(1, 2, 9, 9, causal=True), num_kv_heads=1)[0]
    got = np.concatenate(parts, 1)
    if dtype == scheme == "float32":
        np.testing.assert_allclose(got, whole, atol=3e-6)
    else:  # of each tensor in int8 a step of 2 / 254 of the largest number, 1/12**0.5 of that in the mean
        assert np.linalg.norm(got - whole) < 0.03 * np.linalg.norm(whole)


@pytest.mark.parametrize("scheme", ["float32", "dynamic", "static"])
def test_a_known_call_of_a_layer_reads_and_writes_its_own_arrays(scheme, monkeypatch):
    rng = np.random.default_rng(18)
    layer = edgeattn.MultiHeadAttention(1, **parameters(rng, heads=1))
    batch = 2 if scheme == "static" else 1  # the launches of one scheme are enough to tell the entries apart
    arrays = [rng.standard_normal((batch, 9, 24), np.float32) for _ in range(3)]
    if scheme == "dynamic":
        layer = quant.quantize(layer, scheme="dynamic")
    if scheme == "static":
        layer = quant.quantize(layer, quant.calibrate(layer, [{"query": x, "key": y} for x, y in zip(
            arrays, arrays[1:], strict=False)]))
        arrays = [layer.quantize_input(x) for x in arrays]
    masks = [dict(attn_mask=rng.random((9, 9)) < 0.7, key_padding_mask=rng.random((batch, 9)) < 0.8) for _ in range(2)]
    x, y, z = arrays
    calls = [((x, x), {}), ((x, y), {}), ((y, z), masks[0] | dict(need_weights=True)),
             ((z, x), masks[1] | dict(need_weights=True))]
    if scheme != "static":
        calls += [((x, x, x), {}), ((x, y, z), {}), ((z,), {}), ((y,), {})]
        calls += [((z, y), masks[n] | dict(need_weights=True, average_attn_weights=True)) for n in range(2)]

    def results(placed, inputs, options):
        call = placed.run_int8 if scheme == "static" else placed
        found = call(*map(put, inputs), **{n: put(o) if isinstance(o, np.ndarray) else o for n, o in options.items()})
        return [array.numpy() for array in (found if isinstance(found, tuple) else (found,))]

    placed = layer.to("cuda")
    for inputs, options in calls:
        for ours, alone in zip(results(placed, inputs, options), results(layer.to("cuda"), inputs, options), strict=True):
            np.testing.assert_array_equal(ours, alone)
    assert len(placed._calls) == len(calls) // 2
    monkeypatch.setattr(launch_graph, "capture", None)  # a known call does not come by here
    results(placed, *calls[0])


def test_errors_name_the_argument():
    rng = np.random.default_rng(8)
    weights = parameters(rng)
    layer = edgeattn.MultiHeadAttention(2, **weights, num_kv_heads=1)
    placed, x = layer.to("cuda"), put(rng.standard_normal((1, 3, 24), np.float32))
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'gpu'"):
        layer.to("gpu")
    with pytest.raises(TypeError, match="need_weights must be True or False"):
        placed(x, need_weights=1)
    with pytest.raises(TypeError, match="attn_mask must be a NumPy array like query, got DeviceArray on the device"):
        placed(np.zeros((1, 3, 24), np.float32), attn_mask=put(np.ones((3, 3), bool)))
    with pytest.raises(ValueError, match="value needs key"):
        placed(x, value=x)
    with pytest.raises(ValueError, match="query must have a last axis of 24"):
        placed(put(np.zeros((1, 3, 23), np.float32)))
    with pytest.raises(TypeError, match="kv_cache must be on the GPU"):
        placed(x, kv_cache=edgeattn.KVCache(1, 1, 20, 8, value_dim=12))
    with pytest.raises(ValueError, match="kv_cache must have the call's B"):
        placed(x, kv_cache=edgeattn.KVCache(2, 1, 20, 8, value_dim=12).to("cuda"))
    with pytest.raises(ValueError, match="causal_alignment must be None with kv_cache"):
        placed(x, kv_cache=edgeattn.KVCache(1, 1, 20, 8, value_dim=12).to("cuda"), causal_alignment="upper_left")
    with pytest.raises(ValueError, match="the cache is full"):
        placed(x, kv_cache=edgeattn.KVCache(1, 1, 2, 8, value_dim=12).to("cuda"))
    with pytest.raises(ValueError, match="device must be 'cuda' for a cache on the GPU"):
        edgeattn.KVCache(1, 1, 8, 8).to("cuda").to("cpu")
    turned = type("Turned", (), {"__cuda_array_interface__": {
        **put(np.zeros((1, 24, 3), np.float32)).__cuda_array_interface__, "shape": (1, 3, 24), "strides": (288, 4, 12)}})()
    with pytest.raises(ValueError, match="query must be contiguous on CUDA"):
        placed(turned)
    turned.__cuda_array_interface__ |= {"shape": (1, 3, 20), "strides": (240, 4, 12)}
    with pytest.raises(ValueError, match="out must have neighbours along its last axis on CUDA"):
        placed(x, out=turned)


def test_cuda_without_a_gpu_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(driver_module, "_current", None)
    layer = edgeattn.MultiHeadAttention(2, **parameters(np.random.default_rng(9)), num_kv_heads=1)
    monkeypatch.setattr(driver_module, "_installed", lambda module: False)
    with pytest.raises(RuntimeError, match=r"needs the extra 'cuda' \(pip install 'edgeattn\[cuda\]'\): numba_cuda"):
        layer.to("cuda")
    assert "the extra 'cuda'" in driver_module.why_not()


@emulated_only
def test_info_says_what_it_found_and_why_cuda_is_not_used(capsys, monkeypatch):
    assert cli.main(["info"]) == 0
    assert "an emulator, compute capability 8.7" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(driver_module, "_current", None)
    monkeypatch.setattr(driver_module, "_installed", lambda module: module != "cuda.bindings")
    assert cli.main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "CUDA not used: CUDA needs the extra 'cuda' (pip install 'edgeattn[cuda]'): cuda.bindings is not" in said
