"""One token of each sequence through an encoder whose caches hold those before it: what a decoding loop calls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from numpy import ndarray

from edgeattn.checks import FLOAT32
from edgeattn.executors.compiled import CompiledOps
from edgeattn.masks import NO_WINDOW

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from edgeattn.kv_cache import KVCache
    from edgeattn.types import Float32s


def step_signature(x: Any, caches: Any, lengths: Any, window_size: Any, masks: dict[str, Any]
                   ) -> tuple[Any, ...] | None:
    """What is equal for steps of which one was checked; None of a call that is none, or whose masks hide a token."""
    if (type(caches) is not list and type(caches) is not tuple or type(x) is not ndarray or x.dtype is not FLOAT32
            or x.shape[-2:-1] != (1,) or lengths is not None or window_size is not NO_WINDOW):
        return None
    is_causal, *arrays = masks["is_causal"], masks["attn_mask"], masks["key_padding_mask"]
    if is_causal is not False and is_causal is not True or any(array is not None for array in arrays):
        return None
    of = _kv_cache()
    kinds = [cache.kind for cache in caches if type(cache) is of]
    return (x.shape, *kinds) if len(kinds) == len(caches) else None


@functools.cache
def _kv_cache() -> type[KVCache]:
    from edgeattn.kv_cache import KVCache  # only with a cache: it brings kernels of its own

    return KVCache


def can_step(encoder: Any) -> bool:
    """Whether all stages of an encoder's layers know steps, and no layer has a window beside its cache's."""
    return all(layer.window_size == NO_WINDOW and layer.stages is not None
               and all(getattr(stage, "can_step", False) for stage in layer.stages) for layer in encoder.layers)


def step(encoder: Any, x: Float32s, caches: Sequence[KVCache]) -> Float32s | None:
    """The encoder of x (B, 1, E) or (1, E), whose signature is known; None where these caches must be checked."""
    length = caches[0].length
    if len({id(cache) for cache in caches}) != len(caches):
        return None
    for cache in caches:
        if cache.length != length or not cache.room():
            return None
    rows = x.reshape(-1, x.shape[-1])
    if not rows.flags.carray:
        rows = rows.copy()
    try:
        for layer, cache in zip(encoder.layers, caches, strict=True):
            for stage in layer.stages:
                rows = stage.step(rows, cache)
        if encoder.norm is not None:
            rows = encoder.norm.forward(CompiledOps(), rows, "norm")
        return rows.reshape(x.shape)
    except BaseException:  # as `KVCache.transaction` does
        for cache in caches:
            cache.restore(length)
        raise
