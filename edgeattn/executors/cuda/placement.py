"""What takes the place of a layer or a cache on a GPU: `edgeattn.device` finds this by its name."""

import functools

from edgeattn.executors.cuda.encoders import EncoderOnCuda, ImagesOnCuda, TextsOnCuda
from edgeattn.executors.cuda.kv_cache import CacheOnCuda
from edgeattn.executors.cuda.layers import FloatOnCuda, StaticOnCuda
from edgeattn.kv_cache import KVCache
from edgeattn.layers import MultiHeadAttention, TransformerEncoder
from edgeattn.models import ImageEncoder, TextEncoder
from edgeattn.quantized import DynamicMultiHeadAttention, StaticMultiHeadAttention


@functools.singledispatch
def place(thing, **options):
    """Put a layer or a cache on the current GPU; the row of its class below."""
    raise TypeError(f"{type(thing).__name__} has no counterpart on a GPU; attention layers, encoders, models "
                    "and caches have one")


place.register(KVCache, CacheOnCuda)
place.register(MultiHeadAttention, FloatOnCuda)
place.register(DynamicMultiHeadAttention, FloatOnCuda)
place.register(StaticMultiHeadAttention, StaticOnCuda)
place.register(TransformerEncoder, EncoderOnCuda)
place.register(TextEncoder, TextsOnCuda)
place.register(ImageEncoder, ImagesOnCuda)
