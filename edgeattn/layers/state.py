"""Layers made of layers as what a file holds: a tree of settings in JSON, and tensors.

A class in `kinds.KINDS` keeps each argument of its constructor as an attribute of the same name; so a part is
{"kind": the name of its class, argument: value, ...}, an array {"tensor": its name}, a long text {"text": its name}, a
part that is there a second time {"same": the name of the first}.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.files.paths import listed
from edgeattn.kinds import KINDS, class_of, kind_of
from edgeattn.layers.saveable import Saveable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from typing_extensions import Self

_LONGEST = 1000  # characters of a text in JSON


class Stored(Saveable):
    """What is made of parts: its state is the arguments of its constructor."""

    def to_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(config, tensors): all that `from_state` needs to build an equal one."""
        tensors: dict[str, Any] = {}
        return arguments(self, "", tensors), tensors

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Self:
        """What `to_state` gave, as one of this class."""
        left = dict(tensors)
        try:
            made: Self = build(cls, keywords(config, left))
        except RecursionError:
            raise ValueError("its config has too many levels") from None
        if left:
            raise ValueError(f"unexpected tensors [{listed(sorted(left))}]")
        return made


def pack(part: Any, name: str, tensors: dict[str, Any], seen: dict[int, str] | None = None) -> Any:
    """`part` as JSON; its arrays are put into `tensors`, under names that begin with `name`.

    Raises
    ------
    TypeError
        For a part of a kind that files do not know.
    """
    seen = {} if seen is None else seen
    if isinstance(part, str) and len(part) > _LONGEST:
        tensors[name] = np.frombuffer(part.encode(), np.uint8)
        return {"text": name}
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, np.ndarray):
        tensors[name] = part
        return {"tensor": name}
    if isinstance(part, (list, tuple)):
        return [pack(each, f"{name}.{i}", tensors, seen) for i, each in enumerate(part)]
    kind, row = type(part).__name__, kind_of(part)
    if row is None:
        raise TypeError(f"{name} must be made of {', '.join(KINDS)} to be saved, got {kind}")
    if id(part) in seen:
        return {"same": seen[id(part)]}
    seen[id(part)] = name
    if row.own_state:
        config, own = part.to_state()
        tensors |= {f"{name}.{key}": array for key, array in own.items()}
        return {"kind": kind, "state": config, "tensors": sorted(own)}
    return {"kind": kind, **arguments(part, f"{name}.", tensors, seen)}


def arguments(part: Any, prefix: str, tensors: dict[str, Any], seen: dict[int, str] | None = None) -> dict[str, Any]:
    """What the constructor of `part` was given, each as `pack` has it, but for what was None."""
    seen = {} if seen is None else seen
    given = {name: getattr(part, name) for name in inspect.signature(type(part)).parameters}
    return {name: pack(value, prefix + name, tensors, seen) for name, value in given.items() if value is not None}


def unpack(packed: Any, tensors: dict[str, Any], made: dict[str, Any] | None = None, name: str = "") -> Any:
    """What `pack` packed, from names that it took; tensors are taken out of `tensors`.

    Raises
    ------
    KeyError, TypeError, ValueError
        For what `pack` would not have written.
    """
    made = {} if made is None else made
    if isinstance(packed, list):
        return [unpack(each, tensors, made, f"{name}.{i}") for i, each in enumerate(packed)]
    if not isinstance(packed, dict):
        return packed
    for key, things in (("tensor", tensors), ("text", tensors), ("same", made)):
        if key in packed:
            if not isinstance(packed[key], str) or packed[key] not in things:
                raise ValueError(f"{name} names {str(packed[key])[:100]!r}, which is not there")
            thing = made[packed[key]] if key == "same" else tensors.pop(packed[key])
            return np.asarray(thing, np.uint8).tobytes().decode() if key == "text" else thing
    kind = packed.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{name} must be one of {', '.join(KINDS)}, got {str(kind)[:100]!r}")
    home = class_of(kind)
    if KINDS[kind].own_state:
        state, names = packed.get("state"), packed.get("tensors")
        if not isinstance(state, dict) or not isinstance(names, list) or not all(
                f"{name}.{key}" in tensors for key in names):
            raise ValueError(f"{name} must have a state and the names of its tensors, got {str(packed)[:200]}")
        made[name] = home.from_state(state, {key: tensors.pop(f"{name}.{key}") for key in names})
    else:
        made[name] = build(home, keywords(packed, tensors, made, f"{name}."))
    return made[name]


def build(home: Any, given: dict[str, Any]) -> Any:
    """A `home` of these arguments, which may be too few or too many."""
    known = inspect.signature(home).parameters
    missing = [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in given]
    unknown = [name for name in given if name not in known]
    if missing or unknown:
        raise ValueError(f"{home.__name__} must be made of [{listed(known)}], got [{listed(given)}]")
    return home(**given)


def keywords(packed: Mapping[str, Any], tensors: dict[str, Any], made: dict[str, Any] | None = None, prefix: str = ""
             ) -> dict[str, Any]:
    """The inverse of `arguments`."""
    made = {} if made is None else made
    return {key: unpack(value, tensors, made, prefix + key) for key, value in packed.items() if key != "kind"}
