"""Keys and values of the tokens seen so far, so that each is computed once."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from edgeattn.cache_queries import decode_run, runs_of, visible
from edgeattn.cache_slots import CacheSlots
from edgeattn.checks import (
    FLOAT32,
    check_out,
    checked_softcap,
    count,
    default_scale,
    flag,
    float_array,
    is_one_of,
    number,
    result_dtype,
    to_float32,
    write_result,
)
from edgeattn.device import place
from edgeattn.hints import hinted
from edgeattn.kernels.cpu import float32, reference_float32
from edgeattn.kernels.cpu.decode import decode_slots
from edgeattn.masks import NO_WINDOW, resolve_mask
from edgeattn.prepared import PLAIN, PreparedCalls, call_signature
from edgeattn.runtime.plan_cache import PlanCache

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike
    from typing_extensions import Self, Unpack

    from edgeattn.masks import Mask
    from edgeattn.types import (
        CacheDtype,
        CacheOnDevice,
        CacheOptions,
        Device,
        Flag,
        Float32s,
        Floats,
        LayerSizes,
        Real,
        Window,
    )

_DTYPES = ("float32", "int8")
_LARGEST_POSITION = 2**31 - 1


def _name_of(dtype: object) -> object:
    """NumPy's dtypes of a cache, and their types of scalars, by their names; anything else as it is."""
    for name in _DTYPES:
        if dtype is np.dtype(name).type or isinstance(dtype, np.dtype) and dtype == np.dtype(name):
            return name
    return dtype


class KVCache(CacheSlots):
    """Storage for the keys and values of up to `capacity` tokens, allocated once.

    A token's position is the number of tokens appended before it. `append` adds a chunk, `attend` lets queries
    see what is there; `MultiHeadAttention(..., kv_cache=cache)` does both. Without `window` the cache holds
    every token. With `window` a query sees only the last `window` keys, older tokens are dropped as room is
    needed, and a stream may be endless.

    Results do not depend on how a sequence was cut into chunks: within the rounding of float32 for a float32
    cache, bit for bit for an int8 cache.

    Parameters
    ----------
    batch : int
        B.
    num_kv_heads : int
        Hkv.
    capacity : int
        Tokens held at a time. With `window` at least that; chunks of n tokens need window - 1 + n. What goes
        beyond `window` makes dropping cheaper (twice the window is ample) and leaves room to truncate.
    head_dim : int
        D.
    value_dim : int, optional
        Dv, D unless given.
    dtype : {"float32", "int8"}, or such a NumPy dtype
        "int8": one symmetric scale per token and head, max|x| / 127, for keys and for values; a quarter of the
        memory. Rows with max|x| < 1.5e-36 become zeros, rows with NaN or infinity NaN. A float or dynamic layer
        that fills an int8 cache from its first token on stores keys without its key bias, which softmax does not
        see and a scale would be wasted on; `held` and a softcap find it added again.
    scales : (float, float), optional
        Of an int8 cache: one scale for all keys and one for all values instead, as a static layer has them. What lies
        beyond 127 scales saturates; NaN and infinity are refused.
    window : int, optional
        W: a query at position p sees the keys p - W + 1 to p, W in all.

    Attributes
    ----------
    batch, num_kv_heads, capacity, head_dim, value_dim : int
    dtype : str
    scales : (float, float) or None
    window : int or None
    length : int
        Tokens appended so far, less those truncated: the position of the next one.
    start : int
        Position of the oldest token still held; 0 without `window`.
    nbytes : int
        Bytes of storage.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    @hinted
    def __init__(
        self, batch: SupportsIndex, num_kv_heads: SupportsIndex, capacity: SupportsIndex, head_dim: SupportsIndex, *,
        value_dim: SupportsIndex | None = None, dtype: CacheDtype = "float32", scales: tuple[Real, Real] | None = None,
        window: SupportsIndex | None = None,
    ):
        self.batch = count("batch", batch)
        self.num_kv_heads = count("num_kv_heads", num_kv_heads)
        self.capacity = count("capacity", capacity)
        self.head_dim = count("head_dim", head_dim)
        self.value_dim = self.head_dim if value_dim is None else count("value_dim", value_dim)
        name = _name_of(dtype)
        if not is_one_of(name, _DTYPES):
            raise ValueError(f"dtype must be 'float32' or 'int8', got {name!r}")
        self.dtype = name
        self.window = None if window is None else count("window", window)
        if self.window is not None and self.capacity < self.window:
            raise ValueError(
                f"capacity must be at least window = {self.window}, got {self.capacity}; "
                "twice the window makes dropping old tokens cheap"
            )
        rows = (self.batch, self.num_kv_heads, self.capacity)
        self._keys = np.zeros((*rows, self.head_dim), name)
        self._values = np.zeros((*rows, self.value_dim), name)
        self._key_scales = self._value_scales = None
        self.scales = None if scales is None else _fixed_scales(scales, name)
        if self.scales is not None:
            self._key_scales, self._value_scales = (np.broadcast_to(np.float32(scale), rows) for scale in self.scales)
        elif name == "int8":
            self._key_scales, self._value_scales = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self.kind = self.batch, self.num_kv_heads, self.head_dim, self.value_dim, self.scales
        self._prepared = PreparedCalls()
        self._plans = PlanCache()
        self._length = self._start = self._first = 0

    @classmethod
    def for_layer(cls, layer: LayerSizes, batch: SupportsIndex, capacity: SupportsIndex, *,
                  dtype: CacheDtype | None = None, window: SupportsIndex | None = None) -> Self:
        """A cache that fits `layer`.

        Parameters
        ----------
        layer : MultiHeadAttention, SelfAttention or QuantizedMultiHeadAttention
        batch, capacity, window : int
            As for the class.
        dtype : {"float32", "int8"}, optional
            "float32" unless given. A static layer always has an int8 cache, with its own scales.

        Returns
        -------
        KVCache
            Empty.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; or for a static layer whose keys or values have a zero point.
        """
        try:
            sizes = layer.num_kv_heads, layer.head_dim, layer.value_dim
        except AttributeError:
            raise TypeError(f"layer must be an attention layer, got {type(layer).__name__}") from None
        scales = getattr(layer, "cache_scales", None)
        if scales is not None and dtype is not None and not is_one_of(_name_of(dtype), ["int8"]):
            raise ValueError(f"dtype must be 'int8' for a static layer, whose codes the cache holds, got {dtype!r}")
        if dtype is None:
            dtype = "float32" if scales is None else "int8"
        return cls(batch, sizes[0], capacity, sizes[1], value_dim=sizes[2], dtype=dtype, scales=scales, window=window)

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, num_kv_heads={self.num_kv_heads}, capacity={self.capacity}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self.dtype!r}, scales={self.scales}, "
            f"window={self.window}, length={self.length})"
        )

    def append(self, key: ArrayLike, value: ArrayLike) -> None:
        """Add the keys and values of n tokens, those at positions `length` to `length` + n - 1.

        Parameters
        ----------
        key : (B, Hkv, n, D) float16, float32 or float64 array
        value : (B, Hkv, n, Dv) array
            NaN and infinity are kept, in codes too: who attends to such a token gets NaN, as without a cache. Where
            `scales` are fixed they are refused.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; or where the tokens do not fit. The cache is unchanged then.
        """
        key, value = float_array("key", key), float_array("value", value)
        tokens = self._check_tokens(key, value)
        self._check_room(tokens)
        self.check_finite(key, value)
        if tokens:
            with self.transaction():
                self.append_heads(to_float32(key), to_float32(value))

    def _check_tokens(self, key: Floats, value: Floats) -> int:
        """The number of tokens in key and value, whose shapes must be as `append` takes them."""
        tokens = key.shape[2] if key.ndim == 4 else 0
        for name, array, size in (("key", key, self.head_dim), ("value", value, self.value_dim)):
            wanted = (self.batch, self.num_kv_heads, tokens, size)
            if array.shape != wanted:
                shown = f"({self.batch}, {self.num_kv_heads}, n, {size})"
                raise ValueError(
                    f"{name} must have shape (B, Hkv, n, size) = {shown}, n the same for key and value, "
                    f"got key {key.shape}, value {value.shape}"
                )
        return tokens

    @overload
    def to(self, device: Literal["cpu"]) -> Self: ...

    @overload
    def to(self, device: Literal["cuda"]) -> CacheOnDevice: ...

    def to(self, device: Device) -> Self | CacheOnDevice:
        """An empty cache of the same sizes on `device`: "cpu" is this one, "cuda" on a GPU (docs/cuda.md).

        Parameters
        ----------
        device : {"cpu", "cuda"}

        Returns
        -------
        KVCache, or one on the GPU

        Raises
        ------
        ValueError
            For another device.
        RuntimeError
            Where there is no CUDA, saying what of it is missing.
        """
        placed: Self | CacheOnDevice = place(self, device)
        return placed

    @overload
    def attend(self, query: ArrayLike, *, return_weights: Literal[False] = False,
               **options: Unpack[CacheOptions]) -> Floats: ...

    @overload
    def attend(self, query: ArrayLike, *, return_weights: Literal[True],
               **options: Unpack[CacheOptions]) -> tuple[Floats, Floats]: ...

    @overload
    def attend(self, query: ArrayLike, *, return_weights: Flag,
               **options: Unpack[CacheOptions]) -> Floats | tuple[Floats, Floats]: ...

    def attend(
        self,
        query: Any,  # an ArrayLike, and from the checks on an array
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        scale: Real | None = None,
        softcap: Real = 0.0,
        window_size: Window = NO_WINDOW,
        alibi_slopes: ArrayLike | None = None,
        position: SupportsIndex | None = None,
        return_weights: Flag = False,
        out: Floats | None = None,
    ) -> Floats | tuple[Floats, Floats]:
        """Attend from queries to the tokens in the cache.

        What `scaled_dot_product_attention` computes with the cached keys and values; S is `length`. One query
        at a time reads the cache in place. So does any number of queries, unless an int8 cache is used with
        masks or slopes, or with a softcap after a layer left its key bias out, or the probabilities are wanted.

        Parameters
        ----------
        query : (B, H, L, D) float16, float32 or float64 array
            H a multiple of Hkv: query head h reads key/value head h // (H / Hkv).
        attn_mask : bool or float array, broadcastable to (B, H, L, S), optional
            bool: True = attend. float: added to the scores. Columns are positions, also of dropped tokens.
        key_padding_mask : (B, S) bool array, optional
            True = a real token that may be attended to.
        is_causal : bool
            A query sees no key after its own position.
        scale : float, optional
            1 / sqrt(D) unless given; 0 means 0.
        softcap : float
            Bound of the scores, 0 = none.
        window_size : (int, int)
            (left, right), -1 = unbounded; the cache's own `window` holds as well.
        alibi_slopes : (H,) or (B, H) float array, optional
        position : int, optional
            Position of the first query. `length` - L unless given: the queries belong to the last L tokens
            appended.
        return_weights : bool
            Return the probabilities too.
        out : (B, H, L, Dv) array, optional
            Takes the result; of the result's dtype.

        Returns
        -------
        (B, H, L, Dv) array
            Of the query's dtype.
        (B, H, L, S) array
            The probabilities, only with `return_weights`; 0 for dropped tokens.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        signature = None
        if (type(softcap) is float and not softcap and position is None and return_weights is False
                and (scale is None or type(scale) is float)):
            signature = call_signature(query, query, query, attn_mask, key_padding_mask, is_causal, None, window_size,
                                       alibi_slopes, others=("of a cache",))
        if signature is not None and len(signature) == PLAIN:
            # what a decoding loop calls again and again: one query, that of the last token; it sees all before it
            signature = *signature, scale
            prepared = self._prepared.get(signature)
            if prepared is not None and self._length and (result := prepared.target(out, query)) is not None:
                self.attend_last(query, default_scale(self.head_dim) if scale is None else float(scale), result)
                return write_result(result, out, FLOAT32)
        query = float_array("query", query)
        return_weights = flag("return_weights", return_weights)
        heads, queries, position = self._check_query(query, position)
        softcap = checked_softcap(softcap)
        scale = default_scale(self.head_dim) if scale is None else number("scale", scale)
        mask = resolve_mask(
            (self.batch, heads, queries, self._length),
            attn_mask,
            key_padding_mask,
            is_causal=is_causal,
            window_size=self.within_window(window_size),
            alibi_slopes=alibi_slopes,
            position=position,
        )
        dtype = result_dtype(query)
        shape = (*query.shape[:3], self.value_dim)
        check_out(out, shape, dtype)
        result = np.empty(shape, np.float32)
        weights = np.zeros(mask.shape, np.float32) if return_weights else None
        self.attend_heads(to_float32(query), mask, scale, softcap, result, weights)
        if (signature is not None and len(signature) > PLAIN and queries == 1 and result.size
                and float32.is_ordinary(scale, 0.0)):
            self._prepared.learn_step(signature, result)
        result = write_result(result, out, dtype)
        return result if weights is None else (result, write_result(weights, None, dtype))

    def _check_query(self, query: Floats, position: SupportsIndex | None) -> tuple[int, int, int]:
        """(heads, queries, position) of a query of `attend`, the position found where it is None."""
        if query.ndim != 4 or query.shape[0] != self.batch or query.shape[3] != self.head_dim:
            raise ValueError(
                f"query must have shape (B, H, L, D) = ({self.batch}, H, L, {self.head_dim}), got {query.shape}"
            )
        _, heads, queries, _ = query.shape
        if heads % self.num_kv_heads:
            raise ValueError(
                f"query must have a multiple of the cache's {self.num_kv_heads} key/value heads, got {query.shape}"
            )
        if position is None:
            position = self._length - queries
        try:
            first = operator.index(position)
        except TypeError:
            raise TypeError(f"position must be an integer, got {position!r}") from None
        if not 0 <= first <= _LARGEST_POSITION:
            raise ValueError(
                f"position must be at least 0, and below 2**31, got {first} for L = {queries} queries and a cache "
                f"of length {self._length}; append the keys of these tokens first"
            )
        return heads, queries, first

    # -- what layers and executors call --------------------------------------------------------------------------------

    def attend_heads(self, query: Float32s, mask: Mask, scale: float, softcap: float, out: Float32s,
                     weights: Float32s | None = None, added: tuple[Float32s, Float32s] | None = None) -> None:
        """`attend` without checks: query (B, H, L, D), out (B, H, L, Dv), weights (B, H, L, S) or None, float32.

        mask : Mask of all positions, the offset the same for the whole batch. Within a window, `weights` must be
        zeros: nothing is written for dropped tokens.
        added : keys (B, Hkv, n, D) and values (B, Hkv, n, Dv) that every query sees after the tokens; S counts them.
        """
        queries = query.shape[2]
        part = mask.part((0, queries), (self._start, self._length))
        keys, values, key_scales, value_scales = self.views()
        scores_alone = (part.keep is None and part.bias is None and part.slopes is None
                        and not (softcap and self._key_offset is not None))
        if (weights is not None or added or not out.size or (key_scales is not None and not scores_alone)
                or not float32.is_ordinary(scale, softcap)):
            held = self.held()
            if added:
                held = np.concatenate((held[0], added[0]), axis=2), np.concatenate((held[1], added[1]), axis=2)
                part = part.with_keys(added[0].shape[2])
            attend: Callable[..., None] = float32.attention if key_scales is None else reference_float32.attention
            part_weights = None if weights is None else np.empty(part.shape, np.float32)
            attend(to_float32(query), *map(to_float32, held), part, out=out, scale=scale, softcap=softcap,
                   weights=part_weights)
            if weights is not None and part_weights is not None:
                tokens = self._length - self._start
                weights[..., self._start : self._length] = part_weights[..., :tokens]
                if added:
                    weights[..., -added[0].shape[2] :] = part_weights[..., tokens:]
        elif key_scales is None and not (scores_alone and queries == 1):
            float32.attention(query, keys, values, part, out, scale=scale, softcap=softcap)
        else:
            for run in runs_of(*visible(part)):
                decode_run(query, (keys, values, key_scales, value_scales), out, scale, softcap, run)

    def attend_last(self, query: Float32s, scale: float, out: Float32s) -> None:
        """`attend_heads` of one query, in C order, that stands at the last token and sees all of the cache's window."""
        decode_slots(self._plans, query, self._keys, self._values, out, self.visible_range(), scale, self._key_scales,
                     self._value_scales)


def _fixed_scales(scales: tuple[Real, Real], dtype: str) -> tuple[float, float]:
    """`scales` as two floats that float32 holds exactly."""
    if dtype != "int8":
        raise ValueError(f"scales must be None for a cache of dtype {dtype!r}, got {scales!r}; pass dtype='int8'")
    try:
        key, value = scales
    except (TypeError, ValueError):
        raise TypeError(f"scales must be two numbers, of the keys and of the values, got {scales!r}") from None
    fixed = float(np.float32(number("scales", key))), float(np.float32(number("scales", value)))
    if min(fixed) < np.finfo(np.float32).tiny:
        raise ValueError(f"scales must be positive, got {scales!r}")
    return fixed
