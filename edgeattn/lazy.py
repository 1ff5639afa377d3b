"""Names of a package whose modules are imported when a name is asked for."""

import importlib
import sys


def names_from(package, homes):
    """The package's `__getattr__`.

    Parameters
    ----------
    package : str
        Its `__name__`.
    homes : mapping of str to str
        Name -> the module in the package that has it.
    """
    def get(name):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value
    return get
