"""Where the tokens of a cache of keys and values lie, and which are dropped to make room."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.kernels.cpu.cache_int8 import store

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeattn.runtime.plan_cache import PlanCache
    from edgeattn.types import Codes, Float32s, Floats, Window

    _Span = tuple[int, int]

_LARGEST_CODE = np.float32(127)


class CacheSlots:
    """The storage of a `KVCache`, which allocates it: tokens side by side, in order, `start` to `length` - 1."""

    num_kv_heads: int
    capacity: int
    head_dim: int
    dtype: str
    scales: tuple[float, float] | None
    window: int | None
    _keys: NDArray[Any]
    _values: NDArray[Any]
    _key_scales: Float32s | None
    _value_scales: Float32s | None
    _plans: PlanCache[Any, Any]
    _length: int
    _start: int
    _first: int  # the slot of token `start`; tokens lie side by side, in order
    _moving = False  # tokens, to make room
    # What every key had before it was stored without, (1, Hkv, 1, D) float32 or None; of int8 caches.
    _key_offset: Float32s | None = None

    @property
    def length(self) -> int:
        """Position of the next token."""
        return self._length

    @property
    def start(self) -> int:
        """Position of the oldest token still held."""
        return self._start

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(array.nbytes for array in self._storage())

    def __len__(self) -> int:
        return self._length

    def truncate(self, length: SupportsIndex) -> None:
        """Forget the tokens at position `length` and after, as if they had not been appended.

        Parameters
        ----------
        length : int
            At most the present one. With `window`, the keys that the next query may see must still be held: that
            is so at least back to where the last `append` began.

        Raises
        ------
        TypeError, ValueError
            Naming what was required and what came.
        """
        try:
            wanted = operator.index(length)
        except TypeError:
            raise TypeError(f"length must be an integer, got {length!r}") from None
        if not 0 <= wanted <= self._length:
            raise ValueError(f"length must lie between 0 and the cache's length {self._length}, got {wanted}")
        if self.window is not None and max(wanted - self.window + 1, 0) < self._start:
            raise ValueError(
                f"length must be at least {self._start + self.window - 1}, or 0 after reset(): older tokens "
                f"than position {self._start} were dropped; got {wanted}. A larger capacity keeps more of them"
            )
        self._length = wanted
        if not wanted:
            self._key_offset = None

    def reset(self) -> None:
        """Forget every token; the storage stays."""
        self._length = self._start = self._first = 0
        self._key_offset, self._moving = None, False

    def held(self) -> tuple[Float32s, Float32s]:
        """The tokens `start` to `length` - 1 as float32 copies; int8 codes times their scales.

        Returns
        -------
        key : (B, Hkv, length - start, D) float32 array
        value : (B, Hkv, length - start, Dv) float32 array
        """
        keys, values, key_scales, value_scales = self.views()
        if key_scales is None or value_scales is None:
            return keys.copy(), values.copy()
        with np.errstate(invalid="ignore"):
            keys, values = keys * key_scales[..., None], values * value_scales[..., None]
            return keys if self._key_offset is None else keys + self._key_offset, values

    # -- room, and what a chunk does to it -----------------------------------------------------------------------------

    def _storage(self) -> list[NDArray[Any]]:
        scales = (self._key_scales, self._value_scales) if self.scales is None else ()
        return [array for array in (self._keys, self._values, *scales) if array is not None]

    def _check_room(self, tokens: int) -> None:
        if tokens <= self.room():
            return
        if self.window is None:
            raise ValueError(
                f"the cache is full: its capacity is {self.capacity} tokens, it holds {self._length}, and "
                f"{tokens} more came; truncate or reset it, build it with a larger capacity, or with a window"
            )
        raise ValueError(
            f"a chunk of {tokens} tokens needs a capacity of window - 1 + {tokens} = {self.window - 1 + tokens}, "
            f"got {self.capacity}; append at most {self.room()} tokens at a time"
        )

    def room(self) -> int:
        """The largest chunk that can come next."""
        if self.window is None:
            return self.capacity - self._length
        return self.capacity - min(self._length - self._start, self.window - 1)

    def pieces(self, queries: int, tokens: int, right: int) -> list[tuple[_Span, _Span]]:
        """How a chunk is taken in: (first, last) query and (first, last) token of each piece; raises without room.

        Where queries see no later key, `right` = 0, a chunk too long for the window comes in pieces that fit.
        """
        piece = tokens
        if self.window is not None and queries == tokens and right == 0:
            piece = min(tokens, self.capacity - self.window + 1)
        self._check_room(piece)
        if piece == tokens:
            return [((0, queries), (0, tokens))]
        ends = [(begin, min(begin + piece, tokens)) for begin in range(0, tokens, piece)]
        return [(end, end) for end in ends]

    def within_window(self, window_size: Window) -> Window:
        """`window_size` within the cache's own window; what is no window is left to `resolve_mask`."""
        if self.window is None:
            return window_size
        try:
            left, right = (operator.index(bound) for bound in window_size)
        except (TypeError, ValueError):
            return window_size
        return (self.window - 1 if left == -1 else min(left, self.window - 1)), right

    def check_finite(self, key: Floats, value: Floats) -> None:
        """Raise if key or value, float arrays, hold what codes by `scales` cannot keep."""
        if self.scales is None:
            return
        for name, array in (("key", key), ("value", value)):
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite for a cache with fixed scales, whose codes have no NaN")

    def store_without_bias(self, key_bias: Float32s | None) -> None:
        """Keep the bias (Hkv * D,) of all keys that will come, or None, out of an int8 cache that holds no token yet.

        It adds the same to all scores of a query, unless a softcap or keys without it come between: `held` adds it
        again for these.
        """
        if self._length == 0 and self.dtype == "int8":
            shape = (1, self.num_kv_heads, 1, self.head_dim)
            self._key_offset = None if key_bias is None else key_bias.reshape(shape)

    def transaction(self) -> _Transaction:
        """For `with`, while a chunk is taken in: an exception leaves the length as it was before.

        A signal's handler may raise anywhere: no token is counted and not written, nor one whose result nobody got.
        Only where the window has dropped older tokens for the first pieces of a long chunk, these pieces stay; and
        nothing does where it comes while tokens are moved to make room.
        """
        return _Transaction(self)

    def restore(self, length: int) -> None:
        """What a transaction does, and what in its place is called where it shows: the length as it was before.

        Never more than there is: an inner transaction may have emptied the cache.
        """
        if self._moving:  # tokens lie half here, half there
            self.reset()
        else:
            self._length = max(min(length, self._length), self._start)

    def append_heads(self, key: NDArray[Any], value: NDArray[Any]) -> None:
        """Store float32 (B, Hkv, n, D) and (B, Hkv, n, Dv), for which there is room; or their codes, by `scales`."""
        slots = self.take_slots(key.shape[2])
        if self.dtype == "float32" or key.dtype == np.int8:
            self._keys[:, :, slots], self._values[:, :, slots] = key, value
            return
        if self._key_offset is not None:
            key = key - self._key_offset
        if self.scales is not None:
            self._keys[:, :, slots] = _quantize_by(self.scales[0], key)
            self._values[:, :, slots] = _quantize_by(self.scales[1], value)
        elif self._key_scales is not None and self._value_scales is not None:
            store(self._plans, key, value, self._keys, self._key_scales, self._values, self._value_scales, slots.start)

    def take_slots(self, tokens: int) -> slice:
        """The slots of so many new tokens, for which there is room: held from now on, and to be written."""
        held = self._length - self._start
        if self._first + held + tokens > self.capacity:
            # Only with a window: move what the coming queries may see to the front, drop what is older.
            kept = held if self.window is None else min(held, self.window - 1)
            begin = self._first + held - kept
            self._moving = True
            for array in self._storage():
                array[:, :, :kept] = array[:, :, begin : begin + kept]
            self._first, self._start, held = 0, self._length - kept, kept
            self._moving = False
        self._length += tokens
        return slice(self._first + held, self._first + held + tokens)

    # -- what kernels read ---------------------------------------------------------------------------------------------

    @property
    def plans(self) -> PlanCache[Any, Any]:
        """What calls of kernels with the arrays of this cache have planned."""
        return self._plans

    @property
    def key_slots(self) -> NDArray[Any]:
        """All slots of keys, (B, Hkv, capacity, D), in place."""
        return self._keys

    @property
    def value_slots(self) -> NDArray[Any]:
        """All slots of values, (B, Hkv, capacity, Dv), in place."""
        return self._values

    @property
    def first_slot(self) -> int:
        """The slot of token `start`; tokens lie side by side, in order."""
        return self._first

    def views(self) -> tuple[NDArray[Any], NDArray[Any], Float32s | None, Float32s | None]:
        """Keys, values, key scales and value scales of the tokens held, in place; None for no scales."""
        slots = slice(self._first, self._first + self._length - self._start)
        key_scales, value_scales = self._key_scales, self._value_scales
        return (self._keys[:, :, slots], self._values[:, :, slots],
                None if key_scales is None else key_scales[:, :, slots],
                None if value_scales is None else value_scales[:, :, slots])

    def visible_range(self) -> _Span:
        """(first, last) of the slots that a query at the last token sees."""
        last = self._first + self._length - self._start
        return (self._first if self.window is None else max(self._first, last - self.window)), last


class _Transaction:
    def __init__(self, cache: CacheSlots):
        self._cache, self._before = cache, cache._length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._cache.restore(self._before)


def _quantize_by(scale: float, x: Floats) -> Codes:
    """int8 codes of x by one scale, saturated."""
    with np.errstate(over="ignore"):  # what saturates
        codes: Codes = np.clip(np.rint(x / np.float32(scale)), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
        return codes
