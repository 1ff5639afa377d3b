"""Files that TensorFlow and ai-edge-quantizer wrote, see tests/files/golden/README.md: read, and equal to LiteRT."""

from pathlib import Path

import numpy as np
import pytest
from runtimes import each_runtime

import edgeattn
from edgeattn.files.tflite import blocks_of
from edgeattn.quantized import MulConstant
from quant.describe import describe_file
from quant.runtimes import RUNTIMES

FOLDER = Path(__file__).parent / "golden"
FILES = ("keras_self", "keras_cross", "quantizer_self", "quantizer_cross")
RECORDED = dict(np.load(FOLDER / "litert.npz")) | dict(np.load(FOLDER / "litert_torch.npz"))


def inputs(name):
    return [RECORDED[f"{name}.{role}"] for role in ("query", "key", "value") if f"{name}.{role}" in RECORDED]


@pytest.mark.parametrize("arithmetic", ["litert", "litert-reference"])
@pytest.mark.parametrize("name", [*FILES, "torch_mha", "torch_packed"])
def test_bytes_are_the_recorded_ones(name, arithmetic):
    layer = edgeattn.load(FOLDER / f"{name}.tflite", arithmetic=arithmetic)
    np.testing.assert_array_equal(layer.run_int8(*inputs(name)), RECORDED[f"{name}.{arithmetic}"])


@pytest.mark.parametrize("file", FILES)
@each_runtime
def test_bytes_are_those_of_every_runtime_here(file, name):
    path = FOLDER / f"{file}.tflite"
    session = RUNTIMES[name].session(path)
    random = np.random.default_rng(0)
    for _ in range(20):
        given = {n.split("_")[-1].split(":")[0]: random.integers(-128, 128, shape).astype(dtype)
                 for n, shape, dtype in session.inputs}
        if len(given) == 1:  # TFLite Micro does not tell the names
            given = {"query": next(iter(given.values()))}
        elif set(given) != {"query", "key", "value"}:
            given = dict(zip(("key", "value", "query"), given.values(), strict=True))  # in the file's order
        result, = session.run(*(given.values()))
        layer = edgeattn.load(path, arithmetic=name)
        ours = layer.run_int8(*(given[role] for role in ("query", "key", "value") if role in given))
        np.testing.assert_array_equal(ours, result)


@pytest.mark.parametrize("name", FILES)
def test_what_the_files_say_is_read(name):
    layer = edgeattn.load(FOLDER / f"{name}.tflite")
    cross = name.endswith("cross")
    assert (layer.num_heads, layer.head_dim, layer.value_dim, layer.embed_dim) == (2, 4, 3 if cross else 4, 12)
    assert layer.sources == ((0, 1, 2) if cross else (0, 0, 0))
    assert layer.tensors["key"].zero_point != 0 != layer.tensors["value"].zero_point
    mul, = layer.score_ops
    assert isinstance(mul, MulConstant) and abs(float(mul.constant.dequantize(mul.code)) - 0.5) < 0.01


def test_queries_and_keys_that_a_mul_scales_are_told_apart():
    """nn.MultiheadAttention multiplies both by the root of 1/sqrt(D)."""
    layer = edgeattn.load(FOLDER / "torch_mha.tflite")
    for op, in (layer.query_ops, layer.key_ops):
        assert float(op.constant.dequantize(op.code)) == pytest.approx(8**-0.25, rel=0.01)
    assert "query op: MulConstant by 0.59" in " ".join(map(str, describe_file(FOLDER / "torch_mha.tflite")))


def test_a_block_of_a_model_is_read_alone():
    path = FOLDER / "torch_two.tflite"
    with pytest.raises(ValueError, match=r"one SOFTMAX; found 2: choose one by block=, its number or name: 0: '.*Apart.*', 1: "):
        edgeattn.load(path)
    first, second = (edgeattn.load(path, block=number) for number in range(2))
    assert (first.score_ops, len(second.score_ops)) == ((), 1)
    name = blocks_of(path)[1]
    np.testing.assert_array_equal(edgeattn.load(path, block=name).linears["key"].weight, second.linears["key"].weight)
    # where it is the whole file it is the same layer
    one, block = edgeattn.load(FOLDER / "torch_packed.tflite"), edgeattn.load(FOLDER / "torch_packed.tflite", block=0)
    np.testing.assert_array_equal(one.run_int8(*inputs("torch_packed")), block.run_int8(*inputs("torch_packed")))
    for wrong, error in ((2, "block must be from 0 to 1; got 2"), ("x", "block must name one of .* got 'x'")):
        with pytest.raises(ValueError, match=f"torch_two.tflite: {error}"):
            edgeattn.load(path, block=wrong)
    with pytest.raises(TypeError, match="block must be a number or a name; got True"):
        edgeattn.load(path, block=True)
    shown = " ".join(map(str, describe_file(path)))
    assert "block 0" in shown
    assert "block 1" in shown


def test_a_hybrid_file_is_the_float_layer_of_its_weights():
    with pytest.warns(UserWarning, match=r"torch_hybrid.tflite has int8 weights, .* quant.quantize\(layer, scheme='dynamic'\)"):
        layer = edgeattn.load(FOLDER / "torch_hybrid.tflite")
    assert type(layer) is edgeattn.MultiHeadAttention
    session = RUNTIMES["litert"].session(FOLDER / "torch_hybrid.tflite")
    x = np.random.default_rng(0).standard_normal((1, 6, 16), np.float32)
    want = session.run(x)[0]
    np.testing.assert_allclose(layer(x).reshape(want.shape), want, rtol=0, atol=0.03 * np.abs(want).max())


@pytest.mark.parametrize("arithmetic", ["litert", "litert-reference"])
def test_a_mask_that_took_the_whole_range_is_computed_as_it_is_and_told(arithmetic):
    layer = causal(arithmetic)
    assert layer.score_ops[0].output.scale > 9e35
    np.testing.assert_array_equal(layer.run_int8(*inputs("keras_causal")), RECORDED[f"keras_causal.{arithmetic}"])


@each_runtime
def test_bytes_under_such_a_mask_are_those_of_every_runtime_here(name, tmp_path):
    layer, session = causal(name), RUNTIMES[name].session(FOLDER / "keras_causal.tflite")
    edgeattn.save(layer, tmp_path / "layer.safetensors")
    for given in (layer, edgeattn.load(tmp_path / "layer.safetensors")):
        x = np.random.default_rng(0).integers(-128, 128, (1, 6, 12)).astype(np.int8)
        np.testing.assert_array_equal(given.run_int8(x), session.run(x)[0])


def causal(arithmetic):
    with pytest.warns(UserWarning, match=r"keras_causal.tflite: the scores, .*, are 9.3e\+35 from code to code, .* convert "
                                         "without the mask and pass it to each call, or quantize the float layer") as told:
        layer = edgeattn.load(FOLDER / "keras_causal.tflite", arithmetic=arithmetic)
    assert len(told) == 1
    return layer
