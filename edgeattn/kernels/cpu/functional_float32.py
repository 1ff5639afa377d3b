"""Calling the float32 attention kernel on given queries, keys and values."""
import numpy as np

from edgeattn.runtime.plan_cache import planned

from . import fused as f
from .attend_rows import FEW_QUERIES, MORE_MASK, scratch_of_rows
from .call import PreparedCall
from .matmul import round_up
from .records import NO_MASK, NO_MASKS, bits_of_real, blank, packed, set_masks
from .simd import LANES, ROWS, WIDTH

_MOST_KEPT = 1 << 14  # elements of masks that one head leaves to the next


def prepare(inputs, scale, softcap=0.0, masks=NO_MASKS):
    """The `PreparedCall` of q, k, v of these shapes and their result, in C order; masks: `KernelMask.shapes`."""
    (_, H, L, D), (_, Hkv, S, _), (*_, Dv) = inputs
    steps = H * L * D, L * D, D, Hkv * S * D, S * D, D, Hkv * S * Dv, S * Dv, Dv, H * L * Dv, L * Dv, Dv
    return _plan(*inputs, steps, scale, softcap, masks)


def _plan(q, k, v, steps, scale, softcap, masks):
    """The `PreparedCall` of arrays and masks of these shapes; steps: of q, k, v and out, elements along three axes."""
    B, H, L, D = q
    Hkv, S, Dv = k[1], k[2], v[3]
    D_up, Dv_up, Dv_lanes = round_up(D, LANES), round_up(Dv, ROWS), round_up(Dv, LANES)
    p = blank(f.ATTENTION, batch=B, heads=H, kv_heads=Hkv, queries=L, keys=S, head_size=D, value_size=Dv,
              scale=bits_of_real(scale), softcap=bits_of_real(softcap))
    masked = set_masks(p, masks)
    private = (f.AT_FREE + WIDTH * (max(D_up, Dv_lanes) + D_up + max(Dv_up, Dv_lanes) + ROWS) + ROWS * D + 64
               + (S * Dv_up if Dv != Dv_up else 0) + D_up)
    if masked:
        blocks = -(-L // WIDTH)
        shared = FEW_QUERIES < L <= _MOST_KEPT // max(S, 1) and not (p.keep_h or p.bias_h or masks[4])
        p.mask_step = S * WIDTH if shared else 0
        private += S * WIDTH * (blocks if shared else 1)
    p.private_size = round_up(private, 16)
    if L <= FEW_QUERIES:
        p.at_few = p.private_size + MORE_MASK
        p.private_size = p.at_few + scratch_of_rows(D, Dv)
    (p.q_b, p.q_h, p.q_l, p.k_b, p.k_h, p.k_s, p.v_b, p.v_h, p.v_s, p.out_b, p.out_h, p.out_l) = steps
    return PreparedCall(f.attention_float32, packed(p, f.ATTENTION), f.ATTENTION_ADDRESSES, np.float32, 0,
                        p.private_size, 2 * B * H * L * S * (D + Dv))


def attention(q, k, v, out, scale, softcap=0.0, mask=NO_MASK, lengths=None):
    """out (B, H, L, Dv) = softmax(q k^T scale, capped and masked) v.

    Parameters
    ----------
    q, k, v : ndarray of float32
        (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); last dimension contiguous, other strides free.
    out : ndarray of float32
        (B, H, L, Dv), last dimension contiguous.
    mask : KernelMask
    lengths : (B,) int64 or None
        Keys that exist per batch entry.
    """
    steps = tuple(step // 4 for array in (q, k, v, out) for step in array.strides[:3])
    call = planned(_plan, q.shape, k.shape, v.shape, steps, scale, softcap, mask.shapes)
    call(q, k, v, out, *mask.arrays, lengths)
    return out
