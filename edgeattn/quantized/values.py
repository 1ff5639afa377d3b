"""Objects that stay as they were made: frozen dataclasses, but for the source that those compile at every import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, NoReturn


class Frozen:
    """Its attributes are those that `set_fields` is given, in that order."""

    def set_fields(self, **fields: Any) -> None:
        """Set them, once."""
        vars(self).update(fields)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name}: {type(self).__name__} stays as it was made")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name}: {type(self).__name__} stays as it was made")

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Value(Frozen):
    """One that equals another with the same attributes."""

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))
