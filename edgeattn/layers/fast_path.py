"""The fast paths of a float or dynamic layer: by its fused kernel, by what a call before it found, by one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import FLOAT32, to_float32, write_result
from edgeattn.layers.call import is_next, is_self_attention_input, is_unmasked, is_written_as_it_is
from edgeattn.prepared import call_signature

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Call
    from edgeattn.types import Float32s, Floats

    _Layer: TypeAlias = Any  # a MultiHeadAttention or a DynamicMultiHeadAttention


def attend_again(layer: _Layer, query: Any, key: Any, value: Any, out: Any, kv_cache: KVCache | None, *masks: Any
                 ) -> tuple[Float32s | None, tuple[Any, ...] | None]:
    """What `layer` gives where a call like this was checked before, or one token meets a cache; else None.

    And the signature of the call, with which `attend_fused` prepares the next; None where it has none.
    masks: attn_mask, key_padding_mask, is_causal, causal_alignment, window_size, alibi_slopes.
    """
    if kv_cache is not None:
        if (layer.position_bias is None and key is None and value is None and is_unmasked(*masks)
                and is_self_attention_input(layer, query, FLOAT32)
                and is_written_as_it_is(out, query, layer.output_dim, FLOAT32)):
            x = query if query.ndim == 3 else query[None]
            if is_next(layer, x, kv_cache):
                result = attend_next(layer, x, kv_cache).reshape(*query.shape[:-1], layer.output_dim)
                return write_result(result, out, FLOAT32), None
        return None, None
    if key is None:
        if value is not None:
            return None, None
        key = query
    if value is None:
        value = key
    signature = call_signature(query, key, value, *masks)
    prepared = layer.prepared_calls.find(signature, out)
    if prepared is None:
        return None, signature
    return prepared(query, key, value, out, masks[0], masks[1]), signature


def attend_fused(layer: _Layer, call: Call, signature: tuple[Any, ...] | None, attn_mask: Any, key_padding_mask: Any
                 ) -> Floats | tuple[Floats, Floats]:
    """The result of a call that has no empty axis by the layer's fused kernel, and what the next like it needs."""
    q = to_float32(call.query)
    k = q if call.key is call.query else to_float32(call.key)
    v = k if call.value is call.key else to_float32(call.value)
    rows = layer.position_rows(call.mask)
    mask = call.mask.with_bias(rows)
    keep, bias, band, alibi = mask.for_kernels()
    kernel = layer.fused_kernel.prepare(q, k, v, keep, bias, band, alibi, layer.first_position(mask))
    result = np.empty((*q.shape[:2], layer.output_dim), np.float32)
    kernel(q, k, v, result, keep, bias, alibi)
    layer.prepared_calls.learn(signature, (*call.lead, *call.mask.shape[1:]), kernel, (*call.lead, *result.shape[1:]),
                               mask, attn_mask, key_padding_mask, rows)
    return call.write_result(result)


def attend_next(layer: _Layer, x: Float32s, cache: KVCache) -> Float32s:
    """Attention without masks of one token per batch entry, x (B, 1, E) float32 in C order, and all before it.

    The layer has no `position_bias`.
    """
    batch, linears = len(x), layer.projections
    x = x.reshape(batch, -1)
    k = linears["key"].packed(x).reshape(batch, layer.num_kv_heads, 1, layer.head_dim)
    v = linears["value"].packed(x).reshape(batch, layer.num_kv_heads, 1, layer.value_dim)
    q = linears["query"].packed(x).reshape(batch, layer.num_heads, 1, layer.head_dim)
    q, k = layer.placed_at(q, k, cache.length, cache.length)
    cache.check_finite(k, v)
    if not cache.length:
        cache.store_without_bias(layer.common_key_bias)
    context = np.empty((batch, layer.num_heads, 1, layer.value_dim), np.float32)
    with cache.transaction():
        cache.append_heads(k, v)
        cache.attend_last(q, layer.scale, 0.0, context)
    result = context.reshape(batch, -1)
    if "output" in linears:
        result = linears["output"].packed(result)
    return result.reshape(batch, 1, layer.output_dim)
