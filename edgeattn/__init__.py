"""Attention for small computers: NumPy arrays in, NumPy arrays out."""

from edgeattn.lazy import names_from as _names_from

__version__ = "0.1.0"

# A name's module is imported when the name is asked for: `edgeattn.bundle` must not bring Numba in.
_HOMES = {
    "KVCache": "kv_cache",
    "MultiHeadAttention": "layers",
    "QuantizedMultiHeadAttention": "quantized",
    "SelfAttention": "layers",
    "apply_rotary_embedding": "rotary",
    "get_num_threads": "threads",
    "load": "files.storage",
    "rotary_cache": "rotary",
    "save": "files.storage",
    "scaled_dot_product_attention": "functional",
    "set_num_threads": "threads",
    "sliding_window": "masks",
}

__all__ = list(_HOMES)

TYPE_CHECKING = False  # what type checkers take for True; tests/test_packaging.py holds the two lists together
if TYPE_CHECKING:
    from edgeattn.files.storage import load as load
    from edgeattn.files.storage import save as save
    from edgeattn.functional import scaled_dot_product_attention as scaled_dot_product_attention
    from edgeattn.kv_cache import KVCache as KVCache
    from edgeattn.layers import MultiHeadAttention as MultiHeadAttention
    from edgeattn.layers import SelfAttention as SelfAttention
    from edgeattn.masks import sliding_window as sliding_window
    from edgeattn.quantized import QuantizedMultiHeadAttention as QuantizedMultiHeadAttention
    from edgeattn.rotary import apply_rotary_embedding as apply_rotary_embedding
    from edgeattn.rotary import rotary_cache as rotary_cache
    from edgeattn.threads import get_num_threads as get_num_threads
    from edgeattn.threads import set_num_threads as set_num_threads
else:
    __getattr__ = _names_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
