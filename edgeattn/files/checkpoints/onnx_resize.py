"""Resize of ONNX, upon constants: tables of positions that a model brings to the size of its images."""

import math

import numpy as np

from edgeattn.files.paths import reason

_LARGEST = 2**22


def resized_shape(attributes, shape, scales, sizes):
    """(shape, scale of each axis) of what Resize makes of a shape.

    Raises
    ------
    ValueError
        For sizes that are none, or too large.
    """
    axes = attributes.get("axes") or range(len(shape))
    made, factors = list(shape), [1.0] * len(shape)
    given = sizes if sizes is not None and np.size(sizes) else scales
    if given is None or np.size(given) != len(axes):
        raise ValueError(f"a Resize must have a scale or size of each axis, got {np.size(given)} of {len(axes)}")
    for axis, number in zip(axes, np.asarray(given, np.float64).tolist(), strict=True):
        if not 0 < number <= _LARGEST:
            raise ValueError(f"a Resize must have positive scales and sizes, got {number}")
        made[axis] = int(number) if given is sizes else math.floor(shape[axis] * number)
        factors[axis] = number / shape[axis] if given is sizes else number
    if not 0 < math.prod(made) <= _LARGEST:
        raise ValueError(f"a Resize must give at most {_LARGEST} elements, got {reason(made)}")
    return tuple(made), factors


def resize(attributes, x, roi=None, scales=None, sizes=None):  # noqa: ARG001
    """Resize: nearest, linear or cubic, without antialias."""
    shape, factors = resized_shape(attributes, x.shape, scales, sizes)
    if attributes.get("antialias") or attributes.get("exclude_outside"):
        raise ValueError("a Resize must have neither antialias nor exclude_outside")
    for axis, factor in enumerate(factors):
        if factor != 1:
            x = np.moveaxis(np.tensordot(_taps(attributes, x.shape[axis], shape[axis], factor), x, (1, axis)), 0, axis)
    return x


def _taps(attributes, old, new, scale):
    """(new, old): what each element of an axis is made of."""
    place = np.arange(new, dtype=np.float64)
    how = attributes.get("coordinate_transformation_mode", "half_pixel")
    if how in ("half_pixel", "pytorch_half_pixel"):
        place = (place + 0.5) / scale - 0.5 if new > 1 or how == "half_pixel" else np.zeros(1)
    elif how == "align_corners":
        place = place * (old - 1) / max(new - 1, 1)
    elif how == "asymmetric":
        place = place / scale
    else:
        raise ValueError(f"a Resize must have coordinates as half_pixel, align_corners or asymmetric, got {how!r}")
    mode, first = attributes.get("mode", "nearest"), np.floor(place)
    if mode == "cubic":
        a = attributes.get("cubic_coeff_a", -0.75)
        far = np.abs(place[:, None] - first[:, None] - np.arange(-1, 3))
        near = ((a + 2) * far - (a + 3)) * far * far + 1
        weights = np.where(far <= 1, near, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a)
    elif mode == "linear":
        weights = np.stack([0 * place, 1 - place + first, place - first, 0 * place], 1)
    elif mode == "nearest" and attributes.get("nearest_mode", "round_prefer_floor") in ("round_prefer_floor", "floor"):
        first = np.ceil(place - 0.5) if attributes.get("nearest_mode") != "floor" else first
        weights = np.tile([0.0, 1.0, 0.0, 0.0], (new, 1))
    else:
        raise ValueError(f"a Resize must be nearest, linear or cubic, got {mode!r}")
    taps = np.zeros((new, old))
    index = np.clip(first[:, None] + np.arange(-1, 3), 0, old - 1).astype(int)
    np.add.at(taps, (np.arange(new)[:, None], index), weights)
    return taps.astype(np.float32)
