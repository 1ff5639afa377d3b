"""What kernels are written with, where none is compiled: names that may be used as Numba's are, and mean nothing.

A module of kernels says at import time what LLVM is to write later. Where kernels come prebuilt that is never asked
for, and Numba need not be there.
"""


class _Placeholder:
    """Of a module, a type, a function or a value: whatever is done with it gives a placeholder."""

    def __init__(self, *_arguments):
        pass

    def __call__(self, *_arguments):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, _bases):
        return (_Placeholder,)


class NamedTuple:
    """Of what kernels hold together: nothing makes one, and typing's takes 0.2 ms to define."""


cgutils = emit = ir = models = types = _Placeholder()


def _unchanged(function):
    return function


def _of_another(*_arguments):
    return _unchanged


def inline(function):
    """The function, which Python may call by the name it would have in Numba."""
    function.py_func = function
    return function


task = inline
intrinsic = register_jitable = _unchanged
overload = register_model = _of_another
