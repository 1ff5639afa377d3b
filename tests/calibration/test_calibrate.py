"""What calibration remembers, refuses, and writes to files."""
import json
import warnings

import numpy as np
import pytest
import safetensors.numpy
import whole_models
from arrays import cosine
from workbench import as_batch, random_call, random_input, random_layer

import edgeattn
import quant
from quant.calibration import Calibration, fingerprint
from quant.observers import OBSERVERS


def assert_same(a, b):
    assert (a.layer, a.observer, a.sources, a.lowest_row_maximum, a.masked) == (
        b.layer, b.observer, b.sources, b.lowest_row_maximum, b.masked)
    assert list(a.statistics) == list(b.statistics)
    for s, t in zip((*a.statistics.values(), a.single_scores), (*b.statistics.values(), b.single_scores), strict=True):
        assert (s.minimum, s.maximum, s.exponent) == (t.minimum, t.maximum, t.exponent)
        np.testing.assert_array_equal(s.histogram, t.histogram)


@pytest.fixture(scope="module")
def layer():
    return random_layer(1)


def test_ranges_are_those_of_the_layer(layer):
    x = random_input(0, 3, 2, 7, 32)
    calibration = quant.calibrate(layer, x)
    assert calibration.sources == (0, 0, 0)
    assert not calibration.masked
    rows = x.reshape(-1, 32).astype(np.float64)
    for name, values in (("query_input", rows), ("query", rows @ layer.q_weight.T + layer.q_bias),
                         ("key", rows @ layer.k_weight.T),
                         ("value", rows @ layer.v_weight.T + layer.v_bias), ("output", layer(x.reshape(6, 7, 32)))):
        assert calibration.range(name) == pytest.approx((values.min(), values.max()), rel=1e-4)
    scores = np.concatenate([
        (layer.q_weight @ b.T + layer.q_bias[:, None]).reshape(4, 8, 7).transpose(0, 2, 1)
        @ (layer.k_weight @ b.T).reshape(4, 8, 7) / np.sqrt(8) for b in x.reshape(6, 7, 32)])
    assert calibration.range("scores") == pytest.approx((scores.min(), scores.max()), rel=1e-4)
    assert calibration.lowest_row_maximum == pytest.approx(scores.max(-1).min(), rel=1e-4)
    low, high = calibration.range("key", symmetric=True)
    assert -low == high == max(map(abs, calibration.range("key")))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("sources", [(0, 0, 0), (0, 1, 1), (0, 1, 2)])
def test_merging_equals_calibrating_on_everything(observer, sources):
    layer = random_layer(2, kdim=20 if sources[1] else None, vdim={2: 24, 1: 20}.get(sources[2]))
    batches = [as_batch(random_call(layer, sources, seed), is_causal=seed == 2, causal_alignment="lower_right")
               for seed in range(4)]
    calibrations = [quant.calibrate(layer, [batch], observer=observer) for batch in batches]
    together = quant.calibrate(layer, batches, observer=observer)
    first = calibrations[0].merge(calibrations[1]).merge(calibrations[2].merge(calibrations[3]))
    last = calibrations[3].merge(calibrations[2]).merge(calibrations[1]).merge(calibrations[0])
    assert_same(first, together)
    assert_same(last, together)
    assert together.sources == sources
    assert together.masked


def test_batches_may_lack_the_batch_axis(layer):
    x = random_input(3, 1, 7, 32)
    padding = np.arange(7) < 5
    assert_same(quant.calibrate(layer, [{"query": x[0], "key_padding_mask": padding}]),
                quant.calibrate(layer, [{"query": x, "key_padding_mask": padding[None]}]))
    assert_same(quant.calibrate(layer, x), quant.calibrate(layer, [x.astype(np.float64)]))


@pytest.mark.parametrize("masks", [
    {"attn_mask": np.arange(9) < 4}, {"key_padding_mask": np.tile(np.arange(9) < 4, (2, 1))},
])
def test_what_no_query_sees_does_not_count(masks):
    layer = random_layer(3)
    query, key, value = random_call(layer, (0, 1, 2))
    expected = quant.calibrate(layer, [as_batch((query, key[:, :4], value[:, :4]))])
    key[:, 4:], value[:, 4:] = 1e6, -1e6
    got = quant.calibrate(layer, [as_batch((query, key, value), **masks)])
    assert got.masked
    for name in expected.statistics:
        assert got.range(name) == pytest.approx(expected.range(name), rel=1e-5), name
    assert got.lowest_row_maximum == pytest.approx(expected.lowest_row_maximum, rel=1e-5)


# Where a token is padding: as a key alone, by key_padding_mask; as key and query, by attn_mask.
PADDED = {"by keys": lambda real: {"key_padding_mask": real},
          "by both": lambda real: {"attn_mask": real[:, None, :, None] & real[:, None, None, :]}}


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("masks", PADDED.values(), ids=PADDED)
def test_padding_counts_nowhere(layer, observer, masks):
    x, lengths = random_input(0, 5, 9, 32), np.array([2, 9, 4, 3, 7])
    real = np.arange(9) < lengths[:, None]
    alone = quant.calibrate(layer, [{"query": one[:n], "attn_mask": np.ones((n, n), bool)}
                                    for one, n in zip(x, lengths, strict=True)], observer=observer)
    x[~real] = random_input(1, int((~real).sum()), 32) * 50
    padded = quant.calibrate(layer, [{"query": x, **masks(real)}], observer=observer)
    for name, s in alone.statistics.items():
        t = padded.statistics[name]
        assert (s.count, s.exponent) == (t.count, t.exponent), name
        assert np.abs(s.histogram - t.histogram).sum() <= 8, name  # products round otherwise at another length
        assert padded.range(name) == pytest.approx(alone.range(name), rel=1e-2), name
    assert padded.lowest_row_maximum == pytest.approx(alone.lowest_row_maximum, rel=1e-5)


def test_queries_without_a_key_do_not_count(layer):
    x, mask = random_input(0, 2, 7, 32), np.ones((2, 1, 7, 7), bool)
    mask[0, 0, 2], mask[1, 0, 5] = False, False
    query, key = x.copy(), random_input(1, 2, 7, 32)
    expected = quant.calibrate(layer, [{"query": np.delete(query[0], 2, 0), "key": key[0]},
                                       {"query": np.delete(query[1], 5, 0), "key": key[1]}])
    query[0, 2], query[1, 5] = 1e4, -1e4
    got = quant.calibrate(layer, [{"query": query, "key": key, "attn_mask": mask}])
    for name in expected.statistics:
        assert got.statistics[name].count == expected.statistics[name].count, name
        assert got.range(name) == pytest.approx(expected.range(name), rel=1e-5), name


def test_what_only_asks_counts(layer):
    # no query sees the last token, itself least of all, but what it sees is a result; so is what a padded key's query is
    x, strict = random_input(0, 2, 7, 32), np.tri(7, k=-1, dtype=bool)
    x[:, 6] *= 50
    got = quant.calibrate(layer, [{"query": x, "attn_mask": strict}])
    assert got.range("query_input")[1] == x.max()
    assert got.range("key")[1] < 50 < got.range("query")[1]
    got = quant.calibrate(layer, [{"query": x, "key": x.copy(), "key_padding_mask": np.tile(np.arange(7) < 3, (2, 1))}])
    assert got.range("query_input")[1] == x.max()
    assert got.statistics["output"].count == x.size


def test_rows_with_a_single_key_say_nothing_of_scores(layer):
    x = random_input(0, 2, 7, 32)
    expected = quant.calibrate(layer, [{"query": x, "is_causal": True}])
    steep = x.copy()
    steep[:, 0] *= 30  # sees itself alone, and others see it
    mask = np.tri(7, dtype=bool)
    mask[1:, 0] = False
    got = quant.calibrate(layer, [{"query": steep, "attn_mask": mask}])
    assert got.single_scores.count == 2 * 4 * 2  # the first token, and the second
    assert got.statistics["scores"].count == 2 * 4 * (2 + 3 + 4 + 5 + 6)
    assert max(map(abs, got.range("scores"))) < 1.5 * max(map(abs, expected.range("scores")))
    assert max(abs(got.single_scores.minimum), abs(got.single_scores.maximum)) > 100
    assert got.lowest_row_maximum > -10


@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_single_keys_are_taken_where_there_are_no_others(tmp_path, layer, masked):
    x = random_input(0, 5, 1, 32)
    alone = quant.calibrate(layer, [{"query": x, "is_causal": True} if masked else x])
    assert alone.lowest_row_maximum == np.inf
    alone.save(tmp_path / "c.safetensors")
    assert_same(Calibration.load(tmp_path / "c.safetensors"), alone)
    assert alone.range("scores") == (min(alone.single_scores.minimum, 0), max(alone.single_scores.maximum, 0))
    q = quant.quantize(layer, alone)
    assert cosine(q(x), layer(x)) > 0.998
    more = quant.calibrate(layer, [random_input(1, 2, 7, 32)])
    assert_same(alone.merge(more), more.merge(alone))
    assert alone.merge(more).range("scores") == more.range("scores")


def test_rows_without_a_key_do_not_set_the_lowest_maximum(layer):
    mask = np.ones((7, 7), bool)
    mask[2] = False
    calibration = quant.calibrate(layer, [{"query": random_input(0, 2, 7, 32), "attn_mask": mask}])
    assert np.isfinite(calibration.lowest_row_maximum)
    assert calibration.statistics["scores"].count == 2 * 4 * 6 * 7


def test_grouped_heads_are_seen_once_per_query_head():
    layer = random_layer(4, Hkv=2)
    x = random_input(0, 1, 5, 32)
    assert quant.calibrate(layer, [x]).statistics["key"].count == 5 * 4 * 8


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e12])
def test_tiny_zero_and_huge_inputs(scale):
    layer = random_layer(5, bias=False)
    calibration = quant.calibrate(layer, [random_input(0, 2, 6, 32) * np.float32(scale)])
    for name in calibration.statistics:
        low, high = calibration.range(name)
        assert low <= 0 <= high
    assert np.isfinite(calibration.lowest_row_maximum)


BAD = [
    (lambda x: [], ValueError, "batches must hold at least one batch; got none"),
    (lambda x: x[:, :0], ValueError, "at least one query with a permitted key; got none"),
    (lambda x: [{"query": x[0], "attn_mask": np.zeros((7, 7), bool)}], ValueError, "with a permitted key; got none"),
    (lambda x: {"query": x[0]}, TypeError, "batches must be an iterable of batches; got dict .*into a list"),
    (lambda x: 3, TypeError, "batches must be an iterable of batches; got int"),
    (lambda x: x[0, 0], ValueError, r"query of batches\[0\] must be \(B, L, E\) or \(L, E\); got shape \(\)"),
    (lambda x: [x[0], x[0].astype(np.int8)], TypeError, r"query of batches\[1\] must be a float array; got int8"),
    (lambda x: [x[0] + np.float32(np.nan)], ValueError, r"query of batches\[0\] holds NaN or infinite values"),
    (lambda x: [x[0], x[0] * np.float32(np.inf)], ValueError, r"query of batches\[1\] holds NaN or infinite"),
    (lambda x: [x[0].astype(np.float64) * 1e200], ValueError, "or values beyond float32"),
    (lambda x: [x[0] * np.float32(1e25)], ValueError, r"batches\[0\]: the layer's scores leaves the range of float32"),
    (lambda x: [x[0, :, :31]], ValueError, r"query of batches\[0\] must have 32 features .* got shape \(7, 31\)"),
    (lambda x: [{"key": x[0]}], ValueError, r"batches\[0\] must be an array or a mapping with 'query'"),
    (lambda x: [{"query": x[0], "mask": 1}], ValueError, r"batches\[0\] must be .* got \['mask', 'query'\]"),
    (lambda x: [{"query": x[0], "value": x[0]}], ValueError, r"batches\[0\] has a value without a key"),
    (lambda x: [{"query": x[:2], "key": x[:1]}], ValueError, r"batches\[0\]: query, key and value must share"),
    (lambda x: [{"query": x[:1], "key": x[0]}], ValueError, r"batches\[0\]: query, key and value must share"),
    (lambda x: [{"query": x[0], "key": x[0], "value": x[0, :3]}], ValueError, "and key and value their length"),
    (lambda x: [{"query": x[0], "attn_mask": np.zeros((7, 7), np.float32)}], TypeError,
     r"attn_mask of batches\[0\] must be bool \(True = attend\) for static int8; got float32; a layer of scheme='dynamic' adds"),
    (lambda x: [{"query": x[0], "attn_mask": np.ones((6, 7), bool)}], ValueError,
     r"batches\[0\]: attn_mask must broadcast"),
    (lambda x: [{"query": x[:2], "key_padding_mask": np.ones(7, bool)}], ValueError,
     r"batches\[0\]: key_padding_mask must have shape"),
    (lambda x: [{"query": x[0], "key": x[0, :3], "is_causal": True}], ValueError, r"batches\[0\]: causal_alignment"),
    (lambda x: [x[0], {"query": x[0], "key": x[1]}], ValueError,
     r"batches\[1\] calls the layer with a query and a key, the batches before with a query alone"),
]


@pytest.mark.parametrize("make,error,match", BAD)
def test_bad_batches_are_refused(layer, make, error, match):
    with pytest.raises(error, match=match):
        quant.calibrate(layer, make(random_input(0, 3, 7, 32)))


def test_other_arguments_are_refused(layer):
    with pytest.raises(TypeError, match="layer must be a float MultiHeadAttention, TransformerEncoder, .*; got int"):
        quant.calibrate(3, [])
    with pytest.raises(ValueError, match="observer must be one of 'minmax', 'percentile', 'mse'; got 'max'"):
        quant.calibrate(layer, [], observer="max")


def test_only_like_calibrations_merge(layer):
    x = random_input(0, 2, 7, 32)
    calibration = quant.calibrate(layer, x)
    with pytest.raises(TypeError, match="other must be a quant.Calibration; got ndarray"):
        calibration.merge(x)
    with pytest.raises(ValueError, match="cannot merge calibrations of different layers"):
        calibration.merge(quant.calibrate(random_layer(9), x))
    with pytest.raises(ValueError, match="different observers, 'minmax' and 'mse'"):
        calibration.merge(quant.calibrate(layer, x, observer="mse"))
    with pytest.raises(ValueError, match="with a query alone and with a query and a key"):
        calibration.merge(quant.calibrate(layer, [{"query": x[0], "key": x[1]}]))


def test_fingerprints_tell_layers_apart(layer):
    config, tensors = layer.to_state()
    prints = {fingerprint(layer)}
    for name, array in tensors.items():
        changed = array.copy()
        changed.flat[3] += 1
        prints.add(fingerprint(edgeattn.MultiHeadAttention(4, **{**tensors, name: changed})))
    prints.add(fingerprint(edgeattn.MultiHeadAttention(2, **tensors)))
    prints.add(fingerprint(edgeattn.MultiHeadAttention(4, **{**tensors, "q_bias": None})))
    assert len(prints) == len(tensors) + 3
    assert fingerprint(edgeattn.MultiHeadAttention(4, **tensors)) == fingerprint(layer)


# -- files -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("output", [True, False])
def test_calibrations_round_trip(tmp_path, observer, output):
    layer = random_layer(6, output=output)
    calibration = quant.calibrate(layer, [as_batch(random_call(layer, (0, 1, 2)), is_causal=True,
                                                   causal_alignment="upper_left")], observer=observer)
    path = tmp_path / "c.safetensors"
    calibration.save(str(path))
    loaded = Calibration.load(path)
    assert_same(loaded, calibration)
    for name in calibration.statistics:
        assert loaded.range(name) == calibration.range(name)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    quant.quantize(layer, loaded)


def saved(tmp_path, layer):
    path = tmp_path / "c.safetensors"
    quant.calibrate(layer, random_input(0, 2, 7, 32)).save(path)
    return path


def test_truncated_and_foreign_files_are_refused(tmp_path, layer):
    path = saved(tmp_path, layer)
    whole = path.read_bytes()
    for size in [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="c.safetensors is not a whole calibration"):
            Calibration.load(path)
    edgeattn.save(layer, path)
    with pytest.raises(ValueError, match="not a whole calibration.*its metadata name no calibration"):
        Calibration.load(path)
    path.write_bytes(b"{}" * 30)
    with pytest.raises(ValueError, match="c.safetensors is not a whole calibration"):
        Calibration.load(path)
    with pytest.raises(OSError, match="nowhere"):
        Calibration.load(tmp_path / "nowhere.safetensors")


LIES = [
    (lambda h, t: h.update(format=1), "its format must be 2: calibrate again"),
    (lambda h, t: h.update(sources=[0, 1, 0]), "unknown sources"),
    (lambda h, t: h.update(sources=3), "not a whole calibration"),
    (lambda h, t: h.update(observer="max"), "unknown sources .* or observer 'max'"),
    (lambda h, t: h.pop("layer"), "'layer'"),
    (lambda h, t: h.update(masked=1), "masked must be true or false"),
    (lambda h, t: h.update(lowest_row_maximum=None), "lowest_row_maximum must be a finite number"),
    (lambda h, t: h.update(lowest_row_maximum=float("nan")), "lowest_row_maximum must be a finite number"),
    (lambda h, t: t.pop("key.range"), "it must hold"),
    (lambda h, t: t.update(more=np.zeros(3)), "it must hold"),
    (lambda h, t: t.update({"key.range": np.zeros(3, np.float32)}), "key.range must be a minimum"),
    (lambda h, t: t.update({"key.range": np.array([2.0, 1.0, 5])}), "key.range is no range of its histogram"),
    (lambda h, t: t.update({"key.range": np.array([np.nan, 1.0, 5])}), "key.range is no range of its histogram"),
    (lambda h, t: t.update({"key.range": np.array([0, 9.0, 2])}), "key.range is no range of its histogram"),
    (lambda h, t: t.update({"key.histogram": np.zeros(5, np.int64)}), "key.histogram must be 2048 counts"),
    (lambda h, t: t.update({"key.histogram": np.full(2048, -1)}), "key.histogram must be 2048 counts"),
]


@pytest.mark.parametrize("lie,match", LIES)
def test_lying_files_are_refused(tmp_path, layer, lie, match):
    path = saved(tmp_path, layer)
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["quant.calibration"])
    lie(header, tensors)
    safetensors.numpy.save_file(tensors, path, {"quant.calibration": json.dumps(header)})
    with pytest.raises(ValueError, match=match) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_saving_is_whole_or_not_at_all(tmp_path, layer, monkeypatch):
    path = saved(tmp_path, layer)
    before = path.read_bytes()
    calibration = quant.calibrate(layer, random_input(5, 1, 7, 32))
    with pytest.raises(ValueError, match=r"path must end in .safetensors; got .*c.json"):
        calibration.save(tmp_path / "c.json")
    with pytest.raises(OSError, match="No such file or directory"):
        calibration.save(tmp_path / "nowhere" / "c.safetensors")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        calibration.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_data_of_one_token_is_named(layer):
    x = random_input(0, 2, 9, 32)
    constant = np.broadcast_to(x[:1, :1], x.shape).copy()
    for made, name in ((layer, "query"), (whole_models.encoder(), "x")):
        with pytest.warns(UserWarning, match="batches hold one token again and again, .* calibrate on samples"):
            seen = quant.calibrate(made, [{name: constant}, constant])
        int8 = quant.quantize(made, seen)
        assert np.isfinite(int8(x)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quant.calibrate(made, [constant, x])
            quant.calibrate(made, [np.zeros_like(x)])  # nothing is wrong with zeros that nothing else is said of
    assert "saturation" in str(quant.compare(layer, quant.quantize(layer, quant.calibrate(layer, [0.1 * x])), [x]).lints)
