"""The attention blocks of a .tflite graph, and the one that is asked for."""

from __future__ import annotations

import operator as index_of

import numpy as np

from edgeattn.files.tflite_graph import LONGEST_CHAIN
from edgeattn.files.tflite_scores import CheckedScores
from edgeattn.tflite_schema import Operator

_TOLD = 20  # blocks in an error


class Blocks(CheckedScores):
    """A graph in which attention is looked for."""

    def blocks(self) -> list[int]:
        """The numbers of the SOFTMAX operators, those of attention where there are any."""
        found = [number for number, operator in enumerate(self.graph.operators) if operator.name == "SOFTMAX"]
        return [number for number in found if self.weighs(self.graph.operators[number])] or found

    def is_float(self) -> bool:
        """Whether all its attention is float32."""
        return bool(blocks := self.blocks()) and all(
            len(operator.inputs) == 1 and operator.inputs[0] >= 0
            and self.tensor(operator.inputs[0]).dtype == np.float32
            for operator in (self.graph.operators[number] for number in blocks))

    def weighs(self, operator: Operator) -> bool:
        """Whether what an operator gives goes into a BATCH_MATMUL, through RESHAPE or not."""
        for _ in range(LONGEST_CHAIN):
            readers = [self.graph.operators[number] for tensor in operator.outputs
                       for number in self.consumers.get(tensor, ())]
            if any(reader.name == "BATCH_MATMUL" for reader in readers):
                return True
            readers = [reader for reader in readers if reader.name == "RESHAPE"]
            if not readers:
                return False
            operator = readers[0]
        return False

    def chosen(self, block=None) -> Operator:
        """The SOFTMAX of the block that is asked for."""
        found = self.blocks()
        names = [self.tensor(self.graph.operators[number].outputs[0]).name for number in found
                 if self.graph.operators[number].outputs]
        listed = ", ".join(f"{i}: {name!r}" for i, name in enumerate(names[:_TOLD]))
        listed += f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
        if block is None:
            if len(found) != 1:
                kinds = {operator.name for operator in self.graph.operators}
                hint = f": choose one by block=, its number or name: {listed}" if found else (
                    ", but EXP and DIV, a softmax taken apart: SOFTMAX is one of the last axis, of 2 keys or more"
                    if {"EXP", "DIV"} <= kinds else "")
                raise self.error(f"expected one attention block, so one SOFTMAX; found {len(found)}{hint}")
        elif isinstance(block, str):
            found = [number for number, name in zip(found, names, strict=False) if name == block]
            if len(found) != 1:
                raise self.error(f"block must name one of its attention blocks; got {block!r}, there are: {listed}")
        elif isinstance(block, bool) or not hasattr(block, "__index__"):
            raise TypeError(f"block must be a number or a name; got {block!r}, and {self.name} has: {listed}")
        else:
            if not 0 <= index_of.index(block) < len(found):
                raise self.error(f"block must be from 0 to {len(found) - 1}; got {block}, there are: {listed}")
            found = [found[index_of.index(block)]]
        self.alone = block is None
        softmax = self.graph.operators[found[0]]
        self.used.add(found[0])
        return softmax
