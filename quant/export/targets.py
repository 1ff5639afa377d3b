"""The processors that layers are compiled for ahead of time."""

from __future__ import annotations

import platform
from typing import Any

from edgeattn.runtime import processor
from edgeattn.runtime.targets import TARGETS, Target, runnable

NATIVE = "native"
# Boards as people call them, and the target of each.
BOARDS = {"pi3": "cortex-a53", "zero2w": "cortex-a53", "pi4": "cortex-a72", "pi400": "cortex-a72", "pi5": "cortex-a76",
          "pi500": "cortex-a76"}


def target_of(name: object) -> Target:
    """The row of that name.

    Raises
    ------
    ValueError
        When there is none.
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join((*TARGETS, *BOARDS))} or {NATIVE}; got {name!r}")
    return TARGETS[name]


def target_named(name: Any) -> Any:
    """What a user called a target, as a name in TARGETS: of a board its processor, of NATIVE this machine's.

    Anything else is given back as it is, for `target_of` to judge.

    Raises
    ------
    RuntimeError
        When NATIVE is asked for and this machine can run none.
    """
    if not isinstance(name, str):
        return name
    return host_target() if name == NATIVE else BOARDS.get(name, name)


def host_target() -> str:
    """The name of the best target that this machine can run.

    Raises
    ------
    RuntimeError
        When it can run none.
    """
    found = runnable(platform.machine(), processor.flags(), processor.parts())
    if not found:
        raise RuntimeError(f"no target is for this machine, {platform.machine()} with "
                           f"{' '.join(sorted(processor.flags()))}")
    return found[-1]
