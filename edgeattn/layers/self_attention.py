"""Self-attention with one head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.masks import NO_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike
    from typing_extensions import Self, Unpack

    from edgeattn.kv_cache import KVCache
    from edgeattn.layers.options import SelfOptions
    from edgeattn.types import Flag, Floats, Real, Window


class SelfAttention(MultiHeadAttention):
    """Attention of a sequence to itself with one head: softmax(Q K^T / sqrt(D)) V, then a projection.

    Parameters
    ----------
    q_weight, k_weight : (D, E) float array
    v_weight : (Dv, E) float array
    out_weight : (Eo, Dv) float array, optional
        Without it the head itself is the output.
    q_bias, k_bias, v_bias, out_bias : (D,), (D,), (Dv,), (Eo,) float arrays, optional
    bias_k, bias_v, add_zero_attn, gate_weight, gate_bias : (D,), (Dv,), bool, (Dv, E), (Dv,), optional
        As for `MultiHeadAttention`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """

    query_name = "x"

    def __init__(
        self,
        q_weight: ArrayLike | None = None,
        k_weight: ArrayLike | None = None,
        v_weight: ArrayLike | None = None,
        out_weight: ArrayLike | None = None,
        *,
        q_bias: ArrayLike | None = None,
        k_bias: ArrayLike | None = None,
        v_bias: ArrayLike | None = None,
        out_bias: ArrayLike | None = None,
        bias_k: ArrayLike | None = None,
        bias_v: ArrayLike | None = None,
        add_zero_attn: Flag = False,
        gate_weight: ArrayLike | None = None,
        gate_bias: ArrayLike | None = None,
    ):
        super().__init__(
            1,
            q_weight,
            k_weight,
            v_weight,
            out_weight,
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            out_bias=out_bias,
            bias_k=bias_k,
            bias_v=bias_v,
            add_zero_attn=add_zero_attn,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
        )
        for name in ("k_weight", "v_weight"):
            if getattr(self, name).shape[1] != self.embed_dim:
                raise ValueError(
                    f"{name} must have the columns of q_weight, E = {self.embed_dim}, got "
                    f"{getattr(self, name).shape}; MultiHeadAttention takes keys of another width"
                )

    @classmethod
    def _build(cls, num_heads: SupportsIndex, weights: Mapping[str, Any],
               num_kv_heads: SupportsIndex | None = None) -> Self:
        if num_heads != 1 or num_kv_heads not in (None, 1):
            raise ValueError(
                f"num_heads must be 1 for SelfAttention, got {num_heads}; use MultiHeadAttention"
            )
        return cls(**weights)

    # It has one input where its base class has three: a call by keyword differs.
    @overload  # type: ignore[override]
    def __call__(self, x: ArrayLike, *, need_weights: Literal[False] = False,
                 **options: Unpack[SelfOptions]) -> Floats: ...

    @overload
    def __call__(self, x: ArrayLike, *, need_weights: Literal[True],
                 **options: Unpack[SelfOptions]) -> tuple[Floats, Floats]: ...

    @overload
    def __call__(self, x: ArrayLike, *, need_weights: Flag,
                 **options: Unpack[SelfOptions]) -> Floats | tuple[Floats, Floats]: ...

    def __call__(
        self,
        x: ArrayLike,
        *,
        attn_mask: ArrayLike | None = None,
        key_padding_mask: ArrayLike | None = None,
        is_causal: Flag = False,
        window_size: Window = NO_WINDOW,
        softcap: Real = 0.0,
        alibi_slopes: ArrayLike | None = None,
        kv_cache: KVCache | None = None,
        need_weights: Flag = False,
        out: Floats | None = None,
    ) -> Floats | tuple[Floats, Floats]:
        """Attend from `x` to itself.

        Parameters
        ----------
        x : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        attn_mask, key_padding_mask : array, optional
        is_causal, need_weights : bool
        window_size, softcap, alibi_slopes : (int, int), float, (1,) or (B, 1) float array
        kv_cache : KVCache, optional
        out : (B, L, Eo) or (L, Eo) array, optional
            As for `MultiHeadAttention`, with H = 1 and S = L.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
        (B, 1, L, L) or (1, L, L) array
            The probabilities, only with `need_weights`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was required and what came.
        """
        return super().__call__(
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            kv_cache=kv_cache,
            need_weights=need_weights,
            out=out,
        )
