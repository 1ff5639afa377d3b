"""Rotary embeddings and position biases as ONNX nodes: constants of one length, or computed of whatever comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.position_bias import RelativePositionBias
from quant.export.head_positions import HeadPositions, added_scores, tables
from quant.export.tflite_ops import MASKED_SCORE

if TYPE_CHECKING:
    from edgeattn.rotary import RotaryEmbedding


class OnnxPositions(HeadPositions[str]):
    """What `OnnxOps` writes of positions.

    Attributes
    ----------
    numbers : float32 array or None
        What a mask adds to the scores of the attention that is about to be written.
    lengths : (int, int) or None
        L and S, where the file has them.
    feeds : dict
        The input that queries are of, and keys.
    """

    def __init__(self) -> None:
        self.numbers: Any = None
        self.lengths: tuple[int, int] | None = None
        self.feeds = {"query": "input", "key": "input"}
        self._made: dict[Any, str] = {}  # what is computed of positions, once

    def added(self, layer: Any, name: str) -> str | None:
        """What is added to the scores by the places of tokens, and by a mask of numbers."""
        bias = layer.position_bias
        if self.lengths is not None:
            numbers = added_scores(layer, self.numbers, *self.lengths)
            return None if numbers is None else self.constant(f"{name}added", np.maximum(numbers, MASKED_SCORE))
        if bias is None:
            return None
        if not isinstance(bias, RelativePositionBias):
            raise ValueError("layer must have no position_bias of fixed lengths where the file takes any: give "
                             "sequence_length")
        furthest = bias.max_distance  # from which on all distances have one number
        table = self.constant(f"{name}distances", bias.rows(furthest, 1, 2 * furthest + 1)[:, 0])
        return self.node("Gather", [table, self._distances(furthest)], f"{name}added", axis=1)

    def _positions(self, part: str) -> str:
        """(length,), from 0 on."""
        feed = self.feeds[part]
        if feed not in self._made:
            length = self.node("Shape", [feed], f"{feed}/length", start=1, end=2)
            first, step = (self.constant(f"positions/{what}", np.array(number)) for what, number in (
                ("first", 0), ("step", 1)))
            axes = self.constant("positions/axes", np.array([0]))
            scalar = self.node("Squeeze", [length, axes], f"{feed}/tokens")
            self._made[feed] = self.node("Range", [first, scalar, step], f"{feed}/positions")
        return self._made[feed]

    def _distances(self, furthest: int) -> str:
        """(L, S): how far each key stands behind each query, from -furthest on, counted from 0."""
        feeds = *self.feeds.values(), furthest
        if feeds not in self._made:
            name = f"distances/{furthest}"
            rows = self.node("Unsqueeze", [self._positions("query"), self.constant("distances/axes", np.array([1]))],
                             f"{name}/queries")
            apart = self.node("Sub", [self._positions("key"), rows], f"{name}/apart")
            low, high = (self.constant(f"{name}/{what}", np.array(number)) for what, number in (
                ("low", -furthest), ("high", furthest)))
            self._made[feeds] = self.node("Add", [self.node("Clip", [apart, low, high], f"{name}/clipped"), high], name)
        return self._made[feeds]

    def angles(self, rotary: RotaryEmbedding, part: str, name: str) -> tuple[str, str]:
        """Cosines and sines: constants, or of any length computed in float64 as `rotary_cache` does."""
        if self.lengths is not None:
            cos, sin = tables(rotary, self.lengths[part == "key"])
            return self.constant(f"{name}/cos", cos), self.constant(f"{name}/sin", sin)
        size = rotary.rotary_embedding_dim
        key = self.feeds[part], size, rotary.base, rotary.offset
        if (*key, "Cos") not in self._made:
            kinds = self.onnx.TensorProto
            places = self.node("Cast", [self._positions(part)], f"{name}/positions", to=kinds.DOUBLE)
            offset, axes, frequencies = (self.constant(f"{name}/{what}", np.array(values)) for what, values in (
                ("offset", float(rotary.offset)), ("axes", [1]), ("frequencies", rotary.base ** (
                    -np.arange(0, size, 2) / size))))
            rows = self.node("Unsqueeze", [self.node("Add", [places, offset], f"{name}/places"), axes], f"{name}/rows")
            angles = self.node("Mul", [rows, frequencies], f"{name}/angles")
            for kind in ("Cos", "Sin"):
                self._made[(*key, kind)] = self.node(
                    "Cast", [self.node(kind, [angles], f"{name}/{kind}")], f"{name}/{kind.lower()}", to=kinds.FLOAT)
        return self._made[(*key, "Cos")], self._made[(*key, "Sin")]

    def pair(self, x: str, rotary: RotaryEmbedding, name: str) -> tuple[str, str]:
        """What is turned together, features beside each other or halves."""
        size, step = rotary.rotary_embedding_dim, 2 if rotary.interleaved else 1
        first = 1 if rotary.interleaved else size // 2
        return (self.part(x, 0, size if step == 2 else first, f"{name}/first", step),
                self.part(x, first, size - first, f"{name}/second", step))

    if TYPE_CHECKING:  # what else it has

        onnx: Any

        def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str: ...  # noqa: D102
        def constant(self, name: str, values: Any) -> str: ...  # noqa: D102
        def part(self, x: str, first: int, size: int, name: str, step: int = 1) -> str: ...  # noqa: D102
