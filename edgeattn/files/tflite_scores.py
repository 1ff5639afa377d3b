"""What a .tflite file does to the scores of attention between the product and the softmax: constants, and masks."""

from __future__ import annotations

import math

import numpy as np

from edgeattn.files.tflite_graph import LONGEST_CHAIN, CheckedGraph
from edgeattn.quantized import AddMask, MulConstant, Requantize, SelectMask
from edgeattn.tflite_schema import Operator

_SCORE_OPS = ("MUL", "ADD", "SELECT_V2", "QUANTIZE")
_LARGEST_RATIO = 256.0  # of scales
_WIDEST_STEP = math.log(256)  # of scores: from there on the lower of two has no probability of 1/256


class CheckedScores(CheckedGraph):
    """A graph in which scores are followed from the softmax back to the product."""

    def score_ops(self, tensor: int) -> tuple[int, list[tuple[Operator, int, int]]]:
        """Walk from the softmax back to the product.

        Returns its tensor, and the operators on the way in the order they run, each with the tensor it
        changes and the position of that among its inputs.
        """
        found = []
        reshaped = []
        while (number := self.producer(tensor, (*_SCORE_OPS, "RESHAPE"))) is not None:
            operator = self.graph.operators[number]
            if operator.name == "RESHAPE":  # keeps the order of elements; shapes are looked at where they are used
                self.used.add(number)
                reshaped.append(number)
                self.check_chain(reshaped, ("RESHAPE",))
                source = self.operands(operator, (1, 2))[0]
                self.moved(operator, np.arange(self.size(source), dtype=np.int32).reshape(self.tensor(source).shape))
                tensor = source
                self.next_operator(tensor)
                continue
            self.no_activation(operator)
            inputs = self.operands(operator, {"SELECT_V2": (3,), "QUANTIZE": (1,)}.get(operator.name, (2,)))
            changing = [i for i, number in enumerate(inputs) if number < 0 or not self.is_constant(number)]
            scores = [i for i in changing if inputs[i] >= 0 and self.is_scores(inputs[i])]
            masks = [i for i in changing if i not in scores]
            if len(scores) != 1 or operator.name == "SELECT_V2" and scores == [0] or masks and (
                    operator.name == "MUL" or operator.name == "SELECT_V2" and masks != [0]):
                raise self.error(
                    f"expected {operator.name} between scores and softmax to have the scores and constants as"
                    f" inputs; found {len(changing)} inputs that are computed"
                )
            changing = scores
            for i in masks:
                self.leave_mask(inputs[i])
            self.used.add(self.producers[tensor])
            tensor = inputs[changing[0]]
            self.next_operator(tensor)  # or the scores would be wanted elsewhere too
            found.append((operator, tensor, changing[0]))
            self.check_chain(found, _SCORE_OPS)
        return tensor, found[::-1]

    def is_scores(self, tensor: int) -> bool:
        """Whether a tensor is made of a product of queries and keys by operators that scores go through."""
        todo = [tensor]
        for _ in range(4 * LONGEST_CHAIN):
            number = self.producers.get(todo.pop()) if todo else None
            operator = None if number is None else self.graph.operators[number]
            if operator is not None and operator.name in ("BATCH_MATMUL", "FULLY_CONNECTED"):
                return True
            if operator is not None and operator.name in (*_SCORE_OPS, "RESHAPE", "TANH", "TRANSPOSE"):
                todo += [each for each in operator.inputs if each >= 0]
            if not todo:
                return False
        return False

    def leave_mask(self, tensor: int) -> None:
        """Leave out a mask that is computed of the graph's inputs at run time, and tell it."""
        todo, seen = [tensor], set()
        inputs: set[int] = set()
        while todo:
            each = todo.pop()
            number = self.producers.get(each)
            if each < 0 or each in seen or self.is_constant(each):
                continue
            seen.add(each)
            if number is None:
                inputs.add(each)
                continue
            operator = self.graph.operators[number]
            if operator.name in ("BATCH_MATMUL", "FULLY_CONNECTED", "SOFTMAX"):
                raise self.error(f"expected masks of scores to be computed of inputs; {self.tensor(tensor).name!r} is "
                                 f"of what {operator.name} gives, {self.tensor(each).name!r}")
            self.used.add(number)
            todo += operator.inputs
        if not inputs:
            number = self.producers[tensor]
            raise self.error(f"expected a mask that is constant or computed of inputs; {self.tensor(tensor).name!r} is "
                             f"computed of constants at run time, by {self.graph.operators[number].name} upon codes: "
                             "keep the mask in the model as a buffer of its final values")
        self.mask_inputs |= inputs
        self.told.append(f"{self.name}: the scores are masked by {self.tensor(tensor).name!r}, which is computed of an "
                         "input: it is not part of this layer. Pass the mask to each call, where masked keys have no "
                         "weight at all; bytes are the runtime's where nothing is masked")

    def keeps_all(self, tensor: int) -> bool:
        """Whether a mask is chosen, by a SELECT_V2 whose condition is one and the same, for all keys alike."""
        operator = self.folds.get(tensor)
        while operator is not None and operator.name == "RESHAPE":
            operator = self.folds.get(operator.inputs[0])
        condition = None if operator is None or operator.name != "SELECT_V2" else self.tensor(operator.inputs[0]).data
        return condition is not None and condition.size > 0 and (condition == condition.flat[0]).all()

    def check_steps(self, tensor: int) -> None:
        """Tell where a mask took the range of the scores: two that are a step apart share nothing."""
        scale = float(self.of_scores(tensor, "the input of SOFTMAX").scale)
        if scale > _WIDEST_STEP:
            self.told.append(
                f"{self.name}: the scores, {self.tensor(tensor).name!r}, are {scale:.3g} from code to code, so that "
                "most are one code, and keys weigh the same or nothing: a mask of large numbers is in their range. "
                "Bytes are the runtime's; for a file that attends convert without the mask and pass it to each call, "
                "or quantize the float layer with quant.quantize")

    def score_op(self, operator: Operator, tensor: int, position: int, scores: tuple[int, int, int, int]):
        """A MUL, ADD or SELECT_V2 as a layer holds it."""
        self.check_shape(operator.outputs[0], scores, f"the result of {operator.name}")
        before = self.of_scores(tensor, f"the scores that {operator.name} takes")
        after = self.of_scores(operator.outputs[0], f"the result of {operator.name}")
        if operator.name == "QUANTIZE":
            self.check_multiplier(float(before.scale) / float(after.scale), "QUANTIZE of the scores")
            return Requantize(after)
        if operator.name == "SELECT_V2" and not self.is_constant(operator.inputs[0]):  # as where all is kept
            return SelectMask(np.ones((1, 1, 1, 1), np.bool_))
        if operator.name == "SELECT_V2":
            keep = self.constant(operator.inputs[0], np.bool_, "the condition of SELECT_V2")
            filling = operator.inputs[3 - position]
            fill = self.constant(filling, np.int8, "the masked score of SELECT_V2")
            if before != after or self.of_scores(filling, "the masked score of SELECT_V2") != after:
                raise self.error(
                    "expected SELECT_V2 to keep the scores' quantization; found another in its output or fill"
                )
            if fill.size == 0 or (fill != fill.flat[0]).any():
                raise self.error("expected SELECT_V2 to give all masked scores one code; found several")
            # The bytes of a damaged file may be neither 0 nor 1.
            keep = keep.view(np.uint8) != 0
            return SelectMask(self.mask(keep if position == 1 else ~keep, tensor, scores), int(fill.flat[0]))
        other = operator.inputs[1 - position]
        if operator.name == "ADD" and not self.is_constant(other):  # as where it adds 0
            mask = self.of_scores(other, "the mask of ADD")
            self.check_multiplier(float(max(before.scale, mask.scale)) / float(after.scale), "ADD of the mask")
            return AddMask(np.full((1, 1, 1, 1), mask.zero_point, np.int8), mask, after)
        codes = self.constant(other, np.int8, f"the constant of {operator.name}")
        quantization = self.of_scores(other, f"the constant of {operator.name}")
        if operator.name == "ADD":
            if float(max(before.scale, quantization.scale)) >= _LARGEST_RATIO * float(after.scale):
                ratio = float(max(before.scale, quantization.scale)) / float(after.scale)
                raise self.error(f"ADD of the mask {self.tensor(other).name!r} has input scales over output scale of "
                                 f"{ratio:.3g}, on which runtimes end the process: the mask holds minus infinity, or "
                                 "numbers as large. Convert without the mask and pass it to each call, or write it by "
                                 "masked_fill or where, or read the float file and quant.quantize it")
            if codes.size > 1 and not self.keeps_all(other) and (
                    np.ptp(codes.astype(np.int32)) * float(quantization.scale) < float(after.scale)):
                self.told.append(f"{self.name}: what ADD adds to the scores, {self.tensor(other).name!r}, changes none "
                                 "by a step: a mask of minus infinity that its converter had no code for. Convert "
                                 "without the mask, and pass it to each call")
            return AddMask(self.mask(codes, tensor, scores).astype(np.int8), quantization, after)
        if codes.size != 1:
            raise self.error(
                f"expected MUL of the scores by one number; found a constant of shape {codes.shape}"
            )
        self.check_multiplier(
            float(before.scale) * float(quantization.scale) / float(after.scale), "MUL of the scores"
        )
        return MulConstant(int(codes.flat[0]), quantization, after)

    def mask(self, values: np.ndarray, tensor: int, scores: tuple[int, int, int, int]) -> np.ndarray:
        """A mask that broadcasts to a tensor of the graph, as one that broadcasts to (B, H, L, S)."""
        shape = self.tensor(tensor).shape
        B, H, L, S = scores
        while values.ndim > len(shape) and values.shape[0] == 1:
            values = values[0]
        try:
            fits = np.broadcast_shapes(values.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise self.error(
                f"expected a mask that broadcasts to the scores {shape}; found shape {values.shape}"
            )
        values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        if shape == scores:
            return values
        leading = math.prod(values.shape[:-2])
        if leading == 1:
            return values.reshape(1, 1, *values.shape[-2:])
        if leading != B * H:
            size = B * H * math.prod(values.shape[-2:])
            if size > self.most_elements:
                raise self.error(f"expected a mask of at most {self.most_elements} elements, (B, H, L, S) apart; found "
                                 f"{size}")
            values = np.broadcast_to(values, (*shape[:-2], *values.shape[-2:]))
        return values.reshape(B, H, *values.shape[-2:])

    def check_shape(self, number: int, shape: tuple[int, ...], role: str) -> None:
        """A product's tensor must have ``shape``, its leading axes merged in any way."""
        tensor = self.tensor(number)
        if tensor.shape[-2:] != shape[-2:] or math.prod(tensor.shape) != math.prod(shape):
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to be (B, H, rows, columns) = {shape}, "
                f"B and H together or apart; found {tensor.shape}"
            )
