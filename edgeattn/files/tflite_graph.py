"""A .tflite graph as its readers look at it: operators, tensors and scales, checked, and where elements go."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from edgeattn.files.tflite_constants import folded, laid_out
from edgeattn.files.tflite_shapes import shape_of
from edgeattn.quantized.parameters import LARGEST_SCALE, LARGEST_SCORE_SCALE, SMALLEST_SCALE, TensorQuantization
from edgeattn.tflite_schema import Graph, Operator, Tensor

# Where elements are followed, and what happens to scores: converters write four operators in a row at most.
LONGEST_CHAIN = 16
_LARGEST_MULTIPLIER = 256.0
_MOVES = ("RESHAPE", "TRANSPOSE")
_SHAPED = ("SQUEEZE", "EXPAND_DIMS")
_CUTS = ("SLICE", "SPLIT", "STRIDED_SLICE", "GATHER", "BROADCAST_TO")  # what may leave elements out, or have them twice


class CheckedGraph:
    """A graph whose parts are looked at with checks. ``used`` collects the operators that were recognised."""

    alone = True  # whether all of the graph must be one attention block

    def __init__(self, graph: Graph, name: str, most_elements: int):
        self.graph = graph
        self.name = name
        self.most_elements = most_elements
        self.outputs = set(graph.outputs)
        self.used: set[int] = set()
        self.told: list[str] = []
        self.mask_inputs: set[int] = set()  # of the graph, from which masks are computed
        self.producers: dict[int, int] = {}
        self.consumers: dict[int, list[int]] = {}
        self.folds: dict[int, Operator] = {}  # what made constants that the file does not hold
        self.left_to_fold = most_elements  # elements of constants that may yet be computed
        written = set(graph.inputs)
        measured: list[int] = []  # tensors of which a folded SHAPE took the shape
        for number, operator in enumerate(graph.operators):
            if self.fold(operator):
                self.used.add(number)
                measured += operator.inputs if operator.name == "SHAPE" else ()
                continue
            for tensor in operator.inputs:
                if tensor >= 0 and not (tensor in written or self.is_constant(tensor)):
                    if graph.tensors[tensor].dtype is None:
                        raise self.error(f"{operator.name} reads {graph.tensors[tensor].name!r}, of a type that is not "
                                         "read: weights may have 4 or 8 bits, or be float16 or float32")
                    raise self.error(
                        f"{operator.name} reads tensor {graph.tensors[tensor].name!r} before it is computed"
                    )
                self.consumers.setdefault(tensor, []).append(number)
            for tensor in operator.outputs:
                if tensor in written or self.is_constant(tensor):
                    raise self.error(f"tensor {graph.tensors[tensor].name!r} is written twice")
                written.add(tensor)
                self.producers[tensor] = number
            self.close(operator)
        self.drop(measured)

    def drop(self, measured: list[int]) -> None:
        """Leave out what was computed for its shape alone."""
        left = {tensor: len(readers) for tensor, readers in self.consumers.items()}
        gone: set[int] = set()
        while measured:
            number = self.producers.get(tensor := measured.pop())
            if number is None or tensor in self.outputs or left.get(tensor) or len(
                    self.graph.operators[number].outputs) > 1:
                continue
            gone.add(number)
            del self.producers[tensor]
            for each in self.graph.operators[number].inputs:
                left[each] -= 1
                measured.append(each)
        if gone:
            self.used |= gone
            self.consumers = {tensor: [reader for reader in readers if reader not in gone]
                              for tensor, readers in self.consumers.items()}

    def error(self, message: str) -> ValueError:
        """The error to raise, with the name of the file."""
        return ValueError(f"{self.name}: {message}")

    def fold(self, operator: Operator) -> bool:
        """Whether an operator has constants only, and what it gives became one: masks and shapes that are left so."""
        tensors = self.graph.tensors
        if len(operator.outputs) != 1 or not operator.inputs or min(operator.inputs) < 0:
            return False
        inputs, output = [tensors[number] for number in operator.inputs], tensors[operator.outputs[0]]
        if output.data is not None or operator.name != "SHAPE" and any(each.data is None for each in inputs):
            return False
        shape = shape_of(operator, inputs)
        if output.is_open and shape is not None:
            output = dataclasses.replace(output, shape=shape, is_open=False)
        if output.is_open or shape not in (None, output.shape):
            return False
        if operator.name not in ("RESHAPE", "SHAPE"):  # which compute nothing
            self.left_to_fold -= 1 + max(math.prod(each.shape) for each in (*inputs, output))
        if self.left_to_fold < 0 or (data := folded(operator, inputs, output)) is None:
            return False
        tensors[operator.outputs[0]] = dataclasses.replace(output, data=data)
        self.folds[operator.outputs[0]] = operator
        return True

    def close(self, operator: Operator) -> None:
        """Give what an operator makes the shape that its inputs' shapes make it, where the file leaves it open."""
        tensors = self.graph.tensors
        if len(operator.outputs) == 1 and tensors[operator.outputs[0]].is_open:
            shape = shape_of(operator, [tensors[number] for number in operator.inputs if number >= 0])
            if shape is not None:
                tensors[operator.outputs[0]] = dataclasses.replace(tensors[operator.outputs[0]], shape=shape)

    # -- access to the graph, checked

    def is_constant(self, tensor: int) -> bool:
        """Whether the file holds what is in a tensor."""
        return self.graph.tensors[tensor].data is not None

    def tensor(self, number: int) -> Tensor:
        """The tensor of a number."""
        return self.graph.tensors[number]

    def operands(self, operator: Operator, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """The input tensors of an operator that must have one of ``inputs`` many, and one output."""
        if len(operator.inputs) not in inputs or len(operator.outputs) != 1:
            raise self.error(
                f"{operator.name} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs; "
                f"expected {' or '.join(map(str, inputs))} and 1"
            )
        if min(operator.inputs[:2]) < 0:
            raise self.error(f"{operator.name} lacks an input")
        return operator.inputs

    def producer(self, tensor: int, names: tuple[str, ...]) -> int | None:
        """The number of the operator that computes ``tensor``, when it is one of ``names``."""
        number = self.producers.get(tensor)
        return number if number is not None and self.graph.operators[number].name in names else None

    def use(self, tensor: int, expected: str, role: str, way_out: str = "") -> Operator:
        """The operator that computes ``tensor``, which must be an ``expected``; ``way_out`` is told behind another."""
        number = self.producers.get(tensor)
        found = "a graph input or constant" if number is None else self.graph.operators[number].name
        if found != expected:
            if number is not None and any(each.is_open for each in self.graph.tensors) and found in ("ADD", "RESHAPE"):
                way_out = (": shapes are open in this file, so biases stand apart: convert with a fixed batch size (of "
                           "Keras, Input(batch_size=1))")
            raise self.error(
                f"expected {expected} to compute {role}, tensor {self.tensor(tensor).name!r}; found {found}{way_out}"
            )
        self.used.add(number)
        return self.graph.operators[number]

    def next_operator(self, tensor: int) -> tuple[int, Operator] | None:
        """The one operator that reads ``tensor``, or None where it only leaves the graph."""
        readers = self.consumers.get(tensor, [])
        if len(readers) + (tensor in self.outputs) != 1 and not (len(readers) == 1 and not self.alone):
            raise self.error(
                f"expected one reader of tensor {self.tensor(tensor).name!r}; found {len(readers)}"
                + (" and the graph's output" if tensor in self.outputs else "")
            )
        return (readers[0], self.graph.operators[readers[0]]) if readers else None

    def quantization(self, number: int, role: str, largest: float = LARGEST_SCALE) -> TensorQuantization:
        """The per-tensor int8 quantization of a tensor."""
        tensor = self.tensor(number)
        if tensor.dtype != np.int8:
            found = "an unsupported type" if tensor.dtype is None else str(tensor.dtype)
            way_out = "" if tensor.dtype != np.int16 else (
                ": activations of 16 bits have no layer; quantize to 8, or read the float file that this was made of")
            raise self.error(f"expected {role}, tensor {tensor.name!r}, to be int8; found {found}{way_out}")
        if tensor.scale is None:
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to have a scale and zero point; found none"
            )
        if tensor.scale.size != 1:
            raise self.error(
                f"expected one scale for {role}, tensor {tensor.name!r}; found {tensor.scale.size}"
            )
        self.check_scales(tensor, role, largest)
        try:
            return TensorQuantization(tensor.scale[0], tensor.zero_point[0])
        except ValueError as error:
            raise self.error(f"{role}, tensor {tensor.name!r}: {error}") from None

    def check_scales(self, tensor: Tensor, role: str, largest: float = LARGEST_SCALE) -> None:
        """Refuse scales that neither float32 nor a multiplier can hold."""
        wrong = tensor.scale[~((tensor.scale >= SMALLEST_SCALE) & (tensor.scale <= largest))]
        if wrong.size:
            raise self.error(
                f"expected a scale between {SMALLEST_SCALE:.0e} and {largest:.0e} for {role}, tensor {tensor.name!r};"
                f" found {wrong[0]}"
            )

    def of_scores(self, number: int, role: str) -> TensorQuantization:
        """As `quantization`, of scores or what is done to them: a mask, float32's lowest number, may lie in it."""
        return self.quantization(number, role, LARGEST_SCORE_SCALE)

    def check_multiplier(self, largest: float, what: str) -> None:
        """Refuse input scales too large beside the output scale."""
        if not largest < _LARGEST_MULTIPLIER:
            raise self.error(
                f"expected input scales over output scale below {_LARGEST_MULTIPLIER:.0f} in {what}; "
                f"found {largest:.3g}"
            )

    def constant(self, number: int, dtype, role: str) -> np.ndarray:
        """What is in a tensor that must be a constant of this dtype."""
        tensor = self.tensor(number)
        if tensor.data is None or tensor.dtype != dtype:
            found = "a tensor computed at run time" if tensor.data is None else str(tensor.dtype)
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to be a constant of {np.dtype(dtype)}; found"
                f" {found}"
            )
        return tensor.data

    def no_activation(self, operator: Operator) -> None:
        """Refuse an activation that is fused into the operator."""
        if operator.options.get("fused_activation_function", 0) != 0:
            raise self.error(f"{operator.name} has a fused activation function "
                             f"({operator.options['fused_activation_function']}); expected none")

    # -- where elements go

    def size(self, number: int) -> int:
        """How many elements a tensor has, of those that are followed."""
        tensor = self.tensor(number)
        size = math.prod(tensor.shape)
        if not 1 <= size <= self.most_elements:
            raise self.error(f"tensor {tensor.name!r} of shape {tensor.shape} has {size} elements; "
                             f"expected 1 to {self.most_elements} in a file of this size")
        return size

    def moved(self, operator: Operator, elements: np.ndarray, given: int | None = None) -> np.ndarray:
        """``elements``, laid out as an operator lays out its input; given: which output of a SPLIT is meant."""
        name = operator.name
        if name == "MUL":
            return elements
        given = operator.outputs[0] if given is None and len(operator.outputs) == 1 else given
        if given not in operator.outputs or len(operator.inputs) < 1 + (name not in ("RESHAPE", "SQUEEZE")):
            raise self.error(f"{name} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs")
        first = operator.inputs[name == "SPLIT"]
        source, output = self.tensor(first), self.tensor(given)
        role = f"a tensor that {name} moves"
        if self.of_scores(first, role) != self.of_scores(given, role):
            raise self.error(f"{name} changes the quantization of {source.name!r}; expected it kept")
        constants = [number for number in operator.inputs if number != first]
        for number in constants:
            self.constant(number, np.int32, f"a number of {name}")
        if name != "SPLIT" and math.prod(output.shape) > self.most_elements:
            self.size(given)
        shape = shape_of(operator, [Tensor("", elements.shape, elements.dtype), *map(self.tensor, constants)])
        if name != "SPLIT" and shape not in (None, output.shape):
            raise self.error(f"{name} gives {output.name!r} shape {output.shape}; expected {shape}")
        try:
            found = (self.part(operator, elements, given) if name == "SPLIT"
                     else laid_out(operator, elements, [self.tensor(number) for number in constants]))
        except (ValueError, TypeError, IndexError, KeyError):
            numbers = [self.tensor(number).data.ravel()[:8].tolist() for number in constants]
            raise self.error(f"{name} of {source.name!r}, shape {elements.shape}, to {output.name!r}, shape "
                             f"{output.shape}, by {numbers}: expected these to agree") from None
        if found.shape != output.shape:
            raise self.error(f"{name} gives {output.name!r} shape {output.shape}; expected {found.shape}")
        return found

    def part(self, operator: Operator, elements: np.ndarray, given: int) -> np.ndarray:
        """The elements that an output of a SPLIT has."""
        (axis,), parts = self.tensor(operator.inputs[0]).data.ravel().tolist(), len(operator.outputs)
        return np.split(elements, parts, axis)[operator.outputs.index(given)]

    def back(self, tensor: int, *, scaled: bool = False) -> tuple[int, np.ndarray, list[Operator]]:
        """Undo RESHAPE, TRANSPOSE, SLICE and SPLIT, with ``scaled`` also MUL by a constant.

        Returns the tensor they begin with, for each element of ``tensor`` its flat index there, and the MUL operators
        in the order they run.
        """
        path, scaling = [], []
        names = (*_MOVES, *_SHAPED, *_CUTS, *(["MUL"] if scaled else []))
        while (number := self.producer(tensor, names)) is not None:
            operator = self.graph.operators[number]
            path.append((number, tensor))
            self.check_chain(path, names)
            if operator.name == "MUL":
                scaling.append(operator)
                tensor = self.scaled(operator)[0]
            else:
                inputs = operator.inputs
                tensor = inputs[1 if operator.name == "SPLIT" and len(inputs) > 1 else 0] if inputs else -1
            if tensor < 0:
                raise self.error(f"{operator.name} lacks an input")
        elements = np.arange(self.size(tensor), dtype=np.int32).reshape(self.tensor(tensor).shape)
        for number, given in reversed(path):
            self.used.add(number)
            elements = self.moved(self.graph.operators[number], elements, given)
        return tensor, elements, scaling[::-1]

    def scaled(self, operator: Operator) -> tuple[int, int, TensorQuantization]:
        """The tensor that a MUL scales, and the number it scales by: its code, and what that stands for."""
        inputs = self.operands(operator, (2,))
        self.no_activation(operator)
        changing = [number for number in inputs if not self.is_constant(number)]
        constants = [number for number in inputs if self.is_constant(number)]
        if len(changing) != 1:
            raise self.error("expected MUL of queries, keys or values by one number; found two computed tensors")
        role = "the number that MUL scales by"
        codes, quantization = self.constant(constants[0], np.int8, role), self.quantization(constants[0], role)
        source, output = self.tensor(changing[0]), self.tensor(operator.outputs[0])
        if codes.size != 1 or source.shape != output.shape:
            raise self.error(f"expected MUL of {source.name!r} by one number; found {codes.size} numbers: read the "
                             "float file that this was made of, and quant.quantize it")
        return changing[0], int(codes.flat[0]), quantization

    def forward(self, tensor: int) -> tuple[int, np.ndarray, Operator | None]:
        """Follow RESHAPE and TRANSPOSE.

        Returns the tensor they end with, the flat index of its elements in ``tensor``, and its reader.
        """
        elements = np.arange(self.size(tensor), dtype=np.int32).reshape(self.tensor(tensor).shape)
        path = []
        while (found := self.next_operator(tensor)) is not None and found[1].name in (*_MOVES, *_SHAPED):
            path.append(found[0])
            self.check_chain(path, _MOVES)
            elements = self.moved(found[1], elements)
            self.used.add(found[0])
            tensor = found[1].outputs[0]
        return tensor, elements, None if found is None else found[1]

    def tokens_first(self, shape: tuple[int, ...] | None, sequences: int, length: int) -> list[str]:
        """What is to be told of rows of ``shape``, those of so many sequences."""
        if shape is None or len(shape) != 3 or shape[:2] != (length, sequences) or length == sequences:
            return []
        return [f"{self.name}: rows have the shape (tokens, batch, features) in this file, {shape}: give calls (batch, "
                "tokens, features)"]

    def check_chain(self, path: list, names: tuple[str, ...]) -> None:
        """Refuse more operators in a row than any converter writes."""
        if len(path) > LONGEST_CHAIN:
            raise self.error(f"expected at most {LONGEST_CHAIN} of {', '.join(names)} in a row; found more")
