"""Every kernel that Python calls, and for what each is compiled: all there is to compile, as data.

A kernel becomes a function of (parameters, addresses, scratch, task_queue, count) for each row here.  Parameters and
addresses are arrays of int64, as the kernel's own records say; scratch is an array of `dtype`, of 32-bit elements.
Kernels that take rules, functions that they are compiled with, are there once for each set of them that a layer may
ask for.
"""
import itertools
from typing import NamedTuple

import numpy as np

from edgeattn.arithmetic import KERNEL_SETS

from . import (
    cache_int8,
    cached_int8,
    call,
    decode_float32,
    decode_int8,
    feed_forward_dynamic,
    feed_forward_float32,
    functional_dynamic,
    fused,
    fused_dynamic,
    fused_int8,
    linear_dynamic,
    norm,
    quantize,
    reference_float32,
)
from .requantize import RULES
from .softmax_int8 import SOFTMAX


class Entry(NamedTuple):
    """A kernel, the dtype of its scratch, and the rules it takes before all else."""

    kernel: object
    dtype: type
    rules: tuple = ()

    def compile(self):
        """The compiled function, from the cache where it is there."""
        return call.entry(*self)


def _rule_sets():
    """{name: rules} of static layers: softmax, and the rules of projections, scores and context."""
    found = {}
    for row in KERNEL_SETS.values():
        # a product's rule is another one where its right operand has a zero point: of keys, of values
        for score, context in itertools.product((row.batch_matmul, row.batch_matmul_asymmetric), repeat=2):
            names = row.fully_connected, score, context, row.softmax
            compute, _ = SOFTMAX[row.softmax]
            found.setdefault((compute, *(RULES[rule] for rule in names[:3])), " ".join(names))
    return {name: rules for rules, name in found.items()}


_RULE_SETS = _rule_sets()

ENTRIES = {
    "layer float32": Entry(fused.layer_float32, np.float32),
    "layer dynamic": Entry(fused_dynamic.layer_dynamic, np.int32),
    **{f"layer int8, {name}": Entry(fused_int8.layer_int8, np.int32, rules) for name, rules in _RULE_SETS.items()},
    **{f"layer int8 with a cache, {name}": Entry(cached_int8.cached_int8, np.int32, rules)
       for name, rules in _RULE_SETS.items()},
    "attention float32": Entry(fused.attention_float32, np.float32),
    "attention dynamic": Entry(functional_dynamic.attention_dynamic, np.int32),
    "attention by rows": Entry(reference_float32.attention_by_rows, np.float32),
    "decode float32": Entry(decode_float32.decode_float32, np.float32),
    "decode int8": Entry(decode_int8.decode_int8, np.float32),
    "projection dynamic": Entry(linear_dynamic.linear_dynamic, np.int32),
    "linear float32": Entry(feed_forward_float32.linear_float32, np.float32),
    "linear dynamic": Entry(feed_forward_dynamic.linear_dynamic, np.float32),
    "feed-forward float32": Entry(feed_forward_float32.feed_forward_float32, np.float32),
    "feed-forward dynamic": Entry(feed_forward_dynamic.feed_forward_dynamic, np.float32),
    "norm": Entry(norm.add_norm, np.float32),
    "store rows": Entry(cache_int8.store_rows, np.float32),
    "quantize": Entry(quantize.quantize, np.float32),
    "dequantize": Entry(quantize.dequantize, np.float32),
}
