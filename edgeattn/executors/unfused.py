"""Attention part by part, for executors that give each part a meaning of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from typing import Any

T = TypeVar("T")


class AttentionParts(Protocol[T]):
    """What `attend` is written in. A name is that of the result; `mask` is whatever the executor says masks with."""

    def scores(self, q: T, k: T, layer: Any, name: str) -> T:
        """q k^T, scaled: (B, H, L, D), (B, H, S, D) -> (B, H, L, S)."""
        ...

    def masked(self, scores: T, layer: Any, mask: Any, name: str) -> T:
        """The scores as the softmax takes them: after the layer's own operations on them, and the masks."""
        ...

    def softmax(self, scores: T, name: str) -> T:
        """Probabilities over the keys; zeros where a row has none."""
        ...

    def context(self, probabilities: T, v: T, name: str) -> T:
        """The weighted means: (B, H, L, S), (B, H, S, Dv) -> (B, H, L, Dv)."""
        ...


def attend(ops: AttentionParts[T], q: T, k: T, v: T, layer: Any, mask: Any, name: str) -> T:
    """softmax(q k^T) v in each head."""
    scores = ops.scores(q, k, layer, name + "scores")
    scores = ops.masked(scores, layer, mask, name + "masked_scores")
    probabilities = ops.softmax(scores, name + "probabilities")
    return ops.context(probabilities, v, name + "context")
