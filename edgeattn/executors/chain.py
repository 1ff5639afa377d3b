"""The stages of an encoder for rows of one shape, one after the other, with the arrays between them kept.

A small encoder's call takes as long in Python as in kernels, where every stage finds its plan, makes an array and
writes addresses. Here all that is done once, for sequences that have come before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from edgeattn import threads
from edgeattn.kernels.cpu.call import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from edgeattn.ops import Sequences
    from edgeattn.types import Float32s, Shape

MOST = 1 << 18  # bytes of an array between stages, which stay in a processor's second-level cache
MOST_LAYERS = 80  # of all chains that an encoder keeps: some 5 KiB each
_APART = 80  # elements between two of them, which must not lie whole pages apart
KEPT = 8  # memories of calls that are kept for others


class _Memory:
    """What a call's arrays lie in, of any chain, one at a time; and what is bound to it, as long as its chain lives."""

    __slots__ = "array", "frames"

    def __init__(self) -> None:
        self.array = threads.aligned(3 * (MOST // 4 + _APART), np.float32)
        self.frames: WeakKeyDictionary[Chain, _Frame] = WeakKeyDictionary()


_free: list[_Memory] = []


class Chain:
    """The calls that an encoder is for rows of one shape and masks that are known, one after the other.

    Any number of threads may call it: each takes memory of its own, which the chains share.

    Parameters
    ----------
    stages : list of (stage, Sequences)
    norm : LayerNorm, RMSNorm or None
        After the last.
    """

    def __init__(self, stages: list[tuple[Any, Sequences]], norm: Any):
        self._stages, self._norm = stages, norm

    def __call__(self, x: Float32s) -> Float32s:
        """x (..., E) float32 in C order -> the same shape."""
        try:
            memory = _free.pop()
        except IndexError:
            memory = _Memory()
        try:
            frame = memory.frames.get(self)
            if frame is None:
                frame = memory.frames[self] = _Frame(memory.array, x.shape, self._stages, self._norm)
            np.copyto(frame.x, x)
            for step in frame.steps:
                step()
            result: Float32s = frame.x.copy()
        finally:
            if len(_free) < KEPT:
                _free.append(memory)
        return result


class _Frame:
    """What is in some memory: the rows, which every step changes in place, and arrays that steps write between."""

    __slots__ = "memory", "steps", "x"

    def __init__(self, memory: Float32s, shape: Shape, stages: list[tuple[Any, Sequences]], norm: Any):
        size = math.prod(shape)
        self.memory, apart = memory, size + _APART - size % 16
        self.x, *between = (memory[at:at + size].reshape(shape) for at in (0, apart, 2 * apart))
        steps = [step for stage, sequences in stages for step in stage.on(self.x, *between, sequences)]
        if norm is not None:
            steps.append(norm.kernel.on(self.x, None, self.x))
        self.steps: list[Callable[[], object]] = in_turn(steps)


def chain_of(encoder: Any, x: Float32s, sequences: list[Sequences]) -> Chain | None:
    """The `Chain` for what is shaped as x; None where stages are called one by one."""
    if x.nbytes > MOST or any(layer.stages is None for layer in encoder.layers):
        return None
    stages = [(stage, seen) for layer, seen in zip(encoder.layers, sequences, strict=True) for stage in layer.stages]
    between = np.empty_like(x), np.empty_like(x)
    if any(not hasattr(stage, "on") or stage.on(x, *between, seen) is None for stage, seen in stages):
        return None
    return Chain(stages, encoder.norm)
