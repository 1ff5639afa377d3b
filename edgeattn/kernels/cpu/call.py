"""Calling kernels: every one takes (parameters, addresses, scratch, task_queue, count).

Parameters and addresses are arrays of int64, records by name inside (see records.py): what follows from shapes, masks
and weights, and where the arrays of one call lie.  The first is made once for many calls; a call writes the second.
"""
import struct

import numpy as np

from edgeattn import threads
from edgeattn.runtime.jit import compiled_for

SIZE = 64  # prepared calls that a layer keeps


def entry(kernel, dtype):
    """The compiled function of a kernel whose scratch is of this dtype."""
    record = np.zeros(1, np.int64)
    return compiled_for(kernel, (record, record, np.zeros(1, dtype), record, 1))


class PreparedCall:
    """A call of a kernel that lacks nothing but the addresses of its arrays.

    Parameters
    ----------
    kernel : dispatcher
    parameters : (n,) int64 array
        Not changed by the kernel.
    dtype : type
        Of the scratch.
    shared, private : int
        Elements of scratch for all threads, and for each.
    work, jobs : int
        As for `threads.run`.
    """

    __slots__ = ("_dtype", "_run", "jobs", "parameters", "private", "shared", "work")

    def __init__(self, kernel, parameters, dtype, shared, private, work, jobs=1):
        self._run, self._dtype = entry(kernel, dtype), dtype
        self.parameters, self.shared, self.private, self.work, self.jobs = parameters, shared, private, work, jobs

    def __call__(self, *addresses):
        """Run it: `addresses` in the order of the kernel's record. The arrays must stay alive meanwhile."""
        record = np.empty(len(addresses), np.int64)
        _WRITE[len(addresses)](record, 0, *addresses)
        threads.run(self._run, (self.parameters, record), self._dtype, self.shared, self.private, self.work, self.jobs)


_WRITE = [struct.Struct(f"{count}q").pack_into for count in range(17)]


class PlanCache(dict):
    """What was planned, by what it depends on: a few dozen, so that ever new lengths do not fill memory."""

    def keep(self, key, plan):
        """Return `plan` and keep it."""
        if len(self) >= SIZE:
            self.clear()
        self[key] = plan
        return plan
