"""The .npy format: a header in Python's words, read as data and not as Python, and the numbers behind it.

NumPy's own reader hands the header to Python's parser, which for a hostile one has errors of many kinds, and trusts the
shape in it. (NumPy documents the format in numpy/lib/format.py.)
"""

from __future__ import annotations

import re

import numpy as np

from edgeattn.files.stored import Budget

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 4096  # that of 32 axes has 800 bytes
_ENTRY = rb"'(descr|fortran_order|shape)' ?: ?('[<>|=]?[a-zA-Z?]\d{0,9}'|True|False|\((?:\d{1,19}L?,? ?){0,32}\)),? ?"
_HEADER = re.compile(rb"\{ ?(?:" + _ENTRY + rb"){3}\} *\n?")
_ENTRIES = re.compile(_ENTRY)
_PLAIN = "biufcUS"  # kinds of numbers and texts


def parse_header(start: bytes, budget: Budget, what: str) -> tuple[int, tuple[int, ...], np.dtype, bool]:
    """What the first bytes of a .npy file say.

    Parameters
    ----------
    start : bytes
        LONGEST_HEADER of them, or all there are.
    budget : Budget
        Of the file.
    what : str
        What messages call the array.

    Returns
    -------
    at : int
        Where the numbers begin.
    shape : tuple of int
    dtype : np.dtype
    fortran_order : bool

    Raises
    ------
    ValueError
    """
    if start[:6] != MAGIC or len(start) < 12 or start[6] not in (1, 2, 3):
        raise ValueError(f"{what} is no .npy array")
    width = 2 if start[6] == 1 else 4
    at = 8 + width + int.from_bytes(start[8:8 + width], "little")
    header = start[8 + width:at]
    found = {key.decode(): value.decode() for key, value in _ENTRIES.findall(header)}
    if at > len(start) or not _HEADER.fullmatch(header) or len(found) != 3 or found["fortran_order"][0] not in "TF":
        raise ValueError(f"{what} has a header other than numpy.save writes for an array of plain numbers: "
                         f"{header[:200]!r}")
    if found["descr"][0] != "'" or found["shape"][0] != "(":
        raise ValueError(f"{what} has a damaged header: {header[:200]!r}")
    try:
        dtype = np.dtype(found["descr"].strip("'"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} has a dtype that NumPy does not know: {found['descr']}") from error
    if dtype.kind not in _PLAIN or dtype.itemsize == 0:
        raise ValueError(f"{what} has dtype {dtype}; only plain numbers are read, never objects")
    shape = tuple(int(axis) for axis in re.findall(r"\d+", found["shape"]))
    budget.nbytes(shape, dtype.itemsize, what)
    return at, shape, dtype, found["fortran_order"] == "True"


def as_array(data, at: int, shape: tuple[int, ...], dtype: np.dtype, fortran_order: bool) -> np.ndarray:
    """The array whose numbers `data` holds from byte `at` on."""
    numbers = np.frombuffer(data, "u1" if dtype == np.bool_ else dtype, offset=at)
    if dtype == np.bool_:
        numbers = numbers != 0  # the bytes of a damaged file may be neither 0 nor 1
    return numbers.reshape(shape, order="F" if fortran_order else "C")
