"""The processors that code is compiled for ahead of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Set


class Target(NamedTuple):
    """One row of the table.

    `machine` is what `platform.machine` calls it, `cpu` and `features` what LLVM does, `isa` is a name in
    edgeattn.runtime.isa; `requires` are the flags of /proc/cpuinfo without which the code cannot run, `parts` the
    numbers of the cores it is tuned for.
    """

    machine: str
    cpu: str
    isa: str
    requires: tuple[str, ...]
    features: str = ""
    parts: tuple[str, ...] = ()

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

# Of those that a machine can run, the last is the best, but for those tuned for other cores.
TARGETS = {
    "aarch64": Target("aarch64", "generic", "neon", _ARM),
    "cortex-a53": Target("aarch64", "cortex-a53", "neon", (*_ARM, "crc32"), parts=("0xd03",)),
    "cortex-a72": Target("aarch64", "cortex-a72", "neon", (*_ARM, "crc32"), parts=("0xd08",)),
    "cortex-a76": Target("aarch64", "cortex-a76", "neondot", _ARM_8_2),
    "x86-64-v2": Target("x86_64", "x86-64-v2", "generic", _V2),
    "x86-64-v3": Target("x86_64", "x86-64-v3", "avx2", _V3),
    "x86-64-v3-vnni": Target("x86_64", "x86-64-v3", "avx2vnni", (*_V3, "avx_vnni"), "+avxvnni"),
    "x86-64-v4": Target("x86_64", "x86-64-v4", "avx2", _V4),
    "x86-64-v4-vnni": Target("x86_64", "x86-64-v4", "avx512vnni", (*_V4, "avx512_vnni"), "+avx512vnni"),
    "x86-64-v4-vbmi": Target("x86_64", "x86-64-v4", "avx512vbmi", (*_V4, "avx512_vnni", "avx512vbmi"),
                             "+avx512vnni,+avx512vbmi"),
    "x86-64-v4-amx": Target("x86_64", "x86-64-v4", "avx512amx",
                            (*_V4, "avx512_vnni", "avx512vbmi", "amx_tile", "amx_int8"),
                            "+avx512vnni,+avx512vbmi,+amx-tile,+amx-int8"),
}


def runnable(machine: str, flags: Set[str], parts: Set[str]) -> list[str]:
    """The names of the targets whose code runs on such a machine, the best one last."""
    able = [name for name, row in TARGETS.items() if row.machine == machine and flags >= set(row.requires)]
    tuned = [name for name in able if not TARGETS[name].parts or parts and parts <= set(TARGETS[name].parts)]
    return [name for name in able if name not in tuned] + tuned
