"""Every kernel that Python calls, and for what each is compiled: all there is to compile, as data.

A kernel becomes a function of (parameters, addresses, scratch, task_queue, count) for each row here.  Parameters and
addresses are arrays of int64, as the kernel's own records say; scratch is an array of `dtype`, of 32-bit elements.
"""
from typing import NamedTuple

import numpy as np

from . import (
    cache_int8,
    cached_int8,
    call,
    decode_float32,
    decode_int8,
    feed_forward_dynamic,
    feed_forward_float32,
    feed_forward_int8,
    functional_dynamic,
    functional_float32,
    fused,
    fused_dynamic,
    fused_int8,
    linear_dynamic,
    linear_float32,
    norm,
    projection_dynamic,
    quantize,
    reference_float32,
    row_codes,
)


class Entry(NamedTuple):
    """A kernel, and the dtype of its scratch."""

    kernel: object
    dtype: type

    def compile(self):
        """The compiled function, from the cache where it is there."""
        return call.entry(*self)


ENTRIES = {
    "layer float32": Entry(fused.layer_float32, np.float32),
    "layer dynamic": Entry(fused_dynamic.layer_dynamic, np.int32),
    "layer int8": Entry(fused_int8.layer_int8, np.int32),
    "layer int8 with a cache": Entry(cached_int8.cached_int8, np.int32),
    "attention float32": Entry(functional_float32.attention_float32, np.float32),
    "attention dynamic": Entry(functional_dynamic.attention_dynamic, np.int32),
    "attention by rows": Entry(reference_float32.attention_by_rows, np.float32),
    "decode float32": Entry(decode_float32.decode_float32, np.float32),
    "decode int8": Entry(decode_int8.decode_int8, np.float32),
    "projection dynamic": Entry(projection_dynamic.projection_dynamic, np.int32),
    "linear float32": Entry(linear_float32.linear_float32, np.float32),
    "linear dynamic": Entry(linear_dynamic.linear_dynamic, np.float32),
    "feed-forward float32": Entry(feed_forward_float32.feed_forward_float32, np.float32),
    "feed-forward dynamic": Entry(feed_forward_dynamic.feed_forward_dynamic, np.float32),
    "feed-forward int8": Entry(feed_forward_int8.feed_forward_int8, np.int32),
    "rows to codes": Entry(row_codes.rows_to_codes, np.int32),
    "codes to rows": Entry(row_codes.codes_to_rows, np.int32),
    "norm": Entry(norm.add_norm, np.float32),
    "store rows": Entry(cache_int8.store_rows, np.float32),
    "quantize": Entry(quantize.quantize, np.float32),
    "dequantize": Entry(quantize.dequantize, np.float32),
}
