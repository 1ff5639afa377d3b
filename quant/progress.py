"""A progress bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Iterable


def track(items: Iterable, description: str):
    """Iterate over ``items`` under a progress bar on standard error, if that is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        import rich.progress
        from rich.console import Console
    except ModuleNotFoundError:
        return items
    return rich.progress.track(items, description, console=Console(stderr=True), transient=True)
