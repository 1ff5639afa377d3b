"""Storing tokens in an int8 cache: every row by a scale of its own, the largest magnitude over 127."""
import numpy as np

from edgeattn.runtime.jit import compiled_for, jit

from .simd import (
    LANES,
    address_of,
    fma,
    load,
    max_lanes,
    maximum,
    pointer_to,
    round_to_int,
    splat,
    store_bytes,
    sum_lanes,
)

_LARGEST_CODE = np.float32(127)
_SMALLEST = np.finfo(np.float32).tiny
_NAN = np.float32(np.nan)
_ZERO = np.float32(0)
_ONE = np.float32(1)
_run = None


@jit
def store_rows(x, codes, scales):
    """See `quantize_into`."""
    B, H, n, size = x.shape
    whole = size // LANES * LANES
    for b in range(B):
        for h in range(H):
            for i in range(n):
                row, out = x[b, h, i], codes[b, h, i]
                numbers, bytes_ = pointer_to(address_of(row), np.float32), pointer_to(address_of(out), np.int8)
                # 1. the largest magnitude; 0, or NaN where a number is not finite
                best, poison = splat(_ZERO), splat(_ZERO)
                for d in range(0, whole, LANES):
                    v = load(numbers, d)
                    best = maximum(maximum(v, splat(_ZERO) - v), best)
                    poison = fma(v, splat(_ZERO), poison)
                largest, unfit = max_lanes(best), sum_lanes(poison)
                for d in range(whole, size):
                    largest = max(largest, abs(numbers[d]))
                    unfit += numbers[d] * _ZERO
                # 2. the scale: 0 for what float32 holds only in part, NaN to be seen by whoever attends to it
                scale = largest / _LARGEST_CODE
                if not scale >= _SMALLEST:
                    scale = _ZERO
                if unfit != _ZERO:
                    scale = _NAN
                scales[b, h, i] = scale
                # 3. the codes
                if unfit != _ZERO:
                    for d in range(size):
                        bytes_[d] = 0
                    continue
                divisor = scale if scale > _ZERO else _ONE
                for d in range(0, whole, LANES):
                    store_bytes(bytes_, d, round_to_int(load(numbers, d) / splat(divisor)))
                for d in range(whole, size):
                    bytes_[d] = np.int8(np.rint(numbers[d] / divisor))


def quantize_into(x, codes, scales):
    """x[..., d] = codes[..., d] * scales, to the nearest code, ties to even; NaN where a row is not finite.

    Parameters
    ----------
    x : (B, Hkv, n, size) float32, last dimension contiguous
    codes : (B, Hkv, n, size) int8, last dimension contiguous; written
    scales : (B, Hkv, n) float32; written
        max|x| / 127 of each row, 0 where that is no normal number.
    """
    global _run
    if _run is None:
        _run = compiled_for(store_rows, (x, codes, scales), strided=3)
    _run(x, codes, scales)
