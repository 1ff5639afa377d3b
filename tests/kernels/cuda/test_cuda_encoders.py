"""Encoders on the GPU, in the emulator: against formulas in float64, and dynamic int8 against exact arithmetic."""
import encoder_cases
import numpy as np
import pytest
import reference
import reference_encoder
import reference_encoder_int8
from cuda_cases import on_device as put
from cuda_emulated import emulated_only

import edgeattn
import quant
from edgeattn.executors.cuda.ops import CudaOps
from edgeattn.executors.cuda.parameters import Parameters
from edgeattn.kernels.cuda import driver as driver_module
from edgeattn.kernels.cuda import launch_graph
from edgeattn.kernels.cuda.arrays import view
from edgeattn.layers.dynamic_linear import DynamicLinear

pytestmark = pytest.mark.usefixtures("device")
E, HEADS, F = 24, 2, 40


def run(forward, x):
    """What forward(ops, rows) gives, on the device, for x (tokens, features)."""
    like = put(np.zeros(1, np.float32))
    ops = CudaOps(Parameters(lambda ops: forward(ops, None)), 0, like)
    return ops.rows(forward(ops, view("x", put(x)))).owner.numpy()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("width", [3, 32, 70])
def test_a_norm_has_the_bits_of_the_rule(rms, width):
    rng = np.random.default_rng(width)
    x, weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((9, width), width, width))
    norm = edgeattn.RMSNorm(weight) if rms else edgeattn.LayerNorm(weight, bias)
    want = reference_encoder_int8.exact_norm("rms" if rms else "layer", weight, None if rms else bias, norm.eps, x)
    np.testing.assert_array_equal(run(norm.forward, x), want)


def as_accurate(got, want, plain):
    """Of the same size as what plain float32 makes of the formula."""
    assert np.abs(got - want).max() <= 4 * np.abs(plain - want).max() + 4 * np.spacing(np.float32(np.abs(want).max()))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "silu"])
def test_a_feed_forward_equals_the_formula(kind, gated):
    rng = np.random.default_rng(1)
    w = reference_encoder.random_layer(rng, E, 70, gated)
    linears = {name: edgeattn.Linear(*w[name]) for name in ("linear1", "linear2", "gate") if name in w}
    layer = edgeattn.FeedForward(**linears, activation=kind)
    x = 3 * rng.standard_normal((19, E), np.float32)
    parts = x, None, *w["linear1"], *w["linear2"], kind, w.get("gate"), None, False
    plain = reference_encoder_int8.feed_forward(*parts)
    as_accurate(run(layer.forward, x), reference_encoder.feed_forward(x.astype(np.float64), w, kind), plain)


DYNAMIC = [name for name in encoder_cases.CASES if name.startswith(("feed-forward", "gated"))]


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_feed_forward_has_the_bytes_of_the_cpu(name):
    case = encoder_cases.CASES[name]
    (w1, w2, gate), rows = case.quantized(), slice(0, 5)

    def linear(weight, bias):
        return DynamicLinear(weight.codes, weight.scale, bias, residual_outputs=weight.residual_outputs,
                             outlier_columns=weight.outlier_columns, outlier_weight=weight.outlier_weight)

    layer = edgeattn.FeedForward(linear(w1, case.b1), linear(w2, case.b2), activation=case.activation,
                                 gate=None if gate is None else linear(*gate))
    w1, w2, gate = case.weights()
    want = reference_encoder_int8.exact_feed_forward(case.x[rows], None, w1, case.b1, w2, case.b2, case.activation, gate,
                                                     None, False)
    np.testing.assert_array_equal(run(layer.forward, case.x[rows]), want)


def encoder_of(layers, kind="gelu", norm_first=False, norm=None):
    state = reference_encoder.torch_state_dict(layers, norm)
    return edgeattn.TransformerEncoder.from_torch(state, HEADS, activation=kind, norm_first=norm_first)


def formula(layers, x, **options):
    """The encoder in float64."""
    for w in layers:
        x = reference_encoder.encoder_layer(x, w, HEADS, **options)
    return x


def made(seed=2, count=2, **options):
    layers = [reference_encoder.random_layer(np.random.default_rng(seed + i), E, F) for i in range(count)]
    return layers, encoder_of(layers, **options), np.random.default_rng(seed).standard_normal((2, 9, E), np.float32)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_equals_the_formula(norm_first):
    layers, encoder, x = made(norm_first=norm_first)
    x, placed = x[:, :5].copy(), encoder.to("cuda")
    assert placed.to("cuda") is placed and placed.to("cpu") is encoder and encoder.to("cpu") is encoder
    want = formula(layers, x.astype(np.float64), norm_first=norm_first)
    out = put(np.zeros_like(x))
    assert placed(put(x), out=out) is out
    np.testing.assert_allclose(out.numpy(), want, atol=2e-5)
    np.testing.assert_array_equal(placed(x), out.numpy())
    np.testing.assert_array_equal(placed(x.astype(np.float64)[0]), placed(put(x[0])).numpy())


def test_masks_reach_every_layer():
    layers, encoder, x = made()
    padding, keep = np.arange(9) < np.array([[9], [6]]), np.random.default_rng(3).random((9, 9)) < 0.8
    seen = keep & padding[:, None, None] & reference.visible(2, 1, 9, 9, causal=True)
    want = formula(layers, x.astype(np.float64), permitted=np.broadcast_to(seen, (2, HEADS, 9, 9)))
    placed, masks = encoder.to("cuda"), dict(attn_mask=keep, key_padding_mask=padding)
    got = placed(put(x), is_causal=True, **{name: put(mask) for name, mask in masks.items()}).numpy()
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(placed(x, is_causal=True, **masks), want, atol=2e-5)


def test_sequences_of_several_lengths_equal_each_alone():
    _, encoder, x = made(count=1)
    placed, counts = encoder.to("cuda"), [3, 8]
    got = placed(put(x), lengths=counts, is_causal=True).numpy()
    np.testing.assert_array_equal(placed(x, lengths=counts, is_causal=True), got)
    listed = placed([x[0, :3], x[1, :8]], is_causal=True)
    for row, one, count, x_row in zip(got, listed, counts, x, strict=True):
        alone = placed(x_row[None, :count], is_causal=True)[0]
        np.testing.assert_array_equal(row[:count], alone)
        np.testing.assert_array_equal(one, alone)
        assert not row[count:].any()


def test_decoding_through_caches_gives_the_whole():
    layers, encoder, x = made()
    x, placed = x[:1], encoder.to("cuda")
    want = formula(layers, x.astype(np.float64), permitted=reference.visible(1, HEADS, 9, 9, causal=True))
    for move in (put, lambda array: array):
        caches = placed.make_caches(1, 9)
        parts = [placed(move(x[:, begin:end]), kv_cache=caches, is_causal=True) for begin, end in ((0, 6), (6, 9))]
        got = np.concatenate([part if isinstance(part, np.ndarray) else part.numpy() for part in parts], 1)
        np.testing.assert_allclose(got, want, atol=2e-5)


def dynamic(linear, *columns):
    return DynamicLinear.quantized_from(linear, outlier_columns=columns, split=2.0 if columns else None)


@pytest.mark.parametrize("attention", ["int8", "apart", "float32"])
def test_a_dynamic_encoder_is_near_the_formula(attention):
    layers, encoder, x = made(count=1)
    layer, x = encoder.layers[0], x[:1]
    part = edgeattn.FeedForward(dynamic(layer.feed_forward.linear1), dynamic(layer.feed_forward.linear2, 3, 9))
    attend = layer.attention
    if attention == "int8":
        attend = quant.quantize(layer.attention, scheme="dynamic")
    elif attention == "apart":
        attend = quant.quantize(edgeattn.TransformerEncoder([layer]), scheme="dynamic").layers[0].attention
        assert len(attend.outlier_columns) == 4
    placed = edgeattn.TransformerEncoder(
        [edgeattn.TransformerEncoderLayer(attend, part, layer.norm1, layer.norm2)]).to("cuda")
    want = formula(layers, x.astype(np.float64))
    got = placed(put(x)).numpy()
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    np.testing.assert_array_equal(placed(x), got)


def test_hidden_features_that_are_no_bytes_are_quantized_as_any_rows():
    """As on the CPU, where the parts of a feed-forward are of different kinds: one kernel has no rule for them."""
    rng = np.random.default_rng(6)
    w = reference_encoder.random_layer(rng, E, F)
    linear2 = dynamic(edgeattn.Linear(*w["linear2"]))
    layer = edgeattn.FeedForward(edgeattn.Linear(*w["linear1"]), linear2, activation="relu")
    x = rng.standard_normal((5, E), np.float32)
    hidden = run(lambda ops, rows: ops.activation(ops.linear(rows, layer.linear1, ""), "relu", ""), x)
    want = reference_encoder_int8.exact_linear(hidden, reference_encoder_int8.Weight(*linear2.quantized), linear2.bias)
    np.testing.assert_array_equal(run(layer.forward, x), want)


@emulated_only
def test_a_known_call_is_played_again_in_scratch_of_one_layer(monkeypatch):
    layers, encoder, x = made(count=1)
    placed, y = encoder.to("cuda"), np.flip(x, 1).copy()
    first, wanted = placed(put(x)).numpy(), placed(y)
    deeper = edgeattn.TransformerEncoder(encoder.layers * 3).to("cuda")
    deeper(put(x[:1]))
    with monkeypatch.context() as patched:
        patched.setattr(launch_graph, "capture", None)  # a known call does not come by here
        np.testing.assert_array_equal(placed(put(x)).numpy(), first)
        np.testing.assert_array_equal(placed(put(y)).numpy(), wanted)
        three = deeper(put(y[:1])).numpy()
    np.testing.assert_allclose(three, formula(layers * 3, y[:1].astype(np.float64)), atol=2e-5)
    few, more = (next(iter(one._calls._calls.values())).record.scratch for one in (placed, deeper))
    assert more < few + 2 * 2 * 1024  # the rows between layers alone


def table(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def test_a_text_encoder_goes_whole():
    rng = np.random.default_rng(4)
    layers, encoder, _ = made(count=1)
    tables, norm = [table(rng, n, E) for n in (11, 16, 2)], (table(rng, E), table(rng, E))
    model = edgeattn.models.TextEncoder(edgeattn.layers.Embedding(*tables, norm=edgeattn.LayerNorm(*norm)), encoder)
    got = model.to("cuda")([[1, 2, 3], [4, 5]])
    for row, ids in zip(got, ([1, 2, 3], [4, 5]), strict=True):
        x = reference_encoder.layer_norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], *norm)
        np.testing.assert_allclose(row[: len(ids)], formula(layers, x[None])[0], atol=2e-5)
        assert not row[len(ids):].any()


def test_the_encoder_of_a_model_is_there_with_the_models_weights():
    rng = np.random.default_rng(7)
    layers, encoder, x = made(count=1)
    x = x[:1, :3].copy()
    placed = edgeattn.models.TextEncoder(edgeattn.layers.Embedding(table(rng, 11, E)), encoder).to("cuda")
    memory = len(driver_module.driver().memory)
    inner = placed.encoder
    assert inner is placed.encoder and inner.to("cpu") is encoder and len(driver_module.driver().memory) == memory
    got = inner(put(x)).numpy()
    np.testing.assert_allclose(got, formula(layers, x.astype(np.float64)), atol=2e-5)
    np.testing.assert_array_equal(inner(x), got)
    caches = inner.make_caches(1, 3)
    placed([[1, 2]], kv_cache=caches)
    np.testing.assert_allclose(placed([[3]], kv_cache=caches), placed([[1, 2, 3]])[:, 2:], atol=2e-5)


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_an_image_encoder_goes_whole(size):
    rng = np.random.default_rng(5)
    layers, encoder, _ = made(count=1)
    weight, places, pixels = table(rng, E, 48) / 7, table(rng, 5, E), table(rng, 2, 3, *size)
    embedding = edgeattn.layers.PatchEmbedding(edgeattn.Linear(weight), places, patch_size=(4, 4), image_size=(8, 8))
    x = [[np.zeros(E)] + [image[:, i:i + 4, j:j + 4].ravel() @ weight.T.astype(np.float64) for i in range(0, size[0], 4)
                          for j in range(0, size[1], 4)] for image in pixels]
    want = formula(layers, np.array(x) + embedding.places(*size))
    np.testing.assert_allclose(edgeattn.models.ImageEncoder(embedding, encoder).to("cuda")(pixels), want, atol=3e-5)


def test_what_a_gpu_does_not_compute_is_refused():
    layers, encoder, x = made()
    rotary = edgeattn.MultiHeadAttention(HEADS, *(layers[0][name][0] for name in ("q", "k", "v", "out")),
                                         rotary=edgeattn.RotaryEmbedding(E // HEADS))
    turned = edgeattn.TransformerEncoder([edgeattn.TransformerEncoderLayer(rotary, encoder.layers[0].feed_forward)])
    with pytest.raises(ValueError, match="layer must have no rotary here"):
        turned.to("cuda")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'gpu'"):
        encoder.to("gpu")
    placed = encoder.to("cuda")
    with pytest.raises(ValueError, match=r"x must be \(B, L, E\) or \(L, E\) with E = 24"):
        placed(put(np.zeros((2, 9, 23), np.float32)))
    with pytest.raises(ValueError, match="lengths must be left out with key_padding_mask"):
        placed(put(x), lengths=[1, 2], key_padding_mask=put(np.ones((2, 9), bool)))
    with pytest.raises(TypeError, match="kv_cache must be on the GPU"):
        placed(put(x), kv_cache=encoder.make_caches(2, 9))
    with pytest.raises(TypeError, match="kv_cache must be on the GPU"):
        placed(x, kv_cache=encoder.make_caches(2, 9))
    assert driver_module.driver().device() == 0
