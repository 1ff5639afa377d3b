"""Numba's decorator as every kernel here uses it."""

import numba


def jit(function):
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
