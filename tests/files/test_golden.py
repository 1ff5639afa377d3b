"""Files that TensorFlow and ai-edge-quantizer wrote, see tests/files/golden/README.md: read, and equal to LiteRT."""

from pathlib import Path

import numpy as np
import pytest
from runtimes import each_runtime

import edgeattn
from edgeattn.quantized import MulConstant
from quant.runtimes import RUNTIMES

FOLDER = Path(__file__).parent / "golden"
FILES = ("keras_self", "keras_cross", "quantizer_self", "quantizer_cross")
RECORDED = np.load(FOLDER / "litert.npz")


def inputs(name):
    return [RECORDED[f"{name}.{role}"] for role in ("query", "key", "value") if f"{name}.{role}" in RECORDED]


@pytest.mark.parametrize("arithmetic", ["litert", "litert-reference"])
@pytest.mark.parametrize("name", FILES)
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


def test_a_mask_that_took_the_whole_range_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"keras_causal.tflite: expected a scale between .* found 9.30.*e\+35; a mask of "
                                         "-3e38 in the scores' range .* pass it to each call, or quantize the float"):
        edgeattn.load(FOLDER / "keras_causal.tflite")
