"""The stages of an encoder for rows of one shape, one after the other, with the arrays between them kept.

A small encoder's call takes as long in Python as in kernels, where every stage finds its plan, makes an array and
writes addresses. Here all that is done once, for sequences that have come before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s

MOST = 1 << 16  # bytes of an array between stages: where they are larger, kernels take the time


class Chain:
    """The calls that an encoder is for rows of one shape and masks that are known, one after the other.

    Any number of threads may call it: each has arrays of its own.

    Parameters
    ----------
    stages : list of (stage, Sequences)
    norm : LayerNorm, RMSNorm or None
        After the last.
    """

    def __init__(self, stages: list[tuple[Any, Sequences]], norm: Any):
        self._stages, self._norm = stages, norm
        self._frames: list[_Frame] = []

    def __call__(self, x: Float32s) -> Float32s:
        """x (..., E) float32 in C order -> the same shape."""
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(x, self._stages, self._norm)
        np.copyto(frame.x, x)
        for step in frame.steps:
            step()
        result: Float32s = frame.x.copy() if frame.last is None else frame.last(frame.x)
        self._frames.append(frame)
        return result


class _Frame:
    """What one call at a time has: the rows, which every step changes in place, and arrays that steps write between."""

    __slots__ = "between", "last", "steps", "x"

    def __init__(self, x: Float32s, stages: list[tuple[Any, Sequences]], norm: Any):
        self.x, self.between = np.empty_like(x), (np.empty_like(x), np.empty_like(x))
        self.steps: list[Callable[[], object]] = [
            step for stage, sequences in stages for step in stage.on(self.x, *self.between, sequences)]
        self.last = None
        if norm is not None and norm.kernel is not None:
            self.steps.append(norm.kernel.on(self.x, None, self.x))
        elif norm is not None:
            self.last = norm.rows


def chain_of(encoder: Any, x: Float32s, sequences: list[Sequences]) -> Chain | None:
    """The `Chain` for what is shaped as x; None where stages are called one by one."""
    if x.nbytes > MOST or any(layer.stages is None for layer in encoder.layers):
        return None
    stages = [(stage, seen) for layer, seen in zip(encoder.layers, sequences, strict=True) for stage in layer.stages]
    between = np.empty_like(x), np.empty_like(x)
    if any(not hasattr(stage, "on") or stage.on(x, *between, seen) is None for stage, seen in stages):
        return None
    return Chain(stages, encoder.norm)
