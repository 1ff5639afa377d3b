"""How large an attention layer is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeattn.types import LayerSizes as _LayerSizes
else:
    _LayerSizes = object  # edgeattn.types is of type checkers alone


class Sizes(_LayerSizes):
    """What every attention layer says of itself, whatever its numbers are."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, output_dim={self.output_dim})"
        )
