"""What calls have planned, kept for the next."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

K = TypeVar("K")
V = TypeVar("V")


class PlanCache(dict[K, V]):
    """Plans by what they depend on, at most `size`: ever new lengths do not fill memory."""

    __slots__ = ("__weakref__", "_size")

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


_ALIKE: weakref.WeakValueDictionary[Any, PlanCache[Any, Any]] = weakref.WeakValueDictionary()


def shared_plans(alike: Hashable) -> PlanCache[Any, Any]:
    """The plans of all who name the same, as long as one of them lives: of layers that differ in weights alone."""
    return _ALIKE.setdefault(alike, PlanCache())


_PLANS: PlanCache[Any, Any] = PlanCache(256)  # of calls that no layer or cache owns


def planned(plan: Callable[..., V], *arguments: Any) -> V:
    """What `plan` makes of these arguments, kept for the next call with the same."""
    key = plan, arguments
    found: V = _PLANS.get(key) or _PLANS.keep(key, plan(*arguments))
    return found
