"""What a call of an encoder says beside its rows: checked, and told from what other calls say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeattn.checks import as_array, float_array
from edgeattn.files.paths import listed
from edgeattn.layers.call import check_cache
from edgeattn.masks import NO_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from numpy.typing import ArrayLike

    from edgeattn.executors.chain import Chain
    from edgeattn.layers.encoder_layer import TransformerEncoderLayer
    from edgeattn.layers.ragged import Run
    from edgeattn.ops import Sequences
    from edgeattn.types import Floats, Shape

FURTHEST = 2**31  # the largest bound of a window
_FEW = 4096  # bytes of a mask that is compared by its content


class Seen:
    """What calls whose masks are equal have in common.

    Attributes
    ----------
    sequences : list of Sequences
        What each layer's tokens see.
    run : (first, last, length) or None
        Where the tokens are, of sequences that are shorter than L; None where all are there.
    times : int
        How often they came again.
    """

    __slots__ = "chain", "run", "sequences", "times"

    def __init__(self, sequences: list[Sequences], run: Run | None = None):
        self.sequences, self.run, self.times = sequences, run, 0
        self.chain: Chain | None = None


def said_of(lead: Shape, lengths: Any, window_size: Any, *, attn_mask: Any = None, key_padding_mask: Any = None,
            is_causal: Any = False) -> tuple[Any, ...] | None:
    """A key, equal for calls whose masks are; None where masks are large, or of types that must be checked first."""
    if is_causal is not False and is_causal is not True:
        return None
    if window_size is not NO_WINDOW and not (type(window_size) is tuple and len(window_size) == 2
                                             and type(window_size[0]) is type(window_size[1]) is int):
        return None
    listed = type(lengths) is list
    if listed and (len(lengths) > _FEW // 8 or any(type(length) is not int for length in lengths)):
        return None
    arrays: list[Any] = [tuple(lengths) if listed else None]
    for array, kinds in ((None if listed else lengths, "iu"), (attn_mask, "bf"), (key_padding_mask, "b")):
        if array is not None:
            if type(array) is not np.ndarray or array.dtype.kind not in kinds or array.nbytes > _FEW:
                return None
            array = array.dtype, array.shape, array.tobytes()
        arrays.append(array)
    return lead, is_causal, window_size, *arrays


def checked_list(embed_dim: int, x: Sequence[ArrayLike], lengths: object, out: object, options: Mapping[str, object]
                 ) -> tuple[list[Floats], list[int]]:
    """The arrays of a list of sequences, and their lengths; `options`: of a call, what a list must not have is None."""
    arrays = [float_array(f"x[{i}]", each) for i, each in enumerate(x)]
    for name, given in {"lengths": lengths, "out": out, **options}.items():
        if name in ("lengths", "out", "kv_cache", "key_padding_mask") and given is not None:
            raise ValueError(f"{name} must be left out where x is a list of sequences, got {type(given).__name__}")
    for i, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != embed_dim:
            raise ValueError(f"x[{i}] must be (L, E) with E = {embed_dim}, got shape {array.shape}")
    return arrays, [len(array) for array in arrays]


def checked_lengths(lengths: ArrayLike, lead: Shape) -> list[int]:
    """`lengths` of (B, L) tokens, checked."""
    array = as_array("lengths", lengths)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be an integer array, got dtype {array.dtype}")
    if array.shape != lead[:-1]:
        raise ValueError(f"lengths must have shape {lead[:-1]}, one per sequence, got {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() <= lead[-1]):
        raise ValueError(f"lengths must lie between 0 and L = {lead[-1]}, got [{listed(array.tolist())}]")
    counts: list[int] = array.reshape(-1).tolist()
    return counts


def narrower(window: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The window that both allow."""
    if other == NO_WINDOW:
        return window
    left, right = (min((bound for bound in pair if bound >= 0), default=-1) for pair in zip(window, other, strict=True))
    return left, right


def check_caches(layers: Sequence[TransformerEncoderLayer], caches: object) -> None:
    """Raise unless there is a cache for each layer, all of the same length, or none."""
    if caches is None:
        return
    if not isinstance(caches, (list, tuple)) or len(caches) != len(layers):
        raise ValueError(f"kv_cache must be a list of {len(layers)} caches, one per layer, as make_caches gives it, "
                         f"got {len(caches) if isinstance(caches, (list, tuple)) else type(caches).__name__}")
    for layer, cache in zip(layers, caches, strict=True):
        check_cache(layer.attention, cache, None)
    if len({id(cache) for cache in caches}) != len(caches) or len({cache.length for cache in caches}) != 1:
        raise ValueError("kv_cache must hold a cache of its own for each layer, all of the same length, got lengths "
                         f"{[cache.length for cache in caches]}")
