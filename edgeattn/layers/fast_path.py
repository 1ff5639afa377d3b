"""The fast paths of a layer: by what a call before it found, by its fused kernel, by one token."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import FLOAT32, check_out, to_float32, write_result
from edgeattn.layers.call import check_input_shapes
from edgeattn.masks import check_mask_shapes, resolve_mask
from edgeattn.prepared import call_signature, plain_inputs

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from numpy.typing import NDArray

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Call
    from edgeattn.types import Float32s, Floats

    _Layer: TypeAlias = Any  # a MultiHeadAttention, a DynamicMultiHeadAttention or a StaticMultiHeadAttention


def attend_again(layer: _Layer, query: Any, key: Any, value: Any, out: Any, kv_cache: KVCache | None,
                 attn_mask: Any, key_padding_mask: Any, is_causal: Any, causal_alignment: Any, window_size: Any,
                 alibi_slopes: Any) -> tuple[NDArray[Any] | None, tuple[Any, ...] | None]:
    """What `layer` gives where a call like this was checked before, else None; and the signature of the call.

    With the signature, which is None where it has none, `layer.prepared_calls` learns of the next like it.
    """
    if key is None:
        if value is not None:
            return None, None
        key = query
    if value is None:
        value = key
    calls = layer.prepared_calls
    signature = call_signature(query, key, value, attn_mask, key_padding_mask, is_causal, causal_alignment, window_size,
                               alibi_slopes, None, calls.dtype)
    if kv_cache is not None:
        signature = _step_signature(signature, kv_cache)
    prepared = calls.get(signature)  # None of None
    if prepared is None:
        return None, signature
    if kv_cache is None:
        return prepared.run(query, key, value, out, attn_mask, key_padding_mask), signature
    if not kv_cache.room() or out is not None and prepared.target(out) is None:
        return None, signature
    return write_result(layer.take_step(query, kv_cache).reshape(prepared.shape), out, calls.dtype), signature


def _step_signature(signature: tuple[Any, ...] | None, cache: KVCache) -> tuple[Any, ...] | None:
    """That of a call with a cache, where it is of one token, which sees all that is held; `signature`: without."""
    shapes = None if signature is None else plain_inputs(signature)
    if signature is None or shapes is None or type(cache) is not _kv_cache():
        return None
    query, key, value = shapes
    return (*signature, cache.kind) if key is None and value is None and query[-2:-1] == (1,) else None


@functools.cache
def _kv_cache() -> type[KVCache]:
    from edgeattn.kv_cache import KVCache  # only with a cache: it brings kernels of its own

    return KVCache


def attend_first(layer: _Layer, signature: tuple[Any, ...], query: Any, key: Any, value: Any, out: Any, attn_mask: Any,
                 key_padding_mask: Any, is_causal: Any, causal_alignment: Any, window_size: Any, alibi_slopes: Any
                 ) -> Floats | None:
    """What a float or dynamic `layer` gives for a call with a signature, by its fused kernel; the next is prepared.

    None where the kernel cannot give it, or does not read these masks as they are.

    Raises
    ------
    TypeError, ValueError
        What `check_call` would.
    """
    key = query if key is None else key
    value = key if value is None else value
    check_input_shapes(layer, query, key, value)
    *lead, queries, _ = query.shape
    shape = *lead, queries, layer.output_dim
    check_out(out, shape, FLOAT32)
    scores = *lead, layer.num_heads, queries, key.shape[-2]
    mask = resolve_mask(scores, is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size,
                        alibi_slopes=alibi_slopes)
    check_mask_shapes(scores, attn_mask, key_padding_mask)
    if not (query.size and key.size and value.size):
        return None
    q, k, v = query, key, value
    if not lead:
        q = query[None]
        k = q if key is query else key[None]
        v = k if value is key else value[None]
    rows, position = layer.position_rows(mask), layer.first_position(mask)
    prepared = layer.prepared_calls.learn(
        signature, functools.partial(layer.fused_kernel.prepare, q, k, v, position=position), scores, shape, mask,
        attn_mask, key_padding_mask, rows)
    if prepared is None:
        return None
    return write_result(prepared.run(query, key, value, None, attn_mask, key_padding_mask), out, FLOAT32)


def attend_fused(layer: _Layer, call: Call) -> Floats | tuple[Floats, Floats]:
    """The result of a call that has no empty axis by the layer's fused kernel."""
    q = to_float32(call.query)
    k = q if call.key is call.query else to_float32(call.key)
    v = k if call.value is call.key else to_float32(call.value)
    given = layer.biased(call.mask).for_kernels()
    prepared = layer.fused_kernel.prepare(q, k, v, given.shapes, layer.first_position(call.mask))
    result = np.empty((*q.shape[:2], layer.output_dim), np.float32)
    prepared.run(q, k, v, result, *given.arrays)
    return call.write_result(result)


def take_step(layer: _Layer, x: Float32s, cache: KVCache) -> Float32s:
    """Attention of a float or dynamic layer, without masks, of one token per batch entry and all before it: (B, Eo).

    x (B, 1, E) or (1, E) float32 in C order; the layer has no `position_bias`.
    """
    batch, heads, kv_heads = cache.batch, layer.num_heads, layer.num_kv_heads
    rows = layer.joined_projections(x.reshape(batch, -1))
    if layer.head_dim == layer.value_dim:
        every = rows.reshape(batch, heads + 2 * kv_heads, 1, layer.head_dim)
        q, k, v = every[:, :heads], every[:, heads:-kv_heads], every[:, -kv_heads:]
    else:
        ends = heads * layer.head_dim, (heads + kv_heads) * layer.head_dim
        q, k, v = (part.reshape(batch, -1, 1, size) for part, size in zip(
            np.split(rows, ends, axis=1), (layer.head_dim, layer.head_dim, layer.value_dim), strict=True))
    if layer.rotary is not None or layer.q_norm is not None or layer.k_norm is not None:
        q, k = layer.placed_at(np.ascontiguousarray(q), np.ascontiguousarray(k), cache.length, cache.length)
    if cache.scales is not None:
        cache.check_finite(k, v)
    if not cache.length:
        cache.store_without_bias(layer.common_key_bias)
    context = np.empty((batch, heads * layer.value_dim), np.float32)
    before = cache.length
    try:
        cache.append_heads(k, v)
        cache.attend_last(q, layer.scale, context)
        return layer.projections["output"].packed(context) if "output" in layer.projections else context
    except BaseException:
        cache.restore(before)
        raise
