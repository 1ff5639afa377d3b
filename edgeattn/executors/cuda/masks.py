"""What restricts attention between arrays on the device, checked, as the launches of edgeattn.kernels.cuda take it."""

import dataclasses

import numpy as np

from edgeattn.masks import fit_attn_mask, resolve_mask, window_bounds


def device_masks(shape, like, attn_mask=None, key_padding_mask=None, *, is_causal=False, causal_alignment=None,
                 window_size=(-1, -1), kv_lengths=None, alibi_slopes=None, position=None, join=None):
    """The arguments of `edgeattn.kernels.cuda.attend.attend` that say what is permitted.

    Parameters
    ----------
    shape : (..., H, L, S)
    like : function
        From a name and an array to a View.
    attn_mask, key_padding_mask, kv_lengths, alibi_slopes
        Arrays on the device, otherwise as for `edgeattn.masks.resolve_mask`. attn_mask and alibi_slopes are bool or
        float32, kv_lengths int32 or int64. Their values are not looked at: that would wait for the device. Lengths are
        clipped to 0 and S.
    join : function, optional
        From a bool mask (B or 1, H or 1, L or 1, S or 1) and a padding (B, S), Views, to one of both; needed where
        there may be both.

    Returns
    -------
    dict

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was required and what came.
    """
    *lead, heads, queries, keys = shape
    batch = int(np.prod(lead, dtype=np.int64))
    found = {}
    if kv_lengths is not None:
        lengths = like("kv_lengths", kv_lengths)
        if lengths.dtype not in (np.int32, np.int64):
            raise TypeError(f"kv_lengths must be int32 or int64 on CUDA, got dtype {lengths.dtype}")
        if lengths.shape != tuple(lead) or not lengths.contiguous:
            raise ValueError(f"kv_lengths must have shape {tuple(lead)}, one length per batch entry, and be "
                             f"contiguous, got {lengths.shape}")
        found["lengths"] = lengths
    slopes = None if alibi_slopes is None else like("alibi_slopes", alibi_slopes)
    # positions matter to all of these, and must be told where they are not plain
    placed = is_causal is True or window_bounds(window_size, queries + keys) != (-1, -1) or slopes is not None
    told = kv_lengths is not None or queries != keys
    if placed and told and causal_alignment is None and position is None:
        resolve_mask((*lead, heads, queries, max(keys, queries + 1)), is_causal=True)  # raises, naming both
    mask = resolve_mask(shape, is_causal=is_causal, causal_alignment=causal_alignment, window_size=window_size,
                        position=position)
    at_end = causal_alignment == "lower_right" and position is None
    offset = position if position is not None else keys - queries if at_end else 0
    found |= {"left": mask.left, "right": mask.right, "offset": offset, "at_end": at_end and kv_lengths is not None}
    if slopes is not None:
        if slopes.dtype != np.float32:
            raise TypeError(f"alibi_slopes must be float32 on CUDA, got dtype {slopes.dtype}")
        if slopes.shape not in ((heads,), (*lead, heads)) or not slopes.contiguous:
            raise ValueError(f"alibi_slopes must have shape (H,) = {(heads,)} or (..., H) = {(*lead, heads)} and be "
                             f"contiguous, got {slopes.shape}")
        found["slopes"] = slopes if slopes.ndim == 1 else slopes.reshape(batch, heads)
    if attn_mask is not None:
        given = like("attn_mask", attn_mask)
        if given.dtype not in (np.bool_, np.float32):
            raise TypeError(f"attn_mask must be bool (True = attend) or float32 (added to the scores) on CUDA, got "
                            f"dtype {given.dtype}")
        found["keep" if given.dtype == np.bool_ else "bias"] = _four_axes(given, tuple(lead), heads, queries, keys)
    if key_padding_mask is not None:
        padding = like("key_padding_mask", key_padding_mask)
        if padding.dtype != np.bool_:
            raise TypeError(f"key_padding_mask must be a bool array (True = a real token), got dtype {padding.dtype}")
        if padding.shape != (*lead, keys):
            raise ValueError(f"key_padding_mask must have shape (..., S) = {(*lead, keys)}, got {padding.shape}")
        if "keep" in found:
            found["keep"] = join(found["keep"], padding.reshape(batch, keys))
        else:
            found["keep"] = padding.reshape(batch, 1, 1, keys)
    return found


def arrays_read(masks):
    """The Views among the arguments that `device_masks` gives."""
    return [x for name in ("lengths", "slopes", "keep", "bias") if (x := masks.get(name)) is not None]


def _four_axes(mask, lead, heads, queries, keys):
    """A mask as a View (B or 1, H or 1, L or 1, S or 1)."""
    shape = (*lead, heads, queries, keys)
    fit_attn_mask(mask.shape, shape, mask.dtype == np.bool_)
    missing = len(shape) - mask.ndim
    mask = dataclasses.replace(mask, shape=(1,) * missing + mask.shape, strides=(0,) * missing + mask.strides)
    batch_axes = mask.shape[:-3]
    if all(n == 1 for n in batch_axes):
        return dataclasses.replace(mask, shape=(1, *mask.shape[-3:]), strides=(0, *mask.strides[-3:]))
    return mask.reshape(int(np.prod(batch_axes)), *mask.shape[-3:])
