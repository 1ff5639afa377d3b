"""What takes the place of a layer or a cache on a GPU: `edgeattn.device` finds this by its name."""

import functools

from edgeattn.executors.cuda.kv_cache import CacheOnCuda
from edgeattn.executors.cuda.layers import FloatOnCuda, StaticOnCuda
from edgeattn.kv_cache import KVCache
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention


@functools.singledispatch
def place(thing, **options):
    """Put a layer or a cache on the current GPU; the row of its class below."""
    raise TypeError(f"{type(thing).__name__} has no counterpart on a GPU; layers and caches have one")


place.register(KVCache, CacheOnCuda)
place.register(MultiHeadAttention, FloatOnCuda)
place.register(DynamicMultiHeadAttention, FloatOnCuda)
place.register(StaticMultiHeadAttention, StaticOnCuda)
