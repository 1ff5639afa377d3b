"""Which keys a query may see: every way of saying so, checked and brought into one form."""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeattn.checks import FLOAT32, as_array, count, flag, float_array, is_one_of, to_float32
from edgeattn.kernels.cpu.records import NO_MASK, KernelMask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, SupportsIndex

    from numpy.typing import ArrayLike, NDArray

    from edgeattn.types import Bools, CausalAlignment, Flag, Float32s, Floats, Shape, Window


NO_WINDOW = (-1, -1)
_LARGEST = np.finfo(np.float32).max
_ALIGNMENTS = ("upper_left", "lower_right")


class Mask(NamedTuple):
    """What is permitted between L queries and S keys, in the form that kernels read.

    Query i of batch entry b has the position p = i + offset (or offset[b]). It may see key j when all of these hold:
    lengths is None or j < lengths[b]; p - left <= j <= p + right (a bound of -1 is none); keep is None or True
    there; bias is None or not -inf there.

    Attributes
    ----------
    shape : tuple of int
        (B, H, L, S).
    keep : (B or 1, H or 1, L or 1, S) bool array or None
        True = attend. Like `bias` read-only and in C order.
    bias : (B or 1, H or 1, L or 1, S) float32 array or None
        Added to the scaled and softcapped scores.
    slopes : (B or 1, H) float32 array or None
        -slope * |p - j| is added too: kernels compute it, as an array it would have H L S elements.
    left, right : int
        Keys seen before and after the query's own position, -1 = unbounded.
    offset : int or (B,) int64 array
        The position of query 0. An int where `lengths` is None.
    lengths : (B,) int64 array or None
        The number of leading keys that exist; None where all do.
    """

    shape: tuple[int, int, int, int]
    keep: Bools | None
    bias: Float32s | None
    slopes: Float32s | None
    left: int
    right: int
    offset: int | NDArray[np.int64]
    lengths: NDArray[np.int64] | None

    def permitted(self) -> Bools | None:
        """All conditions as one array.

        Returns
        -------
        (B or 1, H or 1, L or 1, S) bool array or None
            True = attend; None when every query may see every key.
        """
        parts = self._by_position()
        if self.keep is not None:
            parts.append(self.keep)
        if self.bias is not None:
            parts.append(self.bias != -np.inf)
        return _together(parts)

    def permitted_by_position(self) -> Bools | None:
        """What lengths and bounds permit, as `permitted`."""
        return _together(self._by_position())

    def _by_position(self) -> list[Bools]:
        _, _, queries, keys = self.shape
        column, parts = np.arange(keys), []
        if self.lengths is not None:
            parts.append(column < self.lengths.reshape(-1, 1, 1, 1))
        if self.left >= 0 or self.right >= 0:
            position = np.arange(queries)[:, None] + np.reshape(self.offset, (-1, 1, 1, 1))
            if self.left >= 0:
                parts.append(column >= position - self.left)
            if self.right >= 0:
                parts.append(column <= position + self.right)
        return parts

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> Mask:
        """The same conditions for some of the queries and keys.

        Parameters
        ----------
        rows, columns : (int, int)
            First and one past the last, of the L queries and of the S keys.

        Returns
        -------
        Mask
        """
        batch, heads, _, _ = self.shape

        def cut(array: NDArray[Any] | None) -> NDArray[Any] | None:
            if array is None:
                return None
            if array.shape[2] > 1:
                array = array[:, :, slice(*rows)]
            return _read_only(np.ascontiguousarray(array[..., slice(*columns)]))

        size = columns[1] - columns[0]
        return self._replace(
            shape=(batch, heads, rows[1] - rows[0], size),
            keep=cut(self.keep),
            bias=cut(self.bias),
            offset=self.offset + rows[0] - columns[0],
            lengths=None if self.lengths is None else np.clip(self.lengths - columns[0], 0, size),
        )

    def with_keys(self, extra: int) -> Mask:
        """The same conditions, and `extra` further keys at the end that every query may see.

        Returns
        -------
        Mask
        """
        batch, heads, queries, keys = self.shape

        def widen(array: NDArray[Any] | None, value: float) -> NDArray[Any] | None:
            if array is None:
                return None
            return _read_only(np.pad(np.ascontiguousarray(array), ((0, 0), (0, 0), (0, 0), (0, extra)),
                                     constant_values=value))

        return Mask((batch, heads, queries, keys + extra), widen(self.permitted(), True),
                    widen(self.without_slopes().bias, 0), None, -1, -1, 0, None)

    def with_bias(self, added: Float32s | None) -> Mask:
        """The same conditions, and what `added` (B or 1, H or 1, L, S), if anything, adds to the scores.

        Returns
        -------
        Mask
        """
        return self if added is None else self._replace(bias=sum_of_biases(self.bias, added))

    def without_slopes(self) -> Mask:
        """The same conditions, and what the slopes add in `bias`: for kernels that know no slopes.

        Returns
        -------
        Mask
        """
        if self.slopes is None:
            return self
        _, _, queries, keys = self.shape
        # the entries of a batch share one array unless their positions or slopes differ
        places = _one_if_equal(self.offset)[:, None, None, None] + np.arange(queries)[:, None]
        distance = np.abs(places - np.arange(keys)).astype(np.float32)
        with np.errstate(over="ignore"):
            added = np.clip(-self.slopes[:, :, None, None] * distance, -_LARGEST, _LARGEST)
            if self.bias is not None:  # of a bias, only -inf hides a key
                added = np.where(np.isinf(self.bias), self.bias, np.clip(self.bias + added, -_LARGEST, _LARGEST))
        return self._replace(bias=_read_only(added), slopes=None)

    def for_kernels(self) -> KernelMask:
        """The same conditions as the tiled kernels take them."""
        arrays = self.keep, self.bias, self.slopes, self.lengths
        if all(array is None for array in arrays) and self.left < 0 and self.right < 0:
            return NO_MASK
        if self.lengths is not None:  # where batch entries differ, one array says it all
            return KernelMask(np.ascontiguousarray(self.permitted()), None, self.bias, None, self.alibi())
        return KernelMask(self.keep, None, self.bias, self.band(), self.alibi())

    def band(self) -> tuple[int, int] | None:
        """The bounds of `for_kernels`, of a mask without lengths."""
        if self.left < 0 and self.right < 0:
            return None
        _, _, queries, keys = self.shape
        low = self.offset - self.left if self.left >= 0 else -queries - keys
        high = self.offset + self.right if self.right >= 0 else queries + keys
        return low, high  # type: ignore[return-value]  # without lengths, ints

    def alibi(self) -> NDArray[np.float64] | None:
        """The slopes and positions of `for_kernels`."""
        if self.slopes is None:
            return None
        if isinstance(self.offset, int):
            alibi = np.zeros((*self.slopes.shape, 2))
            if self.offset:
                alibi[..., 1] = self.offset
        else:
            places = _one_if_equal(self.offset)
            alibi = np.empty((max(len(self.slopes), len(places)), self.shape[1], 2))
            alibi[..., 1] = places[:, None]
        alibi[..., 0] = self.slopes
        return alibi


def _together(parts: list[Bools]) -> Bools | None:
    """Where all of these are True; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return functools.reduce(np.logical_and, parts)


def sum_of_biases(bias: Float32s | None, added: Float32s) -> Float32s:
    """What both add to scores, in C order and read-only; of a sum of finite numbers no -inf, which would hide a key."""
    if bias is None:
        return _read_only(added)
    with np.errstate(over="ignore"):
        total = np.add(bias, added, order="C")
    np.copyto(total, np.clip(total, -_LARGEST, _LARGEST), where=np.isfinite(bias) & np.isfinite(added))
    return _read_only(total)


def resolve_mask(
    shape: Sequence[int],
    attn_mask: ArrayLike | None = None,
    key_padding_mask: ArrayLike | None = None,
    *,
    is_causal: Flag = False,
    causal_alignment: CausalAlignment | None = None,
    window_size: Window = NO_WINDOW,
    kv_lengths: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    position: int | None = None,
) -> Mask:
    """Check everything that restricts attention and bring it into one `Mask`.

    Parameters
    ----------
    shape : tuple of int
        (..., H, L, S), the shape of the scores. The leading axes become one axis B.
    attn_mask : bool or float array, broadcastable to `shape`, optional
        bool: True = attend. float: added to the scores, -inf = do not attend. Three axes are (H, L, S); of a bool mask
        they are refused where H equals the batch, and (B, L, S) may be meant.
    key_padding_mask : (..., S) bool array, optional
        True = a real token that may be attended to.
    is_causal : bool
        A query sees no key after its own position.
    causal_alignment : {"upper_left", "lower_right"}, optional
        The position of the queries among the keys, needed when their numbers differ and `is_causal` or
        `window_size` asks for it. "upper_left": query 0 stands at key 0. "lower_right": the last query stands
        at the last key (the last of `kv_lengths`).
    window_size : (int, int)
        (left, right): keys from p - left to p + right, both inclusive; -1 = unbounded.
    kv_lengths : (...) int array, optional
        The number of leading keys that exist, for each batch entry.
    alibi_slopes : (H,) or (..., H) float array, optional
        Adds -slope * |p - j| to the score of the query at position p and key j (Press et al., "Train Short,
        Test Long", 2022, section 3, with the distance on both sides as in FlashAttention).
    position : int, optional
        The position of query 0 where it is known, as in a cache; takes the place of `causal_alignment`.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    shape = tuple(shape)
    *lead, heads, queries, keys = shape
    batch = lead[0] if len(lead) == 1 else math.prod(lead)
    is_causal = flag("is_causal", is_causal)
    # no query is further from a key; clipping keeps the kernels' sums within int64
    left, right = NO_WINDOW
    if window_size is not NO_WINDOW:
        left, right = window_bounds(window_size, queries + keys + (position or 0))
    lengths = None if kv_lengths is None else _lengths(kv_lengths, tuple(lead), keys)
    if causal_alignment is not None and not is_one_of(causal_alignment, _ALIGNMENTS):
        raise ValueError(f"causal_alignment must be 'upper_left' or 'lower_right', got {causal_alignment!r}")
    if is_causal:
        right = 0

    slopes = None if alibi_slopes is None else _alibi_slopes(alibi_slopes, tuple(lead), heads, batch)
    offset: int | NDArray[np.int64] = position or 0
    if position is None and (left >= 0 or right >= 0 or slopes is not None):
        if causal_alignment is None and (queries != keys or lengths is not None):
            lengths_text = "" if kv_lengths is None else f", kv_lengths = {np.asarray(kv_lengths).tolist()}"
            raise ValueError(
                f"causal_alignment is needed because L = {queries} queries and S = {keys} keys{lengths_text} "
                "differ: 'upper_left' puts the first query at the first key (torch, Keras, JAX, ONNX without "
                "a cache), 'lower_right' the last query at the last key (FlashAttention, ONNX with a cache)"
            )
        if causal_alignment == "lower_right":
            offset = (keys if lengths is None else lengths) - queries

    keep = bias = None
    if attn_mask is not None:
        mask = _attn_mask(attn_mask, shape)
        keep, bias = (mask, None) if mask.dtype.kind == "b" else (None, mask)
    if key_padding_mask is not None:
        padding = _key_padding_mask(key_padding_mask, (*lead, keys), batch)
        keep = padding if keep is None else _read_only(np.bitwise_and(keep, padding, order="C"))
    return Mask((batch, heads, queries, keys), keep, bias, slopes, left, right, offset, lengths)


def sliding_window(keys: SupportsIndex) -> tuple[int, int]:
    """The `window_size` in which a query sees `keys` keys in all: itself and those before it.

    Keras, onnxruntime and Hugging Face count so (`sliding_window=W`); `window_size` counts the keys on either
    side of the query, as FlashAttention and ONNX do.

    Parameters
    ----------
    keys : int
        W, at least 1.

    Returns
    -------
    (int, int)
        (W - 1, 0)

    Raises
    ------
    TypeError, ValueError
        If `keys` is not an integer of at least 1.
    """
    return count("keys", keys) - 1, 0


def torch_masks(
    shape: Sequence[int], attn_mask: ArrayLike | None = None, key_padding_mask: ArrayLike | None = None
) -> tuple[Bools | Floats | None, Bools | None]:
    """The masks of torch.nn.MultiheadAttention, where True = blocked, as masks of this package.

    Parameters
    ----------
    shape : tuple of int
        (B, H, L, S), or (H, L, S) for inputs without a batch axis.
    attn_mask : (L, S) or (B * H, L, S) bool or float array, optional
        bool: True = do not attend. float: added to the scores.
    key_padding_mask : (B, S) or (S,) bool or float array, optional
        bool: True = padding, not to be attended to. float: added to the scores.

    Returns
    -------
    attn_mask : bool or float array, broadcastable to `shape`, or None
        bool: True = attend.
    key_padding_mask : (B, S) or (S,) bool array, or None
        True = a real token. None where `key_padding_mask` was a float array: `attn_mask` then holds both.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    *lead, heads, queries, keys = shape
    batch = math.prod(lead)
    if attn_mask is not None:
        attn_mask = _bool_or_float("attn_mask", attn_mask, "True = do not attend")
        if attn_mask.shape == (batch * heads, queries, keys):
            attn_mask = attn_mask.reshape(shape)
        elif attn_mask.shape != (queries, keys):
            raise ValueError(
                f"attn_mask must have torch's shape (L, S) = {(queries, keys)} or (B * H, L, S) = "
                f"{(batch * heads, queries, keys)}, got {attn_mask.shape}"
            )
        if attn_mask.dtype == np.bool_:
            attn_mask = ~attn_mask
    if key_padding_mask is None:
        return attn_mask, None
    key_padding_mask = _bool_or_float("key_padding_mask", key_padding_mask, "True = padding")
    if key_padding_mask.shape != (*lead, keys):
        raise ValueError(f"key_padding_mask must have shape {(*lead, keys)}, got {key_padding_mask.shape}")
    if key_padding_mask.dtype == np.bool_:
        return attn_mask, ~key_padding_mask
    added = key_padding_mask[..., None, None, :]
    if attn_mask is None:
        return added, None
    return (np.where(attn_mask, added, -np.inf) if attn_mask.dtype == np.bool_ else attn_mask + added), None


def _bool_or_float(name: str, value: ArrayLike, meaning: str) -> NDArray[Any]:
    mask = as_array(name, value)
    if mask.dtype.kind not in "bf" or mask.dtype.itemsize > 8:
        raise TypeError(
            f"{name} must be a bool array ({meaning}) or a float array (added to the scores), got dtype {mask.dtype}"
        )
    return mask


def _alibi_slopes(alibi_slopes: ArrayLike, lead: Shape, heads: int, batch: int) -> Float32s:
    """(B or 1, H) float32."""
    slopes = float_array("alibi_slopes", alibi_slopes)
    if slopes.shape not in ((heads,), (*lead, heads)):
        raise ValueError(
            f"alibi_slopes must have shape (H,) = {(heads,)} or (..., H) = {(*lead, heads)}, got {slopes.shape}"
        )
    if not all(map(math.isfinite, slopes.reshape(-1).tolist())):
        raise ValueError("alibi_slopes must be finite, got inf or NaN among them")
    return slopes.astype(np.float32).reshape(1 if slopes.ndim == 1 else batch, heads)


def _one_if_equal(offset: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """The offsets of all batch entries as an array, only one where they are the same."""
    starts = np.reshape(offset, -1)
    return starts[:1] if (starts == starts[:1]).all() else starts


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def window_bounds(window_size: Window, furthest: int) -> tuple[int, int]:
    """`window_size` as two ints, each at most `furthest`; -1 = unbounded."""
    try:
        left, right = map(operator.index, window_size)
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size must be two integers (left, right), -1 for unbounded, got {window_size!r}"
        ) from None
    if left < -1 or right < -1:
        raise ValueError(
            f"window_size must be (left, right) with bounds >= 0, or -1 for unbounded, got {window_size!r}"
        )
    return min(left, furthest), min(right, furthest)


def _lengths(kv_lengths: ArrayLike, lead: Shape, keys: int) -> NDArray[np.int64] | None:
    """(B,) int64, or None where all keys exist."""
    lengths = as_array("kv_lengths", kv_lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"kv_lengths must be an integer array, got dtype {lengths.dtype}")
    if lengths.shape != lead:
        raise ValueError(
            f"kv_lengths must have shape {lead}, one length per batch entry, got {lengths.shape}"
        )
    given = lengths.reshape(-1).tolist()
    if given and (min(given) < 0 or max(given) > keys):
        raise ValueError(f"kv_lengths must lie between 0 and S = {keys}, got {lengths.tolist()}")
    return None if given.count(keys) == len(given) else lengths.astype(np.int64).reshape(-1)


_OF_NUMBERS = "pass numpy.asarray({}) != 0 if 1 means {}, == 0 if 1 means {}"
_ATTN_MASK_OF_NUMBERS = _OF_NUMBERS.format("attn_mask", "attend", "blocked")


def bool_mask(attn_mask: ArrayLike) -> Bools:
    """`attn_mask` as an array, where only bool will do."""
    mask = as_array("attn_mask", attn_mask)
    if mask.dtype != np.bool_:
        raise no_bool_mask(mask.dtype)
    return mask


def no_bool_mask(dtype: np.dtype[Any]) -> TypeError:
    """The error about an `attn_mask` of this dtype where only bool will do: in layers whose scores are codes."""
    if dtype.kind != "f":
        way_out = _ATTN_MASK_OF_NUMBERS
    else:
        way_out = ("pass numpy.asarray(attn_mask) == 0 if 0 means attend and -inf blocked, != 0 if 1 means attend; "
                   "layers of quant.quantize(layer, scheme='dynamic') take float masks")
    return TypeError(f"attn_mask must be bool for int8 (True = attend), got dtype {dtype}; {way_out}")


def _attn_mask(attn_mask: ArrayLike, shape: Shape) -> NDArray[Any]:
    """`attn_mask` in four axes, as `Mask` has it: bool or float32."""
    mask = as_array("attn_mask", attn_mask)
    if mask.dtype.kind != "b" and mask.dtype is not FLOAT32:
        if mask.dtype.kind != "f" or mask.dtype.itemsize > 8:
            raise TypeError(
                "attn_mask must be a bool array (True = attend) or a float array (added to the scores), "
                f"got dtype {mask.dtype}; {_ATTN_MASK_OF_NUMBERS}"
            )
        if mask.dtype == np.float64:  # what is finite stays so: only -inf means "do not attend"
            mask = np.where(np.isfinite(mask), np.clip(mask, -_LARGEST, _LARGEST), mask)
        mask = to_float32(mask)
    repeated, four_axes = fit_attn_mask(mask.shape, shape, mask.dtype.kind == "b")
    if repeated is not None:
        mask = np.broadcast_to(mask, repeated)
    return _in_rows(mask, four_axes)


def fit_attn_mask(given: Shape, shape: Shape, is_bool: bool) -> tuple[Shape | None, Shape]:
    """How an `attn_mask` of shape `given` becomes one for scores of `shape`, (..., H, L, S).

    Returns
    -------
    tuple or None
        What to repeat it to; None where it is that already.
    tuple
        Its shape in four axes.

    Raises
    ------
    ValueError
        Where it does not fit; and where three axes of a bool mask fit in two ways. Keras has one mask per batch entry
        there, NumPy's rules, which hold here, say one per head: where the batch has as many entries as there are heads,
        the first would be taken for the second.
    """
    return (None, (1, 1, *given)) if given == shape[-2:] else _fit(given, shape, is_bool)


@functools.lru_cache(256)
def _fit(given: Shape, shape: Shape, is_bool: bool) -> tuple[Shape | None, Shape]:
    """The same."""
    per_entry = len(given) == 3 and len(shape) == 4 and _fits(given[1:], shape)
    if len(given) > len(shape) or not _fits(given, shape):
        way_out = ""
        if per_entry and given[0] == shape[0]:
            way_out = "; one mask per batch entry is attn_mask[:, None]"
        elif per_entry and given[0] == shape[0] * shape[1]:
            way_out = (f"; torch.nn.MultiheadAttention's (B * H, L, S) is attn_mask.reshape{shape[:2] + given[1:]}, "
                       "inverted if bool: call_with_torch_masks takes it as it is")
        elif given == (*shape[:-3], shape[-1]):
            way_out = "; a mask of tokens, (..., S), is attn_mask[:, None, None], or key_padding_mask of a layer"
        raise ValueError(f"attn_mask must broadcast to (..., H, L, S) = {shape}, got shape {given}{way_out}")
    if is_bool and per_entry and given[0] == shape[0] > 1:
        raise ValueError(
            f"attn_mask of shape {given} must say whether its first axis is the batch or the heads, for both are "
            f"{given[0]}: pass attn_mask[:, None] for one mask per batch entry, as in Keras, attn_mask[None] for one "
            "per head")
    *lead, heads, queries, keys = (1,) * (len(shape) - len(given)) + given
    # The kernels walk along the keys, so that axis is always written out; the others may stay 1.
    if any(axis != 1 for axis in lead):
        lead = [*shape[:-3]]
    wanted = (*lead, heads, queries, shape[-1])
    four_axes = (math.prod(lead), heads, queries, shape[-1])
    return None if math.prod(wanted) == math.prod(given) else wanted, four_axes


def _fits(given: Shape, shape: Shape) -> bool:
    """Whether `given` broadcasts to `shape`, which has at least as many axes."""
    return all(axis in (1, wanted) for axis, wanted in zip(reversed(given), reversed(shape), strict=False))


def _key_padding_mask(key_padding_mask: ArrayLike, shape: Shape, batch: int) -> Bools:
    """`key_padding_mask` in four axes, (B, 1, 1, S)."""
    mask = as_array("key_padding_mask", key_padding_mask)
    if mask.dtype != np.bool_:
        raise TypeError(
            f"key_padding_mask must be a bool array (True = a real token), got dtype {mask.dtype}; "
            + _OF_NUMBERS.format("key_padding_mask", "a real token, as in Hugging Face's attention_mask",
                                 "padding, as in torch.nn.MultiheadAttention")
        )
    _check_padding_shape(mask.shape, shape)
    return _in_rows(mask, (batch, 1, 1, shape[-1]))


def _check_padding_shape(given: Shape, shape: Shape) -> None:
    if given != shape:
        raise ValueError(f"key_padding_mask must have shape (..., S) = {shape}, got {given}")


def check_mask_shapes(shape: Shape, attn_mask: NDArray[Any] | None, key_padding_mask: Bools | None) -> None:
    """Raise, as `resolve_mask` does, unless masks of dtypes that kernels read fit scores of `shape`, (..., H, L, S)."""
    if attn_mask is not None:
        fit_attn_mask(attn_mask.shape, shape, attn_mask.dtype.kind == "b")
    if key_padding_mask is not None:
        _check_padding_shape(key_padding_mask.shape, (*shape[:-3], shape[-1]))


def _in_rows(mask: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """A mask in C order, read-only and of `shape`."""
    flags = mask.flags
    if not flags.c_contiguous or not flags.aligned:
        mask = np.array(mask, order="C")
    mask = mask.reshape(shape)
    mask.flags.writeable = False
    return mask
