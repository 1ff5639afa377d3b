"""The processors that layers are compiled for ahead of time."""

from __future__ import annotations

import platform
from typing import NamedTuple

from edgeattn.bundle import cpu_flags


class Target(NamedTuple):
    """One row of the table.

    `machine` is what `platform.machine` calls it, `cpu` and `features` what LLVM does, `isa` is a name in
    edgeattn.runtime.isa; `requires` are the flags of /proc/cpuinfo without which the code cannot run.
    """

    machine: str
    cpu: str
    isa: str
    requires: tuple[str, ...]
    features: str = ""

    @property
    def triple(self) -> str:
        """The machine as LLVM calls it."""
        return f"{self.machine}-unknown-linux-gnu"


_ARM = ("fp", "asimd")
_ARM_8_2 = (*_ARM, "crc32", "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp")
# The levels of the x86-64 psABI, table 3.1, as Linux names their features.
_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Of those that a machine can run, the last is the best.
TARGETS = {
    "aarch64": Target("aarch64", "generic", "neon", _ARM),
    "cortex-a53": Target("aarch64", "cortex-a53", "neon", (*_ARM, "crc32")),
    "cortex-a72": Target("aarch64", "cortex-a72", "neon", (*_ARM, "crc32")),
    "cortex-a76": Target("aarch64", "cortex-a76", "neondot", _ARM_8_2),
    "x86-64-v3": Target("x86_64", "x86-64-v3", "avx2", _V3),
    "x86-64-v3-vnni": Target("x86_64", "x86-64-v3", "avx2vnni", (*_V3, "avx_vnni"), "+avxvnni"),
    "x86-64-v4": Target("x86_64", "x86-64-v4", "avx2", _V4),
    "x86-64-v4-vnni": Target("x86_64", "x86-64-v4", "avx512vnni", (*_V4, "avx512_vnni"), "+avx512vnni"),
}


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
    flags = cpu_flags()
    found = [name for name, row in TARGETS.items()
             if row.machine == platform.machine() and flags.issuperset(row.requires)]
    if not found:
        raise RuntimeError(f"no target is for this machine, {platform.machine()} with {' '.join(sorted(flags))}")
    return found[-1]
