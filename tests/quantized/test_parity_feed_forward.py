"""Static feed-forwards as .tflite files: every byte is the runtime's."""

import functools

import numpy as np
import pytest
import tflite_graphs
from runtimes import each_runtime
from static_cases import make

from edgeattn.arithmetic import activation_table
from edgeattn.quantized import TensorQuantization
from quant.export.feed_forward_graph import GELU_VERSION, feed_forward_graph
from quant.export.tflite import serialize
from quant.runtimes import RUNTIMES

pytestmark = each_runtime


@functools.cache
def has_gelu(name):
    """Whether a runtime knows the operator: TFLite Micro as packaged does not."""
    quantization = TensorQuantization(0.1, 0)
    file = tflite_graphs.unary("GELU", (1, 1, 4), quantization, quantization, {"approximate": False}, GELU_VERSION)
    try:
        RUNTIMES[name].run(file, [np.zeros((1, 1, 4), np.int8)])
    except RuntimeError as error:
        assert name == "tflm", error
        return False
    return True


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_equals_the_runtime(name, activation, gated):
    if activation != "relu" and not has_gelu(name):
        with pytest.raises(RuntimeError, match="TFLite Micro refuses"):
            _run(name, make(0, 8, 8, 8, activation).layer, np.zeros((1, 1, 8), np.int8))
        return
    for seed in range(12):
        layer = make(seed, 24, 40 + seed, 24, activation, gated=gated, arithmetic=name, bias=seed % 3 > 0,
                     more_inputs=(3,) * (seed % 2), more_outputs=((2, -128),) * (seed % 4 == 1)).layer
        shape = 1 + seed % 2, 9, layer.inputs + len(layer.more_inputs)
        x = np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
        np.testing.assert_array_equal(_run(name, layer, x), layer.run_int8(x))


def _run(name, layer, x):
    return RUNTIMES[name].run(serialize(feed_forward_graph(layer, batch=len(x), sequence_length=x.shape[1])), [x])[0]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_code_of_an_activation_is_the_runtimes(name, activation):
    if not has_gelu(name):
        return
    codes = np.arange(-128, 128).astype(np.int8).reshape(1, 1, 256)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        before, after = (TensorQuantization(10 ** rng.uniform(-3, -0.5), int(rng.integers(-128, 128))) for _ in "ab")
        file = tflite_graphs.unary("GELU", codes.shape, before, after, {"approximate": activation == "gelu_tanh"},
                                    GELU_VERSION)
        want = activation_table(activation, (before.scale, before.zero_point), (after.scale, after.zero_point))
        np.testing.assert_array_equal(RUNTIMES[name].run(file, [codes])[0].ravel(), want)
