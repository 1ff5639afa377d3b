"""Reals to int8 codes and back, in one pass each: `TensorQuantization` says by what rule."""
import numpy as np

from edgeattn.runtime.compiler import inline, jit
from edgeattn.runtime.plan_cache import PlanCache
from edgeattn.runtime.worker_pool import parallel_for, task

from .call import PreparedCall
from .portions import portions
from .records import bits_of_real, blank, located, named, packed, real, record
from .simd import (
    LANES,
    bits_of,
    load,
    load_bytes,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    smaller_float,
    splat,
    store,
    store_bytes,
    to_float,
)

# Bits of two float32 numbers: of codes the inverse of the scale, of reals the scale; and the zero point.
ELEMENTS = record("size factor zero_point")
ADDRESSES = record("reals codes nan")  # flat; `nan`: a byte, to be 1 where a real is one
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # bits of a float32: all but the sign; of infinity
_LEAST_SHARED = 4096  # elements, a multiple of every vector's: a part has as many at least


@inline
def quantize_vectors(x, at, count, inverse, zero_point, flip, codes, to):
    """Codes, ^ flip, of `count` numbers of x, a multiple of LANES; whether one is NaN, which no code stands for."""
    low, high, largest = np.float32(-128) - zero_point, np.float32(127) - zero_point, splat(np.int32(0))
    for i in range(0, count, LANES):
        v = load(x, at + i) * splat(inverse)
        largest = maximum(bits_of(v) & splat(_MAGNITUDE), largest)
        v = smaller_float(maximum(v, splat(low)), splat(high))  # whole numbers: the same before rounding as after it
        store_bytes(codes, to + i, (round_to_int(v) + splat(np.int32(zero_point))) ^ splat(flip))
    return max_lanes(largest) > _INFINITY


@inline
def dequantize_row(codes, at, count, scale, zero_point, x, to):
    """The real numbers that `count` codes stand for."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store(x, to + i, (to_float(load_bytes(codes, at + i)) - splat(zero_point)) * splat(scale))
    for i in range(whole, count):
        x[to + i] = (np.float32(codes[at + i]) - zero_point) * scale


@task
def quantize_part(p, a, portion, worker, part):
    """A portion of the codes."""
    x, codes, inverse, zero_point = (pointer_to(a.reals, np.float32), pointer_to(a.codes, np.int8), real(p.factor),
                                     real(p.zero_point))
    low, high = np.float32(-128) - zero_point, np.float32(127) - zero_point
    begin, end = part * portion, min((part + 1) * portion, p.size)
    whole = max(end - begin, 0) // LANES * LANES
    nan = quantize_vectors(x, begin, whole, inverse, zero_point, np.int32(0), codes, begin)
    for i in range(begin + whole, end):
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
    begin, end = part * portion, min((part + 1) * portion, p.size)
    dequantize_row(codes, begin, max(end - begin, 0), scale, zero_point, x, begin)


@jit
def quantize(parameters, addresses, scratch, task_queue, count):
    """See `Quantizer.to_codes`; on at most `count` threads that serve the task_queue.

    parameters ELEMENTS, addresses ADDRESSES; no scratch.
    """
    p, a = named(parameters, ELEMENTS), located(addresses, ADDRESSES)
    portion, parts = portions(p.size, _LEAST_SHARED, count)
    parallel_for(task_queue, parts, quantize_part, p, a, portion)


@jit
def dequantize(parameters, addresses, scratch, task_queue, count):
    """See `Quantizer.to_reals`; otherwise as `quantize`."""
    p, a = named(parameters, ELEMENTS), located(addresses, ADDRESSES)
    portion, parts = portions(p.size, _LEAST_SHARED, count)
    parallel_for(task_queue, parts, dequantize_part, p, a, portion)


class Quantizer:
    """Codes of reals and reals of codes, real = scale (code - zero_point).

    Parameters
    ----------
    scale : float32
    zero_point : int
    """

    def __init__(self, scale, zero_point):
        self._scale, self._zero_point = scale, zero_point
        self._to_codes, self._to_reals = PlanCache(), PlanCache()  # by the number of elements

    def to_codes(self, x):
        """(int8 codes of float32 x in C order, whether x holds NaN, whose codes mean nothing)."""
        codes, nan = np.empty(x.shape, np.int8), np.zeros(1, np.bool_)
        size = x.size
        call = self._to_codes.get(size) or self._to_codes.keep(
            size, self._plan(quantize, size, np.float32(1) / self._scale))
        call.run(x, codes, nan)
        return codes, bool(nan[0])

    def to_reals(self, codes):
        """float32 reals of int8 codes in C order."""
        x = np.empty(codes.shape, np.float32)
        size = codes.size
        call = self._to_reals.get(size) or self._to_reals.keep(size, self._plan(dequantize, size, self._scale))
        call.run(x, codes, None)
        return x

    def _plan(self, kernel, size, factor):
        p = blank(ELEMENTS, size=size, factor=bits_of_real(factor), zero_point=bits_of_real(self._zero_point))
        # no work: on one thread, and signals wait, so that a token in a cache and its result as reals come together
        return PreparedCall(kernel, packed(p, ELEMENTS), ADDRESSES, np.float32, 0, 0, 0)
