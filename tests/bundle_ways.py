"""What tests of bundles share: targets, and what a layer does beside attending as plainly as it can; needs NumPy and the device package alone."""

import platform

import numpy as np

import edgeattn
from edgeattn.runtime import processor
from edgeattn.runtime.targets import TARGETS, runnable


def targets_here():
    """Instruction set -> the best target of it that this machine can run."""
    return {TARGETS[name].isa: name for name in runnable(platform.machine(), processor.flags(), processor.parts())}


def ways(name, layer):
    """Results of a layer with caches, of chunks and of tokens, with probabilities, a softcap and several threads."""
    made = np.random.default_rng(11)
    if name == "encoder":
        x = made.standard_normal((2, 9, 32)).astype(np.float32)
        return [layer(x), layer(x, lengths=np.array([4, 9])), layer(x[:, :1])]
    if name.startswith("static"):
        codes = made.integers(-128, 128, (1, 9, 32)).astype(np.int8)
        if layer.lut_index is not None:
            return [layer.run_int8(codes, need_weights=True)[1]]
        cache = edgeattn.KVCache.for_layer(layer, 1, 16)
        return [layer.run_int8(codes, kv_cache=cache, is_causal=True), layer.run_int8(codes[:, :1], kv_cache=cache, is_causal=True),
                *layer.run_int8(codes, need_weights=True)]
    query, key, value = (made.standard_normal((1, 9, width)).astype(np.float32) for width in (30, 19, 23))
    found = [*layer(query, key, value, need_weights=True), layer(query, key, value, softcap=2.0)]
    for dtype in ("float32", "int8"):
        cache = edgeattn.KVCache.for_layer(layer, 1, 16, dtype=dtype)
        found += [layer(query, key, value, kv_cache=cache, is_causal=True),
                  layer(query[:, :1], key[:, :1], value[:, :1], kv_cache=cache, is_causal=True)]
    return found
