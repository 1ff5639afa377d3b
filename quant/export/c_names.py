"""The names that an exported C file may have."""

from __future__ import annotations

import re

from quant.export.c_text import check_header_name

C_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register "
    "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while".split()
)


def check_stem(stem: str) -> None:
    """Refuse a stem that cannot be the prefix of C names and the name of a header."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", stem, re.ASCII):
        raise ValueError(f"path must be named like a C identifier, for its functions get that name: letters, digits "
                         f"and underscores after a letter; got {stem!r}")
    if stem in C_KEYWORDS:
        raise ValueError(f"path must not be named by a keyword of C; got {stem!r}")
    check_header_name(stem)


def check_names(stem: str, suffix: str, text: str) -> None:
    """Refuse a stem whose function, ``stem_suffix``, has the name of something else in the file."""
    if re.search(rf"\b{stem}_{suffix}\b", text):
        raise ValueError(f"path must not be named {stem!r}: the file has a {stem}_{suffix} of its own beside the "
                         "function that gets that name")
