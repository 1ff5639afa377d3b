"""Calling the kernels for one query per head against a long cache of keys and values: loops bound by memory."""
import numpy as np

from edgeattn.runtime.addresses import address
from edgeattn.runtime.plan_cache import planned

from . import decode_float32, decode_int8
from .call import PreparedCall
from .decode_blocks import ADDRESSES, BLOCK, DECODE
from .matmul import round_up
from .records import bits_of_real, blank, packed, slot

_KEYS = slot(DECODE, "keys")  # and the first of them: a call's own


def _rows(array):
    """`array` itself if its last dimension is contiguous and it is float32, else a copy that is."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if array.dtype != np.float32 or (array.shape[-1] > 1 and array.strides[-1] != 4) or any(
            s % 4 for s in array.strides):
        return np.ascontiguousarray(array, np.float32)
    return array


def _plan(q, kv_heads, value_size, blocks, scale, softcap, steps, scale_steps, fixed=()):
    """The `PreparedCall` of arrays of such shapes and any number of keys that fills so many blocks.

    steps : strides of q, k, v and out; scale_steps : of k_scale and v_scale, or None
    fixed : addresses of k, v, k_scale and v_scale, where every call has the same
    """
    kernels, kernel, size = (decode_float32, decode_float32.decode_float32, 4) if scale_steps is None else (
        decode_int8, decode_int8.decode_int8, 1)
    B, H, D = q
    p = blank(DECODE, batch=B, heads=H, kv_heads=kv_heads, head_size=D, value_size=value_size, blocks=blocks,
              scale=bits_of_real(scale), softcap=bits_of_real(softcap))
    p.padded_value = round_up(value_size, kernels.CHUNK)
    p.result_size = H // kv_heads * (p.padded_value + 2)
    p.shared_size = round_up(B * kv_heads * blocks * p.result_size, 16)
    p.private_size = round_up(sum(kernels.private_sizes.py_func(H // kv_heads, D, value_size)), 16)
    (p.q_b, p.q_h), (p.out_b, p.out_h) = ([step // 4 for step in steps[i][:2]] for i in (0, 3))
    (p.k_b, p.k_h, p.k_s), (p.v_b, p.v_h, p.v_s) = ([step // size for step in steps[i][:3]] for i in (1, 2))
    if scale_steps is not None:
        (p.k_scale_b, p.k_scale_h, p.k_scale_s), (p.v_scale_b, p.v_scale_h, p.v_scale_s) = (
            [step // 4 for step in each] for each in scale_steps)
    return PreparedCall(kernel, packed(p, DECODE), ADDRESSES, np.float32, p.shared_size, p.private_size,
                        8 * B * H * blocks * BLOCK * (D + value_size), fixed=fixed, own=_KEYS)


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
    keys = k.shape[2]
    call = planned(_plan, q.shape, v.shape[1], v.shape[3], -(-keys // BLOCK), scale, softcap,
                   (q.strides, k.strides, v.strides, out.strides),
                   None if k_scale is None else (k_scale.strides, v_scale.strides))
    call(q, out, lengths, k, v, k_scale, v_scale, own=(keys, 0))
    return out


def decode_slots(plans, q, k, v, out, slots, scale, k_scale=None, v_scale=None):
    """`decode` for the keys in `slots` of a cache, (first, last), in C order: out (B, H, 1, Dv), or (B, H * Dv).

    q : (B, H, 1, D), batch entries any number of elements apart
    plans : PlanCache of this cache alone, whose arrays, the same ones in every call, are k, v, k_scale and v_scale, of
        all slots
    """
    first, last = slots
    key = q.shape[1], q.strides[0], (last - first + BLOCK - 1) // BLOCK, scale
    call = plans.get(key) or plans.keep(key, _plan(
        (*q.shape[:2], q.shape[3]), k.shape[1], v.shape[3], key[2], scale, 0.0,
        (q.strides, k.strides, v.strides, (4 * q.shape[1] * v.shape[3], 4 * v.shape[3])),
        None if k_scale is None else (k_scale.strides, v_scale.strides), tuple(map(address, (k, v, k_scale, v_scale)))))
    call.run(q, out, None, own=(last - first, first))
