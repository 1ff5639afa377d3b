"""What a call on a GPU costs the processor, without a GPU: the driver is one whose calls do nothing.

    python -m benchmarks.cuda_host

Prints the median microseconds of calls like one made before, with arrays of our own that lie on the device. Nothing is
computed, so this says nothing about a card; a real driver's launch comes on top.
"""

from __future__ import annotations

import itertools
import time

import numpy as np

import edgeattn
import quant
from edgeattn.kernels.cuda import driver

CALLS, BLOCKS = 100, 30
DEVICE = (9, 0)


class _Idle:
    """Answers the driver's calls that a known call makes, with success."""

    def __init__(self):
        self._addresses = itertools.count(1 << 20, 1 << 24)  # of blocks that no one touches

    def cuMemAlloc(self, _size):
        return 0, next(self._addresses)

    def cuMemFree(self, _pointer):
        return 0,

    def cuMemcpyHtoD(self, *_):
        return 0,

    def cuStreamSynchronize(self, *_):
        return 0,

    def cuCtxGetCurrent(self):
        return 0, 1

    def cuCtxPushCurrent(self, *_):
        return 0,

    def cuCtxPopCurrent(self):
        return 0, 1

    def cuCtxGetDevice(self):
        return 0, 1

    def cuLaunchKernel(self, *_):
        return 0,


class _IdleDriver(driver.Driver):
    """A driver without a GPU."""

    def __init__(self):
        self._begin(_Idle())

    def capability(self):
        return DEVICE

    def _capability(self, _device):
        return DEVICE

    def processors(self):
        return 132

    def _load(self, kernel, _device):
        return driver._Loaded(self, kernel, None, None)


def _encoder(rng):
    """Of 2 layers, E = 128, F = 256."""
    def linear(outputs, inputs):
        return edgeattn.Linear(rng.standard_normal((outputs, inputs)) / inputs**0.5)

    def layer():
        weights = [linear(128, 128).weight for _ in range(4)]
        norms = (edgeattn.LayerNorm(np.ones(128)) for _ in range(2))
        return edgeattn.TransformerEncoderLayer(
            edgeattn.MultiHeadAttention(4, *weights), edgeattn.FeedForward(linear(256, 128), linear(128, 256)), *norms)

    return edgeattn.TransformerEncoder([layer(), layer()])


def calls() -> dict:
    """What is timed, by name."""
    device = driver.driver()
    q, k, v, out = (device.empty((1, 4, 32, 32), np.float32) for _ in range(4))
    rng = np.random.default_rng(0)
    weights = {f"{name}_weight": rng.standard_normal((128, 128)).astype(np.float32) for name in ("q", "k", "v", "out")}
    layer = edgeattn.MultiHeadAttention(4, **weights)
    x = rng.standard_normal((1, 32, 128)).astype(np.float32)
    static = quant.quantize(layer, quant.calibrate(layer, [x])).to("cuda")
    dynamic, layer = quant.quantize(layer, scheme="dynamic").to("cuda"), layer.to("cuda")
    reals = [device.empty(x.shape, np.float32) for _ in range(2)]
    codes = [device.empty(x.shape, np.int8) for _ in range(2)]
    encoder = _encoder(rng)
    float_encoder, dynamic_encoder = encoder.to("cuda"), quant.quantize(encoder, scheme="dynamic").to("cuda")
    attention = edgeattn.scaled_dot_product_attention
    return {
        "attention 1/4/32/32, out": lambda: attention(q, k, v, out=out),
        "attention": lambda: attention(q, k, v),
        "attention, int8, out": lambda: attention(q, k, v, precision="int8", out=out),
        "float layer 128/4/32, out": lambda: layer(reals[0], out=reals[1]),
        "dynamic layer, out": lambda: dynamic(reals[0], out=reals[1]),
        "static layer, out": lambda: static.run_int8(codes[0], out=codes[1]),
        "float encoder of 2 layers 128/4/256, out": lambda: float_encoder(reals[0], out=reals[1]),
        "dynamic encoder, out": lambda: dynamic_encoder(reals[0], out=reals[1]),
    }


def main() -> None:
    """Time and print."""
    driver._current = _IdleDriver()
    for name, call in calls().items():
        times = []
        for _ in range(BLOCKS + 1):  # the first is not counted
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - start) / CALLS)
        print(f"{name}: {np.median(times[1:]) * 1e6:.1f} us")


if __name__ == "__main__":
    main()
