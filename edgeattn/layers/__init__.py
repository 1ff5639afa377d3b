"""Attention layers in float32: projections, attention, output projection."""

from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.layers.self_attention import SelfAttention

__all__ = ["MultiHeadAttention", "SelfAttention"]
