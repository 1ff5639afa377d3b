"""Static int8 attention in a .tflite graph: all of a block that a layer computes, byte for byte.

The shapes between the projections and the products are not matched against a list of known forms: where RESHAPE,
TRANSPOSE, SLICE and SPLIT carry each element is followed, and compared with where attention needs it.
"""

from __future__ import annotations

import math

import numpy as np

from edgeattn.arithmetic import kernel_set
from edgeattn.files.tflite_blocks import Blocks
from edgeattn.quantized import (
    INPUTS,
    PROBABILITIES,
    MulConstant,
    QuantizedLinear,
    StaticMultiHeadAttention,
    TensorQuantization,
)
from edgeattn.tflite_schema import Operator

# Ways out, behind what an error found.
ALONE = "; block=0 reads the block alone"
FLOAT = ", which a static layer has no place for: read the float file that this was made of, and quant.quantize it"
PRODUCTS = (", as converters write the product of two matrices, which runtimes round otherwise: convert with a batch "
            "of 2, or read the float file that this was made of, and quant.quantize it")


class Matcher(Blocks):
    """Finds attention in one graph."""

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
        one = self.producer(scores, ("FULLY_CONNECTED",)) is not None
        product = self.use(scores, "BATCH_MATMUL", "the scores", PRODUCTS if one else FLOAT)
        query, key = self.operands(product, (2,))
        second, value, value_swaps, turned = self.weighting(softmax)
        tensors["context"] = self.quantization(second.outputs[0], "the context")

        projections, moves, ops = {}, {}, {}
        for role, tensor, swap in (
            ("query", query, product.options["adj_x"]),
            ("key", key, not product.options["adj_y"]),
            ("value", value, value_swaps),
        ):
            source, elements, scaling = self.back(tensor, scaled=True)
            projections[role] = self.use(source, "FULLY_CONNECTED", f"the {role}", FLOAT)
            tensors[role] = self.quantization(tensor if role == "value" else source, f"the {role}")
            ops[role] = [self.mul_of_projected(operator) for operator in scaling]
            if elements.ndim < 2:
                raise self.error(
                    f"expected the {role}, tensor {self.tensor(tensor).name!r}, to have 2 axes or more; "
                    f"found shape {elements.shape}"
                )
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
        context = (B, H, value_dim, L) if turned else (B, H, L, value_dim)
        self.check_shape(second.outputs[0], context, "the context")
        if turned:
            self.check_turned(tensors["value"], arithmetic)

        for left, right, out, what in (("query", "key", "scores", "the product of query and key"),
                                       (None, "value", "context", "the product of probabilities and value")):
            left_scale = (PROBABILITIES if left is None else tensors[left]).scale
            self.check_multiplier(
                float(left_scale) * float(tensors[right].scale) / float(tensors[out].scale), what
            )

        self.told += self.tokens_first(self.tensor(self.back(feeds["query"])[0]).shape, B, L)
        sources = self.inputs(feeds, tensors)
        self.output(second.outputs[0], context, tensors, linears, turned=turned)
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

    def weighting(self, softmax: Operator) -> tuple[Operator, int, bool, bool]:
        """The product of probabilities and values, its values, whether they are (Dv, S), whether it gives (Dv, L).

        A product with the probabilities on its right gives the context turned: (p v)' = v' p'.
        """
        probabilities, elements, second = self.forward(softmax.outputs[0])
        if second is not None and second.name == "BATCH_MATMUL":
            left, right = self.operands(second, (2,))
            turned = left != probabilities
            swaps = bool(second.options["adj_y" if turned else "adj_x"])
            if elements.ndim >= 2 and swaps != turned:
                elements = elements.swapaxes(-1, -2)
            if left != right and probabilities in (left, right) and (np.diff(elements.ravel()) == 1).all():
                self.used.add(self.producers[second.outputs[0]])
                return (second, left, not second.options["adj_x"], True) if turned else (
                    second, right, bool(second.options["adj_y"]), False)
        found = "the output" if second is None else second.name
        raise self.error("expected the probabilities to be one side of a BATCH_MATMUL with the values; found "
                         + (f"{found} of them in another place or order" if found == "BATCH_MATMUL" else found)
                         + (PRODUCTS if found == "FULLY_CONNECTED" else ""))

    def check_turned(self, value: TensorQuantization, arithmetic: str) -> None:
        """Refuse values on the left where their runtime computes them by another rule than on the right."""
        rules = kernel_set(arithmetic)
        if value.zero_point == 0 and rules.batch_matmul != rules.batch_matmul_asymmetric:
            raise self.error("BATCH_MATMUL has values of the zero point 0 on its left and probabilities on its right, "
                             f"which {arithmetic!r} rounds by another rule than a layer: write the product as "
                             "probabilities times values, or read it with arithmetic='litert-builtin'")

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
        if stored.is_packed:
            raise self.error(f"expected {stored.name!r} in 8 bits; found 4, which only float32 layers are read of: "
                             "quantize weights to 8 bits, or activations not at all")
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
            if elements.size != self.size(tensor) or (np.diff(elements.ravel()) != 1).any():
                if self.alone:
                    raise self.error(
                        f"expected the input of the {role} projection to be all of {self.tensor(tensor).name!r} in the "
                        "graph's order; found a part of it, or another order: block=0 reads the block alone")
                tensor = feeds[role]  # what calls give is what the projection takes
            quantization = self.quantization(tensor, f"the input of the {role} projection")
            if tensor not in self.graph.inputs and self.alone:
                quantize = self.use(tensor, "QUANTIZE", f"the input of the {role} projection", ALONE)
                (tensor,) = self.operands_of_edge(quantize)
                if tensor not in self.graph.inputs or self.tensor(tensor).dtype != np.float32:
                    raise self.error(
                        f"expected QUANTIZE to read a float32 graph input; found {self.tensor(tensor).name!r}"
                    )
            self.tell_of_pieces(tensor)
            roots.append((tensor, quantization))
        for number in self.graph.inputs:
            if self.alone and number not in self.mask_inputs and number not in [tensor for tensor, _ in roots]:
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
        """The input of a QUANTIZE or DEQUANTIZE."""
        if len(operator.inputs) != 1 or len(operator.outputs) != 1 or operator.inputs[0] < 0:
            raise self.error(
                f"{operator.name} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs; "
                "expected 1 and 1"
            )
        return operator.inputs

    def output(self, context: int, shape: tuple[int, int, int, int], tensors, linears, *, turned=False) -> None:
        """From the context to the graph's output; adds the output projection where there is one.

        turned : whether ``shape`` is (B, H, Dv, L)
        """
        tensor, elements, reader = self.forward(context)
        merged = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(
            (0, 3, 1, 2) if turned else (0, 2, 1, 3))
        if not np.array_equal(elements.ravel(), merged.ravel()):
            found = f", and {reader.name} behind it" if reader is not None and reader.name != "FULLY_CONNECTED" else ""
            raise self.error(
                "expected the heads of the context merged to (B, L, H*Dv); found another order, tensor "
                f"{self.tensor(tensor).name!r}{found}"
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
