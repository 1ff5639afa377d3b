"""Reals to int8 codes and back, in one pass each: `TensorQuantization` says by what rule."""
import functools

import numpy as np

from edgeattn.runtime.compiler import jit
from edgeattn.runtime.worker_pool import parallel_for, task

from .call import PreparedCall
from .fused import portions
from .records import bits_of_real, blank, named, packed, real, record
from .simd import pointer_to

# Bits of two float32 numbers: of codes the inverse of the scale, of reals the scale; and the zero point.
ELEMENTS = record("size factor zero_point")
ADDRESSES = record("reals codes nan")  # flat; `nan`: a byte, to be 1 where a real is one
_LEAST_SHARED = 4096  # elements, a multiple of every vector's: a part has as many at least


@task
def quantize_part(p, a, portion, worker, part):
    """A portion of the codes."""
    x, codes, inverse, zero_point = (pointer_to(a.reals, np.float32), pointer_to(a.codes, np.int8), real(p.factor),
                                     real(p.zero_point))
    low, high, nan = np.float32(-128) - zero_point, np.float32(127) - zero_point, False
    for i in range(part * portion, min((part + 1) * portion, p.size)):
        v = np.rint(x[i] * inverse)
        nan |= v != v
        codes[i] = np.int8(min(max(low, v), high) + zero_point)
    if nan:
        pointer_to(a.nan, np.uint8)[0] = 1


@task
def dequantize_part(p, a, portion, worker, part):
    """A portion of the reals."""
    codes, x, scale, zero_point = (pointer_to(a.codes, np.int8), pointer_to(a.reals, np.float32), real(p.factor),
                                   real(p.zero_point))
    for i in range(part * portion, min((part + 1) * portion, p.size)):
        x[i] = (np.float32(codes[i]) - zero_point) * scale


@jit
def quantize(parameters, addresses, scratch, task_queue, count):
    """See `to_codes`; on at most `count` threads that serve the task_queue.

    parameters ELEMENTS, addresses ADDRESSES; no scratch.
    """
    p, a = named(parameters, ELEMENTS), named(addresses, ADDRESSES)
    portion, parts = portions(p.size, _LEAST_SHARED, count)
    parallel_for(task_queue, parts, quantize_part, p, a, portion)


@jit
def dequantize(parameters, addresses, scratch, task_queue, count):
    """See `to_reals`; otherwise as `quantize`."""
    p, a = named(parameters, ELEMENTS), named(addresses, ADDRESSES)
    portion, parts = portions(p.size, _LEAST_SHARED, count)
    parallel_for(task_queue, parts, dequantize_part, p, a, portion)


@functools.lru_cache(256)
def _prepare(kernel, size, factor, zero_point):
    """The `PreparedCall` of so many elements."""
    p = blank(ELEMENTS, size=size, factor=bits_of_real(factor), zero_point=bits_of_real(zero_point))
    # no work: on one thread, and signals wait, so that a token in a cache and its result as reals come together
    return PreparedCall(kernel, packed(p, ELEMENTS), ADDRESSES, np.float32, 0, 0, 0)


def to_codes(x, scale, zero_point):
    """(int8 codes of float32 x in C order, whether x holds NaN, whose codes mean nothing)."""
    codes, nan = np.empty(x.shape, np.int8), np.zeros(1, np.bool_)
    _prepare(quantize, x.size, np.float32(1) / scale, zero_point)(x, codes, nan)
    return codes, bool(nan[0])


def to_reals(codes, scale, zero_point):
    """float32 reals of int8 codes in C order."""
    x = np.empty(codes.shape, np.float32)
    _prepare(dequantize, codes.size, scale, zero_point)(x, codes, None)
    return x
