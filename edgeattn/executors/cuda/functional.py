"""Attention as a function of arrays on the device."""

import numpy as np

from edgeattn.executors.cuda.call_cache import OUT, RESULTS, CallCache, provider
from edgeattn.executors.cuda.masks import arrays_read, device_masks


def result_array(call, out, shape, dtype, inputs):
    """(array, View) that takes a result: the caller's `out`, checked, or a new one of the kind of the first array."""
    from edgeattn.kernels.cuda.arrays import view

    if out is None:
        made = provider()(call.like).empty(shape, dtype, call.like)
        return made, view("out", made)
    taken = call.view("out", out)
    if taken.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, the result's, got {taken.dtype}")
    if taken.shape != tuple(shape):
        raise ValueError(f"out must have shape {tuple(shape)}, the result's, got {taken.shape}")
    if taken.size and taken.shape[-1] > 1 and taken.strides[-1] != taken.dtype.itemsize:
        raise ValueError(f"out must have neighbours along its last axis on CUDA, got strides {taken.strides} bytes; "
                         "make it contiguous")
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


_CALLS = CallCache()  # its places: query, key, value, out, attn_mask, kv_lengths, alibi_slopes
_PLACES = {"attn_mask": 4, "kv_lengths": 5, "alibi_slopes": 6}
_WEIGHTS, _LSE = RESULTS, RESULTS + 1


def replay(arrays, options):
    """`CallCache.again` of scaled_dot_product_attention."""
    return _CALLS.replay(arrays, options)


def scaled_dot_product_attention(query, key, value, attn_mask, is_causal, causal_alignment, scale, softcap, window_size,
                                 kv_lengths, alibi_slopes, return_weights, return_lse, precision, out, check_shapes,
                                 known_as):
    """`edgeattn.scaled_dot_product_attention` on the current stream; nothing waits, nothing is copied.

    scale, which may be None, and softcap are checked; `check_shapes` takes the three Views; `known_as` is what `replay`
    will be asked with.
    """
    from edgeattn.checks import default_scale
    from edgeattn.kernels.cuda import attend
    from edgeattn.kernels.cuda.call import Call
    from edgeattn.kernels.cuda.launch_graph import as_argument, capture

    with Call("query", query) as call, capture() as record:
        q, k, v = (call.view(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        numbers(query=q, key=k, value=v)
        if precision == "int8" and q.dtype != np.float32:
            raise TypeError(f"query must be float32 with precision='int8' on CUDA, got dtype {q.dtype}; convert it")
        check_shapes(q, k, v)
        scale = default_scale(q.shape[-1]) if scale is None else scale
        lead, heads = (q.shape[:-3], q.shape[-3]) if q.ndim > 2 else ((), 1)
        queries, keys = q.shape[-2], k.shape[-2]
        shape = q.shape[:-1] + v.shape[-1:]
        batch, kv_heads = int(np.prod(lead, dtype=np.int64)), k.shape[-3] if k.ndim > 2 else 1

        def four(array, count):
            return array.reshape(batch, count, *array.shape[-2:])

        q, k, v = (as_argument(x, place) for place, x in enumerate((q, k, v)))
        masks = device_masks(
            (*lead, heads, queries, keys), lambda name, array: as_argument(call.view(name, array), _PLACES[name]),
            attn_mask,
            is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size, kv_lengths=kv_lengths,
            alibi_slopes=alibi_slopes)
        read = (q, k, v, *arrays_read(masks))
        results, made = zip(*(
            result_array(call, given, wanted, dtype, inputs) for is_wanted, given, wanted, dtype, inputs in (
                (True, out, shape, q.dtype, read),
                (return_weights, None, (*q.shape[:-1], keys), q.dtype, ()),
                (return_lse, None, q.shape[:-1], np.dtype(np.float32), ())) if is_wanted), strict=True)
        if any(array.size for array in made):
            arrays = [four(q, heads), four(k, kv_heads), four(v, kv_heads), four(as_argument(made[0], OUT), heads)]
            weights = four(as_argument(made[1], _WEIGHTS), heads) if return_weights else None
            lse = as_argument(made[-1].reshape(batch, heads, queries), _LSE) if return_lse else None
            where = dict(stream=call.stream, like=call.like)
            if precision == "int8" and keys and q.shape[-1]:
                attend.attend_int8(*arrays, scale, **where, **masks)
            else:
                attend.attend(*arrays, scale, softcap, lse=lse, weights=weights, **where,
                              precision="float32" if precision == "int8" else precision, **masks)
    made_at = [OUT, *([_WEIGHTS] if return_weights else []), *([_LSE] if return_lse else [])]
    _CALLS.record(*known_as, record, read, list(zip(made_at, made, strict=True)))
    return results if len(results) > 1 else results[0]
