"""How the workbench prints: one style of table, no blanks at the ends of lines, and what to install without rich.

The package `rich` is imported when something is printed, so that calibrating and quantizing do without it.
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
from pathlib import Path

INSTALL = "pip install '.[quant]' in edgeattn's folder"
WIDTH = 80  # where there is no terminal to ask


def missing(what: str, package: str) -> ImportError:
    """The error for a package of the extra `quant` that is not there."""
    return ImportError(f"{what} needs the package {package}: {INSTALL}", name=package)


def table(*titles: str, text: int = 1, title: str | None = None):
    """An empty ``rich.table.Table``.

    Parameters
    ----------
    *titles : str
        Of the columns.
    text : int
        How many columns, from the first, are text; the others are numbers, flush right.
    title : str, optional
        Above it, flush left.
    """
    try:
        import rich.box
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise missing("a table", "rich") from error
    new = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="")
    for i, title in enumerate(titles):
        new.add_column(title, justify="left" if i < text else "right")
    return new


def console():
    """A ``rich.console.Console`` for standard output; elsewhere than on a terminal 80 wide, lines without blanks."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise missing("printing", "rich") from error
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(file=_Trimmed(sys.stdout), width=WIDTH, highlight=False, force_terminal=False, color_system=None)


def fill(text: str) -> str:
    """``text`` in lines of at most 80, words and paths whole."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def short(path) -> Path:
    """A path as seen from the current folder where it lies within."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def render(part) -> str:
    """``part`` as plain text, 80 wide."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise missing("a table", "rich") from error
    text = io.StringIO()
    Console(file=_Trimmed(text), width=WIDTH, force_terminal=False, color_system=None).print(part)
    return text.getvalue().rstrip()


class _Trimmed:
    """A text file that takes away blanks before ends of lines."""

    def __init__(self, file):
        self._file = file
        self.encoding = getattr(file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._file.write(re.sub(r"[ \t]+(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False
