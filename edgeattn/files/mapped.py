"""Files in memory, whose pages are read when they are used and dropped when memory is short."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from numpy.typing import NDArray


def let_go(content: Any, array: NDArray[Any]) -> None:
    """Give back the memory of an array in C order that lies in a mapped file, which is read again when it is used."""
    start, first = ctypes.addressof(content), array.__array_interface__["data"][0]
    last, page = first + array.nbytes, mmap.PAGESIZE
    begin, end = -(-first // page) * page, last // page * page  # whole pages
    if start <= first and last <= start + len(content) and begin < end and hasattr(mmap, "MADV_DONTNEED"):
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def map_file(file: BinaryIO) -> Any:
    """The bytes of an open file, as a ctypes array: not to be written to, unmapped when nothing refers to them.

    Python's own mapping would keep a descriptor for each file.
    """
    size = os.fstat(file.fileno()).st_size
    libc = _libc()
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(),
                        ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    content = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(content, libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)).atexit = False
    return content
