"""Attention as a function of arrays."""

import functools
import math

import numpy as np

from edgeattn.checks import check_out, deliver, flag, float_array, is_one_of, number, result_dtype, to_float32
from edgeattn.cpu import functional_dynamic, functional_float32, plain
from edgeattn.masks import resolve_mask

_NO_WINDOW = (-1, -1)
_ATTENTION = {"float32": functional_float32.attention, "int8": functional_dynamic.attention}
_SMALLEST_SOFTCAP = 1e-30  # its reciprocal is a float32 too


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    *,
    is_causal=False,
    causal_alignment=None,
    scale=None,
    enable_gqa=False,
    softcap=0.0,
    window_size=_NO_WINDOW,
    kv_lengths=None,
    alibi_slopes=None,
    return_weights=False,
    return_lse=False,
    precision="float32",
    out=None,
):
    """softmax(query key^T * scale + mask) value.

    The order is: scores = query key^T * scale, then softcap * tanh(scores / softcap), then masks, then
    softmax over the permitted keys, then the weighted mean of the values. A query with no permitted key gives
    zeros. Keys and values behind a mask have no influence, not even as NaN; NaN in a permitted place
    propagates.

    Parameters
    ----------
    query : (..., H, L, D) float16, float32 or float64 array
        All dtypes are computed in float32. The three may also have two axes, (L, D) and so on. Arrays on a GPU, with
        `__cuda_array_interface__` or DLPack, are computed there, docs/cuda.md says how; all arrays must be there then.
    key : (..., Hkv, S, D) array
    value : (..., Hkv, S, Dv) array
    attn_mask : bool or float array, broadcastable to (..., H, L, S), optional
        bool: True = attend. float: added to the scores; -inf = do not attend.
    is_causal : bool
        A query sees no key after its own position. May be combined with `attn_mask`.
    causal_alignment : {"upper_left", "lower_right"}, optional
        Where the queries stand among the keys; needed by `is_causal` and `window_size` when L != S, or when
        `kv_lengths` differ from L. "upper_left": the first query at the first key. "lower_right": the last
        query at the last key, the last of `kv_lengths` where given.
    scale : float, optional
        1 / sqrt(D) unless given; 0 means 0.
    enable_gqa : bool
        Permits H != Hkv: query head h reads key/value head h // (H / Hkv).
    softcap : float
        Bound of the scores, 0 = none.
    window_size : (int, int)
        (left, right): a query at position p sees keys p - left to p + right, both inclusive; -1 = unbounded.
        `sliding_window` gives it for a number of keys in all.
    kv_lengths : (...) int array, optional
        Number of leading keys that exist, per batch entry: the axes of `query` before H.
    alibi_slopes : (H,) or (..., H) float array, optional
        Adds -slope * |p - j| to the score of the query at position p and key j, after the softcap, as
        FlashAttention does. Positions follow `causal_alignment`.
    return_weights : bool
        Return the probabilities too. Probabilities and `return_lse` take a slower way through the same sums.
    return_lse : bool
        Return log(sum(exp(scores))) over the permitted keys too: what is needed to join the results over parts
        of the keys. With the probabilities it gives the scores that softmax saw, log(weights) + lse.
    precision : {"float32", "int8", "float16", "tf32"}
        Of the two products; the softmax and all sums stay float32. "int8" quantizes every query, key, value and row of
        probabilities by its own range as it comes, as dynamic int8 layers do; without `softcap`, `return_weights` and
        `return_lse`. "float16" and "tf32" (10 bits of fraction, the range of float32) are for arrays
        on a GPU, where tensor cores multiply them; float16 makes infinities of numbers from 65520 on.
    out : (..., H, L, Dv) array, optional
        Takes the result; of the result's dtype. It may overlap inputs.

    Returns
    -------
    (..., H, L, Dv) array
        Of the inputs' dtype, the widest of them where they differ.
    (..., H, L, S) array
        The probabilities, only with `return_weights`.
    (..., H, L) float32 array
        The log of the sum, only with `return_lse`; -inf for a query with no permitted key.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    if (attn_mask is None and causal_alignment is None and type(softcap) is float and not softcap
            and window_size is _NO_WINDOW and kv_lengths is None and alibi_slopes is None and return_weights is False
            and return_lse is False and type(precision) is str and precision in _ATTENTION
            and (is_causal is False or is_causal is True) and (enable_gqa is False or enable_gqa is True)
            and _is_usual(query, key, value, is_causal, enable_gqa, out)):
        # what small attention is called with, again and again: nothing to convert, no mask but the causal one
        result = np.empty((*query.shape[:3], value.shape[3]), np.float32) if out is None else out
        scale = default_scale(query.shape[3]) if scale is None else number("scale", scale)
        band = (-2 * key.shape[2], 0) if is_causal else None
        return _ATTENTION[precision](query, key, value, result, scale, band=band)
    on_cuda = not isinstance(query, np.ndarray) and _on_gpu(query)
    if not is_one_of(precision, ("float32",)):
        _check_precision(precision, softcap, return_weights, return_lse, on_cuda)
    if on_cuda:
        on_cuda = _functions_on_cuda()
        arrays = (query, key, value, out, attn_mask, kv_lengths, alibi_slopes)
        options = (is_causal, causal_alignment, scale, enable_gqa, softcap, window_size, return_weights, return_lse,
                   precision)
        result = on_cuda.again(arrays, options)
        if result is not None:
            return result
    grouped = flag("enable_gqa", enable_gqa)
    return_weights = flag("return_weights", return_weights)
    return_lse = flag("return_lse", return_lse)
    softcap = checked_softcap(softcap)
    if on_cuda:
        scale = None if scale is None else number("scale", scale)
        return on_cuda.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal, causal_alignment, scale, softcap, window_size, kv_lengths,
            alibi_slopes, return_weights, return_lse, precision, out,
            functools.partial(_check_shapes, grouped=grouped), (arrays, options))
    query, key, value = (
        float_array(name, array) for name, array in (("query", query), ("key", key), ("value", value))
    )
    _check_shapes(query, key, value, grouped)
    if scale is None:
        scale = default_scale(query.shape[-1])
    else:
        scale = number("scale", scale)
    dtype = result_dtype(query, key, value)
    shape = query.shape[:-1] + value.shape[-1:]
    check_out(out, shape, dtype)

    # Two axes are one head without a name.
    lead, heads = (query.shape[:-3], query.shape[-3]) if query.ndim > 2 else ((), 1)
    queries, keys = query.shape[-2], key.shape[-2]
    mask = resolve_mask(
        (*lead, heads, queries, keys),
        attn_mask,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window_size=window_size,
        kv_lengths=kv_lengths,
        alibi_slopes=alibi_slopes,
    )
    batch = mask.shape[0]
    kv_heads = key.shape[-3] if key.ndim > 2 else 1
    q = to_float32(query).reshape(batch, heads, queries, query.shape[-1])
    k = to_float32(key).reshape(batch, kv_heads, keys, key.shape[-1])
    v = to_float32(value).reshape(batch, kv_heads, keys, value.shape[-1])

    result = out if _writes_directly(out, q, k, v, mask) else np.empty(shape, np.float32)
    weights = np.empty(query.shape[:-1] + (keys,), np.float32) if return_weights else None
    lse = np.empty(query.shape[:-1], np.float32) if return_lse else None
    context = result.reshape(batch, heads, queries, shape[-1])
    if return_weights or return_lse or not (context.size and keys and query.shape[-1]):
        plain.attention(
            q,
            k,
            v,
            mask,
            scale=scale,
            softcap=softcap,
            out=context,
            weights=None if weights is None else weights.reshape(batch, heads, queries, keys),
            lse=None if lse is None else lse.reshape(batch, heads, queries),
        )
    else:
        keep, bias, band = mask.for_kernels()
        if precision == "int8":
            functional_dynamic.attention(q, k, v, context, scale, keep, bias, band)
        else:
            functional_float32.attention(q, k, v, context, scale, softcap, keep, bias, band)
    result = deliver(result, out, dtype)
    if not (return_weights or return_lse):
        return result
    return (result, *([deliver(weights, None, dtype)] if return_weights else []), *([lse] if return_lse else []))


def _is_usual(query, key, value, is_causal, grouped, out):
    """Whether these are float32 arrays with four axes in C order that fit, and nothing needs a copy."""
    arrays = (query, key, value) if out is None else (query, key, value, out)
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype != np.float32 or not array.flags.carray or not array.size:
            return False
    if not query.ndim == key.ndim == value.ndim == 4:
        return False
    (batch, heads, queries, size), (of_keys, kv_heads, keys, key_size) = query.shape, key.shape
    if value.shape[:3] != key.shape[:3] or of_keys != batch or key_size != size or is_causal and keys != queries:
        return False
    if heads != kv_heads and (not grouped or heads % kv_heads):
        return False
    return out is None or out.shape == (batch, heads, queries, value.shape[3]) and not any(
        np.may_share_memory(out, array) for array in arrays[:3])


@functools.cache
def _functions_on_cuda():
    """edgeattn.on_cuda.functional, imported by the first call that needs it."""
    from edgeattn.on_cuda import functional

    return functional


def _on_gpu(array):
    """Whether an array that is not NumPy's lies in a GPU's memory."""
    here = getattr(array, "is_cuda", None)  # torch says so at once, and takes microseconds to describe an array
    if here is True or here is False:
        return here
    if hasattr(array, "__cuda_array_interface__"):
        return True
    if not hasattr(array, "__dlpack_device__"):
        return False
    from edgeattn.cuda import dlpack

    return dlpack.on_gpu(array)


def _check_precision(precision, softcap, return_weights, return_lse, on_cuda):
    """Refuse what is no precision, or none of where the arrays are, and what the int8 products do not come with."""
    if not is_one_of(precision, ("int8", "float16", "tf32")):
        raise ValueError(f"precision must be 'float32', 'int8', 'float16' or 'tf32', got {precision!r}")
    if precision != "int8":
        if not on_cuda:
            raise ValueError(f"precision must be 'float32' or 'int8' for arrays on the CPU, got {precision!r}, which "
                             "tensor cores have; leave it out, or pass arrays on a GPU")
        return
    flags = {"return_weights": return_weights, "return_lse": return_lse}
    for name, given in {"softcap": checked_softcap(softcap), **{n: flag(n, f) for n, f in flags.items()}}.items():
        if given:
            raise ValueError(f"{name} must be left out with precision='int8', got {given}; use precision='float32'")


def default_scale(head_dim):
    """1 / sqrt(head_dim); heads of size 0 have scores of 0 whatever the scale."""
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def checked_softcap(softcap):
    """`softcap` as a float that kernels can divide by, or 0."""
    softcap = number("softcap", softcap)
    if softcap != 0 and softcap < _SMALLEST_SOFTCAP:
        raise ValueError(f"softcap must be 0 (off), or positive and at least {_SMALLEST_SOFTCAP}, got {softcap}")
    return softcap


def _check_shapes(query, key, value, grouped):
    """Ranks, then the axes that must agree, then the numbers of heads."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim < 2:
            raise ValueError(f"{name} must have at least 2 axes (..., length, size), got shape {array.shape}")
        if array.ndim != query.ndim:
            raise ValueError(f"{name} must have as many axes as query, {query.ndim}, got {shapes}")
        if array.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must have query's leading axes {query.shape[:-3]}, got {shapes}; "
                "repeat it with numpy.broadcast_to"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's last axis D = {query.shape[-1]}, got {shapes}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have as many rows as key, S = {key.shape[-2]}, got {shapes}")
    if query.ndim == 2:
        return
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if value.shape[-3] != kv_heads:
        raise ValueError(f"value must have as many heads as key, {kv_heads}, got {shapes}")
    if heads != kv_heads and not grouped:
        raise ValueError(
            f"key and value must have query's {heads} heads, got {shapes}; "
            "pass enable_gqa=True if groups of query heads share a key/value head"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {heads} and {kv_heads} in {shapes}"
        )


def _writes_directly(out, query, key, value, mask):
    """Whether the kernel may write into the caller's array: right layout, and no input changes under it."""
    if type(out) is not np.ndarray or out.dtype != np.float32 or not (out.flags.c_contiguous and out.flags.aligned):
        return False
    inputs = (query, key, value, mask.keep, mask.bias)
    return not any(array is not None and np.may_share_memory(out, array) for array in inputs)
