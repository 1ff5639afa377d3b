"""How large an attention layer is."""


class Sizes:
    """What every attention layer says of itself, whatever its numbers are."""

    num_heads: int
    num_kv_heads: int
    embed_dim: int
    kdim: int
    vdim: int
    head_dim: int
    value_dim: int
    output_dim: int

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, output_dim={self.output_dim})"
        )
