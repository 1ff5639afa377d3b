"""Layers computed operation by operation with our kernels, in float32 or with dynamic int8 projections.

The projections give a token the same bits alone and in a chunk, so that a cache does not show how a sequence was cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import FLOAT32, to_float32
from edgeattn.executors.numpy import NumpyOps, added_keys
from edgeattn.kernels.cpu import float32

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from edgeattn.kv_cache import KVCache
    from edgeattn.masks import Mask
    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s

    _Pair: TypeAlias = tuple[Float32s, Float32s]


class CompiledOps(NumpyOps):
    """`NumpyOps` whose products are compiled. Of attention's parts it keeps the probabilities."""

    def block(self, layer: Any, x: Float32s, sequences: Sequences, name: str) -> Float32s:
        """An encoder layer by its compiled stages, unless something in it is to be kept."""
        if self.record is not None or layer.stages is None:
            return super().block(layer, x, sequences, name)
        given = x = np.ascontiguousarray(x)
        for stage in layer.stages:
            # What is nobody else's takes the result: memory that is given back and asked for again comes as new pages.
            x = stage.onto(x) if x is not given and hasattr(stage, "onto") else stage(x, sequences)
        return x

    def linear(self, x: Float32s, linear: Any, name: str) -> Float32s:
        """x weight^T + bias."""
        return self._keep(name, linear.packed(x if x.dtype is FLOAT32 and x.flags.c_contiguous else to_float32(x)))

    def layer_norm(self, x: Float32s, norm: Any, name: str) -> Float32s:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        return self._keep(name, norm.packed(x if x.dtype is FLOAT32 and x.flags.c_contiguous else to_float32(x)))

    rms_norm = layer_norm

    def static(self, x: Float32s, layer: Any, sequences: Sequences | None, name: str) -> Float32s:
        """By the layer's kernels, unless something in it is to be kept."""
        if self.record is not None:
            return super().static(x, layer, sequences, name)
        result: Float32s = layer.stage(None, None, residual=False)(np.ascontiguousarray(x), sequences)
        return result

    def _attend(self, q: Float32s, k: Float32s, v: Float32s, layer: Any, mask: Mask, sequences: Sequences, name: str
                ) -> Float32s:
        batch, heads, queries, keys = mask.shape
        q, k, v = map(np.ascontiguousarray, (q, k, v))
        added = added_keys(layer, batch) if layer.extra_keys else None
        context = np.empty((batch, heads, queries, layer.value_dim), np.float32)
        weights = None
        if self.keeps(name + "probabilities"):
            weights = np.zeros((batch, heads, queries, keys + layer.extra_keys), np.float32)
            self._keep(name + "probabilities", weights)
        if sequences.cache is None:
            _attend_once(layer, mask, sequences.softcap, q, k, v, added, context, weights)
        else:
            with sequences.cache.transaction():
                _attend_cached(layer, mask, sequences, sequences.cache, q, k, v, added, context, weights)
        return context


def _attend_once(layer: Any, mask: Mask, softcap: float, q: Float32s, k: Float32s, v: Float32s, added: _Pair | None,
                 context: Float32s, weights: Float32s | None) -> None:
    if added:
        k, v = (to_float32(np.concatenate(pair, axis=2)) for pair in zip((k, v), added, strict=True))
        mask = mask.with_keys(layer.extra_keys)
    float32.attention(q, k, v, mask, context, scale=layer.scale, softcap=softcap, weights=weights)


def _attend_cached(layer: Any, mask: Mask, sequences: Sequences, cache: KVCache, q: Float32s, k: Float32s,
                   v: Float32s, added: _Pair | None, context: Float32s, weights: Float32s | None) -> None:
    """Append this chunk's keys and values to the cache, and attend to what it holds."""
    cache.check_finite(k, v)
    cache.store_without_bias(layer.common_key_bias)
    for rows, tokens in sequences.pieces:
        cache.append_heads(k[:, :, slice(*tokens)], v[:, :, slice(*tokens)])
        part = mask.part(rows, (0, cache.length))
        some = np.empty((*part.shape[:3], layer.value_dim), np.float32)
        some_weights = None if weights is None else weights[:, :, slice(*rows)]
        cache.attend_heads(
            to_float32(q[:, :, slice(*rows)]), part, layer.scale, sequences.softcap, some, some_weights, added)
        context[:, :, slice(*rows)] = some
