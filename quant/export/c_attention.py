"""The attention of a static layer as a C function: projections, scores, softmax and contexts, head by head.

Its text stands once, in c_templates/attention.c.in, for the file of a layer and for that of an encoder.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

from edgeattn.executors.unfused import attend
from edgeattn.layers.attention import forward
from edgeattn.ops import Ops, Sequences
from edgeattn.quantized import INPUTS, QuantizedLinear, StaticMultiHeadAttention
from quant.export.c_operators import (
    DSP_TOKENS,
    MAX_HEAD_WIDTH,
    MAX_KEYS,
    MAX_WIDTH,
    linear_constants,
    product_constants,
    softmax_constants,
)
from quant.export.c_text import constant, fill_template

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quant.export.c_mask import ScorePasses


class Attention(NamedTuple):
    """A layer's attention in C.

    Attributes
    ----------
    constants, function : str
        Of the file; the function is ``NAMEattend_s8``.
    projected : bool
        Whether ``NAMEoutput_linear`` comes after the contexts.
    """

    constants: str
    function: str
    projected: bool


def attention_c(layer: StaticMultiHeadAttention, passes: ScorePasses, prefix: str, *, name: str = "", what: str = "",
                title: str, widths: Mapping[str, str], parameters: str, feeds: Mapping[str, str], sizes: str
                ) -> Attention:
    """The attention of ``layer``.

    Parameters
    ----------
    layer : StaticMultiHeadAttention
    passes : ScorePasses
        Of the layer.
    prefix : str
        Of the file's macros.
    name, what : str
        Before the names of the function and the constants, and behind those of projections in comments.
    title : str
        What the function's comment begins with.
    widths : mapping of str to str
        Of "H * D", "H * DV", "EQ", "EK", "EV" and "EO": the C that says so where the constants stand.
    parameters : str
        The function's parameters before ``context``.
    feeds : mapping of str to str
        Which parameter each of `INPUTS` reads.
    sizes : str
        The function's first statements: they say what H, D, DV, EQ, EK, EV, queries and keys are.
    """
    ops = COps(layer, name, what, widths)
    result = forward(ops, layer, *INPUTS, Sequences([]))
    constants = [*ops.linears, *ops.products]
    looked_up = {}
    for role, rows, target in (("key", 12, "key[j * D + n]"), ("query", 16, "rows[n]")):
        table, text = layer.projection_tables.get(role), ""
        if table is not None:
            constants.append(constant("int8_t", f"{name}{role}_table_s8", "256", table,
                                      f"What MUL makes of the codes -128 to 127 of the {role} projection{what}."))
            text = (f"for (int32_t n = 0; n < tokens * D; n++) {{\n"
                    f"    {target} = {name}{role}_table_s8[{target} + 128];\n}}\n")
        looked_up[f"{role}_look_up"] = textwrap.indent(text, " " * rows)
    constants = [*constants, softmax_constants(f"{name}exponentials", prefix, passes.scale)]
    tensors, all_keys = layer.tensors, passes.permitted == "keys"
    text = "" if all_keys else f"const int32_t permitted = {passes.permitted};\n"
    seen = "keys" if all_keys else "permitted"
    text += (f"failed |= batch_matmul_s8(&{name}scores_product, rows + i % TOKENS * D, key, {seen}, D, buffer,\n"
             "                          scores);\n\n")
    text += passes.code + f"/* 4. probabilities, in place */\nsoftmax_s8(&{name}exponentials, scores, keys);\n"
    function = fill_template("attention.c", {
        "PREFIX": prefix, "name": name, "title": title, "parameters": parameters, "sizes": sizes,
        "indent": " " * len(f"static int {name}attend_s8("),
        "scaling_note": "lies in its scale" + " or in a table" * bool(layer.projection_tables) + (
            " or in pass 3" * bool(layer.score_ops and passes.scale != tensors["scores"].scale)),
        "score_passes": textwrap.indent(text, " " * 12), **looked_up,
        **{f"{role}_input": feeds[role] for role in INPUTS}})
    return Attention("\n".join(constants + [passes.constants] * bool(passes.constants)), function, result == "output")


def check_attention(layer: StaticMultiHeadAttention, keys: int) -> None:
    """Refuse sizes at which TFLite Micro's int32 sums may overflow."""
    limits = {"embed_dim": (layer.embed_dim, MAX_WIDTH), "kdim": (layer.kdim, MAX_WIDTH),
              "vdim": (layer.vdim, MAX_WIDTH), "head_dim": (layer.head_dim, MAX_HEAD_WIDTH),
              "value_dim": (layer.value_dim, MAX_HEAD_WIDTH), "output_dim": (layer.output_dim, MAX_WIDTH),
              "the width of all heads": (layer.num_heads * layer.value_dim, MAX_WIDTH)}
    for name, (size, largest) in limits.items():
        if not 1 <= size <= largest:
            raise ValueError(f"layer must have {name} from 1 to {largest} for C; got {size}")
    if keys > MAX_KEYS:
        raise ValueError(f"there may be at most {MAX_KEYS} keys in C: TFLite Micro sums a softmax row in 12 integer "
                         f"bits; got {keys}")


def attention_bytes(layer: StaticMultiHeadAttention, keys: int, *, dsp: bool = False) -> int:
    """What the function wants at ``rows``: keys, values and scores, and rows of a projection."""
    widest = max(layer.head_dim, layer.value_dim)
    return keys * (layer.head_dim + layer.value_dim + 1) + widest * (DSP_TOKENS if dsp else 1)


def widest_input(layer: StaticMultiHeadAttention) -> int:
    """Of the layer's projections."""
    return max(linear.weight.shape[1] for linear in layer.linears.values())


class COps(Ops[str]):
    """`edgeattn.ops.Ops` as C: the constants that each operation reads; what it hands on are names of arrays.

    Their calls stand in attention.c.in, which computes a head at a time.
    """

    def __init__(self, layer: StaticMultiHeadAttention, name: str = "", what: str = "",
                 widths: Mapping[str, str] | None = None):
        self.layer, self._name, self._what, self._widths = layer, name, what, widths or {}
        self.linears: list[str] = []
        self.products: list[str] = []

    def linear(self, x: str, linear: QuantizedLinear, name: str) -> str:
        """x weight^T + bias."""
        outputs = {"query": "H * D", "key": "H * D", "value": "H * DV", "output": "EO"}[name]
        inputs = {"query": "EQ", "key": "EK", "value": "EV", "output": "H * DV"}[name]
        self.linears.append(linear_constants(
            self._name + name, f"the {name} projection{self._what}", linear, self.layer.input_of(name),
            self.layer.tensors[name], self._widths.get(outputs, outputs), self._widths.get(inputs, inputs)))
        return name

    def attention(self, q: str, k: str, v: str, layer: StaticMultiHeadAttention, sequences: Sequences, name: str
                  ) -> str:
        """The heads side by side."""
        return attend(self, q, k, v, layer, None, name)

    def scores(self, q: str, k: str, layer: StaticMultiHeadAttention, name: str) -> str:
        """q k^T"""
        return self._product(name, "query times keys", q, k)

    def masked(self, scores: str, layer: StaticMultiHeadAttention, mask: None, name: str) -> str:
        """In place, by what `score_passes` writes."""
        return scores

    def softmax(self, scores: str, name: str) -> str:
        """In place."""
        return name

    def context(self, probabilities: str, v: str, name: str) -> str:
        """Probabilities v."""
        return self._product(name, "probabilities times values", probabilities, v)

    def _product(self, name: str, what: str, lhs: str, rhs: str) -> str:
        self.products.append(product_constants(
            self._name + name, f"the {name}{self._what}: {what}",
            *(self.layer.product_tensors[tensor] for tensor in (lhs, rhs, name))))
        return name
