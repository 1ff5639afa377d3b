"""Layers in float32: attention, and what else an encoder is made of."""

from edgeattn.layers.embedding import Embedding, PatchEmbedding
from edgeattn.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from edgeattn.layers.feed_forward import FeedForward
from edgeattn.layers.linear import Linear
from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.layers.norm import LayerNorm, RMSNorm
from edgeattn.layers.self_attention import SelfAttention

__all__ = [
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "PatchEmbedding",
    "RMSNorm",
    "SelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
