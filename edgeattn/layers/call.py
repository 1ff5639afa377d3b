"""One call of a float or dynamic layer: its arguments checked once; and checks that other layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn import shapes
from edgeattn.checks import check_out, checked_softcap, flag, float_array, result_dtype, write_result
from edgeattn.masks import Mask, resolve_mask

if TYPE_CHECKING:
    from typing import Any, Protocol, TypeAlias

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.kv_cache import KVCache
    from edgeattn.types import CausalAlignment, Flag, Float32s, Floats, LayerSizes, Real, Shape, Window

    _Span = tuple[int, int]
    Pieces: TypeAlias = list[tuple[_Span, _Span]]

    class _Layer(LayerSizes, Protocol):
        query_name: str


class Call:
    """The checked arguments of a call. The batch axis is made where inputs have none.

    Attributes
    ----------
    query, key, value : (B, L, E), (B, S, kdim), (B, S, vdim) float16, float32 or float64 array
        Not yet converted. `key is query` and `value is key` where the caller left them out.
    mask : Mask
        Of shape (B, H, L, S). With a cache S counts its tokens too.
    softcap : float
    need_weights, average : bool
    lead : tuple of int
        (B,), or () for inputs without a batch axis.
    out : array or None
        The caller's, which can take the result.
    dtype : dtype
        The result's.
    cache : KVCache or None
        It has room for `key` and `value`, in pieces.
    pieces : list
        Of the cache: (first, last) query and (first, last) token of each piece.
    """

    __slots__ = ("average", "cache", "dtype", "key", "lead", "mask", "need_weights", "out", "pieces", "query",
                 "softcap", "value")

    def __init__(self, query: Floats, key: Floats, value: Floats, mask: Mask, softcap: float, need_weights: bool,
                 average: bool, lead: Shape, out: Floats | None, dtype: np.dtype[Any], cache: KVCache | None,
                 pieces: Pieces):
        self.query, self.key, self.value, self.mask, self.softcap = query, key, value, mask, softcap
        self.need_weights, self.average, self.lead, self.out, self.dtype = need_weights, average, lead, out, dtype
        self.cache, self.pieces = cache, pieces

    def write_result(self, result: Float32s, weights: Float32s | None = None) -> Floats | tuple[Floats, Floats]:
        """What the caller gets, from result (B, L, Eo) and weights (B, H, L, S) or None, both float32."""
        delivered = write_result(result.reshape(*self.lead, *result.shape[1:]), self.out, self.dtype)
        if weights is None:
            return delivered
        weights = weights.reshape(*self.lead, *weights.shape[1:])
        return delivered, write_result(weights.mean(axis=-3) if self.average else weights, None, self.dtype)


def check_call(layer: _Layer, query: ArrayLike, key: ArrayLike | None, value: ArrayLike | None, *, softcap: Real,
               need_weights: Flag, average_attn_weights: Flag, kv_cache: KVCache | None, out: Floats | None,
               causal_alignment: CausalAlignment | None, **masks: Any) -> Call:
    """The arguments of a call of `layer` as a `Call`.

    Parameters
    ----------
    layer : object
        Has num_heads, num_kv_heads, head_dim, value_dim, embed_dim, kdim, vdim and output_dim.
    **masks
        As for `resolve_mask`; the other arguments as for a call of `MultiHeadAttention`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    need_weights = flag("need_weights", need_weights)
    average = flag("average_attn_weights", average_attn_weights)
    softcap = checked_softcap(softcap)
    if kv_cache is not None:
        check_cache(layer, kv_cache, causal_alignment)
    query, key, value = check_inputs(layer, query, key, value)
    dtype = result_dtype(query, key, value)
    lead, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
    check_out(out, (*lead, queries, layer.output_dim), dtype)
    mask, pieces = resolve_call_mask(
        (*lead, layer.num_heads, queries, keys), kv_cache, causal_alignment=causal_alignment, **masks)
    if not lead:
        given, query = (query, key, value), query[None]
        key = query if given[1] is given[0] else key[None]
        value = key if given[2] is given[1] else value[None]
    return Call(query, key, value, mask, softcap, need_weights, average, lead, out, dtype, kv_cache, pieces)


def resolve_call_mask(shape: Shape, cache: KVCache | None, *, causal_alignment: CausalAlignment | None,
                      window_size: Window, **masks: Any) -> tuple[Mask, Pieces]:
    """The Mask of a call with scores of `shape` (..., H, L, S), and the pieces in which the cache, if any, takes it.

    With a cache, tokens it has seen stand before the S keys, and the mask is over all.
    """
    if cache is None:
        return resolve_mask(shape, causal_alignment=causal_alignment, window_size=window_size, **masks), []
    *lead, heads, queries, keys = shape
    if (tuple(lead) or (1,)) != (cache.batch,):
        raise ValueError(f"query must have the cache's batch, B = {cache.batch}, got {(*lead, queries)} tokens")
    before = cache.length
    mask = resolve_mask(
        (*lead, heads, queries, before + keys), position=before, window_size=cache.within_window(window_size), **masks)
    return mask, cache.pieces(queries, keys, mask.right)


def check_cache(layer: LayerSizes, cache: object, causal_alignment: object) -> None:
    """Raise unless `cache` is one of the sizes of `layer`, and knows the positions alone."""
    from edgeattn.kv_cache import KVCache  # only with a cache: it brings kernels of its own

    if not isinstance(cache, KVCache):
        raise TypeError(f"kv_cache must be an edgeattn.KVCache, got {type(cache).__name__}")
    if causal_alignment is not None:
        raise ValueError(
            f"causal_alignment must be None with kv_cache, which knows the positions, got {causal_alignment!r}")
    wanted = (layer.num_kv_heads, layer.head_dim, layer.value_dim)
    given = (cache.num_kv_heads, cache.head_dim, cache.value_dim)
    if wanted != given:
        raise ValueError(f"kv_cache must have the layer's num_kv_heads, head_dim and value_dim {wanted}, got {given}")


def check_inputs(layer: _Layer, query: ArrayLike, key: ArrayLike | None, value: ArrayLike | None
                 ) -> tuple[Floats, Floats, Floats]:
    """The three inputs as float arrays of agreeing shapes."""
    if key is None and value is not None:
        raise ValueError("value needs key, got key=None; pass key=query to attend from query to itself")
    first = layer.query_name
    query = float_array(first, query)
    key = query if key is None else float_array("key", key)
    value = key if value is None else float_array("value", value)
    check_input_shapes(layer, query, key, value)
    return query, key, value


def check_input_shapes(layer: _Layer, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any]) -> None:
    """Raise unless the shapes of three inputs, arrays of any kind, fit the layer and each other."""
    shapes.check_input_shapes(layer.query_name, (layer.embed_dim, layer.kdim, layer.vdim), query.shape, key.shape,
                              value.shape)
