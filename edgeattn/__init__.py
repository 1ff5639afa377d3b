"""Attention for small computers: NumPy arrays in, NumPy arrays out."""

from edgeattn.functional import scaled_dot_product_attention
from edgeattn.kv_cache import KVCache
from edgeattn.layers import MultiHeadAttention, SelfAttention
from edgeattn.masks import sliding_window
from edgeattn.quantized import QuantizedMultiHeadAttention
from edgeattn.rotary import apply_rotary_embedding, rotary_cache
from edgeattn.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "QuantizedMultiHeadAttention",
    "SelfAttention",
    "apply_rotary_embedding",
    "load",
    "rotary_cache",
    "save",
    "scaled_dot_product_attention",
    "sliding_window",
]
