"""Attention for small computers: NumPy arrays in, NumPy arrays out."""

from edgeattn.functional import scaled_dot_product_attention
from edgeattn.kv_cache import KVCache
from edgeattn.layers import MultiHeadAttention, SelfAttention
from edgeattn.masks import sliding_window
from edgeattn.quantized import QuantizedMultiHeadAttention
from edgeattn.storage import load, save

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "QuantizedMultiHeadAttention",
    "SelfAttention",
    "load",
    "save",
    "scaled_dot_product_attention",
    "sliding_window",
]
