"""What an attention layer does with positions, between its projections and the products of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgeattn.layers.norm import LayerNorm, RMSNorm
from edgeattn.position_bias import ConstantPositionBias, RelativePositionBias
from edgeattn.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import ArrayLike

    from edgeattn.masks import Mask
    from edgeattn.types import Float32s

Norm: TypeAlias = LayerNorm | RMSNorm
PositionBias: TypeAlias = ConstantPositionBias | RelativePositionBias
POSITIONS = ("rotary", "q_norm", "k_norm", "position_bias")


class Positions:
    """A layer's `rotary`, `q_norm`, `k_norm` and `position_bias`; None in layers that cannot have them."""

    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: RotaryEmbedding | None = None
    position_bias: PositionBias | None = None

    k_bias: Float32s | None

    @property
    def common_key_bias(self) -> Float32s | None:
        """`k_bias` where it adds the same to all scores of a query; None where keys are normed or rotated after it."""
        return self.k_bias if self.rotary is None and self.k_norm is None else None

    @property
    def head_positions(self) -> dict[str, Any]:
        """`rotary`, `q_norm` and `k_norm` as kernels take them."""
        def parts(norm: Norm | None) -> tuple[str, Float32s, Float32s | None, float] | None:
            kind = "layer" if isinstance(norm, LayerNorm) else "rms"
            return None if norm is None else (kind, norm.weight, norm.bias, norm.eps)

        return {"rotary": self.rotary, "q_norm": parts(self.q_norm), "k_norm": parts(self.k_norm)}

    def _set_positions(self, num_heads: int, head_dim: int, rotary: RotaryEmbedding | None, q_norm: Norm | None,
                       k_norm: Norm | None, position_bias: ArrayLike | PositionBias | None) -> None:
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is None:
                continue
            if not isinstance(norm, Norm):
                raise TypeError(f"{name} must be an edgeattn.LayerNorm or RMSNorm, got {type(norm).__name__}")
            if norm.weight.shape != (head_dim,):
                raise ValueError(f"{name} must be over the features of a head, D = {head_dim}, got {norm}")
        if rotary is not None:
            if not isinstance(rotary, RotaryEmbedding):
                raise TypeError(f"rotary must be an edgeattn.RotaryEmbedding, got {type(rotary).__name__}")
            if rotary.rotary_embedding_dim > head_dim:
                raise ValueError(f"rotary must turn at most D = {head_dim} features, got {rotary}")
        if position_bias is not None:
            if not isinstance(position_bias, PositionBias):
                position_bias = ConstantPositionBias(position_bias)
            if position_bias.num_heads != num_heads:
                raise ValueError(f"position_bias must have H = {num_heads} heads, got {position_bias.num_heads}")
        self.rotary, self.q_norm, self.k_norm, self.position_bias = rotary, q_norm, k_norm, position_bias

    def placed(self, q: Float32s, k: Float32s, mask: Mask) -> tuple[Float32s, Float32s]:
        """q (B, H, L, D) and the keys (B, Hkv, n, D) of this call as their products take them: normed, then turned.

        mask : Mask
            Its last n keys are these.
        """
        return self.placed_at(q, k, int(mask.offset), mask.shape[3] - k.shape[2])

    def placed_at(self, q: Float32s, k: Float32s, query_position: int, key_position: int) -> tuple[Float32s, Float32s]:
        """The same, the first query and the first of these keys standing at these positions."""
        if self.q_norm is not None:
            q = self.q_norm.rows(q)
        if self.k_norm is not None:
            k = self.k_norm.rows(k)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, query_position), self.rotary.turn(k, key_position)
        return q, k

    def first_position(self, mask: Mask) -> int:
        """Where kernels have to know that query 0 stands; 0 for a layer whose kernels do not ask."""
        return 0 if self.rotary is None else int(mask.offset)

    def position_rows(self, mask: Mask) -> Float32s | None:
        """`position_bias` for the queries and keys of a mask, (1, H, L, S) in C order; None of none."""
        if self.position_bias is None:
            return None
        _, _, queries, keys = mask.shape
        return np.ascontiguousarray(self.position_bias.rows(int(mask.offset), queries, keys))[None]

    def biased(self, mask: Mask) -> Mask:
        """`mask` with what the layer adds to the scores by positions."""
        return mask.with_bias(self.position_rows(mask))


def refuse_positions(layer: Any, way_out: str, names: tuple[str, ...] = POSITIONS) -> None:
    """Raise where `layer` has any of `names`, which float32 and dynamic int8 layers on the CPU alone compute."""
    given = [name for name in names if getattr(layer, name, None) is not None]
    if given:
        raise ValueError(f"layer must have no {', '.join(given)} here, which float32 and dynamic int8 layers compute, "
                         f"on the CPU; {way_out}")
