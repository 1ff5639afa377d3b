"""Calls that come again: what the checks of one found, kept for the next with the same signature.

A signature is what a call's meaning depends on beside the numbers in its large arrays: types, shapes, flags, and what
stands in arrays of a few numbers. Only arguments that kernels read as they are have one. A call without one, or with
one that is new, goes the long way, through every check and conversion, and may leave a `Prepared` behind.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from edgeattn.checks import FLOAT32, write_result
from edgeattn.masks import NO_WINDOW, sum_of_biases
from edgeattn.runtime.plan_cache import PlanCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from edgeattn.kernels.cpu.call import PreparedCall
    from edgeattn.masks import Mask
    from edgeattn.types import Bools, Float32s, MaskShapes, Shape

PLAIN = 5  # parts of the signature of a call that no mask but a causal one restricts
_BOOL = np.dtype(np.bool_)
_KEEP, _BIAS, _ALIBI = 4, 6, 7  # places of masks in the kernels' records of addresses; what else is kept stands at 5
_MOST_KEPT = 1 << 14  # bytes of a mask that a prepared call holds: its lengths written out


def call_signature(query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any, is_causal: object,
                   causal_alignment: object, window_size: Any, alibi_slopes: Any, kv_lengths: Any = None,
                   dtype: np.dtype[Any] = FLOAT32, others: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """The signature of these inputs, of `dtype`, and masks; None where a kernel does not read them as they are.

    That of self-attention without masks is the input's shape alone.  others : what else the call's meaning depends on
    """
    if type(query) is not ndarray or query.dtype is not dtype or not query.flags.carray:
        return None
    key_shape = value_shape = None
    if key is not query:
        if type(key) is not ndarray or key.dtype is not dtype or not key.flags.carray:
            return None
        key_shape = key.shape
    if value is not key:
        if type(value) is not ndarray or value.dtype is not dtype or not value.flags.carray:
            return None
        value_shape = value.shape
    if is_causal is not False and is_causal is not True:
        return None
    if (attn_mask is None and key_padding_mask is None and causal_alignment is None and window_size is NO_WINDOW
            and alibi_slopes is None and kv_lengths is None):
        if key_shape is None and value_shape is None and is_causal is False and not others:
            return tuple(query.shape)
        return query.shape, key_shape, value_shape, is_causal, others
    if causal_alignment is not None and type(causal_alignment) is not str:
        return None
    if window_size is not NO_WINDOW and not (type(window_size) is tuple and len(window_size) == 2
                                             and type(window_size[0]) is type(window_size[1]) is int):
        return None
    mask = adds = padding = few = None
    if attn_mask is not None:
        if type(attn_mask) is not ndarray:
            return None
        mask, mask_dtype, flags = attn_mask.shape, attn_mask.dtype, attn_mask.flags
        adds = mask_dtype is FLOAT32
        if not adds and mask_dtype is not _BOOL or not flags.c_contiguous or not flags.aligned:
            return None
    if key_padding_mask is not None:
        if (type(key_padding_mask) is not ndarray or key_padding_mask.dtype is not _BOOL
                or not key_padding_mask.flags.c_contiguous):
            return None
        padding = key_padding_mask.shape
    if alibi_slopes is not None or kv_lengths is not None:
        few = _content(alibi_slopes, "f"), _content(kv_lengths, "iu")  # a number for each head, for each batch entry
        if False in few:
            return None
    return (query.shape, key_shape, value_shape, is_causal, others, mask, adds, padding, causal_alignment, window_size,
            few)


def plain_inputs(signature: tuple[Any, ...]) -> tuple[Any, Any, Any] | None:
    """The shapes of query, key and value in a signature without masks but a causal one; None of another.

    None stands for those of the input before it.
    """
    if signature and type(signature[0]) is int:
        return signature, None, None
    return signature[:3] if len(signature) == PLAIN else None


def is_read_as_it_is(x: object, dtype: np.dtype[Any] = FLOAT32) -> bool:
    """Whether a kernel for `dtype` reads x where it lies: an array in C order."""
    return type(x) is ndarray and x.dtype is dtype and x.flags.carray


def _content(array: Any, kinds: str) -> Any:
    """What stands in an array of a dtype of these kinds, to be compared; False of what is none, None of None."""
    if array is None:
        return None
    if type(array) is not np.ndarray or array.dtype.kind not in kinds:
        return False
    return array.dtype, array.shape, array.tobytes()


def _in_four_axes(mask: Shape, scores: Shape) -> Shape | None:
    """The shape of an `attn_mask` beside (B, H, L, S) scores; None where its batch would have to be written out."""
    if mask == scores[-2:]:  # what most are
        return 1, 1, *mask
    *lead, heads, queries, keys = (1,) * (len(scores) - len(mask)) + mask
    if any(axis != 1 for axis in lead) and tuple(lead) != scores[:-3]:
        return None
    return math.prod(lead), heads, queries, keys


class Prepared:
    """What the checks of a call found, for all calls with its signature.

    Parameters
    ----------
    shape, dtype
        Of the result.
    call : PreparedCall, optional
        The kernel's, of (query, key, value, result, keep, padding, bias), the last ones left out where it holds them or
        they are None, for masks of these shapes.
    adds : bool
        Whether `attn_mask` is added to the scores.
    keep, position_bias : array or None
        Where a call's mask is added: what else its signature says the whole of, and what is added beside it.
    """

    __slots__ = ("_adds", "_dtype", "_keep", "_position_bias", "call", "shape")

    def __init__(self, shape: Shape, dtype: np.dtype[Any], call: PreparedCall | None = None, adds: bool = False,
                 keep: Bools | None = None, position_bias: Float32s | None = None):
        self.shape, self._dtype, self.call, self._adds, self._keep, self._position_bias = (
            shape, dtype, call, adds, keep, position_bias)

    def target(self, out: Any, *inputs: NDArray[Any] | None) -> NDArray[Any] | None:
        """Where a kernel that reads `inputs` writes the result: `out`, or a new array; None if `out` cannot take it."""
        if out is None:
            return np.empty(self.shape, self._dtype)
        if type(out) is not ndarray or out.dtype is not self._dtype or not out.flags.carray or out.shape != self.shape:
            return None
        return out if lies_apart(out, inputs) else np.empty(self.shape, self._dtype)

    def run(self, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], out: Any, attn_mask: Any,
            key_padding_mask: Any) -> NDArray[Any] | None:
        """The result, in `out` if there is one; None where that cannot take it as it is."""
        result = (np.empty(self.shape, self._dtype) if out is None else
                  self.target(out, query, key, value, attn_mask, key_padding_mask))
        if result is None:
            return None
        call: Any = self.call
        if self._adds:
            keep, padding = (key_padding_mask, self._keep) if key_padding_mask is not None else (self._keep, None)
            bias = attn_mask if self._position_bias is None else sum_of_biases(attn_mask, self._position_bias)
            call.run(query, key, value, result, keep, padding, bias)
        elif attn_mask is None:
            if key_padding_mask is None:
                call.run_four(query, key, value, result)
            else:
                call.run(query, key, value, result, key_padding_mask)
        elif key_padding_mask is None:
            call.run(query, key, value, result, attn_mask)
        else:
            call.run(query, key, value, result, attn_mask, key_padding_mask)
        return result if out is None else write_result(result, out, self._dtype)


class PreparedCalls(PlanCache[Any, Prepared]):
    """Of a layer, a cache or the function: the `Prepared` of each signature; `dtype`: of inputs and results."""

    __slots__ = ("dtype",)

    def __init__(self, size: int = 64, dtype: np.dtype[Any] = FLOAT32):
        super().__init__(size)
        self.dtype = dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._size, self.dtype)

    def learn(self, signature: tuple[Any, ...] | None, prepare: Callable[[MaskShapes], PreparedCall],
              scores: Shape, shape: Shape, mask: Mask, attn_mask: Any, key_padding_mask: Any = None,
              position_bias: Float32s | None = None) -> Prepared | None:
        """Keep what a call of a signature found, and return it; None where kernels cannot read its masks as they are.

        prepare : the kernel for masks of such shapes, given as they are.
        scores, shape : of the scores (..., H, L, S) and of the result.
        mask : what the call's masks make.
        position_bias : (1, H, L, S), what is added to the scores beside them.
        """
        if signature is None:
            return None
        # of lengths, what they and a band permit is written out once; of slopes, what kernels make of them
        written = band = None
        if mask.lengths is None:
            band = mask.band()
        else:
            written = np.ascontiguousarray(mask.permitted_by_position())
        alibi = mask.alibi()
        shapes = [] if written is None else [written.shape]
        bias = None
        if key_padding_mask is not None:
            shapes.insert(0, (mask.shape[0], 1, 1, mask.shape[3]))
        if attn_mask is not None:
            given = _in_four_axes(attn_mask.shape, scores)
            if given is None:
                return None
            if attn_mask.dtype is _BOOL:
                shapes.insert(0, given)
            else:
                bias = given
        keep, padding = (*shapes, None, None)[:2]
        if (written is not None and written.nbytes > _MOST_KEPT or len(shapes) > 2
                or padding is not None and padding[2] > 1):
            return None
        adds = bias is not None
        held: dict[int, NDArray[Any]] = {}
        if position_bias is not None:
            if not adds:
                held[_BIAS] = position_bias
            bias = position_bias.shape if bias is None else np.broadcast_shapes(bias, position_bias.shape)
        if written is not None and not adds:
            held[_KEEP + len(shapes) - 1] = written
        if alibi is not None:
            held[_ALIBI] = alibi
        call = prepare((keep, padding, bias, band, None if alibi is None else alibi.shape))
        if held:
            call = call.holding(held)
        return self.keep(signature, Prepared(shape, self.dtype, call, adds, written if adds else None,
                                             position_bias if adds else None))

    def learn_step(self, signature: tuple[Any, ...] | None, result: Any) -> None:
        """Keep that a call of one token with a cache, which gave this result, needs no more checks."""
        if signature is not None:
            self.keep(signature, Prepared(result.shape, self.dtype))


def lies_apart(out: NDArray[Any], inputs: Iterable[NDArray[Any] | None]) -> bool:
    """Whether no input changes where `out` is written."""
    alone, last = out.flags.owndata, None
    for array in inputs:
        if array is last or array is None:
            continue
        last = array
        if alone and array is not out and array.flags.owndata:  # each has memory of its own
            continue
        if np.may_share_memory(out, array):
            return False
    return True
