"""Calling the float32 attention kernel on given queries, keys and values."""
import functools

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for

from . import fused as f
from .layer_float32 import _NO_BIAS, _NO_KEEP, shape_of
from .matmul import round_up
from .records import blank, mask_fields, packed, slot
from .simd import LANES, ROWS, WIDTH

_NO_LENGTHS = np.zeros(0, np.int64)
_ALIBI = slot(f.ATTENTION, "alibi")
_run = None


@functools.lru_cache(256)
def _plan(q, k, v, keep, bias, band, alibi):
    """(parameters, scratch elements of a thread, work) for arrays and masks of these shapes."""
    B, H, L, D = q
    S, Dv = k[2], v[3]
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    masked = keep is not None or bias is not None or alibi is not None
    private = (f.AT_FREE + WIDTH * (max(D_up, Dv_lanes) + D_up + max(Dv_up, Dv_lanes) + ROWS) + ROWS * D + 64
               + (S * Dv_up if Dv != Dv_up else 0) + D_up + (S * WIDTH if masked else 0))
    private = round_up(private, 16)
    p = blank(f.ATTENTION, private_size=private, **mask_fields(keep, bias, band, alibi))
    return packed(p, f.ATTENTION), private, 2 * B * H * L * S * (D + Dv)


def attention(q, k, v, out, scale, softcap=0.0, keep=None, bias=None, band=None, alibi=None, lengths=None):
    """out (B, H, L, Dv) = softmax(q k^T scale, capped and masked) v.

    Parameters
    ----------
    q, k, v : ndarray of float32
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); last dimension contiguous, other strides free.
    out : ndarray of float32
        (B, H, L, Dv), last dimension contiguous.
    keep, bias : ndarray, C-contiguous, broadcast to (B, H, L, S) by NumPy's rules, or None
        bool or uint8, and float32.
    band : (low, high) or None
        Query i sees key j when i + low <= j <= i + high.
    alibi : (B or 1, H, 2) float64, C-contiguous, or None
        A head's slope, and the position of query 0: -slope * |position - j| is added too.
    lengths : (B,) int64 or None
        Keys that exist per batch entry.
    """
    global _run
    plan, private, work = _plan(q.shape, k.shape, v.shape, shape_of(keep), shape_of(bias), band, shape_of(alibi))
    parameters = plan.copy()  # the kernel writes addresses into it
    if alibi is not None:
        parameters[_ALIBI] = alibi.ctypes.data
    keep = _NO_KEEP if keep is None else keep.reshape(-1).view(np.uint8)
    bias = _NO_BIAS if bias is None else bias.reshape(-1)
    lengths = _NO_LENGTHS if lengths is None else lengths
    arguments = (q, k, v, out, parameters, scale, softcap, keep, bias, lengths)
    if _run is None:
        types = (q, k, v, out, parameters, np.float32(scale), np.float32(softcap), keep, bias, lengths)
        _run = compiled_for(f.attention_float32, (*types, np.zeros(1, np.float32), np.zeros(1, np.int64), 1), strided=4)
    threads.run(_run, arguments, np.float32, 0, private, work)
    return out
