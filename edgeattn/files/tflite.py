"""Static int8 attention read from a .tflite file, ours or another converter's.

A file is accepted when its operators, all of them, are one attention block that the layer reproduces exactly.
The shapes between the projections and the products are not matched against a list of known forms: where RESHAPE,
TRANSPOSE, SLICE and SPLIT carry each element is followed, and compared with where attention needs it. Of a model with
several blocks one is read, and what stands around it is not looked at.
"""

from __future__ import annotations

import dataclasses
import math
import operator as index_of
import warnings

import numpy as np

from edgeattn.files.tflite_file import parse, read_bytes
from edgeattn.quantized import (
    INPUTS,
    PROBABILITIES,
    AddMask,
    MulConstant,
    QuantizedLinear,
    SelectMask,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Graph, Operator, Tensor

# Following elements takes four bytes for each: 64 MiB at the largest size, an activation of 4096 rows of 4096, which
# only a file with weights for so many columns may have.
_MOST_ELEMENTS = 2**24
_FEW_ELEMENTS = 2**22
# Where elements are followed, and what happens to scores: converters write four operators in a row at most.
_LONGEST_CHAIN = 16
# Beyond these, scales and their products leave what float32 and the runtimes' 31-bit multipliers can hold.
_SCALES = (2.0**-60, 2.0**60)
_LARGEST_MULTIPLIER = 256.0
_MASK_IN_THE_RANGE = ("; a mask of -3e38 in the scores' range leaves the scores no codes: convert without the "
                      "mask and pass it to each call, or quantize the float layer with quant.quantize")
_MOVES = ("RESHAPE", "TRANSPOSE")
_CUTS = ("SLICE", "SPLIT")
_TOLD = 20  # blocks in an error
_SCORE_OPS = ("MUL", "ADD", "SELECT_V2")


def read_tflite(path_or_bytes, *, arithmetic: str = "litert", block=None) -> StaticMultiHeadAttention:
    """The attention layer in a .tflite file.

    Read are blocks of int8: FULLY_CONNECTED projections with per-channel weights, apart or packed and cut by SLICE or
    SPLIT, heads split by RESHAPE and TRANSPOSE or one head, BATCH_MATMUL, any number of MUL by a constant, ADD of a
    constant mask and SELECT_V2 by a constant mask, SOFTMAX, BATCH_MATMUL, and an output projection or none; QUANTIZE
    and DEQUANTIZE at the edges. Keys and values may have a zero point, and the first product may have K transposed
    already or by adj_y. A MUL of queries, keys or values by a constant becomes a part of their projection, which rounds
    once where the file rounds twice: a warning says so.

    Parameters
    ----------
    path_or_bytes : str, os.PathLike or bytes
    arithmetic : str
        The kernel set to compute as, see ``edgeattn.arithmetic.KERNEL_SETS``; a file does not name one.
    block : int or str, optional
        Of a model with more than attention, or with several blocks: the number of one, in the order of the graph, or
        the name of the tensor that its SOFTMAX gives. Unless given the file must be one block and nothing else.

    Returns
    -------
    StaticMultiHeadAttention
        It takes any batch and length unless a mask in the file has its own. A query that the file's mask
        leaves no key gets what the file gives it.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file is damaged, not quantized to int8, or anything else than one attention block: the
        message names the file, what was expected and what was found.
    """
    data, name = read_bytes(path_or_bytes)
    most = min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data)))
    matcher = _Matcher(parse(data, name), name, most)
    layer = matcher.layer(arithmetic, block)
    for told in matcher.told:
        warnings.warn(told, stacklevel=3)
    return layer


def blocks_of(path_or_bytes) -> list[str]:
    """The names of the tensors that the SOFTMAX of each attention block gives; of a float file none."""
    data, name = read_bytes(path_or_bytes)
    matcher = _Matcher(parse(data, name), name, min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data))))
    return [matcher.tensor(matcher.graph.operators[number].outputs[0]).name for number in matcher.blocks()
            if matcher.tensor(matcher.graph.operators[number].outputs[0]).dtype == np.int8]


class _Matcher:
    """Finds attention in one graph. ``used`` collects the operators that were recognised."""

    def __init__(self, graph: Graph, name: str, most_elements: int):
        self.graph = graph
        self.name = name
        self.most_elements = most_elements
        self.outputs = set(graph.outputs)
        self.used: set[int] = set()
        self.told: list[str] = []
        self.alone = True  # whether all of the graph must be the block
        self.producers: dict[int, int] = {}
        self.consumers: dict[int, list[int]] = {}
        written = set(graph.inputs)
        for number, operator in enumerate(graph.operators):
            if self.fold(operator):
                self.used.add(number)
                continue
            for tensor in operator.inputs:
                if tensor >= 0 and not (tensor in written or self.is_constant(tensor)):
                    raise self.error(
                        f"{operator.name} reads tensor {graph.tensors[tensor].name!r} before it is computed"
                    )
                self.consumers.setdefault(tensor, []).append(number)
            for tensor in operator.outputs:
                if tensor in written or self.is_constant(tensor):
                    raise self.error(f"tensor {graph.tensors[tensor].name!r} is written twice")
                written.add(tensor)
                self.producers[tensor] = number

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.name}: {message}")

    def fold(self, operator: Operator) -> bool:
        """Whether an operator has constants only, and what it gives became one: masks that converters leave so."""
        tensors = self.graph.tensors
        counts = {"RESHAPE": (1, 2), "SELECT_V2": (3,)}.get(operator.name, ())
        if len(operator.inputs) not in counts or len(operator.outputs) != 1 or any(
                number < 0 or tensors[number].data is None for number in operator.inputs):
            return False
        output = tensors[operator.outputs[0]]
        inputs = [tensors[number] for number in operator.inputs]
        values = inputs[:1] if operator.name == "RESHAPE" else inputs[1:]
        if output.data is not None or math.prod(output.shape) > self.most_elements or any(
                each.dtype != output.dtype or not _same_codes(each, output) for each in values):
            return False
        try:
            if operator.name == "RESHAPE":
                data = values[0].data.reshape(output.shape)
            elif np.broadcast_shapes(*(each.shape for each in inputs)) != output.shape or inputs[0].dtype != np.bool_:
                return False
            else:
                data = np.where(inputs[0].data.view(np.uint8) != 0, *(each.data for each in values))
        except ValueError:
            return False
        tensors[operator.outputs[0]] = dataclasses.replace(output, data=data)
        return True

    # -- access to the graph, checked

    def is_constant(self, tensor: int) -> bool:
        return self.graph.tensors[tensor].data is not None

    def tensor(self, number: int) -> Tensor:
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

    def use(self, tensor: int, expected: str, role: str) -> Operator:
        """The operator that computes ``tensor``, which must be an ``expected``."""
        number = self.producers.get(tensor)
        found = "a graph input or constant" if number is None else self.graph.operators[number].name
        if found != expected:
            raise self.error(
                f"expected {expected} to compute {role}, tensor {self.tensor(tensor).name!r}; found {found}"
            )
        self.used.add(number)
        return self.graph.operators[number]

    def next_operator(self, tensor: int) -> tuple[int, Operator] | None:
        """The one operator that reads ``tensor``, or None where it only leaves the graph."""
        readers = self.consumers.get(tensor, [])
        if len(readers) + (tensor in self.outputs) != 1:
            raise self.error(
                f"expected one reader of tensor {self.tensor(tensor).name!r}; found {len(readers)}"
                + (" and the graph's output" if tensor in self.outputs else "")
            )
        return (readers[0], self.graph.operators[readers[0]]) if readers else None

    def quantization(self, number: int, role: str) -> TensorQuantization:
        """The per-tensor int8 quantization of a tensor."""
        tensor = self.tensor(number)
        if tensor.dtype != np.int8:
            found = "an unsupported type" if tensor.dtype is None else str(tensor.dtype)
            raise self.error(f"expected {role}, tensor {tensor.name!r}, to be int8; found {found}")
        if tensor.scale is None:
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to have a scale and zero point; found none"
            )
        if tensor.scale.size != 1:
            raise self.error(
                f"expected one scale for {role}, tensor {tensor.name!r}; found {tensor.scale.size}"
            )
        self.check_scales(tensor, role)
        try:
            return TensorQuantization(tensor.scale[0], tensor.zero_point[0])
        except ValueError as error:
            raise self.error(f"{role}, tensor {tensor.name!r}: {error}") from None

    def check_scales(self, tensor: Tensor, role: str) -> None:
        lowest, highest = _SCALES
        wrong = tensor.scale[~((tensor.scale >= lowest) & (tensor.scale <= highest))]
        if wrong.size:
            raise self.error(
                f"expected a scale between {lowest:.0e} and {highest:.0e} for {role}, tensor {tensor.name!r};"
                f" found {wrong[0]}" + (_MASK_IN_THE_RANGE if wrong.max() > highest else "")
            )

    def check_multiplier(self, largest: float, what: str) -> None:
        if not largest < _LARGEST_MULTIPLIER:
            raise self.error(
                f"expected input scales over output scale below {_LARGEST_MULTIPLIER:.0f} in {what}; "
                f"found {largest:.3g}"
            )

    def constant(self, number: int, dtype, role: str) -> np.ndarray:
        tensor = self.tensor(number)
        if tensor.data is None or tensor.dtype != dtype:
            found = "a tensor computed at run time" if tensor.data is None else str(tensor.dtype)
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to be a constant of {np.dtype(dtype)}; found"
                f" {found}"
            )
        return tensor.data

    def no_activation(self, operator: Operator) -> None:
        if operator.options.get("fused_activation_function", 0) != 0:
            raise self.error(f"{operator.name} has a fused activation function "
                             f"({operator.options['fused_activation_function']}); expected none")

    # -- where elements go

    def size(self, number: int) -> int:
        tensor = self.tensor(number)
        size = math.prod(tensor.shape)
        if not 1 <= size <= self.most_elements:
            raise self.error(f"tensor {tensor.name!r} of shape {tensor.shape} has {size} elements; "
                             f"expected 1 to {self.most_elements} in a file of this size")
        return size

    def moved(self, operator: Operator, elements: np.ndarray, given: int | None = None) -> np.ndarray:
        """``elements``, laid out as an operator lays out its input; given: which output of a SPLIT is meant."""
        if operator.name in _CUTS:
            return self.cut(operator, elements, given)
        if operator.name == "MUL":
            return elements
        inputs = self.operands(operator, (1, 2) if operator.name == "RESHAPE" else (2,))
        source, output = self.tensor(inputs[0]), self.tensor(operator.outputs[0])
        role = f"a tensor that {operator.name} moves"
        if self.quantization(inputs[0], role) != self.quantization(operator.outputs[0], role):
            raise self.error(f"{operator.name} changes the quantization of {source.name!r}; expected it kept")
        if operator.name == "TRANSPOSE":
            axes = self.constant(inputs[1], np.int32, "the permutation of TRANSPOSE").ravel().tolist()
            if sorted(axes) != list(range(elements.ndim)):
                raise self.error(
                    f"TRANSPOSE of {source.name!r} has permutation {axes}; its input has {elements.ndim} axes"
                )
            elements = elements.transpose(axes)
            if elements.shape != output.shape:
                raise self.error(
                    f"TRANSPOSE gives {output.name!r} shape {output.shape}; expected {elements.shape}"
                )
        elif self.size(operator.outputs[0]) != elements.size:
            raise self.error(
                f"RESHAPE from {source.shape} to {output.shape}, tensor {output.name!r}, changes the size"
            )
        return elements.reshape(output.shape)

    def cut(self, operator: Operator, elements: np.ndarray, given: int | None) -> np.ndarray:
        """The elements that a SLICE or an output of a SPLIT has."""
        name, inputs = operator.name, operator.inputs
        if len(inputs) != (3 if name == "SLICE" else 2) or given not in operator.outputs:
            raise self.error(f"{name} has {len(inputs)} inputs; expected {3 if name == 'SLICE' else 2}")
        output, source = self.tensor(given), self.tensor(inputs[1 if name == "SPLIT" else 0])
        role = f"a tensor that {name} cuts"
        if self.quantization(inputs[1 if name == "SPLIT" else 0], role) != self.quantization(given, role):
            raise self.error(f"{name} changes the quantization of {source.name!r}; expected it kept")
        if name == "SLICE":
            begin, size = (self.constant(inputs[i], np.int32, f"the {what} of SLICE").ravel().tolist()
                           for i, what in ((1, "begin"), (2, "size")))
            if len(begin) != elements.ndim or len(size) != elements.ndim or any(
                    at < 0 or at + max(count, 0) > length
                    for at, count, length in zip(begin, size, elements.shape, strict=True)):
                raise self.error(f"SLICE of {source.name!r} begins at {begin[:8]} with {size[:8]} elements; its input "
                                 f"has shape {elements.shape}")
            found = elements[tuple(slice(at, None if count < 0 else at + count)
                                   for at, count in zip(begin, size, strict=True))]
        else:
            axes = self.constant(inputs[0], np.int32, "the axis of SPLIT").ravel().tolist()
            parts = len(operator.outputs)
            if len(axes) != 1 or not -elements.ndim <= axes[0] < elements.ndim or elements.shape[axes[0]] % parts:
                raise self.error(f"SPLIT of {source.name!r}, shape {elements.shape}, along {axes[:8]} in {parts} "
                                 "parts; expected equal parts of one axis")
            found = np.split(elements, parts, axes[0])[operator.outputs.index(given)]
        if found.shape != output.shape:
            raise self.error(f"{name} gives {output.name!r} shape {output.shape}; expected {found.shape}")
        return found

    def back(self, tensor: int, *, scaled: bool = False) -> tuple[int, np.ndarray, float]:
        """Undo RESHAPE, TRANSPOSE, SLICE and SPLIT, with ``scaled`` also MUL by a positive constant.

        Returns the tensor they begin with, for each element of ``tensor`` its flat index there, and the product of the
        constants.
        """
        path, factor = [], 1.0
        names = (*_MOVES, *_CUTS, *(["MUL"] if scaled else []))
        while (number := self.producer(tensor, names)) is not None:
            operator = self.graph.operators[number]
            path.append((number, tensor))
            self.check_chain(path, names)
            if operator.name == "MUL":
                tensor, by = self.scaled(operator)
                factor *= by
            else:
                inputs = self.operands(operator, (1, 2)) if operator.name in _MOVES else operator.inputs
                tensor = inputs[1 if operator.name == "SPLIT" and len(inputs) > 1 else 0] if inputs else -1
            if tensor < 0:
                raise self.error(f"{operator.name} lacks an input")
        elements = np.arange(self.size(tensor), dtype=np.int32).reshape(self.tensor(tensor).shape)
        for number, given in reversed(path):
            self.used.add(number)
            elements = self.moved(self.graph.operators[number], elements, given)
        return tensor, elements, factor

    def scaled(self, operator: Operator) -> tuple[int, float]:
        """The tensor that a MUL scales, and by what number."""
        inputs = self.operands(operator, (2,))
        self.no_activation(operator)
        changing = [number for number in inputs if not self.is_constant(number)]
        constants = [number for number in inputs if self.is_constant(number)]
        if len(changing) != 1:
            raise self.error("expected MUL of queries, keys or values by one number; found two computed tensors")
        role = "the number that MUL scales by"
        codes, quantization = self.constant(constants[0], np.int8, role), self.quantization(constants[0], role)
        source, output = self.tensor(changing[0]), self.tensor(operator.outputs[0])
        by = float(quantization.dequantize(codes.ravel()[:1])[0]) if codes.size else 0.0
        if codes.size != 1 or source.shape != output.shape or not by > 0:
            raise self.error(f"expected MUL of {source.name!r} by one positive number; found {codes.size} numbers, "
                             f"{by:g}")
        self.told.append(f"{self.name}: {output.name!r} is scaled by a MUL of its own, which is taken into the "
                         "projection, and rounds once: its codes may differ by one step, the output's by a few")
        return changing[0], by

    def forward(self, tensor: int) -> tuple[int, np.ndarray, Operator | None]:
        """Follow RESHAPE and TRANSPOSE.

        Returns the tensor they end with, the flat index of its elements in ``tensor``, and its reader.
        """
        elements = np.arange(self.size(tensor), dtype=np.int32).reshape(self.tensor(tensor).shape)
        path = []
        while (found := self.next_operator(tensor)) is not None and found[1].name in _MOVES:
            path.append(found[0])
            self.check_chain(path, _MOVES)
            elements = self.moved(found[1], elements)
            self.used.add(found[0])
            tensor = found[1].outputs[0]
        return tensor, elements, None if found is None else found[1]

    def check_chain(self, path: list, names: tuple[str, ...]) -> None:
        """Refuse more operators in a row than any converter writes."""
        if len(path) > _LONGEST_CHAIN:
            raise self.error(f"expected at most {_LONGEST_CHAIN} of {', '.join(names)} in a row; found more")

    # -- the parts of attention

    def blocks(self) -> list[int]:
        """The numbers of the SOFTMAX operators, those of attention where there are any."""
        found = [number for number, operator in enumerate(self.graph.operators) if operator.name == "SOFTMAX"]
        return [number for number in found if self.weighs(self.graph.operators[number])] or found

    def weighs(self, operator: Operator) -> bool:
        """Whether what an operator gives goes into a BATCH_MATMUL, through RESHAPE or not."""
        for _ in range(_LONGEST_CHAIN):
            readers = [self.graph.operators[number] for tensor in operator.outputs
                       for number in self.consumers.get(tensor, ())]
            if any(reader.name == "BATCH_MATMUL" for reader in readers):
                return True
            readers = [reader for reader in readers if reader.name == "RESHAPE"]
            if not readers:
                return False
            operator = readers[0]
        return False

    def softmax(self, block=None) -> Operator:
        found = self.blocks()
        names = [self.tensor(self.graph.operators[number].outputs[0]).name for number in found
                 if self.graph.operators[number].outputs]
        listed = ", ".join(f"{i}: {name!r}" for i, name in enumerate(names[:_TOLD]))
        listed += f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
        if block is None:
            if len(found) != 1:
                raise self.error(f"expected one attention block, so one SOFTMAX; found {len(found)}" + (
                    f": choose one by block=, its number or name: {listed}" if found else ""))
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
        (scores,) = self.operands(softmax, (1,))
        if self.tensor(scores).dtype == np.float32:
            hybrid = any(operator.name == "FULLY_CONNECTED" and len(operator.inputs) > 1 and operator.inputs[1] >= 0
                         and self.tensor(operator.inputs[1]).dtype == np.int8 for operator in self.graph.operators)
            raise self.error(
                "is a hybrid model, int8 weights and float32 attention: expected int8 attention; a runtime quantizes "
                "its rows by rules of its own. Read the model that it was made of (edgeattn.from_pretrained, "
                "MultiHeadAttention.from_torch, from_onnx) and quantize that with quant.quantize(layer, "
                "scheme='dynamic'), or convert with full integer quantization" if hybrid else
                "is a float model: expected int8 attention; found a float32 SOFTMAX (quantize the float layer with "
                "quant.quantize, or convert with full integer quantization)"
            )
        if softmax.options["beta"] != 1:
            raise self.error(f"expected SOFTMAX with beta 1; found {softmax.options['beta']}")
        probabilities = self.quantization(softmax.outputs[0], "the probabilities")
        if probabilities != PROBABILITIES:
            raise self.error(
                f"expected probabilities of scale 1/256 and zero point -128; found {probabilities}"
            )
        return softmax

    def layer(self, arithmetic: str, block=None) -> StaticMultiHeadAttention:
        """The layer, after everything about the graph was found to be as one attention block has it."""
        softmax = self.softmax(block)
        tensors = {}
        scores, score_ops = self.score_ops(softmax.inputs[0])
        tensors["scores"] = self.quantization(scores, "the scores")
        product = self.use(scores, "BATCH_MATMUL", "the scores")
        query, key = self.operands(product, (2,))
        probabilities, elements, second = self.forward(softmax.outputs[0])
        if (
            second is None
            or second.name != "BATCH_MATMUL"
            or self.operands(second, (2,))[0] != probabilities
            or second.options["adj_x"]
            or (np.diff(elements.ravel()) != 1).any()
        ):
            raise self.error("expected the probabilities to be the left side of a BATCH_MATMUL; found "
                             f"{'the output' if second is None else second.name}")
        self.used.add(self.producers[second.outputs[0]])
        tensors["context"] = self.quantization(second.outputs[0], "the context")

        projections, moves, factors = {}, {}, {}
        for role, tensor, swap in (
            ("query", query, product.options["adj_x"]),
            ("key", key, not product.options["adj_y"]),
            ("value", second.inputs[1], second.options["adj_y"]),
        ):
            tensors[role] = self.quantization(tensor, f"the {role}")
            source, elements, factors[role] = self.back(tensor, scaled=True)
            if elements.ndim < 2:
                raise self.error(
                    f"expected the {role}, tensor {self.tensor(tensor).name!r}, to have 2 axes or more; "
                    f"found shape {elements.shape}"
                )
            projections[role] = self.use(source, "FULLY_CONNECTED", f"the {role}")
            moves[role] = elements.swapaxes(-1, -2) if swap else elements

        linears, feeds = {}, {}
        for role, operator in projections.items():
            linears[role], feeds[role] = self.linear(operator, role)
        B, H, L, S = self.check_heads(moves, linears)
        for role, factor in factors.items():
            linears[role] = _cut_linear(linears[role], moves[role], factor)
            if factor != 1:
                scale = float(self.quantization(feeds[role], "an input").scale) * float(linears[role].scale.max())
                self.check_multiplier(scale / float(tensors[role].scale), f"MUL of the {role}")
        self.check_shape(scores, (B, H, L, S), "the scores")
        self.check_shape(softmax.outputs[0], (B, H, L, S), "the probabilities")
        value_dim = moves["value"].shape[-1]
        self.check_shape(second.outputs[0], (B, H, L, value_dim), "the context")

        for left, right, out, what in (("query", "key", "scores", "the product of query and key"),
                                       (None, "value", "context", "the product of probabilities and value")):
            left_scale = (PROBABILITIES if left is None else tensors[left]).scale
            self.check_multiplier(
                float(left_scale) * float(tensors[right].scale) / float(tensors[out].scale), what
            )

        sources = self.inputs(feeds, tensors)
        self.output(second.outputs[0], (B, H, L, value_dim), tensors, linears)
        for number, operator in enumerate(self.graph.operators):
            if self.alone and number not in self.used:
                raise self.error(f"expected one attention block and nothing else; found {operator.name} "
                                 f"(operator {number}) besides it; block=0 reads the block alone")
        ops = tuple(self.score_op(*op, (B, H, L, S)) for op in score_ops)
        try:
            return StaticMultiHeadAttention(
                H, linears, tensors, sources=sources, score_ops=ops, arithmetic=arithmetic
            )
        except ValueError as error:
            raise self.error(str(error)) from None

    def check_shape(self, number: int, shape: tuple[int, ...], role: str) -> None:
        """A product's tensor must have ``shape``, its leading axes merged in any way."""
        tensor = self.tensor(number)
        if tensor.shape[-2:] != shape[-2:] or math.prod(tensor.shape) != math.prod(shape):
            raise self.error(
                f"expected {role}, tensor {tensor.name!r}, to be (B, H, rows, columns) = {shape}, "
                f"B and H together or apart; found {tensor.shape}"
            )

    def check_heads(self, moves, linears) -> tuple[int, int, int, int]:
        """B, H, L, S, once query, key and value are found to be split into heads as attention needs."""
        L, head_dim = moves["query"].shape[-2:]
        S = moves["key"].shape[-2]
        width = linears["query"].weight.shape[0]
        rows = self.rows_of(moves["query"], width)
        B = len(np.unique(rows[:, 0])) if rows.size else 0
        groups = len(rows)
        if not B or groups % B:
            raise self.error(f"expected queries of as many heads for each sequence; found {groups} for {B} sequences")
        H = groups // B
        for role, length in (("query", L), ("key", S), ("value", S)):
            features, size = linears[role].weight.shape[0], moves[role].shape[-1]
            first = moves[role].reshape(-1, length, size)[:, :1, :1] if moves[role].shape[-2] == length else None
            if first is None or len(first) != groups:
                raise self.error(f"expected a {role} of batch {B}, length {length} and {H} heads; found "
                                 f"{moves[role].size} elements in {features} features")
            heads = (first % features).reshape(B, H)
            wanted = (np.arange(B)[:, None, None, None] * length * features + heads[:1, :, None, None]
                      + np.arange(length)[:, None] * features + np.arange(size))
            if (heads[:, :] + size > features).any() or not np.array_equal(moves[role].ravel(), wanted.ravel()):
                raise self.error(
                    f"expected the {role}'s features split into {H} heads of {size}, (B, H, length, head "
                    f"size); found another order, shape {moves[role].shape}"
                )
        return B, H, L, S

    @staticmethod
    def rows_of(elements: np.ndarray, features: int) -> np.ndarray:
        """(groups, length): the row of a projection that each row of each head is of."""
        return elements[..., 0].reshape(-1, elements.shape[-2]) // features if elements.shape[-1] else elements[..., :0]

    def linear(self, operator: Operator, role: str) -> tuple[QuantizedLinear, int]:
        """A FULLY_CONNECTED's parameters and the tensor it reads."""
        inputs = self.operands(operator, (2, 3))
        self.no_activation(operator)
        if operator.options["weights_format"] != 0:
            raise self.error(f"expected plain weights in the {role} projection; found format "
                             f"{operator.options['weights_format']}")
        weight = self.constant(inputs[1], np.int8, f"the weight of the {role} projection")
        stored = self.tensor(inputs[1])
        if weight.ndim != 2 or 0 in weight.shape:
            raise self.error(
                f"expected {stored.name!r} to be (out_features, in_features); found {weight.shape}"
            )
        if stored.scale is None or stored.zero_point.any() or (weight == -128).any():
            raise self.error(f"expected {stored.name!r} quantized symmetrically, codes -127 to 127; found "
                             + ("no scale" if stored.scale is None else "a zero point or the code -128"))
        if stored.scale.size != weight.shape[0] or (stored.channel_axis != 0 and stored.scale.size > 1):
            raise self.error(
                f"expected {stored.name!r} quantized per output channel, {weight.shape[0]} scales along axis"
                f" 0; found {stored.scale.size} along axis {stored.channel_axis} (TFLite rounds per-tensor"
                " weights by another rule: convert with per-channel weights)"
            )
        self.check_scales(stored, f"the weight of the {role} projection")
        bias = None
        if len(inputs) == 3 and inputs[2] >= 0:
            bias = self.constant(inputs[2], np.int32, f"the bias of the {role} projection")
            if bias.shape != weight.shape[:1]:
                raise self.error(
                    f"expected the bias of the {role} projection to have shape {weight.shape[:1]}; "
                    f"found {bias.shape}"
                )
        read, output = self.tensor(inputs[0]), self.tensor(operator.outputs[0])
        before = self.quantization(inputs[0], f"the input of the {role} projection")
        after = self.quantization(operator.outputs[0], f"the output of the {role} projection")
        self.check_multiplier(
            float(before.scale) * float(stored.scale.max()) / float(after.scale), f"the {role} projection"
        )
        rows, remainder = divmod(self.size(inputs[0]), weight.shape[1])
        if remainder or rows * weight.shape[0] != self.size(operator.outputs[0]):
            raise self.error(
                f"the {role} projection {weight.shape} cannot take {read.name!r} {read.shape} to "
                f"{output.name!r} {output.shape}"
            )
        if read.shape[-1:] != weight.shape[1:] or output.shape[-1:] != weight.shape[:1]:
            raise self.error(
                f"expected the {role} projection {weight.shape} between the last axes of {read.name!r} and "
                f"{output.name!r}; found {read.shape} and {output.shape}"
            )
        return QuantizedLinear(weight, stored.scale, bias), inputs[0]

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
            inputs = self.operands(operator, (3,) if operator.name == "SELECT_V2" else (2,))
            changing = [i for i, number in enumerate(inputs) if number < 0 or not self.is_constant(number)]
            condition_changes = operator.name == "SELECT_V2" and 0 in changing
            if len(changing) != 1 or inputs[changing[0]] < 0 or condition_changes:
                raise self.error(
                    f"expected {operator.name} between scores and softmax to have the scores and constants as"
                    f" inputs; found {len(changing)} inputs that are computed (a mask must be a constant)"
                )
            self.used.add(self.producers[tensor])
            tensor = inputs[changing[0]]
            self.next_operator(tensor)  # or the scores would be wanted elsewhere too
            found.append((operator, tensor, changing[0]))
            self.check_chain(found, _SCORE_OPS)
        return tensor, found[::-1]

    def score_op(self, operator: Operator, tensor: int, position: int, scores: tuple[int, int, int, int]):
        """A MUL, ADD or SELECT_V2 as a layer holds it."""
        self.check_shape(operator.outputs[0], scores, f"the result of {operator.name}")
        before = self.quantization(tensor, f"the scores that {operator.name} takes")
        after = self.quantization(operator.outputs[0], f"the result of {operator.name}")
        if operator.name == "SELECT_V2":
            keep = self.constant(operator.inputs[0], np.bool_, "the condition of SELECT_V2")
            filling = operator.inputs[3 - position]
            fill = self.constant(filling, np.int8, "the masked score of SELECT_V2")
            if before != after or self.quantization(filling, "the masked score of SELECT_V2") != after:
                raise self.error(
                    "expected SELECT_V2 to keep the scores' quantization; found another in its output or fill"
                )
            if fill.size == 0 or (fill != fill.flat[0]).any():
                raise self.error("expected SELECT_V2 to give all masked scores one code; found several")
            # The bytes of a damaged file may be neither 0 nor 1.
            keep = keep.view(np.uint8) != 0
            return SelectMask(self.mask(keep if position == 1 else ~keep, tensor, scores), int(fill.flat[0]))
        other = operator.inputs[1 - position]
        codes = self.constant(other, np.int8, f"the constant of {operator.name}")
        quantization = self.quantization(other, f"the constant of {operator.name}")
        if operator.name == "ADD":
            self.check_multiplier(
                max(before.scale, quantization.scale) / float(after.scale), "ADD of the mask"
            )
            if codes.size > 1 and float(np.ptp(quantization.dequantize(codes))) < float(after.scale):
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

    # -- the edges

    def inputs(self, feeds: dict[str, int], tensors: dict[str, TensorQuantization]) -> tuple[int, int, int]:
        """Which input feeds each projection; adds the inputs' quantization to ``tensors``."""
        roots = []
        for role in INPUTS:
            tensor, elements, _ = self.back(feeds[role])
            if (elements.ravel()[1:] < elements.ravel()[:-1]).any():
                raise self.error(
                    f"expected the input of the {role} projection in the graph's order; found it transposed"
                )
            quantization = self.quantization(tensor, f"the input of the {role} projection")
            if tensor not in self.graph.inputs and self.alone:
                quantize = self.use(tensor, "QUANTIZE", f"the input of the {role} projection")
                (tensor,) = self.operands_of_edge(quantize)
                if tensor not in self.graph.inputs or self.tensor(tensor).dtype != np.float32:
                    raise self.error(
                        f"expected QUANTIZE to read a float32 graph input; found {self.tensor(tensor).name!r}"
                    )
            roots.append((tensor, quantization))
        for number in self.graph.inputs:
            if self.alone and number not in [tensor for tensor, _ in roots]:
                raise self.error(
                    f"expected every graph input to feed a projection; found {self.tensor(number).name!r}"
                    " unused"
                )
        if roots[0] == roots[1] == roots[2]:
            sources = (0, 0, 0)
        elif roots[1] == roots[2]:
            sources = (0, 1, 1)
        else:  # the layer has no form for "the value is the query" and the like: three inputs say it too
            sources = (0, 1, 2)
        for source, (_, quantization) in zip(sources, roots, strict=True):
            tensors[f"{INPUTS[source]}_input"] = quantization
        return sources

    def operands_of_edge(self, operator: Operator) -> tuple[int, ...]:
        if len(operator.inputs) != 1 or len(operator.outputs) != 1 or operator.inputs[0] < 0:
            raise self.error(
                f"{operator.name} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs; "
                "expected 1 and 1"
            )
        return operator.inputs

    def output(self, context: int, shape: tuple[int, int, int, int], tensors, linears) -> None:
        """From the context to the graph's output; adds the output projection where there is one."""
        tensor, elements, reader = self.forward(context)
        merged = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(0, 2, 1, 3)
        if not np.array_equal(elements.ravel(), merged.ravel()):
            raise self.error(
                "expected the heads of the context merged to (B, L, H*Dv); found another order, tensor "
                f"{self.tensor(tensor).name!r}"
            )
        if reader is not None and reader.name == "FULLY_CONNECTED":
            linears["output"], read = self.linear(reader, "output")
            if read != tensor:
                raise self.error(
                    "expected the output projection to read the context; found it among the weights"
                )
            self.used.add(self.producers[reader.outputs[0]])
            tensors["output"] = self.quantization(reader.outputs[0], "the output")
            if not self.alone:
                return
            tensor, elements, reader = self.forward(reader.outputs[0])
            if (np.diff(elements.ravel()) != 1).any():
                raise self.error("expected the output in the order (B, L, features); found it transposed")
        if not self.alone:
            return
        if reader is not None and reader.name == "DEQUANTIZE":
            self.operands_of_edge(reader)
            self.used.add(self.producers[reader.outputs[0]])
            tensor = reader.outputs[0]
        if self.graph.outputs != [tensor]:
            found = [self.tensor(number).name for number in self.graph.outputs[:8]]
            raise self.error(
                f"expected the attention's result, tensor {self.tensor(tensor).name!r}, to be the graph's one"
                f" output; found {found}"
                + ("" if reader is None else f", and {reader.name} behind it")
            )


def _same_codes(one: Tensor, other: Tensor) -> bool:
    """Whether codes of two tensors stand for the same numbers."""
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b))
               for a, b in ((one.scale, other.scale), (one.zero_point, other.zero_point)))


def _cut_linear(linear: QuantizedLinear, elements: np.ndarray, factor: float) -> QuantizedLinear:
    """The features of a projection that heads have, in their order, times a number; ``elements`` as of `back`."""
    features = linear.weight.shape[0]
    length, size = elements.shape[-2:]
    wanted = elements.reshape(-1, length, size)[:, 0] % features  # of each group; those of each sequence are the same
    sequences = len(np.unique(elements.reshape(-1, length, size)[:, 0, 0] // features))
    wanted = wanted[:len(wanted) // sequences].ravel()
    if factor == 1 and np.array_equal(wanted, np.arange(features)):
        return linear
    scale = linear.scale[wanted] * np.float32(factor)
    return QuantizedLinear(linear.weight[wanted], scale, None if linear.bias is None else linear.bias[wanted])
