"""Calls that come again: what the checks of one found, kept for the next with the same signature.

A signature is what a call's meaning depends on beside the numbers in its large arrays: types, shapes, flags, and what
stands in arrays of a few numbers. Only arguments that kernels read as they are have one. A call without one, or with
one that is new, goes the long way, through every check and conversion, and may leave a `Prepared` behind.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.checks import FLOAT32, write_result
from edgeattn.masks import NO_WINDOW, sum_of_biases
from edgeattn.runtime.plan_cache import PlanCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.types import Bools, Float32s, MaskShapes, Shape

PLAIN = 4  # parts of the signature of a call that no mask but a causal one restricts
_BOOL = np.dtype(np.bool_)
_MOST_KEPT = 1 << 14  # bytes of a mask that a prepared call holds: its lengths written out


def call_signature(query: Any, key: Any, value: Any, attn_mask: Any, key_padding_mask: Any, is_causal: object,
                   causal_alignment: object, window_size: Any, alibi_slopes: Any, kv_lengths: Any = None,
                   dtype: np.dtype[Any] = FLOAT32) -> tuple[Any, ...] | None:
    """The signature of these inputs, of `dtype`, and masks; None where a kernel does not read them as they are."""
    if (not is_read_as_it_is(query, dtype) or key is not query and not is_read_as_it_is(key, dtype)
            or value is not key and not is_read_as_it_is(value, dtype)
            or is_causal is not False and is_causal is not True):
        return None
    key_shape, value_shape = None if key is query else key.shape, None if value is key else value.shape
    if (attn_mask is None and key_padding_mask is None and causal_alignment is None and window_size is NO_WINDOW
            and alibi_slopes is None and kv_lengths is None):
        return query.shape, key_shape, value_shape, is_causal
    if causal_alignment is not None and type(causal_alignment) is not str:
        return None
    if window_size is not NO_WINDOW and not (type(window_size) is tuple and len(window_size) == 2
                                             and type(window_size[0]) is type(window_size[1]) is int):
        return None
    mask = mask_dtype = padding = few = None
    if attn_mask is not None:
        if type(attn_mask) is not np.ndarray:
            return None
        mask, mask_dtype, flags = attn_mask.shape, attn_mask.dtype, attn_mask.flags
        if mask_dtype is not _BOOL and mask_dtype is not FLOAT32 or not flags.c_contiguous or not flags.aligned:
            return None
    if key_padding_mask is not None:
        if (type(key_padding_mask) is not np.ndarray or key_padding_mask.dtype is not _BOOL
                or not key_padding_mask.flags.c_contiguous):
            return None
        padding = key_padding_mask.shape
    if alibi_slopes is not None or kv_lengths is not None:
        few = _content(alibi_slopes, "f"), _content(kv_lengths, "iu")  # a number for each head, for each batch entry
        if False in few:
            return None
    return (query.shape, key_shape, value_shape, is_causal, mask, mask_dtype is FLOAT32, padding, causal_alignment,
            window_size, few)


def is_read_as_it_is(x: object, dtype: np.dtype[Any] = FLOAT32) -> bool:
    """Whether a kernel for `dtype` reads x where it lies: an array in C order."""
    return type(x) is np.ndarray and x.dtype is dtype and x.flags.carray


def _content(array: Any, kinds: str) -> Any:
    """What stands in an array of a dtype of these kinds, to be compared; False of what is none, None of None."""
    if array is None:
        return None
    if type(array) is not np.ndarray or array.dtype.kind not in kinds:
        return False
    return array.dtype, array.shape, array.tobytes()


def _in_four_axes(mask: Shape, scores: Shape) -> Shape | None:
    """The shape of an `attn_mask` beside (B, H, L, S) scores; None where its batch would have to be written out."""
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
    call : callable, optional
        The kernel's, of (query, key, value, result, keep, padding, bias, alibi), the last ones left out where they are
        None, for masks of these shapes.
    adds : bool
        Whether `attn_mask` is added to the scores.
    keep, alibi : array or None
        Of a call's masks what its signature says the whole of.
    position_bias : float32 array or None
        What is added to the scores beside the call's masks.
    """

    __slots__ = ("_adds", "_alibi", "_call", "_dtype", "_keep", "_more", "_position_bias", "shape")

    def __init__(self, shape: Shape, dtype: np.dtype[Any], call: Callable[..., object] | None = None,
                 adds: bool = False, keep: Bools | None = None, alibi: NDArray[np.float64] | None = None,
                 position_bias: Float32s | None = None):
        self.shape, self._dtype, self._call, self._adds, self._keep, self._alibi, self._position_bias = (
            shape, dtype, call, adds, keep, alibi, position_bias)
        self._more = adds or alibi is not None or keep is not None or position_bias is not None

    def takes(self, out: object) -> bool:
        """Whether a kernel can write the result to `out`; None stands for a new array."""
        return out is None or (type(out) is np.ndarray and out.dtype is self._dtype and out.flags.carray
                               and out.shape == self.shape)

    def target(self, out: NDArray[Any] | None, *inputs: NDArray[Any] | None) -> NDArray[Any]:
        """Where a kernel that reads `inputs` is to write: `out`, which it takes, unless it lies over one."""
        return out if out is not None and lies_apart(out, inputs) else np.empty(self.shape, self._dtype)

    def __call__(self, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], out: NDArray[Any] | None,
                 attn_mask: Any, key_padding_mask: Any) -> NDArray[Any]:
        """The result, in `out` if there is one."""
        call: Any = self._call
        if out is None:
            result = np.empty(self.shape, self._dtype)
        else:
            result = self.target(out, query, key, value, attn_mask, key_padding_mask)
        if self._more:
            keep, padding, bias = key_padding_mask, None, None
            if self._adds:
                bias = attn_mask
            elif attn_mask is not None:
                keep, padding = attn_mask, key_padding_mask
            if self._keep is not None:
                keep, padding = (self._keep, None) if keep is None else (keep, self._keep)
            if self._position_bias is not None:
                bias = sum_of_biases(bias, self._position_bias)
            call(query, key, value, result, keep, padding, bias, self._alibi)
        elif attn_mask is not None:
            call(query, key, value, result, attn_mask, key_padding_mask)
        elif key_padding_mask is not None:
            call(query, key, value, result, key_padding_mask)
        else:
            call(query, key, value, result)
        return result if out is None else write_result(result, out, self._dtype)


class PreparedCalls(PlanCache[Any, Prepared]):
    """Of a layer, a cache or the function: the `Prepared` of each signature; `dtype`: of inputs and results."""

    def __init__(self, size: int = 64, dtype: np.dtype[Any] = FLOAT32):
        super().__init__(size)
        self.dtype = dtype

    def find(self, signature: tuple[Any, ...] | None, out: object) -> Prepared | None:
        """That of a signature, where it can give its result in `out`."""
        if signature is None:
            return None
        found = self.get(signature)
        return found if out is None or found is None or found.takes(out) else None

    def learn(self, signature: tuple[Any, ...] | None, prepare: Callable[[MaskShapes], Callable[..., object]],
              scores: Shape, shape: Shape, mask: Mask, attn_mask: Any, key_padding_mask: Any = None,
              position_bias: Float32s | None = None) -> None:
        """Keep what a call of a signature found; not where kernels cannot read its masks as they are.

        prepare : the kernel for masks of such shapes, given as they are.
        scores, shape : of the scores (..., H, L, S) and of the result.
        mask : what the call's masks make.
        position_bias : (1, H, L, S), what is added to the scores beside them.
        """
        if signature is None:
            return
        # of lengths, what they and a band permit is written out once; of slopes, what kernels make of them
        of_few = mask if mask.lengths is None else mask._replace(keep=None, bias=None)
        written, _, band, alibi = of_few.for_kernels()
        if mask.lengths is None:
            written = None
        shapes = [] if written is None else [written.shape]
        bias = None
        if key_padding_mask is not None:
            shapes.insert(0, (mask.shape[0], 1, 1, mask.shape[3]))
        if attn_mask is not None:
            given = _in_four_axes(attn_mask.shape, scores)
            if given is None:
                return
            if attn_mask.dtype is _BOOL:
                shapes.insert(0, given)
            else:
                bias = given
        keep, padding = (*shapes, None, None)[:2]
        if (written is not None and written.nbytes > _MOST_KEPT or len(shapes) > 2
                or padding is not None and padding[2] > 1):
            return
        adds = bias is not None
        if position_bias is not None:
            bias = position_bias.shape if bias is None else np.broadcast_shapes(bias, position_bias.shape)
        call = prepare((keep, padding, bias, band, None if alibi is None else alibi.shape))
        self.keep(signature, Prepared(shape, self.dtype, call, adds, written, alibi, position_bias))

    def learn_step(self, signature: tuple[Any, ...] | None, result: Any) -> None:
        """Keep that a call of one token with a cache, which gave this result, needs no more checks."""
        if signature is not None:
            self.keep(signature, Prepared(result.shape, self.dtype))


def lies_apart(out: NDArray[Any], inputs: Iterable[NDArray[Any] | None]) -> bool:
    """Whether no input changes where `out` is written."""
    alone, last = out.flags.owndata, None
    for array in inputs:
        if array is None or array is last:
            continue
        last = array
        if alone and array is not out and array.flags.owndata:  # each has memory of its own
            continue
        if np.may_share_memory(out, array):
            return False
    return True
