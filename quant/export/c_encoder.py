"""Whole static int8 encoders as portable C99: products on codes, norms and residuals in single precision.

The stages of a layer are the patterns that `edgeattn.executors.fused` finds in its forward, as the compiled kernels
have them; so the C computes in their order, and its bytes are theirs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.executors.fused import parts_of
from edgeattn.layers import LayerNorm, TransformerEncoder, TransformerEncoderLayer
from edgeattn.quantized import (
    INPUTS,
    AddMask,
    SelectMask,
    StaticFeedForward,
    StaticMultiHeadAttention,
    StaticSelfAttention,
)
from quant.export.c_attention import attention_bytes, attention_c, check_attention, widest_input
from quant.export.c_mask import score_passes
from quant.export.c_names import check_names, check_stem
from quant.export.c_operators import (
    DSP_TOKENS,
    MAX_WIDTH,
    check_bytes,
    fixed_point,
    linear_constants,
    operators,
    pairs_bytes,
)
from quant.export.c_test import encoder_vectors_c
from quant.export.c_text import block_comment_lines, constant, fill_template, float_literal
from quant.export.static_rows import masked, prepared
from quant.export.tflite_ops import check_lengths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeattn.quantized import QuantizedLinear, TensorQuantization
    from quant.export.c_mask import ScorePasses

_WAY_OUT = ("quantize the float encoder with quant.quantize(encoder, quant.calibrate(encoder, batches), "
            "arithmetic='tflm')")


def write_encoder_c(encoder: TransformerEncoder, stem: str, *, batch: int = 1, sequence_length: int,
                    key_length: int | None = None, mask: Any = None, test_vectors: int | None = None
                    ) -> dict[str, str]:
    """The C source files that compute ``encoder`` for sequences of at most ``sequence_length`` tokens.

    Parameters
    ----------
    encoder : TransformerEncoder
        Of static int8 halves of the kernel set "tflm".
    stem : str
        Name of the files before their suffix, and prefix of every name they make known to a linker or a preprocessor.
    batch : int
        1: the function takes a sequence at a time.
    sequence_length : int
        The most tokens.
    key_length : None
    mask : bool array, broadcastable to (1, H, L, L), optional
        True = attend; as attention with ``with_mask(mask)`` computes it.
    test_vectors : int, optional
        How many to write, with a program that checks them.

    Returns
    -------
    dict of str
        File name -> text: ``stem.c`` and ``stem.h``, with test vectors also ``stem_test.c`` and ``stem_test.h``.

    Raises
    ------
    TypeError, ValueError
        Naming the layer or argument that has no such form, and what to do instead.
    """
    check_stem(stem)
    check_encoder(encoder)
    if batch != 1:
        raise ValueError(f"batch must be 1 for an encoder in C, which takes a sequence of any length up to "
                         f"sequence_length at a time: call it for each; got {batch}")
    if key_length is not None:
        raise ValueError(f"key_length must be left out for an encoder, which attends to itself; got {key_length}")
    length = check_lengths(encoder.layers[0].attention, (0, 0, 0), 1, sequence_length, None).queries
    file = _File(stem, carried(encoder, length, mask), length)
    texts = file.texts()
    if test_vectors is not None:
        texts |= encoder_vectors_c(file.encoder, stem, length, test_vectors, shortened)
    return texts


def check_encoder(encoder: TransformerEncoder) -> None:
    """Refuse halves that are not static int8 of TFLite Micro's arithmetic."""
    for i, layer in enumerate(encoder.layers):
        for name, kind in (("attention", StaticSelfAttention), ("feed_forward", StaticFeedForward)):
            half: Any = getattr(layer, name)
            if not isinstance(half, kind):
                of = {"dynamic": "dynamic int8"}.get(getattr(half, "scheme", ""), "float32")
                raise ValueError(f"layers.{i}.{name} must be static int8 for C, whose products are of codes; got a "
                                 f"{of} {type(half).__name__}: {_WAY_OUT}")
            if half.arithmetic != "tflm":
                raise ValueError(f"layers.{i}.{name} must have the arithmetic 'tflm' for C, which equals TFLite Micro; "
                                 f"got {half.arithmetic!r}: {_WAY_OUT}")


def carried(encoder: TransformerEncoder, length: int, mask: Any) -> TransformerEncoder:
    """The encoder whose attention carries masks and windows as a file does: masked scores keep a trace of weight."""
    layers: list[TransformerEncoderLayer] = []
    with prepared(encoder, (1, length), mask) as sequences:
        for i, (layer, (seen,)) in enumerate(zip(encoder.layers, (each.masks for each in sequences), strict=True)):
            keep, of = seen.permitted(), layer.attention.attention
            try:
                of = of if keep is None else masked(of, keep)
            except ValueError as error:
                raise ValueError(f"layers.{i}.attention: {error}") from None
            before = (n for n, other in enumerate(encoder.layers[:i]) if other is layer)
            made = next(before, None)  # a layer that stands there twice is one layer here
            layers.append(layers[made] if made is not None else _with_attention(layer, of))
    return TransformerEncoder(layers, norm=encoder.norm)


def shortened(encoder: TransformerEncoder, length: int) -> TransformerEncoder:
    """An encoder of `carried` for sequences of ``length`` tokens: of its constants of scores the first."""
    def cut(values: Any) -> Any:
        ends = tuple(slice(length if axis >= values.ndim - 2 and size > 1 else None)
                     for axis, size in enumerate(values.shape))
        return np.ascontiguousarray(values[ends])

    def op(of: Any) -> Any:
        if isinstance(of, SelectMask):
            return SelectMask(cut(of.keep), of.fill)
        return AddMask(cut(of.codes), of.mask, of.output) if isinstance(of, AddMask) else of

    layers = []
    for layer in encoder.layers:
        of = layer.attention.attention
        layers.append(_with_attention(layer, StaticMultiHeadAttention(
            of.num_heads, of.linears, of.tensors, score_ops=[op(each) for each in of.score_ops],
            arithmetic=of.arithmetic, query_ops=of.query_ops, key_ops=of.key_ops)))
    return TransformerEncoder(layers, norm=encoder.norm)


def _with_attention(layer: TransformerEncoderLayer, attention: StaticMultiHeadAttention) -> TransformerEncoderLayer:
    # the window stands in the mask now
    rows = StaticSelfAttention(attention, more_inputs=layer.attention.more_inputs)
    return TransformerEncoderLayer(rows, layer.feed_forward, layer.norm1, layer.norm2, norm_first=layer.norm_first)


class _Stage(NamedTuple):
    """What is written once for a layer, and what of it the scratch memory holds, without and with the DSP extension."""

    constants: str
    calls: str
    bytes: tuple[int, int]


class _File:
    """The text of a file, layer by layer."""

    def __init__(self, stem: str, encoder: TransformerEncoder, length: int):
        self.stem, self.prefix, self.encoder, self.length = stem, stem.upper(), encoder, length
        self.linears: list[QuantizedLinear] = []
        self.inner, self.widest, self.columns, self.gated = length, 1, encoder.embed_dim, False
        self.rows = [("tensor", "scale", "zero point")]
        self.notes: set[str] = set()
        self.masks: dict[str, int] = {}

    def texts(self) -> dict[str, str]:
        """File name -> text."""
        E, L = self.encoder.embed_dim, self.length
        made: dict[int, _Stage] = {}
        stages = [made.get(id(layer)) or made.setdefault(id(layer), self.layer(i, layer))
                  for i, layer in enumerate(self.encoder.layers)]
        constants, calls = [stage.constants for stage in made.values()], [stage.calls for stage in stages]
        if self.encoder.norm is not None:
            constants.append(self.norm("last_norm", "The norm behind the last layer", self.encoder.norm))
            calls.append("    /* the norm behind the last layer */\n    last_norm_f32(&last_norm, length, x);\n")
        plain, dsp = (max(stage.bytes[n] for stage in stages) for n in (0, 1))
        sums = 4 * max(L, *(layer.attention.value_dim for layer in self.encoder.layers))
        pairs = pairs_bytes(self.widest, self.inner)
        check_bytes({"scratch memory": max(plain + sums, dsp + pairs) + 4 * self.columns, "output": 4 * L * E})
        names = {"stem": self.stem, "PREFIX": self.prefix, "L": str(L), "E": str(E)}
        rows = fill_template("rows.c", {
            "multiply": fill_template("multiply.c", {}) if self.gated else "",
            "last_norm": fill_template("last_norm.c", {}) if self.encoder.norm is not None else ""})
        note = next(iter(self.notes), "") if len(self.notes) < 2 else ", masked, each layer in its own way"
        source = {**names, "tensor_table": block_comment_lines(self.rows), "rows": rows,
                  "operators": operators(self.prefix, self.linears, self.inner, gated=self.gated),
                  "constants": "\n".join(constants), "stages": "\n".join(calls)}
        header = {**names, "layers": str(len(stages)), "size": str(L * E), "mask_note": note,
                  "features": fill_template("features.h", {"PREFIX": self.prefix}).rstrip("\n"),
                  "sums_bytes": str(sums), "pairs_bytes": str(pairs), "row_floats": str(self.columns),
                  "stage_bytes": str(_up(plain)), "dsp_stage_bytes": str(_up(dsp))}
        check_names(self.stem, "f32", fill_template("encoder.c", source | {"stem": ""}))
        return {f"{self.stem}.c": fill_template("encoder.c", source),
                f"{self.stem}.h": fill_template("encoder.h", header)}

    # -- layers --------------------------------------------------------------------------------------------------------

    def layer(self, i: int, layer: TransformerEncoderLayer) -> _Stage:
        """The parts of a layer, in the order of its forward."""
        constants, calls, sizes = [], [], []
        name, path = f"layer_{i}_", f"layers.{i}."
        for part in parts_of(layer) or ():
            of: Any = None if part.branch is None else part.branch.made_with
            half, make = ("1", self.attention) if isinstance(of, StaticSelfAttention) else ("2", self.feed_forward)
            norms = ["NULL" if norm is None else f"&{name}norm{half}" for norm in (part.first, part.last)]
            constants += [self.norm(f"{name}norm{half}", f"The norm {path}norm{half}", norm.made_with)
                          for norm in (part.first, part.last) if norm is not None]
            stage = make(of, name, path, *norms)
            constants.append(stage.constants)
            calls.append(stage.calls)
            sizes.append(stage.bytes)
        return _Stage("\n".join(constants), "".join(calls), (max(n for n, _ in sizes), max(n for _, n in sizes)))

    def attention(self, rows: StaticSelfAttention, name: str, path: str, first: str, last: str) -> _Stage:
        """x + attention(x), with a norm before or behind it."""
        layer, E, L = rows.attention, rows.embed_dim, self.length
        H, D, DV = layer.num_heads, layer.head_dim, layer.value_dim
        try:
            check_attention(layer, L)
            passes = self.passes(layer, (1, H, L, L))
            made = attention_c(
                layer, passes, self.prefix, name=name, what=f" of {path}attention", title=f"Attention of {path[:-1]}",
                widths={"H * D": str(H * D), "H * DV": str(H * DV), "EO": str(E),
                        **dict.fromkeys(("EQ", "EK", "EV"), str(layer.embed_dim))},
                parameters="const int8_t *codes, int32_t length", feeds=dict.fromkeys(INPUTS, "codes"),
                sizes=f"    enum {{ H = {H}, D = {D}, DV = {DV}, EQ = {layer.embed_dim}, EK = EQ, EV = EQ, S = L }};\n"
                      "    const int32_t queries = length, keys = length;\n")
        except ValueError as error:
            raise ValueError(f"{path}attention: {error}") from None
        self.notes |= {passes.note} - {""}
        self._tensors(f"{path}attention.", layer.tensors)
        self._products(layer.linears.values(), max(widest_input(layer), 1), D, layer.embed_dim)
        result = layer.tensors["output" if made.projected else "context"]
        constants = [made.constants, self.source(f"{name}attention", layer.tensors["query_input"], rows.more_inputs),
                     self.result(f"{name}attention", result, ()), made.function]
        projection = f"&{name}output_linear" if made.projected else "NULL"
        context, rest = L * layer.embed_dim, L * H * DV
        calls = f"""\
    /* {path}attention: codes (length, {layer.embed_dim}), contexts (length, {H * DV}); then a head, or projections */
    read_rows_f32(&{name}attention_source, {first}, x, length, row, memory);
    failed |= {name}attend_s8(memory, length, memory + {context}, buffer, memory + {context + rest});
    failed |= add_contexts_f32({projection}, &{name}attention_result, {last},
                               memory + {context}, {H * DV}, length, x, buffer, row, memory + {context + rest});
"""
        plain, dsp = (context + rest + max(attention_bytes(layer, L, dsp=dsp), E * (DSP_TOKENS if dsp else 1))
                      for dsp in (False, True))
        return _Stage("\n".join(constants), calls, (plain, dsp))

    def passes(self, layer: StaticMultiHeadAttention, shape: tuple[int, int, int, int]) -> ScorePasses:
        """What happens to scores; layers of the same masks have them once."""
        masks = score_passes(layer, shape).constants
        known = masks in self.masks
        name = f"mask_{self.masks.setdefault(masks, len(self.masks))}_"
        passes = score_passes(layer, shape, name=name, any_length=True)
        return dataclasses.replace(passes, constants="") if known else passes

    def feed_forward(self, layer: StaticFeedForward, name: str, path: str, first: str, last: str) -> _Stage:
        """x + feed_forward(x), likewise; large features are a network of their own, which is added first."""
        networks, constants, tokens, most = list(_networks(layer)), [], 0, 0
        for n, of in enumerate(networks):
            own, what = f"{name}network_{n}_", f"{path}feed_forward" + ".large" * (len(networks) - 1 - n)
            constants.append(self.network(of, own, what))
            columns, channels = of.inputs + len(of.more_inputs), of.outputs + len(of.more_outputs)
            tokens += columns
            most = max(most, of.hidden * (2 if of.gated else 1) + channels)
        constants.append(f"static const feed_forward_s8 {name}networks[{len(networks)}] = {{\n"
                         + "".join(self.initializer(of, f"{name}network_{n}_") for n, of in enumerate(networks))
                         + "};\n")
        calls = f"""\
    /* {path}feed_forward */
    failed |= feed_forward_f32({name}networks, {len(networks)}, {first}, {last}, length, x, buffer, row, memory);
"""
        return _Stage("\n".join(constants), calls, (tokens + most, DSP_TOKENS * (tokens + most)))

    # -- parts of layers -----------------------------------------------------------------------------------------------

    def network(self, layer: StaticFeedForward, name: str, what: str) -> str:
        """The constants of a network of a feed-forward."""
        sizes = {"linear1": layer.inputs + len(layer.more_inputs), "linear2": layer.hidden}
        for size in (*sizes.values(), layer.outputs + len(layer.more_outputs)):
            if not 1 <= size <= MAX_WIDTH:
                raise ValueError(f"{what} must have widths from 1 to {MAX_WIDTH} for C; got {size}")
        self._tensors(f"{what}.", layer.tensors)
        self._products(layer.linears.values(), max(sizes.values()), 1, sizes["linear1"])
        self.gated |= layer.gated
        texts = [linear_constants(
            name + linear, f"{linear} of {what}", of, layer.input_of(linear), layer.tensors[layer.product_of(linear)],
            str(len(of.weight)), str(of.weight.shape[1])) for linear, of in layer.linears.items()]
        texts.append(constant("int8_t", f"{name}table_s8", "256", layer.table,
                              f"The activation, {layer.activation}, of the codes -128 to 127."))
        texts += [_more(f"{name}more_inputs_s32", layer.more_inputs,
                        "Of each further column the one that it goes on from."),
                  _more(f"{name}more_outputs_s32", layer.more_outputs,
                        "Of each further output the one that it is added to, and the code that adds nothing.")]
        return "\n".join(text for text in texts if text)

    def initializer(self, layer: StaticFeedForward, name: str) -> str:
        """One of an array of feed_forward_s8."""
        t, product = layer.tensors, "0, 0, 0, 0, 0"
        if layer.gated:
            precision, other = layer.kernel_set.precision, t[layer.product_of("linear1")]
            real = rules.mul_multiplier(precision, t["activation"].scale, other.scale, t["gated"].scale)
            (multiplier,), (shift,) = fixed_point(real, "the product with the gate")
            product = (f"{-t['activation'].zero_point}, {-other.zero_point}, {multiplier}, {shift}, "
                       f"{t['gated'].zero_point}")
        gate = f"&{name}gate_linear" if layer.gated else "NULL"
        return (f"    {{{_source(t['input'], layer.inputs, layer.more_inputs, f'{name}more_inputs_s32')},\n"
                f"     &{name}linear1_linear, &{name}linear2_linear, {gate},\n"
                f"     {name}table_s8, {layer.hidden}, {product},\n"
                f"     {_result(t['linear2'], layer.outputs, layer.more_outputs, f'{name}more_outputs_s32')}}},\n")

    def norm(self, name: str, what: str, norm: Any) -> str:
        """The arrays of a norm, and the struct that points at them."""
        parts = {"weight": norm.weight} | ({} if norm.bias is None else {"bias": norm.bias})
        if not all(np.isfinite(array).all() for array in parts.values()):
            raise ValueError(f"{what.removeprefix('The norm ')} must have finite weights for C")
        texts = [constant("float", f"{name}_{part}_f32", str(len(array)), array, f"{what}, its {part}.")
                 for part, array in parts.items()]
        bias = "NULL" if norm.bias is None else f"{name}_bias_f32"
        texts.append(f"static const norm_f32 {name} = {{{name}_weight_f32, {bias}, {float_literal(norm.eps)}, "
                     f"{int(isinstance(norm, LayerNorm))}}};\n")
        return "\n".join(texts)

    def source(self, name: str, tensor: TensorQuantization, more: tuple[int, ...]) -> str:
        """A source_s8 of its own."""
        array = f"{name}_more_inputs_s32"
        texts = [_more(array, more, "Of each further column the one that it goes on from."),
                 f"static const source_s8 {name}_source =\n"
                 f"    {_source(tensor, self.encoder.embed_dim, more, array)};\n"]
        return "\n".join(text for text in texts if text)

    def result(self, name: str, tensor: TensorQuantization, more: tuple[tuple[int, int], ...]) -> str:
        """A result_s8 of its own."""
        return f"static const result_s8 {name}_result = {_result(tensor, self.encoder.embed_dim, more, '')};\n"

    def _tensors(self, path: str, tensors: dict[str, TensorQuantization]) -> None:
        self.rows += [(path + name, float_literal(tensor.scale)[:-1], str(tensor.zero_point))
                      for name, tensor in tensors.items()]

    def _products(self, linears: Any, widest: int, inner: int, columns: int) -> None:
        self.linears += linears
        self.widest, self.inner = max(self.widest, widest), max(self.inner, inner)
        self.columns = max(self.columns, columns)


def _networks(layer: StaticFeedForward) -> Iterator[StaticFeedForward]:
    """Those of large features before the one they belong to."""
    if layer.large is not None:
        yield from _networks(layer.large)
    yield layer


def _more(name: str, more: Any, comment: str) -> str:
    """The array of further columns or outputs; nothing where there are none."""
    values = np.array(more, np.int32).reshape(-1)
    return constant("int32_t", name, str(len(values)), values, comment) if len(values) else ""


def _source(tensor: TensorQuantization, features: int, more: tuple[int, ...], array: str) -> str:
    inverse = float_literal(np.float32(1) / tensor.scale)
    return (f"{{{float_literal(tensor.scale)}, {inverse}, {tensor.zero_point}, {features + len(more)}, "
            f"{array if more else 'NULL'}}}")


def _result(tensor: TensorQuantization, features: int, more: Any, array: str) -> str:
    return (f"{{{float_literal(tensor.scale)}, {tensor.zero_point}, {features + len(more)}, "
            f"{array if more else 'NULL'}}}")


def _up(size: int) -> int:
    return -(-size // 4) * 4
