"""The short ways of small calls that a float or dynamic layer is called with again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import FLOAT32, write_result
from edgeattn.layers.call import is_next, is_unmasked, output_buffer, self_masks

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from edgeattn.kv_cache import KVCache
    from edgeattn.types import Float32s, Floats

    _Layer: TypeAlias = Any  # a MultiHeadAttention or a DynamicMultiHeadAttention


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
        result = output_buffer(out, (*query.shape[:-1], layer.output_dim), FLOAT32, x, *masks)
        layer._kernel(x, x, x, result, *self_masks(layer, x, *masks))
    else:
        result = attend_next(layer, x, kv_cache).reshape(*query.shape[:-1], layer.output_dim)
    return write_result(result, out, FLOAT32)


def attend_next(layer: _Layer, x: Float32s, cache: KVCache) -> Float32s:
    """Attention without masks of one token per batch entry, x (B, 1, E) float32 in C order, and all before it."""
    batch, linears = len(x), layer.projections
    x = x.reshape(batch, -1)
    k = linears["key"].packed(x).reshape(batch, layer.num_kv_heads, 1, layer.head_dim)
    v = linears["value"].packed(x).reshape(batch, layer.num_kv_heads, 1, layer.value_dim)
    q = linears["query"].packed(x).reshape(batch, layer.num_heads, 1, layer.head_dim)
    cache._check_finite(k, v)
    if not cache._length:
        cache._store_without(layer.k_bias)
    context = np.empty((batch, layer.num_heads, 1, layer.value_dim), np.float32)
    with cache._chunk():
        cache._append(k, v)
        cache._attend_last(q, layer.scale, 0.0, context)
    result = context.reshape(batch, -1)
    if "output" in linears:
        result = linears["output"].packed(result)
    return result.reshape(batch, 1, layer.output_dim)
