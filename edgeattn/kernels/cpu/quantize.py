"""Reals to int8 codes and back, in one pass each: `TensorQuantization` says by what rule."""
import numpy as np

from edgeattn.runtime.jit import compiled_for, jit

_runs = {}


@jit
def quantize(x, inverse, zero_point, codes):
    """See `to_codes`; x and codes flat, inverse of the scale and zero_point float32."""
    low, high, nan = np.float32(-128) - zero_point, np.float32(127) - zero_point, False
    for i in range(x.size):
        v = np.rint(x[i] * inverse)
        nan |= v != v
        codes[i] = np.int8(min(max(low, v), high) + zero_point)
    return nan


@jit
def dequantize(codes, scale, zero_point, x):
    """See `to_reals`; codes and x flat, scale and zero_point float32."""
    for i in range(codes.size):
        x[i] = (np.float32(codes[i]) - zero_point) * scale


def _run(kernel, *arguments):
    run = _runs.get(kernel)
    if run is None:
        run = _runs[kernel] = compiled_for(kernel, arguments)
    return run(*arguments)


def to_codes(x, scale, zero_point):
    """(int8 codes of float32 x in C order, whether x holds NaN, whose codes mean nothing)."""
    codes = np.empty(x.shape, np.int8)
    nan = _run(quantize, x.reshape(-1), np.float32(1) / scale, np.float32(zero_point), codes.reshape(-1))
    return codes, nan


def to_reals(codes, scale, zero_point):
    """float32 reals of int8 codes in C order."""
    x = np.empty(codes.shape, np.float32)
    _run(dequantize, codes.reshape(-1), scale, np.float32(zero_point), x.reshape(-1))
    return x
