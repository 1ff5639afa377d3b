"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Iterable

import rich.progress
from rich.console import Console


def track(items: Iterable, description: str):
    """Iterate over ``items`` under a progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    return rich.progress.track(items, description, console=console, transient=True, disable=not console.is_terminal)
