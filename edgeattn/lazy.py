"""Names of a package whose modules are imported when a name is asked for."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # what type checkers take for True; `typing` itself would be another import
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def dir_of(package: str, homes: Mapping[str, str]) -> Callable[[], list[str]]:
    """The package's `__dir__`: the names it is for, and no module of it."""
    def names() -> list[str]:
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith("__")), *homes})
    return names


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The package's `__getattr__`.

    Parameters
    ----------
    package : str
        Its `__name__`.
    homes : mapping of str to str
        Name -> the module in the package that has it.
    """
    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value
    return get
