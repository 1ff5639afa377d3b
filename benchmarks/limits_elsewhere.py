"""The limits of `limits.py` in a process of their own, where Numba compiles them, while this one runs a library.

The process is told a limit's name and how often to call it, a line each, and answers with the seconds of a call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO, cast

_HERE = Path(__file__).resolve().parents[1]


class Limits:
    """The limits of `threads` threads, and of reading as many bytes as said: a context that ends the process.

    Attributes
    ----------
    operations : dict of str to int
        Of each limit, in a call.
    """

    def __init__(self, threads: int, sizes: Mapping[str, int]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limits_elsewhere", json.dumps([threads, dict(sizes)])], text=True,
            cwd=_HERE, env={**os.environ, "EDGEATTN_JIT": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask, self._told = cast("TextIO", self._process.stdin), cast("TextIO", self._process.stdout)
        self.operations: dict[str, int] = self._answer()

    def __enter__(self) -> Limits:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def call(self, name: str) -> Limit:
        """A contender of `timing.interleave`."""
        return Limit(self, name)

    def seconds(self, name: str, calls: int) -> float:
        """Of a call, of so many."""
        self._ask.write(f"{name}\t{calls}\n")
        self._ask.flush()
        found: float = self._answer()
        return found

    def _answer(self):
        line = self._told.readline()
        if not line:
            raise RuntimeError(f"the process that measures limits ended with {self._process.wait()}")
        return json.loads(line)


class Limit:
    """One of them, which says itself how long it took."""

    def __init__(self, limits: Limits, name: str):
        self._limits, self._name = limits, name

    def __call__(self) -> None:
        """Once."""
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        """Of a call, of so many."""
        return self._limits.seconds(self._name, calls)


def main(threads: int, sizes: Mapping[str, int]) -> None:
    """Answer until there are no more questions."""
    import numpy as np

    import edgeattn
    from benchmarks.limits import limits, read_limits

    edgeattn.set_num_threads(threads)
    found = limits(threads) | read_limits({name: (np.zeros(size, np.int8),) for name, size in sizes.items()}, 1)
    for call, _ in found.values():
        call()
    print(json.dumps({name: operations for name, (_, operations) in found.items()}), flush=True)
    clock = time.process_time if threads == 1 else time.perf_counter
    for line in sys.stdin:
        name, calls = line.split("\t")
        call, begin = found[name][0], clock()
        for _ in range(int(calls)):
            call()
        print((clock() - begin) / int(calls), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
