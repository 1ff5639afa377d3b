"""Self-attention with one head."""

from edgeattn.layers.multi_head import MultiHeadAttention
from edgeattn.masks import NO_WINDOW


class SelfAttention(MultiHeadAttention):
    """Attention of a sequence to itself with one head: softmax(Q K^T / sqrt(D)) V, then a projection.

    Parameters
    ----------
    q_weight, k_weight : (D, E) float array
    v_weight : (Dv, E) float array
    out_weight : (Eo, Dv) float array, optional
        Without it the head itself is the output.
    q_bias, k_bias, v_bias, out_bias : (D,), (D,), (Dv,), (Eo,) float arrays, optional
    bias_k, bias_v, add_zero_attn, gate_weight, gate_bias
        As for `MultiHeadAttention`.
    """

    _query_name = "x"

    def __init__(
        self,
        q_weight=None,
        k_weight=None,
        v_weight=None,
        out_weight=None,
        *,
        q_bias=None,
        k_bias=None,
        v_bias=None,
        out_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        gate_weight=None,
        gate_bias=None,
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
    def _build(cls, num_heads, weights, num_kv_heads=None):
        if num_heads != 1 or num_kv_heads not in (None, 1):
            raise ValueError(
                f"num_heads must be 1 for SelfAttention, got {num_heads}; use MultiHeadAttention"
            )
        return cls(**weights)

    def __call__(
        self,
        x,
        *,
        attn_mask=None,
        key_padding_mask=None,
        is_causal=False,
        window_size=NO_WINDOW,
        softcap=0.0,
        alibi_slopes=None,
        kv_cache=None,
        need_weights=False,
        out=None,
    ):
        """Attend from `x` to itself.

        Parameters
        ----------
        x : (B, L, E) or (L, E) float16, float32 or float64 array
            All dtypes are computed in float32.
        attn_mask, key_padding_mask, is_causal, window_size, softcap, alibi_slopes, kv_cache, need_weights, out
            As for `MultiHeadAttention`, with H = 1 and S = L.

        Returns
        -------
        (B, L, Eo) or (L, Eo) array
        (B, 1, L, L) or (1, L, L) array
            The probabilities, only with `need_weights`.
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
