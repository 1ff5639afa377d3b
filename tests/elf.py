"""What a 64-bit ELF file says of itself: enough to see what a shared library asks of the system that loads it."""
import struct
from typing import NamedTuple

MACHINES = {62: "x86_64", 183: "aarch64"}
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551  # kinds of segments
_NEEDED, _STRINGS, _VERSIONS_NEEDED = 1, 5, 0x6FFFFFFE  # kinds of dynamic entries


class Library(NamedTuple):
    """`needed` are the libraries it names, `versioned` whether it asks for versions of their functions."""

    machine: str
    needed: list
    versioned: bool
    alignments: list
    executable_stack: bool


def read(content):
    """A shared library's demands."""
    assert content[:6] == b"\x7fELF\x02\x01"
    machine, = struct.unpack_from("<H", content, 18)
    first, = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    # (kind, flags, offset, address, physical address, size in the file, in memory, alignment)
    segments = [struct.unpack_from("<IIQQQQQQ", content, first + i * size) for i in range(count)]
    dynamic = next(segment for segment in segments if segment[0] == _DYNAMIC)
    entries = list(struct.iter_unpack("<QQ", content[dynamic[2]:dynamic[2] + dynamic[5]]))
    at = dict(entries)[_STRINGS]
    strings = next(at - segment[3] + segment[2] for segment in segments
                   if segment[0] == _LOAD and segment[3] <= at < segment[3] + segment[5])
    needed = [content[strings + value:content.index(b"\0", strings + value)].decode()
              for kind, value in entries if kind == _NEEDED]
    return Library(MACHINES.get(machine, str(machine)), needed, any(kind == _VERSIONS_NEEDED for kind, _ in entries),
                   [segment[7] for segment in segments if segment[0] == _LOAD],
                   any(segment[0] == _STACK and segment[1] & 1 for segment in segments))
