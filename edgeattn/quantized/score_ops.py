"""What an int8 graph does to its scores before the softmax, operator by operator, and all of it as one table."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import numpy as np

from edgeattn import arithmetic as rules
from edgeattn.arithmetic import CODE_MAX, CODE_MIN
from edgeattn.quantized.parameters import TensorQuantization, check_scales, frozen
from edgeattn.quantized.values import Frozen, Value

if TYPE_CHECKING:
    from typing import Any, SupportsIndex, TypeVar

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from edgeattn.types import Bools, Codes

    _Scalar = TypeVar("_Scalar", bound=np.generic)


class MulConstant(Value):
    """Scores times a constant: how other converters write 1/sqrt(D).

    Parameters
    ----------
    code : int
        The constant's int8 code.
    constant, output : TensorQuantization
    """

    code: int
    constant: TensorQuantization
    output: TensorQuantization

    def __init__(self, code: int, constant: TensorQuantization, output: TensorQuantization):
        self.set_fields(code=_code(code, "code"), constant=constant, output=output)
        _check_quantization(self, "constant", "output")


class AddMask(Frozen):
    """Scores plus a constant mask: how other converters write a mask.

    Parameters
    ----------
    codes : int8, broadcastable to (B, H, L, S)
    mask, output : TensorQuantization
    """

    codes: Codes
    mask: TensorQuantization
    output: TensorQuantization

    def __init__(self, codes: Codes, mask: TensorQuantization, output: TensorQuantization):
        self.set_fields(codes=_mask(codes, np.int8, "codes"), mask=mask, output=output)
        _check_quantization(self, "mask", "output")


class SelectMask(Frozen):
    """Scores where permitted, a fill code elsewhere: how our exporter writes a mask. Keeps the scores' quantization.

    Parameters
    ----------
    keep : bool, broadcastable to (B, H, L, S)
        True = attend.
    fill : int
        The code of a masked score: the lowest, -128.
    """

    keep: Bools
    fill: int

    def __init__(self, keep: Bools, fill: int = CODE_MIN):
        self.set_fields(keep=_mask(keep, np.bool_, "keep"), fill=_code(fill, "fill"))


class Requantize(Value):
    """The same scores in another quantization, as converters make them fit a mask's: QUANTIZE of codes.

    Parameters
    ----------
    output : TensorQuantization
    """

    output: TensorQuantization

    def __init__(self, output: TensorQuantization):
        self.set_fields(output=output)
        _check_quantization(self, "output")


ScoreOp = MulConstant | AddMask | SelectMask | Requantize
SCORE_OPS = {op.__name__: op for op in (MulConstant, AddMask, SelectMask, Requantize)}
# Masks may be as small as what broadcasts, and have a class for each position together: a causal one beside the padding
# of 16 sequences grows sixteenfold.
_POSITIONS, _GROWTH = 2**22, 16
_MOST_OPS = 64
_MOST_CLASSES = 256  # they are numbered in a byte
_LARGEST_MULTIPLIER = 2.0**31


def _check_quantization(op: ScoreOp, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(op, name), TensorQuantization):
            raise TypeError(f"{name} of {type(op).__name__} must be a scale and a zero point; got "
                            f"{type(getattr(op, name)).__name__}")


def _mask(array: ArrayLike, dtype: DTypeLike, name: str) -> NDArray[Any]:
    array = frozen(array, dtype, name)
    if array.ndim > 4:
        raise ValueError(f"{name} must broadcast to (B, H, L, S); got shape {array.shape}")
    return array


def _code(value: SupportsIndex, name: str) -> int:
    """An int8 code as a Python int."""
    value = operator.index(value)
    if not CODE_MIN <= value <= CODE_MAX:
        raise ValueError(f"{name} must lie in [-128, 127]; got {value}")
    return value


def check_masks(ops: tuple[ScoreOp, ...], num_heads: int, name: str) -> None:
    """Refuse masks that broadcast to no (B, H, L, S) with this H, or not together, and more than a layer can need.

    The message calls them ``name``.

    Raises
    ------
    ValueError
    """
    shapes = [op.codes.shape if isinstance(op, AddMask) else op.keep.shape for op in ops
              if isinstance(op, AddMask | SelectMask)]
    try:
        together = np.broadcast_shapes((1, num_heads, 1, 1), *shapes)
    except ValueError:
        together = ()
    if together[1:2] != (num_heads,) or 0 in together:
        raise ValueError(f"{name} must broadcast to (B, H, L, S) with H = {num_heads} and no empty axis; got shape "
                         f"{' beside '.join(map(str, reversed(shapes)))}")
    positions, most = math.prod(np.broadcast_shapes(*shapes)), _POSITIONS + _GROWTH * sum(map(math.prod, shapes))
    if len(ops) > _MOST_OPS or positions > most:
        raise ValueError(f"{name} must be at most {_MOST_OPS} operators, and broadcast together to at most {most} "
                         f"positions; got {len(ops)} operators and {positions} positions")


def check_scaling(ops: tuple[MulConstant, ...], name: str) -> None:
    """Refuse what cannot be between a projection and a product; the message calls it ``name``.

    Raises
    ------
    TypeError, ValueError
    """
    if not all(isinstance(op, MulConstant) for op in ops):
        raise TypeError(f"{name} must be MulConstant; got {', '.join(type(op).__name__ for op in ops)}")
    if len(ops) > _MOST_OPS:
        raise ValueError(f"{name} must be at most {_MOST_OPS} operators; got {len(ops)}")
    for op in ops:
        check_scales({f"the constant in {name}": op.constant, f"the output in {name}": op.output})


def fit_mask(mask: NDArray[_Scalar], shape: tuple[int, ...]) -> NDArray[_Scalar]:
    """A mask that a layer carries, or what was made of it, as a view of shape (B, H, L, S).

    Raises
    ------
    ValueError
        When it does not broadcast.
    """
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"the mask this layer carries has shape {mask.shape}, which does not broadcast to "
                         f"(B, H, L, S) = {shape}; call the layer with the lengths the mask was made for") from None


def _check_multiplier(real: float, name: str) -> None:
    if not real < _LARGEST_MULTIPLIER:
        raise ValueError(f"{name} must have input scales over output scale below 2**31; got {real:.3g}")


def _check_add(scale: np.float32, op: AddMask, kernel_set: rules.KernelSet) -> None:
    """Refuse what the runtime does not survive: TFLite's ADD takes 2**20 times its output's scale in float32."""
    output = op.output.scale
    xnnpack = kernel_set.add == "xnn_add" == rules.elementwise_rule(
        kernel_set.add, scale / output, op.mask.scale / output)
    if kernel_set.precision is np.float32 and not xnnpack and output >= 2.0**108:
        raise ValueError("AddMask must have an output scale below 2**108, from which on the ADD of "
                         f"{kernel_set.runtime} ends the process; got {output:.3g}. Convert without the mask, and pass "
                         "it to each call")


def score_map(ops: tuple[ScoreOp, ...], scores: TensorQuantization, kernel_set: rules.KernelSet
              ) -> tuple[Codes, NDArray[np.uint8], TensorQuantization]:
    """Any chain of elementwise operators on int8 scores, as one table per class of position.

    Returns
    -------
    score_luts : int8 (n, 256)
        ``score_luts[index, code + 128]`` is the code the softmax sees.
    lut_index : uint8, broadcastable to (B, H, L, S)
    quantization : TensorQuantization
        Of their entries.
    """
    score_luts = np.arange(CODE_MIN, CODE_MAX + 1, dtype=np.int8)[None]
    lut_index: NDArray[Any] = np.zeros((1, 1, 1, 1), np.uint16)
    for op in ops:
        q = (scores.scale, scores.zero_point)
        if isinstance(op, MulConstant):
            to = (op.output.scale, op.output.zero_point)
            constant = (op.constant.scale, op.constant.zero_point)
            _check_multiplier(float(q[0]) * float(constant[0]) / float(to[0]), "MulConstant")
            score_luts = rules.mul_codes(kernel_set.mul, kernel_set.precision, score_luts, q, op.code, constant, to)
            scores = op.output
            continue
        if isinstance(op, Requantize):
            _check_multiplier(float(q[0]) / float(op.output.scale), "Requantize")
            score_luts = rules.convert_codes(kernel_set.convert, score_luts, q, (op.output.scale, op.output.zero_point))
            scores = op.output
            continue
        # one class per pair of a class so far and a value of the mask
        mask = op.codes if isinstance(op, AddMask) else op.keep
        values, index = np.unique(mask, return_inverse=True)
        index = index.reshape((1,) * (4 - mask.ndim) + mask.shape).astype(np.uint16)
        if len(score_luts) * len(values) > _MOST_CLASSES:
            raise ValueError(f"score_ops distinguish {len(score_luts) * len(values)} kinds of position; at most "
                             f"{_MOST_CLASSES} are supported")
        lut_index = lut_index * np.uint16(len(values)) + index
        if isinstance(op, AddMask):
            to = (op.output.scale, op.output.zero_point)
            _check_multiplier(max(float(q[0]), float(op.mask.scale)) / float(to[0]), "AddMask")
            _check_add(q[0], op, kernel_set)
            mapped = [rules.add_codes(kernel_set.add, score_luts, q, value, (op.mask.scale, op.mask.zero_point), to)
                      for value in values]
            scores = op.output
        else:
            mapped = [score_luts if keep else np.full_like(score_luts, op.fill) for keep in values]
        score_luts = np.stack(mapped, axis=1).reshape(-1, 256)
    return score_luts, lut_index.astype(np.uint8), scores
