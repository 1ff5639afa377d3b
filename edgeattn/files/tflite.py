"""Attention read from a .tflite file, ours or another converter's: static int8 here, float32 in `tflite_float`.

A file is accepted when its operators, all of them, are one attention block that the layer reproduces exactly.
The shapes between the projections and the products are not matched against a list of known forms: where RESHAPE,
TRANSPOSE, SLICE and SPLIT carry each element is followed, and compared with where attention needs it. Of a model with
several blocks one is read, and what stands around it is not looked at.
"""

from __future__ import annotations

import math
import operator as index_of
import warnings

import numpy as np

from edgeattn.files.tflite_file import parse, read_bytes
from edgeattn.files.tflite_float import float_attention
from edgeattn.files.tflite_graph import LONGEST_CHAIN
from edgeattn.files.tflite_scores import CheckedScores
from edgeattn.hints import FRAMES
from edgeattn.layers import MultiHeadAttention
from edgeattn.quantized import (
    INPUTS,
    PROBABILITIES,
    MulConstant,
    QuantizedLinear,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Operator

# Following elements takes four bytes for each: 64 MiB at the largest size, an activation of 4096 rows of 4096, which
# only a file with weights for so many columns may have.
_MOST_ELEMENTS = 2**24
_FEW_ELEMENTS = 2**22
_TOLD = 20  # blocks in an error


def read_tflite(path_or_bytes, *, arithmetic: str | None = None, block=None
                ) -> StaticMultiHeadAttention | MultiHeadAttention:
    """The attention layer in a .tflite file.

    Read are blocks of int8: FULLY_CONNECTED projections with per-channel weights, apart or packed and cut by SLICE or
    SPLIT, heads split by RESHAPE and TRANSPOSE or one head, BATCH_MATMUL, any number of MUL by a constant, ADD of a
    constant mask and SELECT_V2 by a constant mask, SOFTMAX, BATCH_MATMUL, and an output projection or none; QUANTIZE
    and DEQUANTIZE at the edges. Keys and values may have a zero point, and the first product may have K transposed
    already or by adj_y. Queries and keys may be multiplied by a constant of one number before their product. Of values
    such a MUL becomes a part of their projection, which rounds once where the file rounds twice: a warning says so.

    Attention in float32 is found as `MultiHeadAttention.from_onnx` finds it; int8 weights become float32.

    Parameters
    ----------
    path_or_bytes : str, os.PathLike or bytes
    arithmetic : str, optional
        The kernel set to compute int8 as, see ``edgeattn.arithmetic.KERNEL_SETS``; a file does not name one. Unless
        given "litert".
    block : int or str, optional
        Of a model with more than attention, or with several blocks: the number of one, in the order of the graph, or
        the name of the tensor that its SOFTMAX gives. Unless given the file must be one block and nothing else.

    Returns
    -------
    StaticMultiHeadAttention, or MultiHeadAttention of a file whose attention is float32
        It takes any batch and length unless a mask in the file has its own. A query that the file's mask
        leaves no key gets what the file gives it.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When the file is damaged, neither int8 nor float32, or anything else than one attention block: the
        message names the file, what was expected and what was found.
    """
    data, name = read_bytes(path_or_bytes)
    most = min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data)))
    matcher = _Matcher(parse(data, name), name, most)
    layer = _float_layer(matcher, arithmetic, block) if matcher.is_float() else (
        matcher.layer(arithmetic or "litert", block))
    for told in matcher.told:
        warnings.warn(told, stacklevel=3 + FRAMES)
    return layer


def _float_layer(matcher, arithmetic, block) -> MultiHeadAttention:
    """The layer of a graph whose attention is float32."""
    if arithmetic is not None:
        raise matcher.error(f"arithmetic={arithmetic!r} applies to int8 layers; its attention is float32")
    softmax = matcher.chosen(block)
    heads, kv_heads, arguments, matcher.told = float_attention(matcher, softmax, alone=block is None)
    try:
        return MultiHeadAttention.from_found(heads, kv_heads, arguments)
    except (TypeError, ValueError) as error:
        raise matcher.error(str(error)) from None


def blocks_of(path_or_bytes) -> list[str]:
    """The names of the tensors that the SOFTMAX of each attention block gives."""
    data, name = read_bytes(path_or_bytes)
    matcher = _Matcher(parse(data, name), name, min(_MOST_ELEMENTS, max(_FEW_ELEMENTS, 4 * len(data))))
    return [matcher.tensor(matcher.graph.operators[number].outputs[0]).name for number in matcher.blocks()
            if matcher.graph.operators[number].outputs]


class _Matcher(CheckedScores):
    """Finds attention in one graph."""

    alone = True  # whether all of the graph must be the block

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
        return softmax

    def softmax(self, block=None) -> Operator:
        """As `chosen`, of int8."""
        softmax = self.chosen(block)
        self.operands(softmax, (1,))
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
        tensors["scores"] = self.of_scores(scores, "the scores")
        if any(operator.name != "MUL" for operator, *_ in score_ops):
            self.check_steps(softmax.inputs[0])
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
            found = "the output" if second is None else second.name
            raise self.error("expected the probabilities to be the left side of a BATCH_MATMUL; found "
                             + (f"{found} of them in another place or order" if found == "BATCH_MATMUL" else found))
        self.used.add(self.producers[second.outputs[0]])
        tensors["context"] = self.quantization(second.outputs[0], "the context")

        projections, moves, ops = {}, {}, {}
        for role, tensor, swap in (
            ("query", query, product.options["adj_x"]),
            ("key", key, not product.options["adj_y"]),
            ("value", second.inputs[1], second.options["adj_y"]),
        ):
            source, elements, scaling = self.back(tensor, scaled=True)
            tensors[role] = self.quantization(tensor if role == "value" else source, f"the {role}")
            ops[role] = [self.mul_of_projected(operator) for operator in scaling]
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
        factor = self.folded(ops.pop("value"))
        for role in INPUTS:
            linears[role] = _cut_linear(linears[role], moves[role], factor if role == "value" else 1)
        if factor != 1:
            scale = float(self.quantization(feeds["value"], "an input").scale) * float(linears["value"].scale.max())
            self.check_multiplier(scale / float(tensors["value"].scale), "MUL of the value")
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
        of_scores = tuple(self.score_op(*op, (B, H, L, S)) for op in score_ops)
        try:
            return StaticMultiHeadAttention(
                H, linears, tensors, sources=sources, score_ops=of_scores, arithmetic=arithmetic,
                query_ops=ops["query"], key_ops=ops["key"]
            )
        except ValueError as error:
            raise self.error(str(error)) from None

    def mul_of_projected(self, operator: Operator) -> MulConstant:
        """A MUL of queries, keys or values as a layer holds it."""
        _, code, constant = self.scaled(operator)
        return MulConstant(code, constant, self.quantization(operator.outputs[0], "the result of MUL"))

    def folded(self, ops: list[MulConstant]) -> float:
        """What the values' projection takes in of their MUL, a positive number."""
        factor = math.prod(float(op.constant.dequantize(op.code)) for op in ops)
        if not factor > 0:
            raise self.error(f"expected MUL of the values by one positive number; found {factor:g}")
        if ops:
            self.told.append(f"{self.name}: the values are scaled by a MUL of their own, which is taken into the "
                             "projection, and rounds once: its codes may differ by one step, the output's by a few")
        return factor

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
            self.tell_of_pieces(tensor)
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

    def tell_of_pieces(self, tensor: int) -> None:
        """Of a block whose input is put together of features, which a caller has to do then."""
        maker = self.graph.operators[self.producers[tensor]] if tensor in self.producers else None
        if maker is None or maker.name != "CONCATENATION":
            return
        widths = [self.tensor(number).shape[-1] for number in maker.inputs if number >= 0 and self.tensor(number).shape]
        if len(widths) > 1:
            told = (f"{self.name}: the block reads {sum(widths)} features, {self.tensor(tensor).name!r}, which "
                    f"CONCATENATION makes of {widths[0]} and {sum(widths[1:])} more: the layer takes all of them")
            self.told += [told] * (told not in self.told)

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
