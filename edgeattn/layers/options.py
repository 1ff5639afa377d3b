"""Types of the keywords of layers, for type checkers: nothing imports this module when it runs. See edgeattn.types."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from edgeattn.types import MaskOptions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from edgeattn.kv_cache import KVCache
    from edgeattn.types import Codes, Flag, Floats, Real, Window


class CallOptions(MaskOptions, total=False):
    """Keywords of a layer's call but `need_weights`, on which the result's type depends."""

    softcap: Real
    alibi_slopes: ArrayLike | None
    kv_cache: KVCache | None
    average_attn_weights: Flag
    out: Floats | None


class SelfOptions(TypedDict, total=False):
    """The same of `SelfAttention`."""

    attn_mask: ArrayLike | None
    key_padding_mask: ArrayLike | None
    is_causal: Flag
    window_size: Window
    softcap: Real
    alibi_slopes: ArrayLike | None
    kv_cache: KVCache | None
    out: Floats | None


class CodeOptions(MaskOptions, total=False):
    """The same of `StaticMultiHeadAttention.run_int8`."""

    kv_cache: KVCache | None
    out: Codes | None
