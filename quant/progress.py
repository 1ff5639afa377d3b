"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")


def track(items: Iterable[T], description: str) -> Iterable[T]:
    """Iterate over ``items`` under a progress bar on standard error, if that is a terminal and rich is installed.

    Without a description there is none.
    """
    if not (description and sys.stderr.isatty()):
        return items
    try:
        import rich.progress
        from rich.console import Console
    except ModuleNotFoundError:
        return items
    return rich.progress.track(items, description, console=Console(stderr=True), transient=True)
