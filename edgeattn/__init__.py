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
    "load": "storage",
    "rotary_cache": "rotary",
    "save": "storage",
    "scaled_dot_product_attention": "functional",
    "set_num_threads": "threads",
    "sliding_window": "masks",
}

__all__ = list(_HOMES)


__getattr__ = _names_from(__name__, _HOMES)


def __dir__():
    return sorted({*globals(), *_HOMES})
