"""One model of several schemes, ranges that are said instead of seen, and halves that no static form is of."""
import warnings

import numpy as np
import pytest
from arrays import numbers as random
from click.testing import CliRunner
from whole_models import E, encoder
from workbench import random_input, random_layer

import edgeattn
import quant
from edgeattn.layers import FeedForward, Linear, MultiHeadAttention, TransformerEncoder
from edgeattn.layers.dynamic_linear import DynamicLinear
from edgeattn.quantized import DynamicMultiHeadAttention, StaticFeedForward, StaticSelfAttention, TensorQuantization
from quant import cli
from quant.observers import percentile


def calibrated(made):
    return quant.calibrate(made, [random(4, 9, E)])


@pytest.fixture(scope="module")
def seen():
    return calibrated(encoder())


def kinds(made):
    return [(type(layer.attention), type(layer.feed_forward)) for layer in made.layers]


def test_each_half_has_the_scheme_it_is_given_and_the_last_pattern_counts(seen):
    made = quant.quantize(encoder(), seen, overrides={
        "*.feed_forward": "dynamic", "layers.1.*": "float32", "layers.1.attention": "dynamic"})
    assert kinds(made) == [(StaticSelfAttention, FeedForward), (DynamicMultiHeadAttention, FeedForward)]
    linears = [layer.feed_forward.linear1 for layer in made.layers]
    assert type(linears[0]) is DynamicLinear and type(linears[1]) is Linear
    made = quant.quantize(encoder(), seen, scheme="dynamic", overrides={"layers.0.attention": "static"})
    assert kinds(made)[0] == (StaticSelfAttention, FeedForward)
    assert kinds(quant.quantize(encoder(), seen, attention="float32", overrides={"layers.0.attention": "static"})) == [
        (StaticSelfAttention, StaticFeedForward), (MultiHeadAttention, StaticFeedForward)]


def test_a_mixture_is_saved_and_computes_as_its_halves_do(seen, tmp_path):
    made, x = quant.quantize(encoder(), seen, overrides={"*.feed_forward": "dynamic"}), random(2, 9, E)
    edgeattn.save(made, tmp_path / "encoder.safetensors")
    np.testing.assert_array_equal(edgeattn.load(tmp_path / "encoder.safetensors")(x), made(x))
    static, dynamic = quant.quantize(encoder(), seen), quant.quantize(encoder(), scheme="dynamic")
    report = quant.compare(encoder(), made, [x])
    for i, (of, part) in enumerate([(static, "attention"), (dynamic, "feed_forward")] * 2):
        name = f"layers.{i // 2}.{part}"
        # a calibration says which inputs of dynamic halves stay float32: here others than random tokens say
        assert report.alone[name].sqnr_db == pytest.approx(
            quant.compare(encoder(), of, [x]).alone[name].sqnr_db, abs=0 if part == "attention" else 1)


def test_a_report_says_which_halves_to_make_dynamic():
    made, x = encoder(norm_first=True), random(4, 9, E)
    x[..., 5] *= 40
    x, seen = [x], quant.calibrate(made, [x])
    static = quant.compare(made, quant.quantize(made, seen), x)
    loss = 1 - static.cosines.mean
    chosen = static.overrides(1 - loss / 2)
    assert set(chosen.values()) == {"dynamic"} and list(chosen) == list(static.shares())[:len(chosen)]
    assert 0 < len(chosen) < 4 and static.overrides(static.cosines.mean) == {} and len(static.overrides(1)) == 4
    for wrong, error in ((2, ValueError), (-0.1, ValueError), (np.nan, ValueError), ("0.99", TypeError), (True, TypeError)):
        with pytest.raises(error, match="cosine must"):
            static.overrides(wrong)
    mixed = quant.compare(made, quant.quantize(made, seen, overrides=chosen), x)
    assert 1 - mixed.cosines.mean < 0.75 * loss
    assert any("overrides=report.overrides() makes" in lint for lint in static.lints) == (static.cosines.mean < 0.999)


def test_what_has_no_static_form_stays_float32_and_is_named():
    part = encoder(rotary=edgeattn.RotaryEmbedding(8)).layers[1]
    made = TransformerEncoder([encoder().layers[0], part])
    with pytest.warns(UserWarning, match=r"layers\.1\.attention stays float32: layer must have no rotary.*overrides="):
        found = quant.quantize(made, calibrated(made))
    assert kinds(found) == [(StaticSelfAttention, StaticFeedForward), (MultiHeadAttention, StaticFeedForward)]
    assert np.isfinite(found(random(2, 5, E))).all()
    with pytest.raises(ValueError, match=r"^layers\.1\.attention: layer must have no rotary"):
        quant.quantize(made, calibrated(made), overrides={"layers.1.attention": "static"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quant.quantize(made, calibrated(made), overrides={"layers.1.attention": "dynamic"})
    assert kinds(found)[1] == (DynamicMultiHeadAttention, StaticFeedForward)


def test_ranges_of_a_layer():
    layer, x = random_layer(1), random_input(0, 2, 9, 32)
    calibration = quant.calibrate(layer, [x])
    plain, made = quant.quantize(layer, calibration), quant.quantize(layer, calibration, overrides={
        "context": (np.float32(-1), np.int64(2)), "out*": ("percentile", 0.05), "value": (-3, 1), "scores": (-4.0, 5.0)})
    assert made.tensors["context"] == TensorQuantization.over(-1, 2)
    assert made.tensors["output"] == TensorQuantization.over(
        *percentile(calibration.statistics["output"], tail=0.05)) != plain.tensors["output"]
    assert made.tensors["value"] == TensorQuantization(3 / 127, 0)
    assert made.tensors["scores"] == TensorQuantization.over(-4, 5)
    assert made.tensors["query"] == plain.tensors["query"] and calibration.rules == {}
    assert quant.quantize(layer, calibration, overrides={"*": "mse"}).tensors == quant.quantize(
        layer, quant.calibrate(layer, [x], observer="mse")).tensors


def test_ranges_of_attention_in_an_encoder(seen):
    made = quant.quantize(encoder(), seen, overrides={"layers.*.attention.context": (-1, 2)})
    plain = quant.quantize(encoder(), seen)
    for layer, other in zip(made.layers, plain.layers, strict=True):
        of, without = layer.attention.attention.tensors, other.attention.attention.tensors
        assert {name for name in of if of[name] != without[name]} == {"context"}
        assert of["context"] == TensorQuantization.over(-1, 2)


def layer_of(overrides, **options):
    layer = random_layer(1)
    return quant.quantize(layer, quant.calibrate(layer, [random_input(0, 2, 9, 32)]), overrides=overrides, **options)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: layer_of(3), TypeError, "overrides must be a mapping from names"),
    (lambda: layer_of({"logits": "mse"}), ValueError, "must name tensors that there are, query_input.*got 'logits'"),
    (lambda: layer_of({3: "mse"}), ValueError, "got 3"),
    (lambda: layer_of({"scores": "dynamic"}), ValueError, "overrides of scores must be one of 'minmax'"),
    (lambda: layer_of({"scores": (2, 1)}), ValueError, r"overrides of scores must be .* or \(low, high\) .*; got \(2, 1\)"),
    (lambda: layer_of({"scores": (0, np.inf)}), ValueError, "overrides of scores"),
    (lambda: layer_of({"scores": ("percentile", 0.5)}), ValueError, "overrides of scores"),
    (lambda: layer_of({"scores": ("mse", 0.1)}), ValueError, "overrides of scores"),
    (lambda: quant.quantize(random_layer(1), scheme="dynamic", overrides={"scores": "mse"}), ValueError,
     "overrides must be left out for scheme='dynamic' of a layer"),
    (lambda: quant.quantize(encoder(), scheme="dynamic", overrides={"layers.7.attention": "static"}), ValueError,
     r"must name halves of layers that there are, layers\.0\.attention, .*got 'layers.7.attention'"),
    (lambda: quant.quantize(encoder(), scheme="dynamic", overrides={"layers.0.attention": "int4"}), ValueError,
     "overrides of layers.0.attention must be one of 'static', 'dynamic', 'float32'; got 'int4'"),
    (lambda: quant.quantize(encoder(), scheme="dynamic", overrides={"*.scores": "mse"}), ValueError,
     r"overrides of ranges need a quant.ModelCalibration; got \*.scores without one, .*'static', 'dynamic'"),
    (lambda: quant.quantize(encoder(), calibrated(encoder()), overrides={"*.scores": (2, 1)}), ValueError,
     r"overrides of layers\.0\.attention\.scores must be"),
    (lambda: layer_of({"scores": (-10**400, 1)}), ValueError, "overrides of scores must be .* within 2"),
    (lambda: quant.quantize(encoder(), scheme="dynamic", overrides={"layers.0.attention": "static"}), TypeError,
     "calibration must be a quant.ModelCalibration"),
    (lambda: quant.quantize(encoder(), calibrated(encoder()), overrides={"layers.0.attention.query_input": "mse"}),
     ValueError, "must name tensors of attention that there are"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_command_takes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edgeattn.save(encoder(), "e.safetensors")
    calibrated(encoder()).save("c.safetensors")
    words = ["quantize", "e.safetensors", "c.safetensors", "-o", "i.safetensors", "--scheme", "static"]
    options = ["layers.*.feed_forward=dynamic", "*.context=-1:2", "*.output=percentile:0.01"]
    result = CliRunner().invoke(cli.commands, words + [part for each in options for part in ("--override", each)])
    assert result.exit_code == 0, result.output
    made = edgeattn.load("i.safetensors")
    assert kinds(made)[1] == (StaticSelfAttention, FeedForward)
    assert made.layers[0].attention.attention.tensors["context"] == TensorQuantization.over(-1, 2)
    for wrong, said in (("context", "must be NAME=VALUE"), ("a=1:x", "percentile:SHARE or LOW:HIGH"),
                        ("*.context=2:1", "or LOW:HIGH with low below high, within 2**65; got 2.0:1.0"),
                        ("*.context=percentile:0.5", "got percentile:0.5")):
        assert cli.main([*words, "--override", wrong]) == 2
        assert said in capsys.readouterr().err
