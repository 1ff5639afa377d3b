"""A cache of keys and values on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import checked_softcap, default_scale, flag, number
from edgeattn.executors.cuda.functional import numbers, result_array
from edgeattn.executors.cuda.masks import arrays_read, device_masks
from edgeattn.kv_cache import KVCache

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    from typing_extensions import Self

    from edgeattn.types import Device, Flag, Float32s, Real, Window


class CacheOnCuda(KVCache):
    """`KVCache(...).to("cuda")`: an empty cache of the same sizes, its storage on the GPU.

    `append` and `attend` take float32 arrays on the device and work on their current stream, each call after the one
    before it. Values are not looked at:
    with `scales` a NaN is stored as 0, and infinity as the largest code.
    """

    def __init__(self, cache):
        from edgeattn.kernels.cuda.driver import driver

        for name in ("batch", "num_kv_heads", "capacity", "head_dim", "value_dim", "dtype", "window", "scales"):
            setattr(self, name, getattr(cache, name))
        self._length = self._start = self._first = 0
        self._device = driver().device()
        rows = (self.batch, self.num_kv_heads, self.capacity)
        # rows of whole words; of whole tiles, with zeros behind, where a static layer reads them
        step = 1 if self.dtype == "float32" else 4 if self.scales is None else 64
        self._keys, self._values = (driver().empty((*rows, -(-size // step) * step), self.dtype)
                                    for size in (self.head_dim, self.value_dim))
        self._key_scales = self._value_scales = None
        if self.scales is not None:
            self._key_scales, self._value_scales = (
                driver().array(np.full((1, 1, 1), scale, np.float32)) for scale in self.scales)
        elif self.dtype == "int8":
            self._key_scales, self._value_scales = (driver().empty(rows, np.float32) for _ in range(2))

    def to(self, device: Device) -> Self:
        """The cache itself for "cuda"; another device would need a copy, which `held` gives."""
        if device != "cuda":
            raise ValueError(f"device must be 'cuda' for a cache on the GPU, got {device!r}; held() copies it")
        return self

    def append(self, key: Any, value: Any) -> None:
        """Add the keys and values of n tokens: (B, Hkv, n, D) and (B, Hkv, n, Dv) float32 on the device."""
        from edgeattn.kernels.cuda.call import Call

        with Call("key", key) as call:
            k, v = call.view("key", key), call.view("value", value)
            numbers(key=k, value=v)
            if k.dtype != np.float32:
                raise TypeError(f"key must be float32 for a cache on CUDA, got dtype {k.dtype}; convert it")
            tokens = self._check_tokens(k, v)
            self._check_room(tokens)
            self.used_by(call)
            if tokens:
                self.append_device(tokens, (k, v), call.stream, call.like)

    def held(self) -> tuple[Float32s, Float32s]:
        """The tokens held as float32 NumPy copies: (B, Hkv, length - start, D) and (B, Hkv, length - start, Dv)."""
        slots = slice(self._first, self._first + self._length - self._start)
        keys, values = (array.numpy()[:, :, slots, :size].copy() for array, size in (
            (self._keys, self.head_dim), (self._values, self.value_dim)))
        if self._key_scales is None:
            return keys, values
        scales = (array.numpy()[:, :, slots if self.scales is None else slice(None), None]
                  for array in (self._key_scales, self._value_scales))
        with np.errstate(invalid="ignore"):
            return tuple(codes * scale for codes, scale in zip((keys, values), scales, strict=True))

    def attend(self, query: Any, *, attn_mask: Any = None, key_padding_mask: Any = None, is_causal: Flag = False,
               scale: Real | None = None, softcap: Real = 0.0, window_size: Window = (-1, -1), alibi_slopes: Any = None,
               position: SupportsIndex | None = None, return_weights: Flag = False, out: Any = None) -> Any:
        """Attend from queries on the device to the tokens in the cache; as `KVCache.attend`."""
        from edgeattn.kernels.cuda.call import Call
        from edgeattn.kernels.cuda.host import both

        with Call("query", query) as call:
            q = call.view("query", query)
            numbers(query=q)
            if q.dtype != np.float32:
                raise TypeError(f"query must be float32 for a cache on CUDA, got dtype {q.dtype}; convert it")
            return_weights = flag("return_weights", return_weights)
            heads, queries, position = self._check_query(q, position)
            softcap = checked_softcap(softcap)
            scale = default_scale(self.head_dim) if scale is None else number("scale", scale)
            self.used_by(call)
            where = dict(stream=call.stream, like=call.like)
            shape = (self.batch, heads, queries, self._length)
            masks = device_masks(shape, call.view, attn_mask, key_padding_mask, is_causal=is_causal,
                                 window_size=self.within_window(window_size), alibi_slopes=alibi_slopes,
                                 position=position, join=functools.partial(both, **where))
            float32 = np.dtype(np.float32)
            result, taken = result_array(call, out, (*q.shape[:3], self.value_dim), float32, (q, *arrays_read(masks)))
            weights, to = result_array(call, None, shape, float32, ()) if return_weights else (None, None)
            if taken.size or (to is not None and to.size):
                self.attend_device(q, taken, scale, (0, queries), softcap=softcap, weights=to, **where, **masks)
        return (result, weights) if return_weights else result

    def used_by(self, call):
        """Let a call come after the one before it; what reads the storage later comes after this one."""
        if call.device != self._device:
            raise ValueError(f"{call.name} must lie on the GPU of the cache, number {self._device}, got an array on "
                             f"number {call.device}; call to('cuda') while that GPU is the current one")
        for array in self._storage():
            if array.stream != call.stream:
                call.after(array.stream)
                array.stream = call.stream

    # -- for kernels ---------------------------------------------------------------------------------------------------

    def slots(self, begin, count):
        """Views of keys (B, Hkv, count, D), values and their scales, or None, from a slot on."""
        from edgeattn.kernels.cuda.arrays import view
        from edgeattn.kernels.cuda.host import part

        found = []
        for array, size in ((self._keys, self.head_dim), (self._values, self.value_dim)):
            found.append(part(part(view("cache", array), 2, begin, begin + count), 3, 0, size))
        for array in (self._key_scales, self._value_scales):
            if array is not None and self.scales is not None:
                found.append(dataclasses.replace(view("cache", array), shape=(*found[0].shape[:2], count),
                                                 strides=(0, 0, 0)))
            else:
                found.append(None if array is None else part(view("cache", array), 2, begin, begin + count))
        return found

    def held_slots(self):
        """`slots` of the tokens held."""
        return self.slots(self._first, self._length - self._start)

    def places(self, tokens, stream, like):
        """Views of where the keys and values of the next tokens go, room made for them."""
        from edgeattn.kernels.cuda.arrays import view
        from edgeattn.kernels.cuda.host import to_front

        held = self._length - self._start
        if self._first + held + tokens > self.capacity:  # as on the CPU, only with a window
            kept = min(held, self.window - 1)
            if kept:
                for array in self._storage():
                    to_front(view("cache", array), self._first + held - kept, kept, stream, like)
            self._first, self._start, held = 0, self._length - kept, kept
        return self.slots(self._first + held, tokens)[:2]

    def append_device(self, tokens, rows, stream, like):
        """Count tokens, whose keys and values (B, Hkv, tokens, size) are stored first; None where they are in place.

        int8 rows are codes by `scales`, as long as those of the storage.
        """
        from edgeattn.kernels.cuda.host import store_rows, words

        if rows is not None:
            self.places(tokens, stream, like)
            *places, key_scale, value_scale = self.slots(self._first + self._length - self._start, tokens)
            fixed = (None, None) if self.scales is None else self.scales
            for x, to, scale, factor in zip(rows, places, (key_scale, value_scale), fixed, strict=True):
                if x.dtype == np.int8:
                    store_rows(words(x), words(to), None, stream)
                elif factor is None:
                    store_rows(x, to, scale, stream)
                else:
                    store_rows(x, to, None, stream, up=to.strides[2], rule="fixed", factor=factor)
        self._length += tokens

    def attend_device(self, query, out, scale, rows, softcap=0.0, *, left, right, offset, at_end, keep=None, bias=None,
            **options):
        """`edgeattn.kernels.cuda.attend.attend` to all tokens held; masks of all positions, of queries rows[0] to
        rows[1] - 1.
        """
        from edgeattn.kernels.cuda.attend import attend
        from edgeattn.kernels.cuda.host import masks_part

        masks = masks_part(dict(left=left, right=right, offset=offset, at_end=at_end, keep=keep, bias=bias), rows,
                           (self._start, self._length))
        keys, values, key_scale, value_scale = self.held_slots()
        attend(query, keys, values, out, scale, softcap, key_scale=key_scale, value_scale=value_scale,
               column=self._start, **options, **masks)
