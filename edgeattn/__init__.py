"""Small Transformers on small computers: NumPy arrays in, NumPy arrays out."""

from edgeattn.lazy import names_from as _names_from

__version__ = "0.2.0"

# A name's module is imported when the name is asked for: `edgeattn.bundle` must not bring Numba in.
_HOMES = {
    "FeedForward": "layers",
    "ImageEncoder": "models",
    "KVCache": "kv_cache",
    "LayerNorm": "layers",
    "Linear": "layers",
    "MultiHeadAttention": "layers",
    "QuantizedMultiHeadAttention": "quantized",
    "RMSNorm": "layers",
    "RelativePositionBias": "position_bias",
    "RotaryEmbedding": "rotary",
    "SelfAttention": "layers",
    "TextEncoder": "models",
    "TransformerEncoder": "layers",
    "TransformerEncoderLayer": "layers",
    "apply_rotary_embedding": "rotary",
    "from_pretrained": "models",
    "get_num_threads": "threads",
    "load": "files.storage",
    "rotary_cache": "rotary",
    "save": "files.storage",
    "scaled_dot_product_attention": "functional",
    "set_num_threads": "threads",
    "sliding_window": "masks",
    "swin_position_bias": "position_bias",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.files.storage import load as load
    from edgeattn.files.storage import save as save
    from edgeattn.functional import scaled_dot_product_attention as scaled_dot_product_attention
    from edgeattn.kv_cache import KVCache as KVCache
    from edgeattn.layers import FeedForward as FeedForward
    from edgeattn.layers import LayerNorm as LayerNorm
    from edgeattn.layers import Linear as Linear
    from edgeattn.layers import MultiHeadAttention as MultiHeadAttention
    from edgeattn.layers import RMSNorm as RMSNorm
    from edgeattn.layers import SelfAttention as SelfAttention
    from edgeattn.layers import TransformerEncoder as TransformerEncoder
    from edgeattn.layers import TransformerEncoderLayer as TransformerEncoderLayer
    from edgeattn.masks import sliding_window as sliding_window
    from edgeattn.models import ImageEncoder as ImageEncoder
    from edgeattn.models import TextEncoder as TextEncoder
    from edgeattn.models import from_pretrained as from_pretrained
    from edgeattn.position_bias import RelativePositionBias as RelativePositionBias
    from edgeattn.position_bias import swin_position_bias as swin_position_bias
    from edgeattn.quantized import QuantizedMultiHeadAttention as QuantizedMultiHeadAttention
    from edgeattn.rotary import RotaryEmbedding as RotaryEmbedding
    from edgeattn.rotary import apply_rotary_embedding as apply_rotary_embedding
    from edgeattn.rotary import rotary_cache as rotary_cache
    from edgeattn.threads import get_num_threads as get_num_threads
    from edgeattn.threads import set_num_threads as set_num_threads
else:
    __getattr__ = _names_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *_HOMES})
