"""Whole encoders as .tflite files: what runtimes make of them, beside what the encoder gives."""


import numpy as np
import pytest
from arrays import cosine
from arrays import numbers as random
from runtimes import HERE
from static_cases import make
from whole_models import E, encoder, image_encoder, text_encoder

import edgeattn
import quant
from edgeattn.files.tflite_file import parse
from edgeattn.layers import TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.quantized import StaticFeedForward, StaticSelfAttention
from quant.export.tflite import write_tflite
from quant.export.tflite_float_ops import _all_in_codes
from quant.runtimes import RUNTIMES

L = 9
SETTINGS = {"norm last": {}, "norm first": {"norm_first": True}, "gate": {"gate": True}}
CAUSAL = np.tri(L, dtype=bool)


def data(*shape, seed=0):
    """What residual streams are: one feature is much larger than the others."""
    x = random(*shape, E, seed=seed)
    x[..., 5] *= 40
    return x


def activated(kind, **settings):
    """An encoder with this activation; TFLite Micro has no GELU."""
    made = encoder(**settings)
    for layer in made.layers:
        layer.feed_forward.activation = kind
    return made


def static(made, **options):
    batches = [data(3, L, seed=1), {"x": data(3, L, seed=2), "is_causal": True}]
    return quant.quantize(made, quant.calibrate(made, batches), **options)


def with_mask(made, keep):
    """A static encoder whose attention carries the mask as a file does: masked scores keep a trace of weight."""
    layers = [TransformerEncoderLayer(
        StaticSelfAttention(layer.attention.attention.with_mask(keep), more_inputs=layer.attention.more_inputs),
        layer.feed_forward, layer.norm1, layer.norm2, norm_first=layer.norm_first) for layer in made.layers]
    return TransformerEncoder(layers, norm=made.norm)


def written(made, path, **options):
    return RUNTIMES[options.pop("runtime", "litert-reference")].session(
        quant.export(made, path, batch=2, **{"sequence_length": L} | options))


def window(made):
    """The encoder whose layers see a token on each side."""
    return TransformerEncoder([TransformerEncoderLayer(
        layer.attention, layer.feed_forward, layer.norm1, layer.norm2, window_size=(1, 1)) for layer in made.layers])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", [None, "causal"])
def test_float32_is_the_encoder(tmp_path, settings, mask):
    x = data(2, L)
    for activation, names in (("gelu", set(HERE) - {"tflm"}), ("relu", set(HERE) & {"tflm"})):
        made = activated(activation, **SETTINGS[settings])
        want = made(x, is_causal=mask is not None)
        for name in names:
            found = written(made, tmp_path / "a.tflite", mask=mask, runtime=name).run(x)[0]
            np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("settings", SETTINGS)
def test_static_int8_is_the_runtimes(tmp_path, name, settings):
    """Codes are equal: one that was not would show by a step of the codes, hundreds of times the bound."""
    made = static(activated("relu", **SETTINGS[settings]), arithmetic=name, room_for_masks=True)
    x = data(2, L)
    assert any(layer.attention.more_inputs for layer in made.layers)
    for mask in (None, CAUSAL):
        want = (made if mask is None else with_mask(made, mask))(x)
        found = written(made, tmp_path / "a.tflite", mask=mask, runtime=name).run(x)[0]
        np.testing.assert_allclose(found, want, atol=2e-6 * np.abs(want).max())


PADDED = np.array([[1] * L, [1] * 4 + [0] * (L - 4)])


@pytest.mark.parametrize("name", HERE)
def test_padding_is_an_input(tmp_path, name):
    """As the mask of a call in float32; in static int8 as one that is written into the file, masked scores leave a trace."""
    plain, x = activated("relu"), data(2, L)
    seen = PADDED[:, None, None, :] > 0
    static_one = static(plain, arithmetic=name, room_for_masks=True)
    for made, want, mask, near in (
            (plain, plain(x, key_padding_mask=PADDED > 0), None, 1e-5),
            (plain, plain(x, key_padding_mask=PADDED > 0, is_causal=True), CAUSAL, 1e-5),
            (static_one, with_mask(static_one, np.broadcast_to(seen, (2, 1, L, L)))(x), None, 2e-6)):
        session = written(made, tmp_path / "a.tflite", mask=mask, runtime=name, padding=True)
        assert [each[1:] for each in session.inputs] == [((2, L, E), np.float32), ((2, L), np.int32)]
        found = session.run(x, PADDED.astype(np.int32))[0]
        np.testing.assert_allclose(found[PADDED > 0], want[PADDED > 0], atol=near * np.abs(want).max())
    if name == "litert":  # and of several lengths, heads apart or one
        one_head = TransformerEncoder([TransformerEncoderLayer(
            edgeattn.MultiHeadAttention(1, *[random(E, E, seed=i) / 6 for i in range(4)]), plain.layers[0].feed_forward,
            plain.layers[0].norm1, plain.layers[0].norm2), *plain.layers])
        found = written(one_head, tmp_path / "a.tflite", runtime=name, padding=True).run(x, PADDED.astype(np.int32))[0]
        want = one_head(x, key_padding_mask=PADDED > 0)
        np.testing.assert_allclose(found[PADDED > 0], want[PADDED > 0], atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_static_int8_with_the_operator_gelu(tmp_path, activation):
    made, x = static(activated(activation), arithmetic="litert-reference"), data(2, L)
    np.testing.assert_allclose(written(made, tmp_path / "a.tflite").run(x)[0], made(x), atol=2e-6)


def test_static_feed_forwards_with_all_they_may_have(tmp_path):
    """Further outputs, columns that continue further columns, large features apart; attention in float32."""
    options = {"arithmetic": "litert-reference", "more_inputs": (3, E, 7, E + 1), "more_outputs": ((5, -128), (0, 127))}
    large = make(4, E, 20, E, "gelu_tanh", arithmetic="litert-reference", more_inputs=(2,)).layer
    of = make(3, E, 40, E, "gelu", **options).layer
    part = StaticFeedForward(of.linears, of.tensors, activation="gelu", large=large, **options)
    layer = encoder().layers[0]
    made = TransformerEncoder([TransformerEncoderLayer(layer.attention, part, layer.norm1, layer.norm2)])
    x = data(2, L)
    got = written(made, tmp_path / "a.tflite", mask="causal").run(x)[0]
    np.testing.assert_allclose(got, made(x, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_dynamic_int8_is_hybrid(tmp_path, settings):
    """Of as many bytes as the weights, an eighth of whose columns are float32 here; as near the float encoder as ours."""
    made, x = encoder(**SETTINGS[settings]), data(2, L)
    dynamic, want = quant.quantize(made, scheme="dynamic"), made(x)
    for name in HERE:
        if name in ("tflm", "tflite-runtime"):
            continue  # neither has hybrid products of a scale for each channel
        found = written(dynamic, tmp_path / "a.tflite", runtime=name).run(x)[0]
        assert cosine(found, want) > 0.999 and cosine(found, dynamic(x)) > 0.999
    written(made, tmp_path / "float.tflite")
    assert (tmp_path / "a.tflite").stat().st_size < 0.7 * (tmp_path / "float.tflite").stat().st_size


def test_little_stands_beside_hybrid_products():
    """No float product of hidden features; SELECT_V2, where XNNPACK would stop, once, for the padding of all layers."""
    graph = parse(write_tflite(quant.quantize(encoder(), scheme="dynamic"), sequence_length=L, padding=True), "x")
    assert [each.name for each in graph.operators].count("SELECT_V2") == 1
    names = [tensor.name for tensor in graph.tensors]
    assert any("linear1/apart" in name for name in names) and not any("linear2/apart" in name for name in names)


def test_inputs_that_were_apart_are_codes_among_the_others():
    linear = edgeattn.Linear(random(12, 24) * np.where(np.arange(12) == 3, 20, 1)[:, None], random(12))
    dynamic = DynamicLinear.quantized_from(linear, outlier_columns=[1, 5, 7, 20], split=4.0)
    whole = _all_in_codes(dynamic)
    assert len(whole.outlier_columns) == 0 and whole.residual_outputs.tolist() == [3]
    weight = whole.codes * whole.scale[:, None]
    weight[3] += weight[12]
    step = np.where(np.arange(12) == 3, whole.scale[12], whole.scale[:12])[:, None]
    assert (np.abs(weight[:12] - linear.weight) < 1.01 * step).all()


def test_a_block_of_spread_inputs_tells_its_width(tmp_path):
    made = static(encoder())
    path = quant.export(made, tmp_path / "e.tflite", sequence_length=L)
    more = len(made.layers[0].attention.more_inputs)
    assert more
    with pytest.warns(UserWarning, match=rf"the block reads {E + more} features, .* makes of {E} and {more} more: "):
        assert edgeattn.load(path, block=0).embed_dim == E + more
    alone = made.layers[0].attention.attention  # what the file of the layer itself has as its input tells nothing
    assert edgeattn.load(quant.export(alone, tmp_path / "a.tflite", sequence_length=L), block=0).embed_dim == E + more


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}])
def test_input_and_output_are_named_so(settings):
    made = encoder(**settings)
    for each in (made, TransformerEncoder(made.layers), static(made), quant.quantize(made, scheme="dynamic")):
        graph = parse(write_tflite(each, sequence_length=L), "e.tflite")
        assert [graph.tensors[at].name for at in (*graph.inputs, *graph.outputs)] == ["input", "output"]
        assert [tensor.name for tensor in graph.tensors].count("output") == 1


def test_a_norm_without_weights_has_no_operators_for_them():
    def operators(bias):
        norms = (edgeattn.LayerNorm(np.ones(E), bias, 1e-5) for _ in range(2))
        layer = encoder().layers[0]
        made = TransformerEncoder([TransformerEncoderLayer(layer.attention, layer.feed_forward, *norms)])
        return len(parse(write_tflite(made, sequence_length=L), "x").operators)
    assert operators(np.zeros(E)) + 2 == operators(np.ones(E))


def test_halves_of_several_schemes_stand_in_one_file(tmp_path):
    """Static attention in codes, dynamic feed-forwards hybrid, a half in float32."""
    made, x = encoder(), data(2, L)
    mixed = static(made, arithmetic="litert-reference", overrides={
        "*.feed_forward": "dynamic", "layers.1.attention": "float32"})
    assert [type(layer.attention) for layer in mixed.layers] == [StaticSelfAttention, edgeattn.MultiHeadAttention]
    found = written(mixed, tmp_path / "a.tflite").run(x)[0]
    assert cosine(found, mixed(x)) > 0.9995 and cosine(found, made(x)) > 0.999


def test_a_dynamic_layer_is_hybrid(tmp_path):
    made = encoder().layers[0].attention
    dynamic, x = quant.quantize(made, scheme="dynamic"), random(2, L, E)
    found = written(dynamic, tmp_path / "a.tflite", mask="causal").run(x)[0]
    assert cosine(found, made(x, is_causal=True)) > 0.999


def test_layers_with_windows_of_their_own(tmp_path):
    made, x = window(encoder()), data(2, L)
    np.testing.assert_allclose(written(made, tmp_path / "a.tflite").run(x)[0], made(x), atol=1e-5)


def test_shared_heads(tmp_path):
    weights = [random(n, E, seed=n) / 6 for n in (E, 16, 16, E)]
    attention = edgeattn.MultiHeadAttention(4, *weights, num_kv_heads=2)
    made = TransformerEncoder([TransformerEncoderLayer(attention, encoder().layers[0].feed_forward)])
    x = random(2, L, E)
    np.testing.assert_allclose(written(made, tmp_path / "a.tflite").run(x)[0], made(x), atol=1e-5)
    dynamic = quant.quantize(made, scheme="dynamic")
    assert cosine(written(dynamic, tmp_path / "a.tflite").run(x)[0], made(x)) > 0.999


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_inputs_of_dynamic_attention_that_stay_float32(tmp_path, kv_heads):
    """Their weights hold the scale of queries, and are repeated for shared heads, as the codes are."""
    kv = E // 4 * kv_heads
    attention = edgeattn.MultiHeadAttention(4, *(random(n, E, seed=n) / 6 for n in (E, kv, kv, E)),
                                            num_kv_heads=kv_heads)
    scale, feed_forward = np.ones(E), encoder().layers[0].feed_forward
    scale[:4] = 4
    made = TransformerEncoder([TransformerEncoderLayer(
        attention, feed_forward, edgeattn.LayerNorm(scale), edgeattn.LayerNorm(np.ones(E)), norm_first=True)])
    dynamic, x = quant.quantize(made, scheme="dynamic"), random(2, L, E)
    layer = dynamic.layers[0].attention
    assert layer.outlier_columns.tolist() == [0, 1, 2, 3]
    normed = x * scale.astype(np.float32)
    assert cosine(written(layer, tmp_path / "a.tflite").run(normed)[0], attention(normed)) > 0.9995
    assert cosine(written(dynamic, tmp_path / "a.tflite").run(x)[0], made(x)) > 0.9995


def test_several_lengths_are_signatures_over_the_same_weights(tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    made = encoder()
    one = quant.export(made, tmp_path / "one.tflite", sequence_length=4).stat().st_size
    path = quant.export(made, tmp_path / "a.tflite", sequence_length=[4, 9, 17], mask="causal")
    assert path.stat().st_size < 1.6 * one
    interpreter = litert.Interpreter(str(path))
    assert list(interpreter.get_signature_list()) == ["length_4", "length_9", "length_17"]
    for length in (9, 4, 17):
        x = data(1, length)
        (found,) = interpreter.get_signature_runner(f"length_{length}")(input=x).values()
        np.testing.assert_allclose(found, made(x, is_causal=True), atol=1e-5)


REFUSED = {
    "a model": (lambda: text_encoder(), {}, TypeError, r"model\.encoder"),
    "an image model": (lambda: image_encoder(), {}, TypeError, r"model\.encoder"),
    "key_length": (lambda: encoder(), {"key_length": 3}, ValueError, "key_length must be left out for an encoder"),
    "a mask of other lengths": (lambda: encoder(), {"mask": np.ones((8, 8), bool)}, ValueError,
                                "^mask must .*export with the lengths"),
    "no room": (lambda: static(encoder()), {"mask": "causal"}, ValueError, "layers.0: .*room_for_masks=True"),
    "silu": (lambda: static(activated("silu")), {}, ValueError, "layers.0: .*scheme='dynamic'"),
    "equal lengths": (lambda: encoder(), {"sequence_length": [4, 4]}, ValueError, "several, each once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_holds_is_refused(tmp_path, case):
    made, options, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        quant.export(made(), tmp_path / "a.tflite", **{"sequence_length": L} | options)
    assert not list(tmp_path.iterdir())


def test_several_lengths_are_of_tflite_alone(tmp_path):
    with pytest.raises(ValueError, match=r"must be one number but for a \.tflite"):
        quant.export(encoder().layers[0].attention, tmp_path / "a.c", sequence_length=[4, 9])


def test_room_for_masks_is_of_static_scores():
    with pytest.raises(ValueError, match="room_for_masks must be left out for scheme='dynamic'"):
        quant.quantize(encoder(), scheme="dynamic", room_for_masks=True)
