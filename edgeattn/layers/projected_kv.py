"""Keys and values of an encoder's output, projected once and attended to by many calls: cross-attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import check_out, flag, float_array, result_dtype, to_float32, write_result
from edgeattn.functional import checked_softcap
from edgeattn.layers.call import check_input_shapes
from edgeattn.masks import resolve_mask

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Bools, Flag, Floats, Real, Shape


class ProjectedKV:
    """What a layer's `project_kv` returns, and the layer takes as `key`.

    Attributes
    ----------
    length : int
        S, the number of keys.
    nbytes : int
        Bytes of storage.
    """

    __slots__ = ("_lead", "_memory", "_padding", "layer", "length")

    def __init__(self, layer: Any, lead: Shape, length: int, memory: NDArray[Any], padding: Bools | None):
        self.layer, self.length, self._lead, self._memory, self._padding = layer, length, lead, memory, padding

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self._memory.nbytes

    def __repr__(self) -> str:
        return f"ProjectedKV(shape {(*self._lead, self.length)}, of {self.layer})"

    def attend(self, query: ArrayLike, value: object, masks: tuple[Any, ...], softcap: Real, kv_cache: object,
               need_weights: Flag, out: Floats | None) -> Floats:
        """What the layer gives for these arguments of a call."""
        layer: Any = self.layer
        attn_mask, key_padding_mask, is_causal, causal_alignment, window_size, alibi_slopes = masks
        for name, given in (("value", value), ("key_padding_mask", key_padding_mask), ("kv_cache", kv_cache)):
            if given is not None:
                raise ValueError(f"{name} must be left out where key is a ProjectedKV"
                                 f"{', give it to project_kv' * (name != 'kv_cache')}; got {type(given).__name__}")
        if flag("need_weights", need_weights) or checked_softcap(softcap):
            raise ValueError("need_weights and softcap must be left out where key is a ProjectedKV; pass the arrays "
                             "it was made of for these")
        query = float_array(layer.query_name, query)
        if query.ndim != len(self._lead) + 2 or query.shape[:-2] != self._lead or query.shape[-1] != layer.embed_dim:
            wanted = *self._lead, "L", layer.embed_dim
            raise ValueError(f"query must have shape {wanted} for this ProjectedKV, got {query.shape}")
        dtype, shape = result_dtype(query), (*query.shape[:-1], layer.output_dim)
        check_out(out, shape, dtype)
        mask = resolve_mask(
            (*self._lead, layer.num_heads, query.shape[-2], self.length), attn_mask, self._padding,
            is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size, alibi_slopes=alibi_slopes)
        result = np.empty(shape, np.float32)
        if query.size:
            q = to_float32(query if self._lead else query[np.newaxis])
            given = layer.biased(mask).for_kernels()
            kernel = layer.fused_kernel.prepare_kept(q, self.length, given.shapes, layer.first_position(mask))
            kernel(q, q, q, result, *given.arrays, self._memory)
        return write_result(result, out, dtype)


def project_kv(layer: Any, key: ArrayLike, value: ArrayLike | None, key_padding_mask: ArrayLike | None) -> ProjectedKV:
    """`key` and `value` as a `ProjectedKV` of a float or dynamic layer."""
    if layer.fused_kernel is None:
        raise ValueError("layer must have no bias_k, bias_v, add_zero_attn, gate_weight and empty axes to keep keys "
                         f"and values, got {layer}; pass the arrays to each call")
    key = float_array("key", key)
    value = key if value is None else float_array("value", value)
    *lead, length, _ = key.shape if key.ndim > 1 else (0, 0)
    check_input_shapes(layer, np.broadcast_to(np.float32(0), (*lead, 1, layer.embed_dim)), key, value)
    if not (key.size and value.size):
        raise ValueError(f"key must have at least one token to be kept, got shape {key.shape}")
    padding = resolve_mask((*lead, layer.num_heads, 1, length), None, key_padding_mask).keep
    k = to_float32(key if lead else key[np.newaxis])
    v = k if value is key else to_float32(value if lead else value[np.newaxis])
    memory = layer.fused_kernel.keep_keys(k, v, padding)
    kept = None if padding is None else np.array(key_padding_mask, np.bool_)
    return ProjectedKV(layer, tuple(lead), length, memory, kept)
