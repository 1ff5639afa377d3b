"""Calls that come again: what the checks of one found, kept for the next with the same signature.

A signature is what a call's meaning depends on beside the numbers in its large arrays: types, shapes, flags, and what
stands in arrays of a few numbers. Only arguments that kernels read as they are have one. A call without one, or with
one that is new, goes the long way, through every check and conversion, and may leave a `Prepared` behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.checks import FLOAT32, write_result
from edgeattn.masks import NO_WINDOW, fit_attn_mask, sum_of_biases
from edgeattn.runtime.plan_cache import PlanCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.types import Float32s, Shape

_BOOL = np.dtype(np.bool_)


def call_signature(query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any, is_causal: object,
                   causal_alignment: object, window_size: Any, alibi_slopes: Any) -> tuple[Any, ...] | None:
    """The signature of these inputs and masks; None where a kernel does not read them as they are."""
    if (not is_read_as_it_is(query) or key is not query and not is_read_as_it_is(key)
            or value is not key and not is_read_as_it_is(value)):
        return None
    shapes = query.shape, None if key is query else key.shape, None if value is key else value.shape
    if is_causal is not False and is_causal is not True:
        return None
    if (attn_mask is None and key_padding_mask is None and causal_alignment is None and window_size is NO_WINDOW
            and alibi_slopes is None):
        return *shapes, is_causal
    if causal_alignment is not None and type(causal_alignment) is not str:
        return None
    if window_size is not NO_WINDOW and not (type(window_size) is tuple and len(window_size) == 2
                                             and type(window_size[0]) is type(window_size[1]) is int):
        return None
    mask = padding = slopes = None
    if attn_mask is not None:
        if not _is_mask(attn_mask) or (attn_mask.dtype is not _BOOL and attn_mask.dtype is not FLOAT32):
            return None
        mask = attn_mask.dtype is _BOOL, attn_mask.shape
    if key_padding_mask is not None:
        if not _is_mask(key_padding_mask) or key_padding_mask.dtype is not _BOOL:
            return None
        padding = key_padding_mask.shape
    if alibi_slopes is not None:
        if type(alibi_slopes) is not np.ndarray or alibi_slopes.dtype is not FLOAT32:
            return None
        slopes = alibi_slopes.shape, alibi_slopes.tobytes()  # a number for each head
    return *shapes, is_causal, mask, padding, causal_alignment, window_size, slopes


def is_read_as_it_is(x: object) -> bool:
    """Whether a float32 kernel reads x where it lies: an array in C order."""
    return type(x) is np.ndarray and x.dtype is FLOAT32 and x.flags.carray


def _is_mask(mask: object) -> bool:
    """Whether a kernel reads a mask where it lies, if it knows the dtype."""
    return type(mask) is np.ndarray and (flags := mask.flags).c_contiguous and flags.aligned


class Prepared:
    """What the checks of a call found, for all calls with its signature.

    Parameters
    ----------
    call : callable
        (query, key, value, result, keep, bias, alibi): the kernel's, for masks of these shapes.
    shape : tuple of int
        Of the result.
    mask : Mask
        What the call's masks make.
    attn_mask, key_padding_mask : array or None
        The call's.
    position_bias : float32 array or None
        What is added to scores beside the call's masks.
    """

    __slots__ = ("_alibi", "_bias", "_call", "_shape", "_together")

    def __init__(self, call: Callable[..., object], shape: Shape, mask: Mask, attn_mask: NDArray[Any] | None,
                 key_padding_mask: NDArray[Any] | None, position_bias: Float32s | None):
        self._bias = position_bias
        self._call, self._shape, self._alibi = call, shape, mask.for_kernels()[3]
        self._together: tuple[Shape, Shape] | None = None  # the shapes in which two bool masks become one
        if attn_mask is not None and attn_mask.dtype is _BOOL and key_padding_mask is not None:
            batch, _, _, keys = mask.shape
            self._together = (1,) * (4 - attn_mask.ndim) + attn_mask.shape, (batch, 1, 1, keys)

    def takes(self, out: object) -> bool:
        """Whether a kernel can write the result to `out`; None stands for a new array."""
        return out is None or (type(out) is np.ndarray and out.dtype is FLOAT32 and out.flags.carray
                               and out.shape == self._shape)

    def __call__(self, query: Float32s, key: Float32s, value: Float32s, out: Float32s | None,
                 attn_mask: Any, key_padding_mask: Any) -> Float32s:
        """The result, in `out` if there is one."""
        keep, bias = key_padding_mask, None
        if attn_mask is not None:
            if attn_mask.dtype is FLOAT32:
                bias = attn_mask
            elif keep is None:
                keep = attn_mask
            elif self._together is not None:
                shape, of_keys = self._together
                keep = np.bitwise_and(attn_mask.reshape(shape), keep.reshape(of_keys), order="C")
        if self._bias is not None:
            bias = sum_of_biases(bias, self._bias)
        if out is not None and lies_apart(out, (query, key, value, keep, bias)):
            result = out
        else:
            result = np.empty(self._shape, FLOAT32)
        self._call(query, key, value, result, keep, bias, self._alibi)
        return write_result(result, out, FLOAT32)


class PreparedCalls(PlanCache[Any, Prepared]):
    """Of a layer, or of the function: the `Prepared` of each signature."""

    def find(self, signature: tuple[Any, ...] | None, out: object) -> Prepared | None:
        """That of a signature, where it can give its result in `out`."""
        found = None if signature is None else self.get(signature)
        return found if found is not None and found.takes(out) else None

    def learn(self, signature: tuple[Any, ...] | None, scores: Shape, call: Callable[..., object], shape: Shape,
              mask: Mask, attn_mask: Any, key_padding_mask: Any = None, position_bias: Float32s | None = None) -> None:
        """Keep a `Prepared` of these; not where kernels read no `attn_mask` as it is: an axis must be repeated."""
        if signature is not None and (
                attn_mask is None or fit_attn_mask(attn_mask.shape, scores, attn_mask.dtype is _BOOL)[0] is None):
            self.keep(signature, Prepared(call, shape, mask, attn_mask, key_padding_mask, position_bias))


def lies_apart(out: NDArray[Any], inputs: Iterable[NDArray[Any] | None]) -> bool:
    """Whether no input changes where `out` is written."""
    alone = out.flags.owndata
    for array in inputs:
        if array is None or alone and array is not out and array.flags.owndata:  # each has memory of its own
            continue
        if np.may_share_memory(out, array):
            return False
    return True
