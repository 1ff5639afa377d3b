"""Calling the float32 attention kernel on given queries, keys and values."""
import functools

import numpy as np

from . import fused as f
from .call import PreparedCall
from .layer_float32 import shape_of
from .matmul import round_up
from .records import bits_of_real, blank, mask_fields, packed
from .simd import LANES, ROWS, WIDTH


def prepare(q, k, v, out, scale, softcap=0.0, keep=None, bias=None, band=None, alibi=None):
    """The `PreparedCall` of such arrays and masks; arguments as for `attention`."""
    return _prepare(q.shape, k.shape, v.shape, (q.strides, k.strides, v.strides, out.strides), scale, softcap,
                    shape_of(keep), shape_of(bias), band, shape_of(alibi))


@functools.lru_cache(256)
def _prepare(q, k, v, steps, scale, softcap, keep, bias, band, alibi):
    """The same, for arrays and masks of these shapes; steps: of q, k, v and out, bytes along their axes."""
    B, H, L, D = q
    Hkv, S, Dv = k[1], k[2], v[3]
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    masked = keep is not None or bias is not None or alibi is not None
    private = (f.AT_FREE + WIDTH * (max(D_up, Dv_lanes) + D_up + max(Dv_up, Dv_lanes) + ROWS) + ROWS * D + 64
               + (S * Dv_up if Dv != Dv_up else 0) + D_up + (S * WIDTH if masked else 0))
    private = round_up(private, 16)
    p = blank(f.ATTENTION, batch=B, heads=H, kv_heads=Hkv, queries=L, keys=S, head_size=D, value_size=Dv,
              scale=bits_of_real(scale), softcap=bits_of_real(softcap), private_size=private,
              **mask_fields(keep, bias, band, alibi))
    for name, (batch, head, row, _) in zip("qkv", steps, strict=False):
        vars(p).update({f"{name}_b": batch // 4, f"{name}_h": head // 4})
        vars(p)[f"{name}_l" if name == "q" else f"{name}_s"] = row // 4
    p.out_b, p.out_h, p.out_l = (step // 4 for step in steps[3][:3])
    return PreparedCall(f.attention_float32, packed(p, f.ATTENTION), f.ATTENTION_ADDRESSES, np.float32, 0, private,
                        2 * B * H * L * S * (D + Dv))


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
    prepare(q, k, v, out, scale, softcap, keep, bias, band, alibi)(q, k, v, out, keep, bias, alibi, lengths)
    return out
