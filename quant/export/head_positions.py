"""What a file does to queries and keys before their product, and to scores behind it, for the place of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from edgeattn.layers.norm import LayerNorm
from edgeattn.rotary import rotary_cache

if TYPE_CHECKING:
    from edgeattn.rotary import RotaryEmbedding

T = TypeVar("T")


class HeadPositions(Generic[T]):
    """Norms of heads and rotary embeddings, of an executor that writes a file.

    Neighbours and halves turned alike are the same embedding in another order of features, in which queries and keys
    have the same products; so `pair` may take features from wherever they stand.
    """

    def placed(self, q: T, k: T, layer: Any, name: str) -> tuple[T, T]:
        """Queries and keys, split into heads, as their products take them: normed, then turned."""
        turned: list[T] = []
        for x, norm, part in ((q, layer.q_norm, "query"), (k, layer.k_norm, "key")):
            each, full = x, f"{name}{part}"
            if norm is not None:
                norm = self.norm_of_heads(norm, layer, part)
                of = self.layer_norm if isinstance(norm, LayerNorm) else self.rms_norm
                each = of(each, norm, f"{full}/norm")
            if layer.rotary is not None:
                each = self._turned(each, layer.rotary, layer.head_dim, part, full)
            turned.append(each)
        return turned[0], turned[1]

    def _turned(self, x: T, rotary: RotaryEmbedding, head_dim: int, part: str, name: str) -> T:
        """(a cos - b sin, a sin + b cos) of pairs (a, b), and what is not turned."""
        size = rotary.rotary_embedding_dim
        (a, b), (cos, sin) = self.pair(x, rotary, name), self.angles(rotary, part, name)
        halves = [
            self.subtract(self.multiply(a, cos, f"{name}/a_cos"), self.multiply(b, sin, f"{name}/b_sin"), f"{name}/a"),
            self.add(self.multiply(a, sin, f"{name}/a_sin"), self.multiply(b, cos, f"{name}/b_cos"), f"{name}/b")]
        if size < head_dim:
            halves.append(self.part(x, size, head_dim - size, f"{name}/rest"))
        return self.joined(halves, f"{name}/turned")

    def norm_of_heads(self, norm: Any, layer: Any, part: str) -> Any:  # noqa: ARG002
        """A norm as the file has it."""
        return norm

    if TYPE_CHECKING:  # what an executor has

        def pair(self, x: T, rotary: RotaryEmbedding, name: str) -> tuple[T, T]: ...  # noqa: D102
        def angles(self, rotary: RotaryEmbedding, part: str, name: str) -> tuple[T, T]: ...  # noqa: D102
        def layer_norm(self, x: T, norm: Any, name: str) -> T: ...  # noqa: D102
        def rms_norm(self, x: T, norm: Any, name: str) -> T: ...  # noqa: D102
        def add(self, a: T, b: T, name: str) -> T: ...  # noqa: D102
        def subtract(self, a: T, b: T, name: str) -> T: ...  # noqa: D102
        def multiply(self, a: T, b: T, name: str) -> T: ...  # noqa: D102
        def part(self, x: T, first: int, size: int, name: str) -> T: ...  # noqa: D102
        def joined(self, parts: list[T], name: str) -> T: ...  # noqa: D102


def tables(rotary: RotaryEmbedding, length: int) -> list[np.ndarray]:
    """Cosines and sines of the first tokens, (length, R / 2) each."""
    pair = rotary_cache(rotary.offset + length, rotary.rotary_embedding_dim, base=rotary.base)
    return [each[rotary.offset :] for each in pair]


def added_scores(layer: Any, numbers: np.ndarray | None, queries: int, keys: int) -> np.ndarray | None:
    """What is added to the scores, of four axes: the layer's position bias, and a mask of numbers; None of none."""
    if layer.position_bias is None:
        return numbers
    bias: np.ndarray = layer.position_bias.rows(0, queries, keys)[None]
    return bias if numbers is None else bias + numbers
