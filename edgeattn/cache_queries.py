"""Several queries at a cache, one after the other through the kernel that reads it in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided

from edgeattn.kernels.cpu.decode import decode

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from edgeattn.masks import Mask
    from edgeattn.types import Float32s

    _Run = tuple[int, int, int, int, list[int]]


def visible(mask: Mask) -> tuple[list[int], list[int]]:
    """(first, last) per query: it sees the keys first .. last - 1; of a mask that is a band alone."""
    _, _, queries, keys = mask.shape
    position = np.arange(queries) + mask.offset
    first = np.clip(position - mask.left, 0, keys) if mask.left >= 0 else np.zeros(queries, np.int64)
    last = np.clip(position + mask.right + 1, 0, keys) if mask.right >= 0 else np.full(queries, keys)
    return first.tolist(), np.maximum(first, last).tolist()


def runs_of(first: list[int], last: list[int]) -> list[_Run]:
    """Cut queries into runs in which `first` goes up evenly: (begin, end, first key, step, key counts)."""
    begin, runs = 0, []
    while begin < len(first):
        end, step = begin + 1, 0
        if end < len(first):
            step = first[end] - first[begin]
            while end < len(first) and first[end] - first[end - 1] == step:
                end += 1
        counts = [last[i] - first[i] for i in range(begin, end)]
        runs.append((begin, end, first[begin], step, counts))
        begin = end
    return runs


def decode_run(query: Float32s, stored: tuple[NDArray[Any] | None, ...], out: Float32s, scale: float,
               softcap: float, run: _Run) -> None:
    """One query at a time through the kernel for that, which reads the cache in place."""
    begin, end, first, step, counts = run
    if end - begin == 1:
        views = [None if array is None else array[:, :, first : first + counts[0]] for array in stored]
        keys, values, key_scales, value_scales = views
        decode(
            query[:, :, begin], keys, values, out[:, :, begin], scale, softcap,
            k_scale=key_scales, v_scale=value_scales,
        )
        return
    # The queries of one batch entry stand in for a batch: query i sees the same storage, `step` rows further on.
    lengths, size = np.array(counts, np.int64), max(counts)
    for b in range(query.shape[0]):
        views = []
        for array in stored:
            if array is None:
                views.append(None)
                continue
            rows = array[b, :, first:]
            shape = (end - begin, rows.shape[0], size, *rows.shape[2:])
            views.append(as_strided(rows, shape, (step * rows.strides[1], *rows.strides), writeable=False))
        keys, values, key_scales, value_scales = views
        decode(
            query[b, :, begin:end].swapaxes(0, 1), keys, values, out[b, :, begin:end].swapaxes(0, 1),
            scale, softcap, lengths=lengths, k_scale=key_scales, v_scale=value_scales,
        )
