"""Calling the float32 attention kernel on given queries, keys and values."""
import functools

import numpy as np

from edgeattn import threads
from edgeattn.jit import entry

from . import fused as f
from .layer_float32 import _NO_BIAS, _NO_KEEP, _strides
from .matmul import round_up
from .simd import LANES, ROWS, WIDTH

_NO_LENGTHS = np.zeros(0, np.int64)
_run = None


def _rows(array):
    """`array` itself if its last dimension is contiguous and it is float32, else a copy that is."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if array.dtype != np.float32 or (array.shape[-1] > 1 and array.strides[-1] != 4) or any(
            s % 4 for s in array.strides):
        return np.ascontiguousarray(array, np.float32)
    return array


@functools.lru_cache(64)
def _private(D, Dv, S, masked):
    """Scratch elements that a thread needs for itself; S is 0 where its size depends on no number of keys."""
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    private = (f.AT_FREE + WIDTH * (max(D_up, Dv_lanes) + D_up + max(Dv_up, Dv_lanes) + ROWS) + ROWS * D + 64
               + (S * Dv_up if Dv != Dv_up else 0) + D_up + (S * WIDTH if masked else 0))
    return round_up(private, 16)


def attention(q, k, v, out, scale, softcap=0.0, keep=None, bias=None, band=None, lengths=None):
    """out (B, H, L, Dv) = softmax(q k^T scale, capped and masked) v.

    Parameters
    ----------
    q, k, v : ndarray of float32
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); any strides.
    out : ndarray of float32
        (B, H, L, Dv), last dimension contiguous.
    keep, bias : ndarray, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules, or None
        bool or uint8, and float32.
    band : (low, high) or None
        Query i sees key j when i + low <= j <= i + high.
    lengths : (B,) int64 or None
        Keys that exist per batch entry.
    """
    global _run
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, H, L, D = q.shape
    S, Dv = k.shape[2], v.shape[3]
    masked = keep is not None or bias is not None
    private = _private(D, Dv, S if masked or Dv % ROWS else 0, masked)
    p = np.zeros(f.F_COUNT, np.int64)
    p[f.F_PRIVATE] = private
    if band is not None:
        p[f.F_BAND], p[f.F_LOW], p[f.F_HIGH] = 1, band[0], band[1]
    if keep is not None:
        p[f.F_KEEP_B:f.F_KEEP_S + 1] = _strides(keep, None)
    if bias is not None:
        p[f.F_BIAS_B:f.F_BIAS_S + 1] = _strides(bias, None)
    keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
    bias = _NO_BIAS if bias is None else bias.reshape(-1)
    lengths = _NO_LENGTHS if lengths is None else lengths
    arguments = (q, k, v, out, p, np.float32(scale), np.float32(softcap), keep, bias, lengths)
    if _run is None:
        _run = entry(f.attention_float32, (*arguments, np.zeros(1, np.float32), np.zeros(1, np.int64), 1), strided=4)
    threads.run(_run, arguments, np.float32, 0, private, 2 * B * H * L * S * (D + Dv))
    return out
