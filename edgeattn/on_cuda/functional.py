"""Attention as a function of arrays on the device."""

import dataclasses

import numpy as np

from edgeattn.on_cuda.masks import device_masks


def views(**arrays):
    """Views of arrays on the device by their names, and what is said of them as (like, stream)."""
    from edgeattn.cuda.arrays import kind, view

    found = [view(name, array) for name, array in arrays.items()]
    first = next(iter(arrays.values()))
    return found, first, kind(first).stream(first)


def result_array(out, shape, dtype, like, inputs):
    """(array, View) that takes a result: the caller's `out`, checked, or a new one of the kind of `like`."""
    from edgeattn.cuda.arrays import kind, view

    if out is None:
        made = kind(like).empty(shape, dtype, like)
        return made, view("out", made)
    taken = view("out", out)
    if taken.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, the result's, got {taken.dtype}")
    if taken.shape != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, the result's, got {taken.shape}")
    if taken.read_only:
        raise ValueError("out must be writeable, got a read-only array; pass a copy of it")
    low, high = taken.span()
    for other in inputs:
        begin, end = other.span()
        if begin < high and low < end and other.size and taken.size:
            raise ValueError("out must not overlap an input on CUDA; leave it out, or pass an array of its own")
    return out, taken


def numbers(**arrays):
    """Raise unless the Views are all float32 or all float16, with neighbours along the last axis."""
    first, dtype = next((name, array.dtype) for name, array in arrays.items())
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float16):
            raise TypeError(f"{name} must be float32 or float16 on CUDA, got dtype {array.dtype}; convert it")
        if array.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {dtype}, on CUDA, got {array.dtype}; convert one")
        if array.size and array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
            raise ValueError(f"{name} must have neighbours along its last axis on CUDA, got strides {array.strides} "
                             "bytes; make it contiguous")


def scaled_dot_product_attention(query, key, value, attn_mask, is_causal, causal_alignment, scale, softcap, window_size,
                                 kv_lengths, alibi_slopes, return_weights, return_lse, out, check_shapes):
    """`edgeattn.scaled_dot_product_attention` on the current stream; nothing waits, nothing is copied.

    scale and softcap are checked, scale is None for the default; `check_shapes` takes the three Views.
    """
    from edgeattn.cuda import host
    from edgeattn.cuda.arrays import view

    (q, k, v), like, stream = views(query=query, key=key, value=value)
    if return_weights:
        raise ValueError("return_weights is missing on CUDA, where probabilities are never stored; return_lse=True "
                         "gives what they are made of, or pass NumPy arrays")
    numbers(query=q, key=k, value=v)
    check_shapes(q, k, v)
    lead, heads = (q.shape[:-3], q.shape[-3]) if q.ndim > 2 else ((), 1)
    queries, keys = q.shape[-2], k.shape[-2]
    shape = q.shape[:-1] + v.shape[-1:]
    masks = device_masks((*lead, heads, queries, keys), view, attn_mask, is_causal=is_causal,
                         causal_alignment=causal_alignment, window_size=window_size, kv_lengths=kv_lengths,
                         alibi_slopes=alibi_slopes)
    result, taken = result_array(out, shape, q.dtype, like, (q, k, v))
    numbers(out=taken)
    lse = lse_view = None
    if return_lse:
        lse, lse_view = result_array(None, q.shape[:-1], np.dtype(np.float32), like, ())
    if taken.size or lse is not None and lse_view.size:
        batch = int(np.prod(lead, dtype=np.int64))

        def four(array, count):
            return array.reshape(batch, count, *array.shape[-2:])

        kv_heads = k.shape[-3] if k.ndim > 2 else 1
        if lse_view is not None:
            lse_view = dataclasses.replace(lse_view, shape=(batch, heads, queries))
        host.attend(four(q, heads), four(k, kv_heads), four(v, kv_heads), four(taken, heads), scale, softcap,
                    lse=lse_view, stream=stream, like=like, **masks)
    return (result, lse) if return_lse else result
