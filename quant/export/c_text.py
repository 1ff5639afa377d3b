"""Numbers as C source text."""

from __future__ import annotations

import textwrap
from importlib.resources import files
from string import Template

import numpy as np

# Of the lines that hold an array's numbers.
LINE_LENGTH = 118
INDENT = " " * 4
# A file called string.h would be found in place of the compiler's own.
C_HEADERS = frozenset(
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdarg stdbool stddef "
    "stdint stdio stdlib string tgmath time wchar wctype arm_nnfunctions arm_nn_types arm_nn_math_types".split()
)


def check_header_name(stem: str) -> None:
    """Refuse a header that would be found in place of one of the compiler's own.

    Raises
    ------
    ValueError
        Naming ``path``.
    """
    if stem.lower() in C_HEADERS:
        raise ValueError(f"path must not be named like a header, {stem.lower()}.h, that C files include; got {stem!r}")


def fill_template(name: str, values: dict[str, str]) -> str:
    """The text of ``c_templates/<name>.in`` with every ``${word}`` replaced by ``values[word]``."""
    text = (files("quant.export") / "c_templates" / f"{name}.in").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def numbers(array: np.ndarray, indent: str = INDENT) -> str:
    """The numbers of an array in C order, separated by commas, in lines of at most LINE_LENGTH."""
    values = np.ravel(array)
    text = ", ".join(map(float_literal, values) if values.dtype.kind == "f" else map(str, values.tolist()))
    return textwrap.fill(text, LINE_LENGTH, initial_indent=indent, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def constant(ctype: str, name: str, shape: str, array: np.ndarray, comment: str) -> str:
    """A const array; one of two axes has each row on lines of its own.

    Parameters
    ----------
    ctype, name, shape : str
        ``static const <ctype> <name>[<shape>]``.
    array : array of one or two axes
        Of integers or float32.
    comment : str
        What it is, put above it.
    """
    rows = array if array.ndim == 2 else array[None]
    body = ",\n".join(numbers(row) for row in rows)
    return f"/* {comment} */\nstatic const {ctype} {name}[{shape}] = {{\n{body},\n}};\n"


def float_literal(value) -> str:
    """A float32 that reads back as the same float32."""
    text = f"{np.float32(value):.9g}"
    return text + ("f" if any(mark in text for mark in ".e") else ".0f")


def block_comment_lines(rows: list[tuple[str, ...]]) -> str:
    """A table inside a C comment: columns aligned, each line led by `` * ``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(" *   " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)
