"""The name of an argument that was probably meant, in the error for one that there is not."""

from __future__ import annotations

import functools
import sys

TYPE_CHECKING = False  # what type checkers take for True; `typing` itself would be another import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])


FRAMES = int(sys.version_info < (3, 13))  # that `hinted` puts between a function and its caller, as warnings count


def hinted(function: F) -> F:
    """`function`, with that in its errors; from Python 3.13 on the interpreter says it.

    For what is called rarely: it costs a call of a Python function.
    """
    if not FRAMES:
        return function
    code = function.__code__
    names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except TypeError as error:
            for name in named:
                if name not in names and str(error).endswith(f"unexpected keyword argument {name!r}"):
                    hint = nearest(name, names)
                    raise TypeError(f"{error}{'.' if hint else ''}{hint}") from None
            raise
    return call  # type: ignore[return-value]


def explained(why: str) -> Callable[[F], F]:
    """A decorator: the error for a keyword that must be given, and was not, says `why`.

    For what gives no warnings, whose place a frame more would move.
    """
    def decorated(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except TypeError as error:
                said = str(error)
                if said.startswith(f"{function.__qualname__}() missing ") and "keyword-only" in said:
                    raise TypeError(f"{said}; {why}") from None
                raise
        return call  # type: ignore[return-value]
    return decorated


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence with the name that was probably meant; empty where none is near."""
    import difflib

    found = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {found[0]!r}?" if found else ""
