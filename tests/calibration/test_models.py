"""Whole encoders in the workbench: calibrations that do not depend on how the data was cut, and reports of what costs."""

import json

import numpy as np
import pytest
from arrays import numbers as random
from whole_models import E, encoder, image_encoder, text_encoder

import edgeattn
import quant
from edgeattn.layers import FeedForward, Linear, TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.dynamic_linear import DynamicLinear

IDS = np.random.default_rng(0).integers(0, 50, (7, 6))
LENGTHS = [6, 1, 3, 3, 5, 2, 6]
SEQUENCES = [row[:length] for row, length in zip(IDS, LENGTHS, strict=True)]


def equal(a, b):
    """Whether all that two calibrations hold is the same, bit for bit."""
    def same(x, y):
        return x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)

    def states(of):
        return {name: seen.to_state() for name, seen in of.attention.items()}

    attention = states(a).keys() == states(b).keys() and all(
        header == states(b)[name][0] and same(tensors, states(b)[name][1])
        for name, (header, tensors) in states(a).items())
    return (a.encoder, a.tokens) == (b.encoder, b.tokens) and attention and all(
        same(getattr(a, group), getattr(b, group)) for group in ("largest", "ranges", "large"))


def test_subclasses_are_calibrated_as_what_they_are_made_of():
    class Named(TransformerEncoder):
        pass

    made = encoder()
    assert equal(quant.calibrate(made, [random(3, E)]), quant.calibrate(Named(made.layers, norm=made.norm), [random(3, E)]))


def test_it_is_the_same_however_the_data_is_cut(tmp_path):
    model = text_encoder()
    whole = quant.calibrate(model, [SEQUENCES])
    assert whole.tokens == sum(LENGTHS)
    mask = np.arange(6) < np.array(LENGTHS)[:, None]
    assert equal(whole, quant.calibrate(model, [[row] for row in SEQUENCES]))
    assert equal(whole, quant.calibrate(model, ({"ids": IDS, "attention_mask": mask} for _ in range(1))))
    parts = [quant.calibrate(model, [SEQUENCES[i::3]]) for i in range(3)]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    assert equal(whole, merged)
    merged.save(tmp_path / "c.safetensors")
    assert equal(whole, quant.ModelCalibration.load(tmp_path / "c.safetensors"))


def test_every_batch_counts_where_shapes_come_again():
    made, batches = encoder(), [random(2, 5, E) * factor for factor in (1, 2, 4)]
    result = made(batches[0])
    seen = quant.calibrate(made, batches)
    assert seen.tokens == 30 and equal(seen, quant.calibrate(made, batches))
    assert equal(seen, quant.calibrate(made, [np.concatenate(batches)]))
    report = quant.compare(made, quant.quantize(made, seen, scheme="dynamic"), batches)
    assert report.cosines.sequences == 6
    for _ in range(2):  # and what looked on is gone
        np.testing.assert_array_equal(made(batches[0]), result)


def test_padding_does_not_count_wherever_it_stands():
    made, x = encoder(), random(3, 6, E)
    mask = np.array([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6], bool)
    x[~mask] = 1000
    seen = quant.calibrate(made, [{"x": x, "key_padding_mask": mask}])
    assert seen.tokens == mask.sum()
    assert max(array.max() for array in seen.largest.values()) < 100
    report = quant.compare(made, quant.quantize(made, seen, scheme="dynamic"), [{"x": x, "key_padding_mask": mask}])
    assert report.output.cosine > 0.999 and report.cosines.sequences == 3


def test_what_was_seen_chooses_the_inputs_that_stay_float():
    made, x = encoder(), random(4, 9, E)
    x[..., [3, 11]] *= 60
    seen = quant.calibrate(made, [x])
    with_data = quant.quantize(made, seen, scheme="dynamic")
    chosen = with_data.layers[0].feed_forward.linear1.outlier_columns
    np.testing.assert_array_equal(chosen, np.sort(np.argsort(seen.largest["layers.0.feed_forward.linear1"])[-4:]))
    without = quant.quantize(made, scheme="dynamic").layers[0].feed_forward.linear1.outlier_columns
    assert chosen.tolist() != without.tolist()


def test_calibration_of_images_and_of_layers_that_are_shared():
    model = image_encoder()
    pixels = random(3, 2, 8, 8)
    whole = quant.calibrate(model, [pixels])
    assert equal(whole, quant.calibrate(model, [pixels[:1], {"pixels": pixels[1:]}]))
    assert quant.quantize(model, whole, scheme="dynamic")(pixels).shape == (3, 4, E)
    layer = encoder().layers[0]
    twice = TransformerEncoder([layer, layer])
    seen = quant.calibrate(twice, [random(5, E)])
    assert set(seen.largest) == {"layers.0.feed_forward.linear1", "layers.0.feed_forward.linear2"}
    assert quant.quantize(twice, seen, scheme="dynamic").layers[0].feed_forward.linear1.outlier_columns.size == 4


@pytest.mark.parametrize("call, error, words", [
    (lambda: quant.calibrate(encoder(), []), ValueError, "at least one token that is no padding; got none"),
    (lambda: quant.calibrate(encoder(), [{"x": random(2, 5, E), "key_padding_mask": np.zeros((2, 5), bool)}]), ValueError,
     "at least one token that is no padding; got none"),
    (lambda: quant.calibrate(encoder(), [np.zeros((2, 0, E), np.float32)]), ValueError, "at least one token"),
    (lambda: quant.calibrate(encoder(), [random(3, E)], observer="mse"), ValueError, "observer must be left out"),
    (lambda: quant.calibrate(encoder(), [random(3, E), random(3, E + 1)]), ValueError, r"batches\[1\]: x must be"),
    (lambda: quant.calibrate(encoder(), [np.full((3, E), np.nan, np.float32)]), ValueError, r"batches\[0\] holds NaN"),
    (lambda: quant.calibrate(encoder(), [np.full((3, E), 1e38, np.float32)]), ValueError,
     r"batches\[0\]: what layers.0.feed_forward.linear1 reads leaves the range"),
    (lambda: quant.calibrate(encoder(), {"x": random(3, E)}), TypeError, "put a single batch"),
    (lambda: quant.calibrate(encoder(), [{"x": random(3, E), "kv_cache": 1}]), ValueError, r"batches\[0\] must be what"),
    (lambda: quant.calibrate(text_encoder(), [[[1, 99]]]), ValueError, r"batches\[0\]: ids must lie between 0 and 49"),
    (lambda: quant.calibrate(text_encoder(), ["a text"]), TypeError, r"batches\[0\] must be a list of texts"),
    (lambda: quant.calibrate(text_encoder(), [["a text"]]), ValueError, r"batches\[0\]: this TextEncoder has no tok"),
    (lambda: quant.quantize(encoder(), quant.calibrate(encoder(seed=5), [random(3, E)]), scheme="dynamic"), ValueError,
     "calibration was made with another encoder"),
    (lambda: quant.quantize(encoder().layers[0], scheme="dynamic"), TypeError,
     r"layer must be a float .*; got TransformerEncoderLayer; TransformerEncoder\(\[layer\]\) is the encoder of it$"),
    (lambda: quant.export(encoder().layers[0], "a.tflite", sequence_length=3), TypeError,
     r"layer must be .*; got TransformerEncoderLayer; TransformerEncoder\(\[layer\]\) is the encoder of it$"),
    (lambda: quant.quantize(encoder(), 7, scheme="dynamic"), TypeError, "must be a quant.ModelCalibration"),
    (lambda: quant.calibrate(encoder(), [random(3, E)]).merge(7), TypeError, "other must be a quant.ModelCalibration"),
    (lambda: quant.calibrate(encoder(), [random(3, E)]).merge(quant.calibrate(encoder(seed=5), [random(3, E)])),
     ValueError, "different encoders"),
    (lambda: quant.compare(encoder(), quant.quantize(encoder(seed=5), scheme="dynamic"), [random(3, E)]), ValueError,
     r"quantized does not belong to .*layers\[0\].attention|layers\[0\].attention.*quantized does not belong"),
    (lambda: quant.compare(text_encoder(), quant.quantize(text_encoder(pooling="cls"), scheme="dynamic"), [[[1]]]),
     ValueError, "its pooling differs"),
    (lambda: quant.compare(text_encoder(), quant.quantize(encoder(), scheme="dynamic"), [[[1]]]), TypeError,
     "quantized must be a TextEncoder"),
    *[(lambda name=name: quant.export(text_encoder(), name), TypeError, "got a TextEncoder, which only .*files hold whole")
      for name in ("a.tflite", "a.c")],
    *[(lambda batches=batches: quant.compare(encoder(), quant.quantize(encoder(), scheme="dynamic"), batches), ValueError,
       "at least one token that is no padding; got none") for batches in (
        [], [np.zeros((2, 0, E), np.float32)], [{"x": random(2, 5, E), "key_padding_mask": np.zeros((2, 5), bool)}])],
    (lambda: quant.calibrate(quant.quantize(encoder(), scheme="dynamic"), [random(3, E)]), TypeError,
     r"model must be a float one; got layers\[0\]"),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("change, words", [
    (lambda header, tensors: header.update(format=9), "its format must be 2"),
    (lambda header, tensors: header.update(tokens=0), "tokens must be a positive integer"),
    (lambda header, tensors: tensors["largest/layers.0.feed_forward.linear1"].__setitem__(0, np.nan),
     "linear1 must be largest with 1 axes of float32"),
    (lambda header, tensors: tensors.update({"ranges/a": np.zeros((3, 2), np.float32)}), "a must be ranges"),
    (lambda header, tensors: tensors.pop("attention/layers.0.attention/query.range"), "it must hold"),
    (lambda header, tensors: tensors.update({"others/a": np.zeros(2, np.float32)}), "others"),
    (lambda header, tensors: header.pop("attention"), "attention"),
])
def test_damaged_calibrations_are_refused_by_name(change, words, tmp_path):
    import safetensors
    import safetensors.numpy
    path, made = tmp_path / "c.safetensors", quant.calibrate(encoder(), [random(3, E)])
    made.save(path)
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["quant.model_calibration"])
    change(header, tensors)
    path.write_bytes(safetensors.numpy.save(tensors, {"quant.model_calibration": json.dumps(header)}))
    with pytest.raises(ValueError, match=f"c.safetensors.*{words}"):
        quant.ModelCalibration.load(path)
    with pytest.raises(ValueError, match=r"c.safetensors"):
        quant.Calibration.load(path)


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"gate": True}])
def test_a_report_says_which_part_costs_what(settings):
    made, x = encoder(**settings), [random(3, 9, E), random(5, E)]
    int8 = quant.quantize(made, scheme="dynamic")
    report = quant.compare(made, int8, x)
    parts = [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "feed_forward")]
    assert list(report.alone) == list(report.so_far) == parts
    # the first is both, and the last part is the result
    assert report.alone[parts[0]] == report.so_far[parts[0]]
    assert report.so_far[parts[-1]].sqnr_db == pytest.approx(report.output.sqnr_db)
    results = [(made(each).reshape(-1, 9 if each.ndim == 3 else 5, E), int8(each)) for each in x]
    cosines = [float(np.dot(a.ravel(), b.ravel()) / np.linalg.norm(a) / np.linalg.norm(b))
               for real, got in results for a, b in zip(real, got.reshape(real.shape), strict=True)]
    assert report.cosines.sequences == 4
    assert (report.cosines.mean, report.cosines.minimum) == pytest.approx((np.mean(cosines), min(cosines)), abs=1e-6)
    shares = report.shares()
    assert sum(shares.values()) == pytest.approx(1) and list(shares.values()) == sorted(shares.values(), reverse=True)
    text = str(report)
    assert sorted(parts, key=text.index) == list(shares) and f"least {report.cosines.minimum:.5f}" in str(report)
    assert [part["name"] for part in json.loads(report.to_json())["parts"]] == list(shares)


def test_weights_that_were_changed_do_not_belong():
    made = encoder()
    int8 = quant.quantize(made, scheme="dynamic", attention="float32")
    layer = int8.layers[1]
    part = layer.feed_forward.linear2
    blunt = DynamicLinear.quantized_from(Linear(np.round(part.codes / 16) * 16 * part.scale[:, None], part.bias))
    other = TransformerEncoder([int8.layers[0], TransformerEncoderLayer(
        layer.attention, FeedForward(layer.feed_forward.linear1, blunt), layer.norm1, layer.norm2)])
    with pytest.raises(ValueError, match=r"its layers\[1\].feed_forward.linear2 differs"):
        quant.compare(made, other, [random(3, 9, E)])


def test_attention_in_float_costs_nothing_and_reports_of_layers_are_json_too():
    made = encoder()
    report = quant.compare(made, quant.quantize(made, scheme="dynamic", attention="float32"), [random(3, 9, E)])
    assert report.alone["layers.1.attention"].sqnr_db == np.inf and report.alone["layers.1.feed_forward"].sqnr_db < 60
    assert json.loads(report.to_json())["parts"][-1]["alone"]["sqnr_db"] is None and not report.lints
    layer = made.layers[0].attention
    of_layer = quant.compare(layer, quant.quantize(layer, scheme="dynamic"), [random(3, 9, E)])
    assert json.loads(of_layer.to_json())["tensors"]["output"]["cosine"] > 0.99


def test_texts_are_compared_by_their_embeddings(texts_model):
    int8 = quant.quantize(texts_model, quant.calibrate(texts_model, [["a dog", "a cat sat"]]), scheme="dynamic")
    report = quant.compare(texts_model, int8, [["the dog", "a cat"], ["on the mat"]])
    real, got = (model.encode(["the dog", "a cat", "on the mat"]) for model in (texts_model, int8))
    assert report.cosines.sequences == 3
    assert report.cosines.minimum == pytest.approx((real * got).sum(1).min(), abs=1e-6)


@pytest.fixture
def texts_model():
    from places import TESTS
    pytest.importorskip("tokenizers", reason="the package tokenizers, of the extra `text`, is not installed")
    return edgeattn.from_pretrained(TESTS / "models" / "golden" / "sentence-transformer")
