"""What calls have planned, kept for the next."""

from __future__ import annotations

from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class PlanCache(dict[K, V]):
    """Plans by what they depend on, at most `size`: ever new lengths do not fill memory."""

    def __init__(self, size: int = 64):
        super().__init__()
        self._size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._size,)  # a copy of its owner plans anew

    def keep(self, key: K, plan: V) -> V:
        """Return `plan` and keep it."""
        if len(self) >= self._size:
            self.clear()
        self[key] = plan
        return plan
