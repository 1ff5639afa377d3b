"""The processors that layers are compiled for ahead of time."""

from __future__ import annotations

import platform

from edgeattn.runtime import processor
from edgeattn.runtime.targets import TARGETS, Target, runnable

NATIVE = "native"


def target_of(name) -> Target:
    """The row of that name.

    Raises
    ------
    ValueError
        When there is none.
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)} or {NATIVE}; got {name!r}")
    return TARGETS[name]


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
