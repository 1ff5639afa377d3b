"""A layer's steps one by one, for what its fused kernel does not do: probabilities, softcap, added keys, gates, caches,
positions.

The projections give a token the same bits alone and in a chunk, so that a cache does not show how a sequence was cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import FLOAT32, to_float32
from edgeattn.kernels.cpu import float32
from edgeattn.layers.call import handed_over, is_next, is_unmasked, output_buffer, self_masks
from edgeattn.layers.positions import biased, placed

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from numpy.typing import NDArray

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.call import Call
    from edgeattn.layers.multi_head import MultiHeadAttention
    from edgeattn.masks import Mask
    from edgeattn.ops import Sequences
    from edgeattn.quantized.dynamic import DynamicMultiHeadAttention
    from edgeattn.types import Float32s, Floats

    _Layer: TypeAlias = MultiHeadAttention | DynamicMultiHeadAttention
    _Pair: TypeAlias = tuple[Float32s, Float32s]


def attend_to_itself(layer: _Layer, query: Float32s, out: Floats | None, kv_cache: KVCache | None, *masks: Any
                     ) -> Floats | None:
    """What `layer` gives for tokens that its kernel reads as they are, in `out` if there is one; None for other calls.

    Those have a cache that needs more than the next token, or masks without a batch axis.
    """
    x = query if query.ndim == 3 else query[None]
    plain = kv_cache is None and x is query
    if not plain and not (is_unmasked(*masks) and (kv_cache is None or is_next(layer, x, kv_cache))):
        return None
    if kv_cache is None:
        result = output_buffer(out, (*x.shape[:2], layer.output_dim), FLOAT32, x, *masks)
        layer._kernel(x, x, x, result, *self_masks(layer, x, *masks))
    else:
        result = attend_next(layer, x, kv_cache)
    return handed_over(result, query, out)


def attend(layer: _Layer, call: Call) -> Floats | tuple[Floats, Floats]:
    """The result of `call`, a `Call` of `layer`, which has the attributes below.

    num_heads, num_kv_heads, head_dim, value_dim, output_dim, scale, extra_keys, bias_k, bias_v, k_bias, gated
        As `MultiHeadAttention` has them.
    _linears : mapping
        "q", "k", "v" and, where the layer has them, "gate" and "out": (tokens, inputs) -> (tokens, outputs), float32.
    """
    batch, _, queries, _ = call.mask.shape
    q, k, v = (_rows(layer, name, x) for name, x in (("q", call.query), ("k", call.key), ("v", call.value)))
    merged, weights = attend_rows(layer, q, k, v, call.mask, call, need_weights=call.need_weights)
    if layer.gated:
        with np.errstate(invalid="ignore"):  # NaN of what is not finite
            merged = merged * _sigmoid(_rows(layer, "gate", call.query))
    result = layer._linears["out"](merged) if "out" in layer._linears else merged
    return call.write_result(result.reshape(batch, queries, layer.output_dim), weights)


def attend_rows(layer: _Layer, q: Float32s, k: Float32s, v: Float32s, mask: Mask, call: Call | Sequences, *,
                need_weights: bool) -> tuple[Float32s, Float32s | None]:
    """The heads side by side (B * L, H * Dv), and their weights (B, H, L, S) or None.

    q (B * L, H * D), k (B * n, Hkv * D), v (B * n, Hkv * Dv) : projected tokens
    mask : Mask
        Of shape (B, H, L, S); with a cache S counts its tokens too.
    """
    batch, heads, queries, keys = mask.shape
    q, k = placed(layer, _heads(q, batch, heads), _heads(k, batch, layer.num_kv_heads), mask)
    v, mask = _heads(v, batch, layer.num_kv_heads), biased(layer, mask)
    added = added_keys(layer, batch) if layer.extra_keys else None
    context = np.empty((batch, heads, queries, layer.value_dim), np.float32)
    weights = np.zeros((batch, heads, queries, keys + layer.extra_keys), np.float32) if need_weights else None
    if call.cache is None:
        _attend_once(layer, mask, call.softcap, q, k, v, added, context, weights)
    else:
        with call.cache._chunk():
            _attend_cached(layer, mask, call, call.cache, q, k, v, added, context, weights)
    return context.swapaxes(1, 2).reshape(batch * queries, heads * layer.value_dim), weights


def attend_next(layer: _Layer, x: Float32s, cache: KVCache) -> Float32s:
    """`attend` without masks for one token per batch entry, x (B, 1, E) float32 in C order, and all before it."""
    batch, linears = len(x), layer._linears
    x = x.reshape(batch, -1)
    k = linears["k"](x).reshape(batch, layer.num_kv_heads, 1, layer.head_dim)
    v = linears["v"](x).reshape(batch, layer.num_kv_heads, 1, layer.value_dim)
    q = linears["q"](x).reshape(batch, layer.num_heads, 1, layer.head_dim)
    cache._check_finite(k, v)
    if not cache._length:
        cache._store_without(layer.k_bias)
    context = np.empty((batch, layer.num_heads, 1, layer.value_dim), np.float32)
    with cache._chunk():
        cache._append(k, v)
        cache._attend_last(q, layer.scale, 0.0, context)
    result = context.reshape(batch, -1)
    if "out" in linears:
        result = linears["out"](result)
    return result.reshape(batch, 1, layer.output_dim)


def _heads(rows: Float32s, batch: int, heads: int) -> Float32s:
    """(B * length, heads * size) -> (B, heads, length, size) as kernels read it."""
    size = rows.shape[1] // heads
    return to_float32(rows.reshape(batch, len(rows) // max(batch, 1), heads, size).swapaxes(1, 2))


def _rows(layer: _Layer, name: str, x: Floats) -> Float32s:
    """(B, length, inputs) -> (B * length, outputs)"""
    rows: Float32s = layer._linears[name](to_float32(x).reshape(-1, x.shape[-1]))
    return rows


def _sigmoid(x: Float32s) -> Float32s:
    with np.errstate(over="ignore"):  # of what becomes 0
        result: NDArray[Any] = 1 / (1 + np.exp(-x))
    return result


def added_keys(layer: _Layer, batch: int) -> _Pair:
    """Key and value (B, Hkv, extra_keys, size) of `bias_k` and `bias_v`, then zeros."""
    def array(bias: Float32s | None, size: int) -> Float32s:
        keys = np.zeros((batch, layer.num_kv_heads, layer.extra_keys, size), np.float32)
        if bias is not None:
            keys[:, :, 0] = bias.reshape(layer.num_kv_heads, size)
        return keys

    return array(layer.bias_k, layer.head_dim), array(layer.bias_v, layer.value_dim)


def _attend_once(layer: _Layer, mask: Mask, softcap: float, q: Float32s, k: Float32s, v: Float32s,
                 added: _Pair | None, context: Float32s, weights: Float32s | None) -> None:
    if added:
        k, v = (to_float32(np.concatenate(pair, axis=2)) for pair in zip((k, v), added, strict=True))
        mask = mask.with_keys(layer.extra_keys)
    float32.attention(q, k, v, mask, context, scale=layer.scale, softcap=softcap, weights=weights)


def _attend_cached(layer: _Layer, mask: Mask, call: Call | Sequences, cache: KVCache, q: Float32s, k: Float32s,
                   v: Float32s, added: _Pair | None, context: Float32s, weights: Float32s | None) -> None:
    """Append this chunk's keys and values to the cache, and attend to what it holds."""
    cache._check_finite(k, v)
    cache._store_without(None if layer.positioned else layer.k_bias)
    for rows, tokens in call.pieces:
        cache._append(k[:, :, slice(*tokens)], v[:, :, slice(*tokens)])
        part = mask.part(rows, (0, cache.length))
        some = np.empty((*part.shape[:3], layer.value_dim), np.float32)
        some_weights = None if weights is None else weights[:, :, slice(*rows)]
        cache._attend(
            to_float32(q[:, :, slice(*rows)]), part, layer.scale, call.softcap, some, some_weights, added)
        context[:, :, slice(*rows)] = some
