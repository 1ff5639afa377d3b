"""Static layers between the float rows of an exported encoder, whatever a file's operators are called."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from edgeattn.layers import attention as layers_attention
from edgeattn.ops import Sequences
from edgeattn.quantized import StaticFeedForward, StaticSelfAttention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeattn.layers import TransformerEncoder
    from edgeattn.ops import Ops
    from edgeattn.quantized import StaticMultiHeadAttention, TensorQuantization

T = TypeVar("T")
PADDING = "attention_mask"  # the input that says which tokens are none, by transformers' name: 1 = token, 0 = padding


class StaticBetweenRows(Generic[T]):
    """`Ops.static` of an executor that writes a file, and what that is written in."""

    padding: Any = None  # which keys are tokens; None where all are

    def static(self, x: T, layer: Any, sequences: Sequences | None, name: str) -> T:
        """A static layer between codes of rows, and the rows of its codes."""
        if isinstance(layer, StaticSelfAttention) and sequences is not None:
            of, (mask,) = layer.attention, sequences.masks
            keep = mask.permitted()
            if mask.bias is not None:
                raise ValueError("mask must be bool (True = attend) for static attention, whose scores are codes; got "
                                 "numbers that are added")
            if self.padding is not None:
                check_room(of, "padding")
            if keep is not None:
                of = masked(of, keep)
            codes = self._codes(x, of.tensors["query_input"], layer.embed_dim, layer.more_inputs, f"{name}input")
            ops = self.codes_ops(of, name)
            return self.reals(layers_attention.forward(ops, of, codes, codes, codes, Sequences([])), f"{name}reals")
        if not isinstance(layer, StaticFeedForward):
            raise TypeError(f"layer must be a StaticSelfAttention or StaticFeedForward; got {type(layer).__name__}")
        codes = self._codes(x, layer.tensors["input"], layer.inputs, layer.more_inputs, f"{name}input")
        y = self._outputs(layer, layer.forward_codes(self.codes_ops(layer, name), codes), name)
        if layer.large is not None:
            y = self.add(y, self.static(x, layer.large, None, f"{name}large."), f"{name}with_large")
        return y

    def _codes(self, x: T, quantization: TensorQuantization, features: int, more: tuple[int, ...], name: str) -> T:
        """Codes of rows, those of what their range leaves of some columns behind them."""
        codes = self.quantized(x, quantization, name)
        if not more:
            return codes
        reals, parts, order = x, [codes], list(range(features))
        at = {column: column for column in order}  # where a column stands in `reals` and in the codes of it
        pending = list(enumerate(more, features))
        while pending:
            now = [(column, source) for column, source in pending if source in at]
            sources, step = [at[source] for _, source in now], f"{name}/rest{len(parts)}"
            chosen = self.columns(reals, sources, f"{step}/columns")
            kept = self.reals(self.quantized(chosen, quantization, f"{step}/codes"), f"{step}/held")
            reals = self.subtract(chosen, kept, step)
            parts.append(self.quantized(reals, quantization, f"{step}/quantized"))
            order += [column for column, _ in now]
            at = {column: i for i, (column, _) in enumerate(now)}
            pending = [pair for pair in pending if pair not in now]
        codes = self.joined(parts, f"{name}/joined")
        return codes if order == sorted(order) else self.columns(codes, np.argsort(order), f"{name}/ordered")

    def _outputs(self, layer: StaticFeedForward, codes: T, name: str) -> T:
        """The reals of outputs, each with what those behind them add to it."""
        if not layer.more_outputs:
            return self.reals(codes, f"{name}reals")
        quantization, outputs = layer.tensors["linear2"], layer.outputs
        main, more = (self.reals(self.part(codes, first, size, f"{name}{part}/codes"), f"{name}{part}")
                      for part, first, size in (("reals", 0, outputs), ("more", outputs, len(layer.more_outputs))))
        channels = [channel for channel, _ in layer.more_outputs]
        moved = np.zeros(outputs, np.float32)
        np.subtract.at(moved, channels, quantization.dequantize([none for _, none in layer.more_outputs]))
        return self.add(main, self.narrow(more, scatter(channels, outputs), moved, f"{name}added"), f"{name}whole")

    if TYPE_CHECKING:  # what an executor has: an executor upon codes, and a few operations on rows and codes

        def codes_ops(self, layer: Any, name: str) -> Ops[T]: ...  # noqa: D102
        def quantized(self, x: T, quantization: TensorQuantization, name: str) -> T: ...  # noqa: D102
        def reals(self, codes: T, name: str) -> T: ...  # noqa: D102
        def columns(self, x: T, columns: Any, name: str) -> T: ...  # noqa: D102
        def part(self, x: T, first: int, size: int, name: str) -> T: ...  # noqa: D102
        def joined(self, parts: list[T], name: str) -> T: ...  # noqa: D102
        def narrow(self, x: T, weight: np.ndarray, bias: np.ndarray | None, name: str) -> T: ...  # noqa: D102
        def add(self, a: T, b: T, name: str) -> T: ...  # noqa: D102
        def subtract(self, a: T, b: T, name: str) -> T: ...  # noqa: D102


def masked(attention: StaticMultiHeadAttention, keep: Any) -> StaticMultiHeadAttention:
    """The attention of a static encoder with a mask of its own."""
    check_room(attention)
    return attention.with_mask(keep)


def check_room(attention: StaticMultiHeadAttention, given: str = "mask") -> None:
    """Refuse a mask, or padding, of scores that leave no room below for masked ones."""
    if attention.mask_margin == 0:
        raise ValueError(f"{given} needs attention whose scores leave room below for masked ones: quantize with "
                         "room_for_masks=True, or with attention='float32'")


def scatter(channels: Any, outputs: int) -> np.ndarray:
    """(outputs, columns): each column is added to the channel that it has."""
    weight = np.zeros((outputs, len(channels)), np.float32)
    weight[channels, np.arange(len(channels))] = 1
    return weight


@contextlib.contextmanager
def prepared(encoder: TransformerEncoder, shape: tuple[int, int], mask: Any) -> Iterator[list[Sequences]]:
    """What the tokens of each layer see under the mask of a file."""
    with contextlib.ExitStack() as entered:
        try:
            sequences = entered.enter_context(encoder.prepared(shape, attn_mask=mask))
        except ValueError as error:
            raise ValueError(f"{error}; export with the lengths the mask was made for".removeprefix("attn_")) from None
        yield sequences
