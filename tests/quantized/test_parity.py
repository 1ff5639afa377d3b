"""The promise: every output byte of a static layer equals the named TFLite runtime's."""

import functools
import os
from dataclasses import dataclass

import numpy as np
import pytest
from runtimes import HERE

import edgeattn
import quant
from edgeattn import bundle
from edgeattn.arithmetic import KERNEL_SETS
from edgeattn.quantized import (
    INPUTS,
    SOURCES,
    AddMask,
    MulConstant,
    QuantizedLinear,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.runtime import prebuilt
from quant.export.tflite import write_tflite
from quant.runtimes import RUNTIMES

KERNEL_SET_SEEDS = range(200)
# A bundle whose kernels are run, where compiling takes minutes: in the short form of `make test-arm64`.
GIVEN = os.environ.get("TEST_PARITY_KERNELS")


@pytest.fixture(scope="module", autouse=True)
def given_kernels():
    if GIVEN:
        bundle.load(GIVEN)
        assert prebuilt.has("edgeattn_fused_int8_layer_int8")


@dataclass(frozen=True)
class RandomLayer:
    """One random self-attention layer, quantized, with data to run it on."""

    quantized: edgeattn.QuantizedMultiHeadAttention
    codes: np.ndarray  # int8 (B, L, E)
    mask: np.ndarray | None  # carried by the layer


@functools.cache
def random_layer(seed: int) -> RandomLayer:
    rng = np.random.default_rng(seed)
    B, L = int(rng.integers(1, 3)), int(rng.integers(1, 129))
    H = int(rng.choice([1, 2, 3, 4, 8]))
    E = H * int(rng.integers(max(1, -(-16 // H)), 128 // H + 1))
    D, Dv = E // H, int(rng.integers(1, 33)) if seed % 5 == 0 else E // H

    def weight(o, i):
        return (rng.standard_normal((o, i)) * rng.uniform(0.5, 2) / np.sqrt(i)).astype(np.float32)

    def bias(o):
        return None if seed % 7 == 0 else rng.normal(0, 0.3, o).astype(np.float32)

    layer = edgeattn.MultiHeadAttention(
        H,
        weight(H * D, E),
        weight(H * D, E),
        weight(H * Dv, E),
        None if seed % 11 == 0 else weight(E, H * Dv),
        q_bias=bias(H * D),
        k_bias=bias(H * D),
        v_bias=bias(H * Dv),
        out_bias=None if seed % 11 == 0 else bias(E),
    )
    x = (rng.standard_normal((3, B, L, E)) * rng.uniform(0.1, 5) + rng.uniform(-1, 1)).astype(np.float32)
    mask = [
        None,
        np.tri(L, dtype=bool),
        rng.random((B, 1, L, L)) < 0.7,
        np.arange(L) < rng.integers(1, L + 1, (B, 1, 1, 1)),
    ][seed % 4]
    calls = x if mask is None else [{"query": one, "attn_mask": mask} for one in x]
    quantized = quant.quantize(layer, quant.calibrate(layer, calls))
    if mask is not None:
        quantized = quantized.with_mask(mask)
    return RandomLayer(quantized, rng.integers(-128, 128, (B, L, E)).astype(np.int8), mask)


def pytest_generate_tests(metafunc):
    """Runtimes x seeds."""
    if "seed" not in metafunc.fixturenames:
        return
    layers = metafunc.config.getoption("layers")
    share = {"other_converters": 3, "position_bias": 1}
    tenths = next((share[word] for word in share if word in metafunc.function.__name__), 10)
    seeds = -(-layers * tenths // 10)
    metafunc.parametrize("name,seed", [pytest.param(name, seed, id=f"{name}-{seed}")
                                       for name in HERE for seed in range(seeds)])


def assert_equal_in(name: str, layer, *codes: np.ndarray) -> None:
    """The exported file, run in the runtime of kernel set ``name``, gives the bytes we give."""
    (B, L, _), S = codes[0].shape, codes[-1].shape[1]
    file = write_tflite(layer, batch=B, sequence_length=L, key_length=S if len(codes) > 1 else None)
    expected = RUNTIMES[name].run(file, codes)[0]
    np.testing.assert_array_equal(layer.with_arithmetic(name).run_int8(*codes), expected)


def test_layers_equal_the_runtime(name, seed):
    layer = random_layer(seed)
    assert_equal_in(name, layer.quantized, layer.codes)


def test_a_position_bias_equals_the_runtime(name, seed):
    rng, (B, H, L, E) = np.random.default_rng(seed), (2, 2, 7, 12)
    weights = [rng.standard_normal((E, E)).astype(np.float32) for _ in range(4)]
    layer = edgeattn.MultiHeadAttention(H, *weights, position_bias=rng.standard_normal((H, L, L)) * rng.uniform(0.1, 5))
    quantized = quant.quantize(layer, quant.calibrate(layer, [rng.standard_normal((B, L, E)).astype(np.float32)]))
    assert_equal_in(name, quantized, rng.integers(-128, 128, (B, L, E)).astype(np.int8))


def random_quantization(rng, symmetric=False):
    return TensorQuantization(np.float32(10 ** rng.uniform(-2.5, -1)), 0 if symmetric else int(rng.integers(-60, 60)))


def test_layers_as_other_converters_write_them_equal_the_runtime(name, seed):
    # keys and values with a zero point, the scores scaled by MUL and masked by ADD; two or three inputs
    rng = np.random.default_rng(1000 + seed)
    H, D, Dv = int(rng.choice([1, 2, 4])), int(rng.integers(1, 20)), int(rng.integers(1, 20))
    B, L, S = int(rng.integers(1, 3)), int(rng.integers(1, 40)), int(rng.integers(1, 40))
    E, Ek, Ev = (int(rng.integers(8, 40)) for _ in range(3))
    sources = SOURCES[seed % 3]
    S, Ek = (L, E) if sources[1] == 0 else (S, Ek)
    Ev = Ek if sources[2] == sources[1] else Ev

    def linear(o, i):
        return QuantizedLinear(
            rng.integers(-127, 128, (o, i)).astype(np.int8),
            (10 ** rng.uniform(-3.5, -2.5, o)).astype(np.float32),
            rng.integers(-3000, 3000, o).astype(np.int32),
        )

    tensors = {name: random_quantization(rng) for name in ("query", "key", "value", "scores", "context", "output")}
    tensors |= {f"{INPUTS[source]}_input": random_quantization(rng) for source in set(sources)}
    tensors["scores"] = TensorQuantization(tensors["query"].scale * tensors["key"].scale * np.float32(40 * D**0.5), 5)
    tensors["context"] = TensorQuantization(tensors["value"].scale, tensors["value"].zero_point)
    scaled = TensorQuantization(np.float32(0.04), -3)
    ops = [MulConstant(127, TensorQuantization(scaled.scale / tensors["scores"].scale / 127, 0), scaled)]
    if seed % 2:
        ops.append(
            AddMask(
                rng.choice(np.array([-128, 127], np.int8), (1, 1, L, S)),
                TensorQuantization(np.float32(0.03), 127),
                TensorQuantization(np.float32(0.05), 40),
            )
        )
    layer = StaticMultiHeadAttention(
        H,
        {"query": linear(H * D, E), "key": linear(H * D, Ek), "value": linear(H * Dv, Ev), "output": linear(E, H * Dv)},
        tensors,
        sources=sources,
        score_ops=ops,
    )
    lengths = (L, S, S)[: max(sources) + 1]
    codes = [rng.integers(-128, 128, (B, n, e)).astype(np.int8) for n, e in zip(lengths, (E, Ek, Ev), strict=False)]
    assert_equal_in(name, layer, *codes)


def test_the_random_layers_tell_the_kernel_sets_apart():
    # Where all sets agreed, equality with one of them would prove nothing about its rules.
    for name in KERNEL_SETS:
        for other in KERNEL_SETS:
            if name < other:
                assert any(
                    (
                        random_layer(seed).quantized.with_arithmetic(name).run_int8(random_layer(seed).codes)
                        != random_layer(seed).quantized.with_arithmetic(other).run_int8(random_layer(seed).codes)
                    ).any()
                    for seed in KERNEL_SET_SEEDS
                ), (name, other)
