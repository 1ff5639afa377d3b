"""Whole encoders in dynamic int8: near the float model, the same bytes in every batch, saved and loaded."""

import copy
import pickle

import numpy as np
import pytest
from arrays import cosine
from arrays import numbers as random
from whole_models import E, F, H, encoder

import edgeattn
import quant
from edgeattn.layers import Embedding, FeedForward, LayerNorm, Linear, TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear

POSITIONS = {"rotary": edgeattn.RotaryEmbedding(8), "k_norm": LayerNorm(np.ones(8)),
             "position_bias": edgeattn.RelativePositionBias(random(8, H))}


@pytest.mark.parametrize("attention", ["int8", "float32"])
@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"gate": True}, POSITIONS])
def test_it_is_near_the_float_encoder(settings, attention):
    made, x = encoder(**settings), random(3, 9, E)
    x[..., 5] *= 40  # what residual streams have: one feature that would set every token's scale
    result = quant.quantize(made, scheme="dynamic", attention=attention)(x)
    assert cosine(result, made(x)) > (0.999 if attention == "float32" else 0.995)


def test_columns_apart_are_what_keeps_it_near():
    linear, x = Linear(random(16, E)), random(5, E)
    x[:, 7] *= 100
    without = DynamicLinear.quantized_from(linear)(x)
    apart = DynamicLinear.quantized_from(linear, outlier_columns=[7])(x)
    exact = linear(x).astype(np.float64)
    assert np.abs(apart - exact).max() < np.abs(without - exact).max() / 10


def test_a_second_code_is_for_outputs_with_large_weights():
    weight = random(16, E)
    weight[3] *= 100
    made = DynamicLinear.quantized_from(Linear(weight), split=4)
    assert made.residual_outputs.tolist() == [3] and made.outputs == 16 and made.codes.shape == (17, E)
    x = random(5, E)
    whole, exact = DynamicLinear.quantized_from(Linear(weight))(x), Linear(weight)(x).astype(np.float64)
    assert np.abs(made(x) - exact)[:, 3].max() < np.abs(whole - exact)[:, 3].max()


@pytest.mark.parametrize("positions", [{}, POSITIONS])
def test_a_sequence_gives_the_same_bytes_in_every_batch_and_on_any_threads(positions, one_thread_afterwards):
    made, x = quant.quantize(encoder(**positions), scheme="dynamic"), random(5, 13, E)
    lengths = [13, 2, 7, 7, 1]
    whole = made(x, lengths=lengths)
    for threads in (1, 2, 3):
        edgeattn.set_num_threads(threads)
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(made(x[row, :length]), whole[row, :length])
        np.testing.assert_array_equal(made(x, lengths=lengths), whole)
    assert not whole[1, 2:].any()


@pytest.mark.parametrize("settings", [
    {"linear1": {"split": 4}}, {"gate": {"split": 4}}, {"gate": {"outlier_columns": [3]}}, {"linear1": {"outlier_columns": [5]}}])
def test_weights_that_no_feed_forward_kernel_reads_are_computed_operation_by_operation(settings):
    layer = encoder(gate=True).layers[0]
    for name in ("linear1", "gate"):
        getattr(layer.feed_forward, name).weight.setflags(write=True)
        getattr(layer.feed_forward, name).weight[3] *= 20  # an output to split
    made = {name: DynamicLinear.quantized_from(getattr(layer.feed_forward, name), **settings.get(name, {}))
            for name in ("linear1", "linear2", "gate")}
    other = TransformerEncoderLayer(layer.attention, FeedForward(**made), layer.norm1, layer.norm2)
    x = random(3, 9, E)
    assert other.stages is None
    assert cosine(TransformerEncoder([other])(x), TransformerEncoder([layer])(x)) > 0.999


@pytest.mark.parametrize("positions", [{}, POSITIONS])
def test_it_is_saved_and_copied(positions, tmp_path):
    made, x = quant.quantize(encoder(gate=True, **positions), scheme="dynamic"), random(2, 5, E)
    edgeattn.save(made, tmp_path / "encoder.safetensors")
    for other in (edgeattn.load(tmp_path / "encoder.safetensors"), copy.deepcopy(made),
                  pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(other(x), made(x))
    part = made.layers[0].feed_forward.linear1
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(part))(x), part(x))


def test_a_text_encoder_is_quantized_whole():
    model = edgeattn.TextEncoder(Embedding(random(50, E), random(20, E), norm=LayerNorm(np.ones(E))), encoder())
    made = quant.quantize(model, scheme="dynamic")
    assert type(made) is edgeattn.TextEncoder and made.embedding is model.embedding
    ids = [[3, 4, 5, 6, 7, 8], [9, 10]]
    assert cosine(made(ids), model(ids)) > 0.995
    np.testing.assert_array_equal(made(ids)[1:, :2], made([ids[1]]))


def test_layers_that_are_shared_stay_shared():
    one = encoder().layers[0]
    made = quant.quantize(TransformerEncoder([one, one]), scheme="dynamic")
    assert made.layers[0] is made.layers[1]


def block(feed_forward):
    part = encoder().layers[0]
    return TransformerEncoderLayer(part.attention, feed_forward, part.norm1, part.norm2)


def test_a_linear_layer_may_stand_in_feed_forwards_with_different_gates():
    one, two = Linear(random(F, E)), Linear(random(E, F))
    gates = [Linear(random(F, E, seed=i) * 2) for i in (1, 2)]
    made = TransformerEncoder([block(FeedForward(one, two, gate=gate)) for gate in gates])
    int8, x = quant.quantize(made, scheme="dynamic"), random(2, 5, E)
    assert cosine(int8(x), made(x)) > 0.99 and all(layer.stages is not None for layer in int8.layers)


def test_a_feed_forward_without_hidden_features_adds_nothing():
    made = TransformerEncoder([block(FeedForward(Linear(np.zeros((0, E))), Linear(np.zeros((E, 0)))))])
    x, part = random(300, E), made.layers[0]
    encoder()(random(300, E, seed=1))  # leaves numbers in the scratch
    np.testing.assert_allclose(made(x), part.norm2(part.norm1(x + part.attention(x))), atol=1e-5)
    assert np.isfinite(quant.quantize(made, scheme="dynamic")(x)).all()


@pytest.mark.parametrize("places", [4, 30])
def test_a_position_bias_may_be_short(places):
    made = encoder(position_bias=random(H, places, places))
    assert quant.quantize(made, scheme="dynamic", attention="float32")(random(1, 4, E)).shape == (1, 4, E)


@pytest.mark.parametrize("scale", [0, 1e-43, 1e-30, 1e18, 1e30])
def test_weights_of_any_size(scale):
    feed_forward = FeedForward(Linear(random(F, E)), Linear(random(E, F) * np.float32(scale)))
    made = quant.quantize(TransformerEncoder([block(feed_forward)]), scheme="dynamic")
    assert np.isfinite(made(random(2, 3, E))).all()


def with_parts(*, second=False, attention=False):
    """An encoder of which a part is int8 already."""
    part = encoder().layers[0]
    linear1, linear2 = part.feed_forward.linear1, part.feed_forward.linear2
    feed_forward = FeedForward(linear1, DynamicLinear.quantized_from(linear2) if second else linear2)
    attend = quant.quantize(part.attention, scheme="dynamic") if attention else part.attention
    return TransformerEncoder([TransformerEncoderLayer(attend, feed_forward, part.norm1, part.norm2)])


def unlike(name):
    arrays = {"weight": random(F, E), "bias": random(F)}
    arrays[name].flat[7] = np.nan
    return TransformerEncoder([block(FeedForward(Linear(**arrays), Linear(random(E, F))))])


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: quant.quantize(unlike("weight"), scheme="dynamic"), ValueError,
     r"layers\.0\.feed_forward: linear must have a finite weight"),
    (lambda: quant.quantize(unlike("bias"), scheme="dynamic"), ValueError, "linear must have a finite bias"),
    (lambda: quant.quantize(encoder(), object(), scheme="dynamic"), TypeError, "calibration must be a quant.ModelCal"),
    (lambda: quant.quantize(encoder(), scheme="dynamic", attention="int4"), ValueError,
     "attention must be 'int8' or 'float32'; got 'int4'"),
    (lambda: quant.quantize(quant.quantize(encoder(), scheme="dynamic"), scheme="dynamic"), TypeError,
     r"model must be a float one; got layers\[0\]"),
    (lambda: quant.quantize(with_parts(second=True), scheme="dynamic"), TypeError, "model must be a float one.*Linear"),
    (lambda: quant.quantize(with_parts(attention=True), scheme="dynamic", attention="float32"), TypeError,
     "model must be a float one.*MultiHeadAttention"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.float32), np.ones(4)), TypeError, "codes must be int8"),
    (lambda: DynamicLinear(np.full((4, 3), -128, np.int8), np.ones(4)), ValueError, "codes must lie in"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.int8), np.zeros(4)), ValueError, "scale be positive"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.int8), np.ones(3)), ValueError, r"scale must have shape \(4,\)"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.int8), np.ones(4), outlier_columns=[3], outlier_weight=np.zeros((4, 1))),
     ValueError,
     "outlier_columns must lie between 0 and 2"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.int8), np.ones(4), outlier_columns=[1]), ValueError,
     r"outlier_weight must have shape \(4, 1\)"),
    (lambda: DynamicLinear(np.zeros((4, 3), np.int8), np.ones(4), residual_outputs=[3]), ValueError,
     "residual_outputs must lie between 0 and 2"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
