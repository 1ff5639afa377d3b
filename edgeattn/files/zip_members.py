"""Members of a zip file, of which no more is ever unpacked than was asked for.

The standard library finds the members; it unpacks without a bound, so that is done here. NumPy and Keras write members
that are stored or deflated, and nothing else is read.
"""

from __future__ import annotations

import struct
import zipfile
import zlib

from edgeattn.files.paths import reason

_ENCRYPTED = 1  # in a member's flags
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of the name and of what follows it
_SIGNATURE = b"PK\x03\x04"
_KINDS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_OTHERS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}


def members(file) -> dict[str, zipfile.ZipInfo]:
    """The members of an open zip file by name.

    Raises
    ------
    ValueError
        For encrypted ones and for a name used twice; and whatever `zipfile` raises for what is no zip.
    """
    found = {}
    for member in zipfile.ZipFile(file).infolist():
        if member.filename in found:
            raise ValueError(f"member {member.filename!r} is there twice")
        if member.flag_bits & _ENCRYPTED:
            raise ValueError("it is encrypted; save it again without a password")
        found[member.filename] = member
    return found


def unpack(file, member: zipfile.ZipInfo, most: int | None = None) -> bytes | bytearray:
    """A member of an open zip file, or its first `most` bytes.

    Raises
    ------
    ValueError
        For damaged members, and those packed in another way than by deflate.
    """
    name, size = member.filename, member.file_size
    if member.compress_type not in _KINDS:
        kind = _OTHERS.get(member.compress_type, f"method {member.compress_type}")
        raise ValueError(f"member {name!r} is packed by {kind}; save it stored or deflated, as numpy.savez, "
                         "numpy.savez_compressed and Keras do")
    file.seek(member.header_offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != _SIGNATURE:
        raise ValueError(f"member {name!r} does not begin where the list of members says")
    _, name_size, extra_size = _LOCAL.unpack(head)
    file.seek(name_size + extra_size, 1)
    wanted = size if most is None else min(size, most)
    if member.compress_type == zipfile.ZIP_STORED:
        content = file.read(wanted)
    else:
        content = _inflate(file, member, wanted)
    if len(content) != wanted:
        raise ValueError(f"member {name!r} ends after {len(content)} of {wanted} bytes")
    if wanted == size and zlib.crc32(content) != member.CRC:
        raise ValueError(f"member {name!r} has another checksum than it was saved with")
    return content


def _inflate(file, member, wanted: int) -> bytearray:
    """At most so many bytes of a deflated member."""
    content, packed, left = bytearray(), zlib.decompressobj(-zlib.MAX_WBITS), member.compress_size
    try:
        while len(content) < wanted and not packed.eof:
            chunk = packed.unconsumed_tail
            if not chunk:
                chunk = file.read(min(left, 1 << 16))
                left -= len(chunk)
            if not chunk:
                break
            content += packed.decompress(chunk, wanted - len(content))
    except zlib.error as error:
        raise ValueError(f"member {member.filename!r} is damaged: {reason(error)}") from error
    return content
