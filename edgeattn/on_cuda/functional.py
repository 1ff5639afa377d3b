"""Attention as a function of arrays on the device."""

import dataclasses
import functools

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


# A call that was checked once is known by the layouts of its arrays and by its options: the next one like it is the
# same launch with other addresses.
_KNOWN = {}
_MOST = 256


def again(arrays, options):
    """The result of a call that was known, launched, or None.

    arrays : query, key, value, out, attn_mask, kv_lengths, alibi_slopes
    """
    if not _KNOWN:
        return None
    kind, driver = _machine()
    kinds, pointers, key = kind(arrays[0]), [], [options, tuple(map(type, options))]
    try:
        for array in arrays:
            pointer, layout = (0, None) if array is None else kind(array).describe(array)
            pointers.append(pointer)
            key.append(layout)
        known = _KNOWN.get(tuple(key))
    except (AttributeError, TypeError):  # not on the device, or not hashable: the checks have words for it
        return None
    if known is None:
        return None
    kernel, grid, numbers, has_bias, spans, made = known
    q, k, v, out, mask, lengths, slopes = pointers
    result = arrays[3]
    if result is None:
        result = kinds.empty(*made, arrays[0])
        out = kinds.describe(result)[0]
    else:
        low, high = out + spans[3][0], out + spans[3][1]
        for pointer, (begin, end) in zip(pointers[:3], spans[:3], strict=True):
            if pointer + begin < high and low < pointer + end:
                return None
    keep, bias = (0, mask) if has_bias else (mask, 0)
    addresses = (q, k, v, out, 0, keep, bias, lengths, slopes, 0, 0, 0)
    driver().launch(kernel, grid, addresses, numbers, kinds.stream(arrays[0]))
    return result


@functools.cache
def _machine():
    """What `again` needs of edgeattn.cuda, imported once."""
    from edgeattn.cuda.arrays import kind
    from edgeattn.cuda.driver import driver

    return kind, driver


def _remember(call, plan, has_bias, inputs, out):
    kind, _ = _machine()
    arrays, options = call
    spans = [tuple(edge - array.pointer for edge in array.span()) for array in (*inputs, out)]
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    try:
        layouts = [None if array is None else kind(array).describe(array)[1] for array in arrays]
        _KNOWN[(options, tuple(map(type, options)), *layouts)] = (*plan, has_bias, spans, (out.shape, out.dtype))
    except (AttributeError, TypeError):  # an array of DLPack alone, a window_size given as a list
        return


def scaled_dot_product_attention(query, key, value, attn_mask, is_causal, causal_alignment, scale, softcap, window_size,
                                 kv_lengths, alibi_slopes, return_weights, return_lse, precision, out, check_shapes,
                                 call):
    """`edgeattn.scaled_dot_product_attention` on the current stream; nothing waits, nothing is copied.

    scale, which may be None, and softcap are checked; `check_shapes` takes the three Views; `call` is what `again` will
    be asked with.
    """
    from edgeattn.cuda import host
    from edgeattn.cuda.arrays import view
    from edgeattn.functional import default_scale

    (q, k, v), like, stream = views(query=query, key=key, value=value)
    numbers(query=q, key=k, value=v)
    if precision == "int8" and q.dtype != np.float32:
        raise TypeError(f"query must be float32 with precision='int8' on CUDA, got dtype {q.dtype}; convert it")
    check_shapes(q, k, v)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    lead, heads = (q.shape[:-3], q.shape[-3]) if q.ndim > 2 else ((), 1)
    queries, keys = q.shape[-2], k.shape[-2]
    shape = q.shape[:-1] + v.shape[-1:]
    masks = device_masks((*lead, heads, queries, keys), view, attn_mask, is_causal=is_causal,
                         causal_alignment=causal_alignment, window_size=window_size, kv_lengths=kv_lengths,
                         alibi_slopes=alibi_slopes)
    result, taken = result_array(out, shape, q.dtype, like, (q, k, v))
    lse = lse_view = weights = weights_view = None
    if return_lse:
        lse, lse_view = result_array(None, q.shape[:-1], np.dtype(np.float32), like, ())
    if return_weights:
        weights, weights_view = result_array(None, (*q.shape[:-1], keys), q.dtype, like, ())
    if any(array is not None and array.size for array in (taken, lse_view, weights_view)):
        batch = int(np.prod(lead, dtype=np.int64))

        def four(array, count):
            return array.reshape(batch, count, *array.shape[-2:])

        kv_heads = k.shape[-3] if k.ndim > 2 else 1
        if lse_view is not None:
            lse_view = dataclasses.replace(lse_view, shape=(batch, heads, queries))
        if precision == "int8" and keys and q.shape[-1]:
            host.attend_int8(four(q, heads), four(k, kv_heads), four(v, kv_heads), four(taken, heads), scale, stream,
                             like, **masks)
            return result
        precision = "float32" if precision == "int8" else precision
        plan = host.attend(four(q, heads), four(k, kv_heads), four(v, kv_heads), four(taken, heads), scale, softcap,
                           lse=lse_view, weights=None if weights_view is None else four(weights_view, heads),
                           precision=precision, stream=stream, like=like, **masks)
        if plan and not return_lse:
            _remember(call, plan, "bias" in masks, (q, k, v), taken)
    found = [result, *([weights] if return_weights else []), *([lse] if return_lse else [])]
    return tuple(found) if len(found) > 1 else result
