"""What follows from shapes alone, for layers and for bundles, which have NumPy and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeattn.types import Shape


def check_input_shapes(first: str, widths: Shape, query: Shape, key: Shape, value: Shape) -> None:
    """Raise unless the shapes of a layer's inputs agree with its widths (E, kdim, vdim) and with each other.

    first : what the caller calls the query
    """
    if (len(query) in (2, 3) and len(key) == len(value) == len(query) and query[:-2] == key[:-2] == value[:-2]
            and key[-2] == value[-2] and (query[-1], key[-1], value[-1]) == widths):
        return
    shapes = f"query {query}, key {key}, value {value}"
    if len(query) not in (2, 3):
        raise ValueError(f"{first} must be (B, L, E) or (L, E), got shape {query}")
    for name, shape, width in zip((first, "key", "value"), (query, key, value), widths, strict=True):
        if len(shape) != len(query) or shape[:-2] != query[:-2]:
            raise ValueError(f"{name} must have query's batch axes {query[:-2]}, got {shapes}")
        if shape[-1] != width:
            raise ValueError(f"{name} must have a last axis of {width}, the columns of its weight, got {shapes}")
    raise ValueError(f"value must have as many rows as key, S = {key[-2]}, got {shapes}")


def strides(shape: Shape) -> list[int]:
    """Element strides of a mask of `shape`, in C order, along the axes of the scores: 0 where it repeats."""
    found, step = [0, 0, 0, 0], 1
    for axis in range(1, len(shape) + 1):
        if shape[-axis] != 1:
            found[-axis] = step
        step *= shape[-axis]
    return found
