"""Layers and whole encoders as ONNX models, carried out by onnx's own evaluator, or by onnxruntime where it is."""

import builtins

import numpy as np
import pytest
from arrays import cosine
from arrays import numbers as random
from static_cases import make
from test_export_encoders import CAUSAL, PADDED, SETTINGS, L, activated, data, static, window, with_mask
from tflite_graphs import random_scaling
from whole_models import E, encoder, text_encoder
from workbench import random_input, random_layer

import edgeattn
import quant
from edgeattn.executors.numpy import NumpyOps
from edgeattn.layers import TransformerEncoder, TransformerEncoderLayer
from edgeattn.quantized import Requantize, SelectMask, StaticFeedForward, StaticSelfAttention, TensorQuantization

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")

OPSETS = (17, 18, 20, 23)


def evaluated(path, *inputs):
    from onnx.reference import ReferenceEvaluator
    names = [value.name for value in onnx.load(path).graph.input]
    return ReferenceEvaluator(str(path)).run(None, dict(zip(names, inputs, strict=True)))[0]


def in_onnxruntime(path, *inputs):
    """`make test-published` has it."""
    runtime = pytest.importorskip("onnxruntime", reason="make test-published installs it")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip((value.name for value in session.get_inputs()), inputs, strict=True)))[0]


RUNS = {"onnx": evaluated, "onnxruntime": in_onnxruntime}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@each_run
@pytest.mark.parametrize("settings", SETTINGS)
def test_float32_is_the_encoder(tmp_path, run, settings):
    made = encoder(**SETTINGS[settings])
    for opset in OPSETS:
        free = quant.export(made, tmp_path / "a.onnx", opset=opset)
        for shape in ((2, L), (3, 5)):  # one file for any
            x = data(*shape)
            np.testing.assert_allclose(run(free, x), made(x), atol=1e-5)
    x = data(2, L)
    for opset in (17, 23):
        path = quant.export(made, tmp_path / "a.onnx", batch=2, sequence_length=L, mask="causal", opset=opset)
        np.testing.assert_allclose(run(path, x), made(x, is_causal=True), atol=1e-5)


@each_run
@pytest.mark.parametrize("kind", ["relu", "gelu_tanh", "silu"])
def test_activations(tmp_path, run, kind):
    made, x = activated(kind), data(2, L)
    for opset in (17, 20):
        np.testing.assert_allclose(run(quant.export(made, tmp_path / "a.onnx", opset=opset), x), made(x), atol=1e-5)


@each_run
def test_windows_shared_heads_and_rms_norms(tmp_path, run):
    weights = [random(n, E, seed=n) / 6 for n in (E, 16, 16, E)]
    layer = window(encoder()).layers[0]
    made = TransformerEncoder([TransformerEncoderLayer(
        edgeattn.MultiHeadAttention(4, *weights, num_kv_heads=2), layer.feed_forward,
        edgeattn.RMSNorm(np.ones(E)), None, window_size=(1, 1))], norm=layer.norm1)
    x = data(2, L)
    for opset in (17, 18, 23):
        path = quant.export(made, tmp_path / "a.onnx", batch=2, sequence_length=L, opset=opset)
        np.testing.assert_allclose(run(path, x), made(x), atol=1e-5)


@each_run
@pytest.mark.parametrize("settings", SETTINGS)
def test_static_int8_is_near_ours(tmp_path, run, settings):
    """Sums are exact there too; exponentials and roundings of halves are not ours."""
    made = static(activated("gelu", **SETTINGS[settings]), room_for_masks=True)
    x = data(2, L)
    for opset in (17 if run is in_onnxruntime else 20, 23):  # onnx's own evaluator has DequantizeLinear from 19 on
        free = quant.export(made, tmp_path / "a.onnx", opset=opset)
        assert cosine(run(free, x), made(x)) > 0.9995
        path = quant.export(made, tmp_path / "a.onnx", sequence_length=L, batch=2, mask=CAUSAL, opset=opset)
        assert cosine(run(path, x), with_mask(made, CAUSAL)(x)) > 0.9995


@each_run
def test_padding_is_an_input(tmp_path, run):
    """As the mask of a call in float32; in static int8 as one that is written into the file. Our reader takes both."""
    x, seen = data(2, L), PADDED > 0
    plain = encoder()
    made = static(plain, room_for_masks=True)
    for opset in (20, 23):
        for each, want in ((plain, plain(x, key_padding_mask=seen)), (
                made, with_mask(made, np.broadcast_to(seen[:, None, None], (2, 1, L, L)))(x))):
            path = quant.export(each, tmp_path / "a.onnx", opset=opset, padding=True)
            found = run(path, x, PADDED)
            assert [value.name for value in onnx.load(path).graph.input] == ["input", "attention_mask"]
            assert cosine(found[seen], want[seen]) > (0.9995 if each is made else 1 - 1e-6)
    with pytest.warns(UserWarning, match="attention_mask"):
        same(state(TransformerEncoder.from_onnx(path, scheme="static")), state(made))


@each_run
def test_layers(tmp_path, run):
    """Cross-attention too; int8 within one step of the output's codes."""
    layer, x = random_layer(0), random_input(3, 2, 9, 32)
    np.testing.assert_allclose(run(quant.export(layer, tmp_path / "a.onnx"), x), layer(x), atol=1e-5)
    key = random_input(4, 2, 5, 32)
    path = quant.export(layer, tmp_path / "a.onnx", batch=2, sequence_length=9, key_length=5)
    assert [value.name for value in onnx.load(path).graph.input] == ["query_input", "key_input"]
    np.testing.assert_allclose(run(path, x, key), layer(x, key), atol=1e-5)
    calls = [{"query": random_input(seed, 3, 9, 32), "is_causal": seed % 2 == 0} for seed in range(4)]
    made = quant.quantize(layer, quant.calibrate(layer, calls))
    for mask in (None, CAUSAL):
        path = quant.export(made, tmp_path / "a.onnx", batch=2, sequence_length=9, mask=mask, opset=20)
        want = (made if mask is None else made.with_mask(mask))(x)
        assert np.abs(run(path, x) - want).max() <= 1.01 * made.tensors["output"].scale


@each_run
def test_queries_and_keys_that_a_mul_scales(tmp_path, run):
    """Their codes are rounded twice, as ours are: the output within a step, where the MUL left out is many aside."""
    layer, x, rng = random_layer(0), random_input(3, 2, 9, 32), np.random.default_rng(5)
    made = quant.quantize(layer, quant.calibrate(layer, [{"query": x}]))
    made = made._replace(query_ops=(random_scaling(rng, made.tensors["query"]),),
                         key_ops=(random_scaling(rng, made.tensors["key"]),))
    path = quant.export(made, tmp_path / "a.onnx", batch=2, sequence_length=9, opset=20)
    got, step = run(path, x), made.tensors["output"].scale
    assert np.abs(got - made(x)).max() <= 1.01 * step
    assert np.abs(got - made._replace(query_ops=(), key_ops=())(x)).max() > 3 * step


@each_run
def test_scores_made_to_fit_a_mask(tmp_path, run):
    """Rounded to a coarser quantization in the file, too: by 17/256, which XNNPACK's multiplier has exactly."""
    layer, x = random_layer(5), random_input(5, 8, 9, 32)
    made = quant.quantize(layer, quant.calibrate(layer, [x]))
    coarse = TensorQuantization(made.tensors["scores"].scale * np.float32(256 / 17), 3)
    made = made._replace(score_ops=(Requantize(coarse), SelectMask(np.tri(9, dtype=bool))))
    got, want = run(quant.export(made, tmp_path / "a.onnx", opset=20, sequence_length=9, batch=8), x), made(x)
    step = made.tensors["output"].scale
    assert np.abs(got - want).max() <= 1.01 * step
    assert np.abs(got - made._replace(score_ops=made.score_ops[1:])(x)).max() > 3 * step


@each_run
@pytest.mark.parametrize("arithmetic, aside, further, most", [("litert", 0.06, 0.004, 3), ("tflm", 0.3, 0.04, 10)])
def test_how_many_codes_are_aside(tmp_path, run, arithmetic, aside, further, most):
    """As docs/formats.md says it: with operators on queries and keys it is more than a step."""
    steps = {False: [], True: []}
    for seed in range(12):
        layer, x, rng = random_layer(seed), random_input(seed, 8, 9, 32), np.random.default_rng(seed)
        plain = quant.quantize(layer, quant.calibrate(layer, [x]), arithmetic=arithmetic)
        made = plain._replace(query_ops=(random_scaling(rng, plain.tensors["query"]),),
                              key_ops=(random_scaling(rng, plain.tensors["key"]),))
        for each in (plain, made):
            output, path = each.tensors["output"], quant.export(each, tmp_path / "a.onnx", opset=20)
            steps[each is made].append(np.abs(output.quantize(run(path, x)).astype(int) - output.quantize(each(x))))
    for where, share in ((False, aside / 2), (True, aside)):
        assert np.mean(np.array(steps[where]) > 0) < share
    assert 1 < np.max(steps[True]) <= most and np.mean(np.array(steps[True]) > 1) < further


@pytest.mark.parametrize("opset", OPSETS)
def test_our_own_reader_opens_them(tmp_path, opset):
    made, x = encoder(), data(2, L)
    path = quant.export(made, tmp_path / "a.onnx", opset=opset)
    np.testing.assert_array_equal(TransformerEncoder.from_onnx(path)(x), made(x))
    layer = made.layers[0].attention
    path = quant.export(layer, tmp_path / "b.onnx", opset=opset)
    np.testing.assert_array_equal(edgeattn.MultiHeadAttention.from_onnx(path)(x), layer(x))


def state(made):
    """(config, arrays) but for what calibration saw, which no file says."""
    config, arrays = made.to_state()
    for layer in config["layers"]:
        layer["attention"]["state"] |= {"mask_margin": None, "lowest_single_score": None}
    return config, arrays


def without_kernels(made, x):
    with made.prepared(x.shape[:2]) as sequences:
        return made.forward(NumpyOps(), x.reshape(-1, E), sequences)


@pytest.mark.parametrize(("settings", "activation"), list(zip(SETTINGS, ("gelu", "relu", "silu"), strict=True)))
def test_static_encoders_come_back_as_they_were(tmp_path, settings, activation):
    """Codes, scales and further columns; and as the float encoder that they stand for."""
    plain = activated(activation, **SETTINGS[settings])
    made, x = static(plain), data(2, L)
    assert made.layers[0].attention.more_inputs
    path = quant.export(made, tmp_path / "a.onnx")
    same(state(TransformerEncoder.from_onnx(path, scheme="static")), state(made))
    assert cosine(without_kernels(TransformerEncoder.from_onnx(path), x), without_kernels(plain, x)) > 0.9999


def scaled(made, rng, count):
    """A static encoder whose queries, keys or both go by MUL operators; of the second layer alone where count is 0."""
    def attention(number, of):
        layer, chains = of.attention, {}
        for name in ("query", "key")[number:]:
            before, ops = layer.tensors[name], []
            for _ in range(max(count, number)):
                ops.append(random_scaling(rng, before))
                before = ops[-1].output
            chains[f"{name}_ops"] = tuple(ops)
        return StaticSelfAttention(layer._replace(**chains), more_inputs=of.more_inputs)

    return TransformerEncoder([TransformerEncoderLayer(attention(i, layer.attention), layer.feed_forward, layer.norm1, layer.norm2)
                               for i, layer in enumerate(made.layers)])


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_queries_and_keys_that_a_mul_scales_come_back(tmp_path, count, opset):
    plain = static(encoder())
    made, x = scaled(plain, np.random.default_rng(count), count), data(2, L)
    for lengths in ({}, {"batch": 2, "sequence_length": L}):
        path = quant.export(made, tmp_path / "a.onnx", opset=opset, **lengths)
        read = TransformerEncoder.from_onnx(path, scheme="static")
        same(state(read), state(made))
        np.testing.assert_array_equal(read(x), made(x))
    assert np.abs(plain(x) - made(x)).max() > 0.1


@pytest.mark.parametrize("kind", ["Mul", "Div"])
def test_queries_that_others_scale_between_codes_are_rounded_twice_too(tmp_path, kind):
    """By a number that has no code, as quantizers leave it that know none for it."""
    made, x = scaled(static(encoder()), np.random.default_rng(1), 1), data(2, L)
    model = onnx.load(quant.export(made, tmp_path / "a.onnx"))
    known = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    stored = {node.output[0]: [known[name].astype(np.float32) for name in node.input]
              for node in model.graph.node if node.op_type == "DequantizeLinear" and "/constant" in node.name}
    changed = 0
    for node in model.graph.node:
        if node.op_type == "Mul" and node.input[1] in stored:
            code, scale, zero = stored[node.input[1]]
            number = (code - zero) * scale
            node.op_type, node.input[1] = kind, f"{node.name}/number"
            model.graph.initializer.append(onnx.numpy_helper.from_array(number if kind == "Mul" else 1 / number, node.input[1]))
            changed += 1
    assert changed == 3
    read = TransformerEncoder.from_onnx(model, scheme="static")
    for layer, wanted in zip(read.layers, made.layers, strict=True):
        for which in ("query_ops", "key_ops"):
            found, ops = getattr(layer.attention.attention, which), getattr(wanted.attention.attention, which)
            assert [op.output for op in found] == [op.output for op in ops]
    assert cosine(read(x), made(x)) > 0.9999
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.float32(np.inf), model.graph.initializer[-1].name))
    with pytest.raises(ValueError, match={"Mul": "static int8 needs the keys of Softmax node 'layers.1.* times finite numbers other than 0",
                                          "Div": "the keys of Softmax node 'layers.1.* got nothing but constants"}[kind]):
        TransformerEncoder.from_onnx(model, scheme="static")


@pytest.mark.parametrize("which", [(), ("query",), ("key",), ("query", "key"), ("score",), ("query", "score")])
def test_the_float_layer_of_a_file_is_compared_with_the_static_one(tmp_path, which):
    """Its queries and keys hold what those of the static layer are multiplied by."""
    def multiplied(layer):
        rng = np.random.default_rng(2)
        before = {name: layer.tensors["scores" if name == "score" else name] for name in which}
        return layer._replace(**{f"{name}_ops": (random_scaling(rng, of),) for name, of in before.items()})

    layer, x = random_layer(0), random_input(3, 2, 9, 32)
    made = multiplied(quant.quantize(layer, quant.calibrate(layer, [x])))
    read = edgeattn.MultiHeadAttention.from_onnx(quant.export(made, tmp_path / "a.onnx", sequence_length=9))
    report = quant.compare(read, made, [x])
    assert min(report.tensors[name].cosine for name in ("query", "key")) > 0.999
    assert report.tensors["scores"].cosine > 0.97  # some saturate
    made = TransformerEncoder([TransformerEncoderLayer(
        StaticSelfAttention(multiplied(each.attention.attention), more_inputs=each.attention.more_inputs), each.feed_forward,
        each.norm1, each.norm2) for each in static(encoder()).layers])
    read = TransformerEncoder.from_onnx(quant.export(made, tmp_path / "b.onnx", sequence_length=L))
    assert min(part.cosine for part in quant.compare(read, made, [data(2, L)]).alone.values()) > 0.99
    other = TransformerEncoder([read.layers[1], read.layers[0]])
    with pytest.raises(ValueError, match="does not belong to layer: its query weights are off by up to"):
        quant.compare(other, made, [data(2, L)])


def same(found, wanted):
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name, array in wanted[1].items():
        np.testing.assert_array_equal(found[1][name], array)


def test_static_feed_forwards_come_back_with_all_they_may_have(tmp_path):
    options = {"arithmetic": "litert-builtin", "more_inputs": (3, E, 7, E + 1),
               "more_outputs": ((5, -128), (0, 127), (9, -128), (9, 127))}
    large = make(4, E, 20, E, "gelu_tanh", arithmetic="litert-builtin", more_inputs=(2,)).layer
    of = make(3, E, 40, E, "gelu_tanh", **options).layer
    part = StaticFeedForward(of.linears, of.tensors, activation="gelu_tanh", large=large, **options)
    layer = static(encoder(), arithmetic="litert-builtin").layers[0]
    made = TransformerEncoder([TransformerEncoderLayer(layer.attention, part, layer.norm1, layer.norm2)])
    path = quant.export(made, tmp_path / "a.onnx", opset=20)
    same(state(TransformerEncoder.from_onnx(path, scheme="static", arithmetic="litert-builtin")), state(made))


def test_what_has_no_scales_is_no_static_encoder(tmp_path):
    path = quant.export(encoder(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"a\.onnx.*static int8 needs the scale of .*scheme='float32' reads the float model"):
        TransformerEncoder.from_onnx(path, scheme="static")
    with pytest.raises(ValueError, match="scheme must be 'float32' or 'static', got 'dynamic'; quant.quantize"):
        TransformerEncoder.from_onnx(path, scheme="dynamic")
    for each in (TransformerEncoder, edgeattn.TextEncoder, edgeattn.ImageEncoder):
        with pytest.raises(ValueError, match="arithmetic must be left out but for scheme='static'.*got 'litert'"):
            each.from_onnx(path, arithmetic="litert")
    with pytest.raises(ValueError, match="arithmetic must be one of"):
        TransformerEncoder.from_onnx(path, scheme="static", arithmetic="tpu")
    path = quant.export(static(encoder()), tmp_path / "b.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name.startswith("layers.1.attention.scores"):
            node.input[1] = "input"
    with pytest.raises(ValueError, match="static int8 needs the scale of the scores of Softmax node 'layers.1"):
        TransformerEncoder.from_onnx(model, scheme="static")


def test_int8_weights_come_back_as_what_they_stand_for(tmp_path):
    layer, x = random_layer(0), random_input(3, 2, 9, 32)
    made = quant.quantize(layer, quant.calibrate(layer, [x]))
    read = edgeattn.MultiHeadAttention.from_onnx(quant.export(made, tmp_path / "a.onnx"))
    linear = made.linears["value"]
    np.testing.assert_allclose(read.v_weight, linear.weight * linear.scale[:, None], rtol=1e-6)


REFUSED = {
    "a model": (text_encoder, {}, TypeError, r"model\.encoder"),
    "dynamic": (lambda: quant.quantize(encoder(), scheme="dynamic"), {}, ValueError,
                r"layers\.0: .*scheme='static'.*\.tflite"),
    "a dynamic layer": (lambda: quant.quantize(random_layer(0), scheme="dynamic"), {}, ValueError, "layer is dynamic"),
    "opset": (encoder, {"opset": 16}, ValueError, "opset must be one of 17 to 23; got 16"),
    "opset of another": (encoder, {"opset": 17, "path": "a.tflite"}, ValueError, "opset must be left out but for a .onnx"),
    "mask without a length": (encoder, {"mask": np.ones((3, 3), bool)}, ValueError, "mask needs sequence_length"),
    "window without a length": (lambda: window(encoder()), {}, ValueError, r"layers\.0 has a window"),
    "several": (encoder, {"sequence_length": [3, 4]}, ValueError, r"sequence_length must be one number but for a \.tflite"),
    "no room": (lambda: static(encoder()), {"sequence_length": L, "mask": "causal"}, ValueError, "room_for_masks=True"),
    "padding of a layer": (lambda: random_layer(0), {"padding": True}, ValueError,
                           r"padding must be left out but for an encoder in a \.tflite or \.onnx; got a MultiHeadAttention"),
    "padding elsewhere": (encoder, {"padding": True, "path": "a.safetensors"}, ValueError, "takes masks with each call"),
    "no room for padding": (lambda: static(encoder()), {"padding": True}, ValueError, "room_for_masks=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_holds_is_refused(tmp_path, case):
    made, options, error, match = REFUSED[case]
    options = {"path": "a.onnx"} | options
    with pytest.raises(error, match=match):
        quant.export(made(), tmp_path / options.pop("path"), **options)
    assert not list(tmp_path.iterdir())


def test_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("onnx"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the package onnx: pip install 'edgeattn\[checkpoints\]'"):
        quant.export(encoder(), tmp_path / "a.onnx")
