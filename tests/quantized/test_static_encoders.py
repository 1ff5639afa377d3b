"""Whole encoders in static int8: near the float model, the same bytes in every batch, saved and loaded."""

import copy
import pickle

import numpy as np
import pytest
from arrays import cosine
from arrays import numbers as random
from whole_models import E, H, encoder, text_encoder

import edgeattn
import quant
from edgeattn.executors.numpy import NumpyOps
from edgeattn.executors.numpy_int8 import Int8Ops
from edgeattn.layers import FeedForward, Linear, TransformerEncoder, TransformerEncoderLayer
from edgeattn.quantized import (
    QuantizedLinear,
    StaticFeedForward,
    StaticMultiHeadAttention,
    StaticSelfAttention,
    TensorQuantization,
)
from edgeattn.summary import summary
from quant import static_models
from quant.export.bundle import kernels_of

SETTINGS = ({}, {"norm_first": True}, {"gate": True})


def data(*shape):
    """What residual streams are: one feature is much larger than the others."""
    x = random(*shape, E)
    x[..., 5] *= 40
    return x


def static(made, x, **options):
    return quant.quantize(made, quant.calibrate(made, [x]), **options)


@pytest.mark.parametrize("attention", ["int8", "float32"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_near_the_float_encoder(settings, attention):
    made, x = encoder(**settings), data(3, 9)
    found = static(made, x, attention=attention)
    assert cosine(found(x), made(x)) > (0.999 if attention == "float32" else 0.998)
    report = quant.compare(made, found, [x])
    assert report.output.cosine > 0.998 and len(report.alone) == 4


@pytest.mark.parametrize("settings", SETTINGS)
def test_numpy_and_the_kernels_compute_the_same(settings):
    made, x = static(encoder(**settings), data(3, 9)), data(3, 9)
    record = {}
    with made.prepared((3, 9)) as sequences:
        found = made.forward(NumpyOps(record), x.reshape(-1, E), sequences)
    np.testing.assert_allclose(found.reshape(x.shape), made(x), atol=2e-5)  # norms' sums have another order
    part = made.layers[0].feed_forward
    assert record["layers.0.feed_forward.linear2"].shape == (27, E + len(part.more_outputs))
    assert record["layers.1.attention.probabilities"].dtype == np.int8
    np.testing.assert_array_equal(part.rows_of(lambda layer, _: Int8Ops(layer), x[0]), part(x[0]))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_sequence_gives_the_same_bytes_in_every_batch_and_on_any_threads(settings, one_thread_afterwards):
    made, x = static(encoder(**settings), data(5, 13)), data(5, 13)
    lengths = [13, 2, 7, 7, 1]
    whole = made(x, lengths=lengths)
    padding = np.arange(13) < np.array(lengths)[:, None]
    for threads in (1, 2, 3):
        edgeattn.set_num_threads(threads)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(made(x[row, :length]), whole[row, :length])
        np.testing.assert_array_equal(made(x, lengths=lengths), whole)
        np.testing.assert_array_equal(made(x, key_padding_mask=padding)[padding], whole[padding])
    assert not whole[1, 2:].any()


def test_steps_through_caches_are_the_whole_sequence():
    made, x = static(encoder(), data(2, 9)), data(2, 9)
    caches = made.make_caches(2, 9)
    steps = [made(x[:, t:t + n], is_causal=True, kv_cache=caches) for t, n in ((0, 4), (4, 1), (5, 1), (6, 3))]
    np.testing.assert_array_equal(np.concatenate(steps, axis=1), made(x, is_causal=True))
    x[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="x must hold no NaN with kv_cache"):
        made(x, is_causal=True, kv_cache=made.make_caches(2, 9))


def test_what_is_not_a_number_reaches_those_who_see_it():
    made, x = static(encoder(), data(2, 5)), data(2, 5)
    whole = made(x, is_causal=True)
    x[1, 2, 3] = np.nan
    found = made(x, is_causal=True)
    assert np.isnan(found[1, 2:]).all()
    np.testing.assert_array_equal(found[:, :2], whole[:, :2])
    np.testing.assert_array_equal(found[0], whole[0])


@pytest.mark.parametrize("arithmetic", ["tflm", "litert-builtin", "litert-reference"])
def test_every_kernel_set(arithmetic):
    made, x = encoder(gate=True), data(2, 5)
    found = static(made, x, arithmetic=arithmetic)
    parts = found.layers[0]
    assert parts.attention.arithmetic == parts.feed_forward.arithmetic == arithmetic
    assert cosine(found(x), made(x)) > 0.998


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_saved_and_copied(settings, tmp_path):
    x = data(2, 5)
    made = static(encoder(**settings), x)
    edgeattn.save(made, tmp_path / "encoder.safetensors")
    for other in (edgeattn.load(tmp_path / "encoder.safetensors"), copy.deepcopy(made),
                  pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(other(x), made(x))
    for part in (made.layers[0].feed_forward, made.layers[0].attention):
        assert f"more_inputs={len(part.more_inputs)}" in repr(part) and part.more_inputs
        part.save(tmp_path / "part.safetensors")
        assert edgeattn.load(tmp_path / "part.safetensors") == part == copy.copy(part)
    assert E * E < made.layers[0].attention.nbytes < made.nbytes < encoder(**settings).nbytes / 2


def test_a_bundle_holds_the_kernels_that_it_calls():
    made = static(encoder(), data(2, 5))
    assert set(kernels_of(made)) == {"layer int8", "layer int8 with a cache", "rows to codes", "codes to rows",
                                     "feed-forward int8", "norm"}
    assert kernels_of(made.layers[0].feed_forward) == ["feed-forward int8"]


def test_a_text_encoder_is_quantized_whole():
    model, ids = text_encoder(), [[3, 4, 5, 6, 7, 8], [9, 10]]
    made = quant.quantize(model, quant.calibrate(model, [ids]))
    assert type(made) is edgeattn.TextEncoder and made.embedding is model.embedding
    assert cosine(made(ids), model(ids)) > 0.998
    np.testing.assert_array_equal(made(ids)[1:, :2], made([ids[1]]))


@pytest.mark.parametrize("masked", [False, True])
def test_texts_of_one_length_are_calibrated_and_compared(masked):
    model, ids = text_encoder(), np.array([[3, 4, 5, 6], [9, 10, 1, 1]])
    batch = {"ids": ids, "attention_mask": ids != 1} if masked else {"ids": ids}
    calibration = quant.calibrate(model, [batch])
    assert calibration.tokens == (6 if masked else 8)
    made = quant.quantize(model, calibration)
    assert len(quant.compare(model, made, [batch]).alone) == 4


def test_layers_and_halves_that_are_shared_stay_shared():
    one, other = encoder().layers
    twice = TransformerEncoder([one, TransformerEncoderLayer(
        other.attention, one.feed_forward, other.norm1, other.norm2), one])
    made = static(twice, data(2, 5))
    assert made.layers[0] is made.layers[2] and made.layers[1].feed_forward is made.layers[0].feed_forward
    assert cosine(made(data(2, 5)), twice(data(2, 5))) > 0.998


def block(feed_forward):
    part = encoder().layers[0]
    return TransformerEncoder([TransformerEncoderLayer(part.attention, feed_forward, part.norm1, part.norm2)])


def error(made, x, **options):
    found = static(made, x, attention="float32", **options)(x)
    return float(np.linalg.norm(found - made(x)) / np.linalg.norm(made(x)))


def test_what_reaches_beyond_the_range_is_spread_and_wins_accuracy_back(monkeypatch):
    part = encoder().layers[0]
    linear2 = Linear(part.feed_forward.linear2.weight * np.where(np.arange(E) == 7, 20, 1)[:, None])
    made = TransformerEncoder([TransformerEncoderLayer(
        part.attention, FeedForward(part.feed_forward.linear1, linear2), None, None)])
    x = data(4, 9)
    made_static = static(made, x, attention="float32").layers[0].feed_forward
    assert {5} <= set(made_static.more_inputs) and {7} == {output for output, _ in made_static.more_outputs}
    with_them = error(made, x)
    monkeypatch.setattr(static_models, "SHARE", 10**9)
    assert with_them < error(made, x) / 1.5


def test_large_hidden_features_are_a_network_of_their_own():
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((192, E)) / E**0.5).astype(np.float32)
    weight[[10, 150]] *= 30
    lowered = (rng.standard_normal((E, 192)) / 14).astype(np.float32)
    lowered[:, [10, 150]] /= 30
    made, x = block(FeedForward(Linear(weight), Linear(lowered, random(E)))), random(4, 9, E)
    seen = quant.calibrate(made, [x])
    assert seen.large["layers.0.feed_forward"].tolist() == [10, 150]
    found = quant.quantize(made, seen, attention="float32")
    part = found.layers[0].feed_forward
    assert (part.hidden, part.large.hidden) == (190, 2) and "large=2" in repr(part)
    assert cosine(found(x), made(x)) > 0.9998
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found))(x), found(x))
    np.testing.assert_array_equal(part.rows_of(lambda layer, _: Int8Ops(layer), x[0]), part(x[0]))
    assert quant.compare(made, found, [x]).output.cosine > 0.9998
    with pytest.raises(ValueError, match="without a network of large features"):
        part.run_int8(np.zeros((1, E), np.int8))


def test_bias_masks_of_a_layer_and_lengths_without_tokens():
    made = encoder(position_bias=random(H, 6, 6))
    found = static(made, data(2, 6))
    assert cosine(found(data(2, 6)), made(data(2, 6))) > 0.997
    assert found(np.zeros((2, 0, E), np.float32)).shape == (2, 0, E)
    assert not static(encoder(), data(2, 6))(data(2, 6), lengths=[0, 0]).any()


def feed_forward(**changes):
    t = TensorQuantization(0.1, 0)
    arguments = {"linears": {"linear1": QuantizedLinear(np.ones((4, 3), np.int8), np.ones(4, np.float32)),
                             "linear2": QuantizedLinear(np.ones((3, 4), np.int8), np.ones(3, np.float32))},
                 "tensors": dict.fromkeys(("input", "linear1", "activation", "linear2"), t), **changes}
    return StaticFeedForward(arguments.pop("linears"), arguments.pop("tensors"), **arguments)


def self_attention():
    t = TensorQuantization(0.1, 0)
    linears = {name: QuantizedLinear(np.ones((4, 3) if name != "output" else (3, 4), np.int8), np.ones(1, np.float32))
               for name in ("query", "key", "value", "output")}
    return StaticSelfAttention(StaticMultiHeadAttention(2, linears, dict.fromkeys(
        ("query_input", "query", "key", "value", "scores", "context", "output"), t)))


def test_a_summary_knows_static_halves():
    whole = TransformerEncoder([TransformerEncoderLayer(self_attention(), feed_forward(large=feed_forward()))])
    for part in (whole, whole.layers[0], whole.layers[0].attention, whole.layers[0].feed_forward):
        assert dict(summary(part))["class"] == f"{type(part).__name__}, static int8, as litert computes"
    assert dict(summary(whole))["layers"] == "1, width 3, 2 heads, hidden 8, gelu, post-norm"
    gated = feed_forward(
        linears={**feed_forward().linears, "gate": feed_forward().linears["linear1"]},
        tensors=dict.fromkeys(("input", "linear1", "gate", "activation", "gated", "linear2"), TensorQuantization(0.1, 0)))
    made = TransformerEncoder([TransformerEncoderLayer(edgeattn.MultiHeadAttention(1, *np.ones((4, 3, 3))), gated)])
    found = dict(summary(made))
    assert found["class"] == "TransformerEncoder, feed-forward static int8, as litert computes, attention float32"
    assert "hidden 4, gated gelu" in found["layers"]


def layer(**changes):
    part = static(encoder(), data(2, 5)).layers[0]
    return TransformerEncoderLayer(**{"attention": part.attention, "feed_forward": part.feed_forward} | changes)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: quant.quantize(encoder()), TypeError, "got NoneType; scheme='dynamic' needs none$"),
    (lambda: quant.quantize(encoder(), scheme="int4"), ValueError, "scheme must be 'static' or 'dynamic'"),
    (lambda: static(encoder(), data(2, 5), arithmetic="xnnpack"), ValueError, "arithmetic must be one of"),
    (lambda: quant.quantize(encoder(), quant.calibrate(encoder(seed=5), [random(3, E)])), ValueError,
     "calibration was made with another encoder"),
    (lambda: quant.quantize(static(encoder(), data(2, 5)), scheme="dynamic"), TypeError,
     r"model must be a float one; got layers\[0\] with StaticFeedForward"),
    (lambda: static(encoder(), data(2, 5))(data(2, 5), attn_mask=np.zeros((5, 5), np.float32)), ValueError,
     "attn_mask must be bool"),
    (lambda: static(encoder(), data(2, 5))(data(2, 5), is_causal=True, kv_cache=static(
        encoder(seed=9), data(2, 5)).make_caches(2, 9)), ValueError, "kv_cache must have this layer's scales"),
    (lambda: static(encoder(), data(2, 5)).to("cuda"), ValueError, "must be a float or a dynamic int8 one on a GPU"),
    (lambda: layer(attention=static(encoder(), data(2, 5)).layers[0].attention.attention), TypeError,
     "attention must be an edgeattn.MultiHeadAttention"),
    (lambda: feed_forward(activation="tanh"), ValueError, "activation must be one of"),
    (lambda: feed_forward(tensors={}), ValueError, "tensors must be of input, linear1, activation, linear2"),
    (lambda: feed_forward(linears={}), ValueError, "linears must be of linear1, linear2"),
    (lambda: feed_forward(more_inputs=(3,)), ValueError, "more_inputs must each be a column before their own"),
    (lambda: feed_forward(more_outputs=((2, 0),)), ValueError, "more_outputs must be pairs of an output below 2"),
    (lambda: feed_forward(large=3), ValueError, "large must be a StaticFeedForward"),
    (lambda: feed_forward().run_int8(np.zeros((2, 3))), ValueError, r"x must be int8 \(..., 3\)"),
    (lambda: StaticSelfAttention(3), TypeError, "attention must be a static layer with one input"),
    (lambda: quant.compare(encoder(), static(encoder(seed=40), data(2, 5)), [data(2, 5)]), ValueError,
     "quantized does not belong to"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_static_layer_as_such_is_what_is_inside():
    part = static(encoder(), data(2, 5)).layers[0].attention
    assert isinstance(part.attention, StaticMultiHeadAttention) and part.attention.embed_dim == E + len(part.more_inputs)
