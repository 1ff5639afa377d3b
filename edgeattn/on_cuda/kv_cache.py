"""A cache of keys and values on a GPU."""

import dataclasses
import functools

import numpy as np

from edgeattn.checks import number
from edgeattn.functional import checked_softcap, default_scale
from edgeattn.kv_cache import KVCache
from edgeattn.on_cuda.functional import numbers, result_array, views
from edgeattn.on_cuda.masks import device_masks


class CacheOnCuda(KVCache):
    """`KVCache(...).to("cuda")`: an empty cache of the same sizes, its storage on the GPU.

    `append` and `attend` take float32 arrays on the device and work on their current stream; a window is missing.
    """

    def __init__(self, cache):
        from edgeattn.cuda.driver import driver

        if cache.window is not None:
            raise ValueError(f"window is missing on CUDA, got a cache with window={cache.window}; without one a cache "
                             "holds every token, and attend(window_size=...) narrows what is seen")
        if cache.scales is not None:
            raise ValueError("scales are missing on CUDA, where an int8 cache has a scale per token and head; leave "
                             "them out")
        for name in ("batch", "num_kv_heads", "capacity", "head_dim", "value_dim", "dtype", "window", "scales"):
            setattr(self, name, getattr(cache, name))
        self._length = self._start = self._first = 0
        rows = (self.batch, self.num_kv_heads, self.capacity)
        self._keys = driver().empty((*rows, self.head_dim), self.dtype)
        self._values = driver().empty((*rows, self.value_dim), self.dtype)
        self._key_scales = self._value_scales = None
        if self.dtype == "int8":
            self._key_scales, self._value_scales = (driver().empty(rows, np.float32) for _ in range(2))

    def to(self, device):
        """The cache itself for "cuda"; another device would need a copy, which `held` gives."""
        if device != "cuda":
            raise ValueError(f"device must be 'cuda' for a cache on the GPU, got {device!r}; held() copies it")
        return self

    def append(self, key, value):
        """Add the keys and values of n tokens: (B, Hkv, n, D) and (B, Hkv, n, Dv) float32 on the device."""
        (k, v), _, stream = views(key=key, value=value)
        numbers(key=k, value=v)
        if k.dtype != np.float32:
            raise TypeError(f"key must be float32 for a cache on CUDA, got dtype {k.dtype}; convert it")
        tokens = self._check_tokens(k, v)
        self._check_room(tokens)
        if tokens:
            self.took(tokens, (k, v), stream)

    def held(self):
        """The tokens held as float32 NumPy copies: (B, Hkv, length, D) and (B, Hkv, length, Dv)."""
        keys, values = (array.numpy()[:, :, :self._length] for array in (self._keys, self._values))
        if self._key_scales is None:
            return keys, values
        scales = (array.numpy()[:, :, :self._length, None] for array in (self._key_scales, self._value_scales))
        with np.errstate(invalid="ignore"):
            return tuple(codes * scale for codes, scale in zip((keys, values), scales, strict=True))

    def attend(self, query, *, attn_mask=None, key_padding_mask=None, is_causal=False, scale=None, softcap=0.0,
               window_size=(-1, -1), alibi_slopes=None, position=None, return_weights=False, out=None):
        """Attend from queries on the device to the tokens in the cache; as `KVCache.attend`, without probabilities."""
        from edgeattn.cuda.arrays import view
        from edgeattn.cuda.host import both

        (q,), like, stream = views(query=query)
        numbers(query=q)
        if q.dtype != np.float32:
            raise TypeError(f"query must be float32 for a cache on CUDA, got dtype {q.dtype}; convert it")
        if return_weights is not False:
            raise ValueError("return_weights is missing on CUDA, where probabilities are never stored")
        heads, queries, position = self._check_query(q, position)
        softcap = checked_softcap(softcap)
        scale = default_scale(self.head_dim) if scale is None else number("scale", scale)
        masks = device_masks((self.batch, heads, queries, self._length), view, attn_mask, key_padding_mask,
                             is_causal=is_causal, window_size=window_size, alibi_slopes=alibi_slopes, position=position,
                             join=functools.partial(both, stream=stream, like=like))
        result, taken = result_array(out, (*q.shape[:3], self.value_dim), np.dtype(np.float32), like, (q,))
        if taken.size:
            self.see(q, taken, scale, softcap=softcap, stream=stream, like=like, **masks)
        return result

    # -- for kernels ---------------------------------------------------------------------------------------------------

    def _slots(self, array, begin, count):
        """A View of the tokens begin to begin + count - 1 of one of the storage arrays."""
        from edgeattn.cuda.arrays import view

        if array is None:
            return None
        whole = view("cache", array)
        return dataclasses.replace(whole, pointer=whole.pointer + begin * whole.strides[2],
                                   shape=(*whole.shape[:2], count, *whole.shape[3:]))

    def places(self, tokens):
        """Views of where the keys and values of the next tokens go."""
        return [self._slots(array, self._length, tokens) for array in (self._keys, self._values)]

    def took(self, tokens, rows, stream):
        """Count tokens, whose keys and values (B, Hkv, tokens, size) are stored first; None where they are in place."""
        from edgeattn.cuda.host import store_rows

        if rows is not None:
            storage = ((self._keys, self._key_scales), (self._values, self._value_scales))
            for x, arrays in zip(rows, storage, strict=True):
                store_rows(x, *(self._slots(array, self._length, tokens) for array in arrays), stream)
        self._length += tokens

    def see(self, query, out, scale, **arguments):
        """`edgeattn.cuda.host.attend` to all tokens held."""
        from edgeattn.cuda.host import attend

        keys, values, key_scale, value_scale = (self._slots(array, 0, self._length) for array in (
            self._keys, self._values, self._key_scales, self._value_scales))
        attend(query, keys, values, out, scale, key_scale=key_scale, value_scale=value_scale, **arguments)
