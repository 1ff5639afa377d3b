"""Layers in float32: attention, and what else an encoder is made of."""

from edgeattn.lazy import dir_of, names_from

# A name's module is imported when the name is asked for: one kind of layer does not bring in all others.
_HOMES = {
    "Embedding": "embedding",
    "FeedForward": "feed_forward",
    "LayerNorm": "norm",
    "Linear": "linear",
    "MultiHeadAttention": "multi_head",
    "PatchEmbedding": "embedding",
    "RMSNorm": "norm",
    "SelfAttention": "self_attention",
    "TransformerEncoder": "encoder",
    "TransformerEncoderLayer": "encoder_layer",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.layers.embedding import Embedding as Embedding
    from edgeattn.layers.embedding import PatchEmbedding as PatchEmbedding
    from edgeattn.layers.encoder import TransformerEncoder as TransformerEncoder
    from edgeattn.layers.encoder_layer import TransformerEncoderLayer as TransformerEncoderLayer
    from edgeattn.layers.feed_forward import FeedForward as FeedForward
    from edgeattn.layers.linear import Linear as Linear
    from edgeattn.layers.multi_head import MultiHeadAttention as MultiHeadAttention
    from edgeattn.layers.norm import LayerNorm as LayerNorm
    from edgeattn.layers.norm import RMSNorm as RMSNorm
    from edgeattn.layers.self_attention import SelfAttention as SelfAttention
else:
    __getattr__ = names_from(__name__, _HOMES)
    __dir__ = dir_of(__name__, _HOMES)
