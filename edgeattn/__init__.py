"""Attention for small computers: NumPy arrays in, NumPy arrays out."""

from edgeattn.functional import scaled_dot_product_attention
from edgeattn.layers import MultiHeadAttention, SelfAttention
from edgeattn.quantized import QuantizedMultiHeadAttention
from edgeattn.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "MultiHeadAttention",
    "QuantizedMultiHeadAttention",
    "SelfAttention",
    "load",
    "save",
    "scaled_dot_product_attention",
]
