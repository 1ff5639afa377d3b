"""Attention as a function of arrays."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, overload

import numpy as np

from edgeattn.checks import (
    FLOAT32,
    check_out,
    flag,
    float_array,
    is_one_of,
    number,
    result_dtype,
    to_float32,
    write_result,
)
from edgeattn.device import executor, is_on_gpu
from edgeattn.kernels.cpu import float32, functional_dynamic, functional_float32
from edgeattn.masks import NO_WINDOW, check_mask_shapes, resolve_mask
from edgeattn.prepared import PreparedCalls, call_signature, lies_apart

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import ArrayLike
    from typing_extensions import Unpack

    from edgeattn.types import (
        CausalAlignment,
        DeviceArray,
        DeviceOptions,
        Flag,
        Float32s,
        Floats,
        FunctionOptions,
        Precision,
        Real,
        Shape,
        Window,
    )

_SMALLEST_SOFTCAP = 1e-30  # its reciprocal is a float32 too
_FLOAT32: Precision = "float32"
_prepared = PreparedCalls(256)


@overload
def scaled_dot_product_attention(
    query: DeviceArray, key: DeviceArray, value: DeviceArray, attn_mask: DeviceArray | None = None,
    **options: Unpack[DeviceOptions],
) -> Any: ...


@overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, *,
    return_weights: Literal[False] = False, return_lse: Literal[False] = False, **options: Unpack[FunctionOptions],
) -> Floats: ...


@overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, *,
    return_weights: Literal[True], return_lse: Literal[False] = False, **options: Unpack[FunctionOptions],
) -> tuple[Floats, Floats]: ...


@overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, *,
    return_weights: Literal[False] = False, return_lse: Literal[True], **options: Unpack[FunctionOptions],
) -> tuple[Floats, Float32s]: ...


@overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, *,
    return_weights: Literal[True], return_lse: Literal[True], **options: Unpack[FunctionOptions],
) -> tuple[Floats, Floats, Float32s]: ...


@overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, *,
    return_weights: Flag = False, return_lse: Flag = False, **options: Unpack[FunctionOptions],
) -> Floats | tuple[Floats, ...]: ...


def scaled_dot_product_attention(
    query: Any,  # ArrayLikes, and from the checks on arrays; or on a GPU all of them
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *,
    is_causal: Flag = False,
    causal_alignment: CausalAlignment | None = None,
    scale: Real | None = None,
    enable_gqa: Flag = False,
    softcap: Real = 0.0,
    window_size: Window = NO_WINDOW,
    kv_lengths: Any = None,
    alibi_slopes: Any = None,
    return_weights: Flag = False,
    return_lse: Flag = False,
    precision: Precision = "float32",
    out: Any = None,
) -> Floats | tuple[Floats, ...]:
    """softmax(query key^T * scale + mask) value.

    The order is: scores = query key^T * scale, then softcap * tanh(scores / softcap), then masks, then
    softmax over the permitted keys, then the weighted mean of the values. A query with no permitted key gives
    zeros. Keys and values behind a mask have no influence, not even as NaN; NaN in a permitted place
    propagates.

    Parameters
    ----------
    query : (..., H, L, D) float16, float32 or float64 array
        All dtypes are computed in float32, what is beyond it as infinity; docs/attention.md has the range of every
        argument. The three may also have two axes, (L, D) and so on. Arrays on a GPU, with
        `__cuda_array_interface__` or DLPack, are computed there, docs/cuda.md says how; all arrays must be there then.
    key : (..., Hkv, S, D) array
    value : (..., Hkv, S, Dv) array
    attn_mask : bool or float array, broadcastable to (..., H, L, S), optional
        bool: True = attend. float: added to the scores; -inf = do not attend, what is beyond 2.3e38 in size as that.
    is_causal : bool
        A query sees no key after its own position. May be combined with `attn_mask`.
    causal_alignment : {"upper_left", "lower_right"}, optional
        Where the queries stand among the keys; needed by `is_causal` and `window_size` when L != S, or when
        `kv_lengths` differ from L. "upper_left": the first query at the first key. "lower_right": the last
        query at the last key, the last of `kv_lengths` where given.
    scale : float, optional
        1 / sqrt(D) unless given; 0 means 0. From 1e-18 to 1e6 in size with `precision="int8"`; beyond these a slower
        way is taken in float32.
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
        `return_lse`; a value that is smaller than 1.5e-36, or than 1e-18 of its head's others, loses bits.
        "float16" and "tf32" (10 bits of fraction, the range of float32) are for arrays
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
    on_cuda = not isinstance(query, np.ndarray) and is_on_gpu(query)
    if precision is not _FLOAT32 and not is_one_of(precision, (_FLOAT32,)):
        _check_precision(precision, on_cuda)
    if on_cuda:
        arrays = (query, key, value, out, attn_mask, kv_lengths, alibi_slopes)
        options = (is_causal, causal_alignment, scale, enable_gqa, softcap, window_size, return_weights, return_lse,
                   precision)
        on_gpu = executor("cuda", "functional")
        known: Floats | tuple[Floats, ...] | None = on_gpu.replay(arrays, options)
        if known is not None:
            return known
    if type(attn_mask) is np.bool_:
        attn_mask = np.asarray(attn_mask)
    signature = None
    if (return_weights is False and return_lse is False and type(softcap) is float
            and (scale is None or type(scale) is float) and (enable_gqa is False or enable_gqa is True)):
        signature = call_signature(query, key, value, attn_mask, None, is_causal, causal_alignment, window_size,
                                   alibi_slopes, kv_lengths, FLOAT32, (scale, softcap, enable_gqa, precision))
        prepared = _prepared.get(signature)  # None of None
        if prepared is not None and (again := prepared.run(query, key, value, out, attn_mask, None)) is not None:
            return again
    grouped = flag("enable_gqa", enable_gqa)
    return_weights = flag("return_weights", return_weights)
    return_lse = flag("return_lse", return_lse)
    softcap = checked_softcap(softcap)
    if precision == "int8" and (softcap or return_weights or return_lse):
        name, given = next((name, given) for name, given in (
            ("softcap", softcap), ("return_weights", return_weights), ("return_lse", return_lse)) if given)
        raise ValueError(f"{name} must be left out with precision='int8', got {given}; use precision='float32'")
    if on_cuda:
        scale = None if scale is None else number("scale", scale)
        there: Floats | tuple[Floats, ...] = on_gpu.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal, causal_alignment, scale, softcap, window_size, kv_lengths,
            alibi_slopes, return_weights, return_lse, precision, out,
            lambda q, k, v: _shapes(q.shape, k.shape, v.shape, grouped), (arrays, options))
        return there
    query, key, value = float_array("query", query), float_array("key", key), float_array("value", value)
    dtype = result_dtype(query, key, value)
    shapes = _shapes(query.shape, key.shape, value.shape, grouped)
    scale = shapes.scale if scale is None else number("scale", scale)
    if precision == "int8" and not float32.is_ordinary(scale, 0.0):
        raise ValueError(f"scale must be 0, or from {float32.SCALES[0]} to {float32.SCALES[1]} in size, with "
                         f"precision='int8', got {scale}; use precision='float32'")
    check_out(out, shapes.result, dtype)
    positions: dict[str, Any] = {"is_causal": is_causal, "causal_alignment": causal_alignment,
                                 "window_size": window_size, "kv_lengths": kv_lengths, "alibi_slopes": alibi_slopes}
    if signature is not None and not shapes.empty and float32.is_ordinary(scale, softcap):
        mask = resolve_mask(shapes.scores, **positions)
        check_mask_shapes(shapes.scores, attn_mask, None)
        kernel = functional_dynamic if precision == "int8" else functional_float32
        prepared = _prepared.learn(signature, functools.partial(kernel.prepare, shapes.inputs, scale, softcap),
                                   shapes.scores, shapes.result, mask, attn_mask)
        if prepared is not None:
            made = prepared.run(query, key, value, None, attn_mask, None)  # a new array, never None
            return write_result(cast("Floats", made), out, dtype)
    mask = resolve_mask(shapes.scores, attn_mask, **positions)
    q, k, v = (to_float32(x.reshape(axes)) for x, axes in zip((query, key, value), shapes.inputs, strict=True))
    if (type(out) is np.ndarray and out.dtype == FLOAT32 and out.flags.carray
            and lies_apart(out, (q, k, v, mask.keep, mask.bias))):
        result = out
    else:
        result = np.empty(shapes.result, FLOAT32)
    context = result if result.ndim == 4 else result.reshape(shapes.context)
    weights = np.empty((*query.shape[:-1], key.shape[-2]), np.float32) if return_weights else None
    lse = np.empty(query.shape[:-1], np.float32) if return_lse else None
    if precision == "int8" and not shapes.empty:
        functional_dynamic.attention(q, k, v, context, scale, mask.for_kernels())
    else:
        float32.attention(
            q, k, v, mask, context, scale=scale, softcap=softcap,
            weights=None if weights is None else weights.reshape(mask.shape),
            lse=None if lse is None else lse.reshape(mask.shape[:3]))
    result = write_result(result, out, dtype)
    if not (return_weights or return_lse):
        return result
    return (result, *([] if weights is None else [write_result(weights, None, dtype)]), *([] if lse is None else [lse]))


def _check_precision(precision: object, on_cuda: bool) -> None:
    """Refuse what is no precision, or none of where the arrays are."""
    if not is_one_of(precision, ("int8", "float16", "tf32")):
        raise ValueError(f"precision must be 'float32', 'int8', 'float16' or 'tf32', got {precision!r}")
    if precision != "int8" and not on_cuda:
        raise ValueError(f"precision must be 'float32' or 'int8' for arrays on the CPU, got {precision!r}, which "
                         "tensor cores have; leave it out, or pass arrays on a GPU")


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim); heads of size 0 have scores of 0 whatever the scale."""
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def checked_softcap(softcap: object) -> float:
    """`softcap` as a float that kernels can divide by, or 0."""
    if type(softcap) is float and not softcap:
        return softcap
    softcap = number("softcap", softcap)
    if softcap != 0 and softcap < _SMALLEST_SOFTCAP:
        raise ValueError(f"softcap must be 0 (off), or positive and at least {_SMALLEST_SOFTCAP}, got {softcap}")
    return softcap


class _Shapes(NamedTuple):
    """What follows from the shapes of query, key and value.

    scores (..., H, L, S), result (..., H, L, Dv); inputs: the three, and context: the result, in four axes;
    empty: whether an axis is; scale: of the scores, unless another is given.
    """

    scores: Shape
    result: Shape
    inputs: tuple[Shape, Shape, Shape]
    context: Shape
    empty: bool
    scale: float


@functools.lru_cache(256)
def _shapes(query: Shape, key: Shape, value: Shape, grouped: bool) -> _Shapes:
    """The `_Shapes` of three shapes: checked are ranks, then the axes that must agree, then the numbers of heads."""
    if not (len(query) == len(key) == len(value) >= 2 and query[:-3] == key[:-3] == value[:-3]
            and key[-1] == query[-1] and value[-2] == key[-2]):
        _refuse_shapes(query, key, value)
    given, result = (query, key, value), (*query[:-1], value[-1])
    if len(query) == 2:  # one head without a name
        query, key, value = (1, *query), (1, *key), (1, *value)
    (*lead, heads, queries, size), (kv_heads, keys), value_size = query, key[-3:-1], value[-1]
    if not heads == kv_heads == value[-3]:
        _check_heads(given, heads, kv_heads, value[-3], grouped)
    batch = math.prod(lead)
    inputs = (batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size)
    scores = (*lead, heads, queries, keys)
    return _Shapes(scores, result, inputs, (batch, heads, queries, value_size),
                   0 in (batch, heads, queries, keys, size, value_size), default_scale(size))


def _as_text(query: Shape, key: Shape, value: Shape) -> str:
    return f"query {query}, key {key}, value {value}"


def _refuse_shapes(query: Shape, key: Shape, value: Shape) -> None:
    """Say which rank or axis of three shapes is wrong."""
    shapes = _as_text(query, key, value)
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least 2 axes (..., length, size), got shape {shape}")
        if len(shape) != len(query):
            raise ValueError(f"{name} must have as many axes as query, {len(query)}, got {shapes}")
        if shape[:-3] != query[:-3]:
            raise ValueError(
                f"{name} must have query's leading axes {query[:-3]}, got {shapes}; "
                "repeat it with numpy.broadcast_to"
            )
    if key[-1] != query[-1]:
        raise ValueError(f"key must have query's last axis D = {query[-1]}, got {shapes}")
    raise ValueError(f"value must have as many rows as key, S = {key[-2]}, got {shapes}")


def _check_heads(given: tuple[Shape, Shape, Shape], heads: int, kv_heads: int, value_heads: int, grouped: bool) -> None:
    """Raise unless so many heads of queries, keys and values go together; given: the three shapes."""
    shapes = _as_text(*given)
    if value_heads != kv_heads:
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
