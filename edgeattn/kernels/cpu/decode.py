"""Calling the kernels for one query per head against a long cache of keys and values: loops bound by memory."""
import functools

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for

from . import decode_float32, decode_int8
from .decode_blocks import BLOCK
from .matmul import round_up

_NO_LENGTHS = np.zeros(0, np.int64)
_runs = {}


def _rows(array):
    """`array` itself if its last dimension is contiguous and it is float32, else a copy that is."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if array.dtype != np.float32 or (array.shape[-1] > 1 and array.strides[-1] != 4) or any(
            s % 4 for s in array.strides):
        return np.ascontiguousarray(array, np.float32)
    return array


@functools.lru_cache
def _private(sizes, G, D, Dv):
    """Scratch elements that a thread needs for itself, whole cache lines."""
    return round_up(sum(sizes.py_func(G, D, Dv)), 16)


def decode(q, k, v, out, scale, softcap=0.0, lengths=None, k_scale=None, v_scale=None):
    """out (B, H, Dv) = softmax(q k^T scale) v for one query per head.

    Parameters
    ----------
    q : (B, H, D) float32, last dimension contiguous
    k, v : (B, Hkv, S, D), (B, Hkv, S, Dv)
        float32, or int8 with scales; last dimension contiguous, other strides free: a cache is read in place.
    out : (B, H, Dv) float32, last dimension contiguous
    scale, softcap : float
    lengths : (B,) int64 or None
        Keys that exist per batch entry; nothing behind them is read, nor need there be anything.
    k_scale, v_scale : (B, Hkv, S) float32, none negative, contiguous along S or of stride 0; None for a float32 cache
    """
    q = _rows(q)
    B, H, D = q.shape
    _, Hkv, S, Dv = v.shape
    G = H // Hkv
    kernels, scales = (decode_float32, ()) if k_scale is None else (decode_int8, (k_scale, v_scale))
    private = _private(kernels.private_sizes, G, D, Dv)
    shared = round_up(B * Hkv * -(-S // BLOCK) * G * (round_up(Dv, kernels.CHUNK) + 2), 16)
    arguments = (q, k, v, out, *scales, scale, softcap, _NO_LENGTHS if lengths is None else lengths, private)
    run = _runs.get(kernels)
    if run is None:
        run = _runs[kernels] = compiled_for(
            kernels.decode, (*arguments, np.zeros(1, np.float32), np.zeros(1, np.int64), 1), strided=4 + len(scales))
    threads.run(run, arguments, np.float32, shared, private, 8 * B * H * S * (D + Dv))
    return out
