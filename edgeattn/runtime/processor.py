"""What this machine's processor can do, as Linux says it; without Numba, which a device may lack."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import sys

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: asm/prctl.h, XFEATURE_XTILEDATA
_AT_HWCAP = 16  # linux/auxvec.h
# Bits of AT_HWCAP on ARM64, named as Linux names them in /proc/cpuinfo; asm/hwcap.h.
HARDWARE_BITS = {"fp": 0, "asimd": 1, "crc32": 7, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimdrdm": 12, "lrcpc": 15,
                 "asimddp": 20}


def hardware_bits() -> int:
    """AT_HWCAP of this process; 0 where the system has no such thing."""
    try:
        ask = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError, TypeError):
        return 0
    ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(ask(_AT_HWCAP))


def flags() -> set[str]:
    """What all its cores can do, in the words of /proc/cpuinfo."""
    if platform.machine() == "aarch64":  # asked for directly: under emulation /proc is the host's
        bits = hardware_bits()
        return {name for name, bit in HARDWARE_BITS.items() if bits >> bit & 1}
    cores = [set(line.split()) for line in re.findall(r"^flags\s*:(.*)$", _cpuinfo(), re.MULTILINE)]
    found = set.intersection(*cores) if cores else set()
    if "amx_tile" in found and not may_use_matrix_unit():
        found -= {flag for flag in found if flag.startswith("amx")}
    return found


def may_use_matrix_unit() -> bool:
    """Ask Linux for the tile registers, which a process may not touch unasked; False where that is refused."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def parts() -> set[str]:
    """The part numbers of its ARM cores, as hexadecimal digits; none where the system does not tell."""
    return set(re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)\s*$", _cpuinfo(), re.MULTILINE))


@functools.cache
def _cpuinfo() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
