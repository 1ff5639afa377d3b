"""Attention for small computers: NumPy arrays in, NumPy arrays out."""

import importlib

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


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
