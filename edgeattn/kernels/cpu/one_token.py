"""The heads of a lone token to bytes: what dynamic.py does with tokens in lanes, with features in lanes.

For heads of whole vectors. The float operations are the same ones, so the bytes are, and what scales them.
"""
import numpy as np

from edgeattn.runtime.compiler import inline

from .dynamic import inverse_of, keep_scale_of_value, maximum_bits, scale_of
from .int8_operands import FLIP, LANE_FLIP, store_lane_term
from .simd import (
    LANES,
    WIDTH,
    first_lane,
    float_of_bits,
    load,
    max_lanes,
    round_to_int,
    splat,
    store,
    store_bytes,
    sum_lanes,
)

_ZERO = np.float32(0)


@inline
def largest_of_head(x, at, size):
    """The largest magnitude of x[at : at + size], in all lanes; NaN where there is one."""
    best = splat(np.int32(0))
    for d in range(0, size, LANES):
        best = maximum_bits(load(x, at + d), best)
    return float_of_bits(splat(max_lanes(best)))


@inline
def head_to_bytes(x, at, size, inverse, out, to):
    """out[to : to + size], bytes = x[at : at + size] times `inverse`; sums of codes, some in each lane."""
    total = splat(np.int32(0))
    for d in range(0, size, LANES):
        codes = round_to_int(load(x, at + d) * inverse)
        total = total + codes
        store_bytes(out, to + d, codes)
    return total


@inline
def quantize_query(x, at, size, own, at_bytes, out, scales):
    """dynamic.quantize_queries of one token, the first lane; own: Scratch, size / 4 elements from at_bytes on."""
    largest = largest_of_head(x, at, size)
    scales.data[scales.at] = first_lane(scale_of(largest))
    head_to_bytes(x, at, size, inverse_of(largest), own.int8, 4 * at_bytes)
    for d in range(size // 4):
        out.data[out.at + d * WIDTH] = own.int32[at_bytes + d] ^ LANE_FLIP


@inline
def quantize_context(x, at, size, own, at_bytes, at_scale):
    """A row of the context to the operand of a product, size / 4 elements from at_bytes on, and its scale."""
    largest = largest_of_head(x, at, size)
    own.float32[at_scale] = first_lane(scale_of(largest))
    head_to_bytes(x, at, size, inverse_of(largest), own.int8, 4 * at_bytes)
    for i in range(at_bytes, at_bytes + size // 4, LANES):
        store(own.int32, i, load(own.int32, i) ^ splat(FLIP))


@inline
def subtract_mean_of_one(x, at, size, weight, shared, at_mean):
    """key_mean.subtract_mean of a token of that weight, as a row x[at : at + size]."""
    for d in range(0, size, LANES):
        v = load(x, at + d)
        mean = splat(_ZERO)
        if weight > _ZERO:
            mean = splat(_ZERO) - v * splat(weight)
        store(shared, at_mean + d, mean)
        store(x, at + d, v + mean)


@inline
def quantize_key(x, at, size, out, to, scales, terms):
    """dynamic.quantize_keys of one token, to its row of bytes, from out[to] on."""
    largest = largest_of_head(x, at, size)
    store(scales.data, scales.at, scale_of(largest))
    total = head_to_bytes(x, at, size, inverse_of(largest), out, to)
    store_lane_term(splat(sum_lanes(total)), terms.data, terms.at)


@inline
def quantize_value(x, at, size, unit, own, at_bytes, out, logs, inverses):
    """dynamic.quantize_values of one token; own: as for `quantize_query`."""
    inverse = keep_scale_of_value(largest_of_head(x, at, size), unit, logs, inverses, 0)
    head_to_bytes(x, at, size, inverse, own.int8, 4 * at_bytes)
    for d in range(size):
        out.data[out.at + d * out.step] = own.int8[4 * at_bytes + d]
