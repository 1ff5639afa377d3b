"""Our own threads over kernels that release the GIL, and the scratch memory they borrow.

Numba's own layers are not used: `workqueue` aborts when two Python threads enter it, `omp` kills a forked child.

A signal's handler may raise between any two steps of Python, here too. So nothing is taken that must be given back, and
no lock is held: compiled code takes the threads for a job and leaves them (see edgeattn/runtime/worker_pool.py), and
what an exception left half done the next call does again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.runtime import worker_pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import DTypeLike, NDArray

# Below this many operations a hand-over to another thread costs more than it saves.
SMALLEST_SHARED_WORK = 2_000_000
# From this many operations on, a call on the main thread lets signals end it, and is cut into parts of so many: some
# 0.02 s on a workstation.
LONG_WORK = 1_000_000_000
MOST_PARTS = 1 << 16
ALIGNMENT = 64  # bytes: one cache line, and the widest vector
_NAP = 1e-3  # seconds between a thread's looks for work, where compiled code cannot sleep until there is some
_LOOK = 100_000_000  # nanoseconds between a long call's looks for signals; each waits for the GIL, up to 5 ms
KEPT = 8  # scratch buffers kept for the next call

_numbers = itertools.count(1)
_wanted = 0, 1  # a number of its own for each change, and the number of threads for a call
_settled = 0  # the change whose pool alone is left
_pools: dict[int, _WorkerPool] = {}  # by the number of the change that asked for them
_pool: _WorkerPool | None = None  # the one last used
scratch: list[NDArray[Any]] = []  # what `borrow` takes from
_ALONE = np.zeros(0, np.int64)


class _WorkerPool:
    """Threads that wait for the jobs of one caller at a time; see edgeattn/runtime/worker_pool.py."""

    def __init__(self, change: int, count: int):
        self.change, self.count = change, count
        self.task_queue = aligned(worker_pool.task_queue_size(count - 1), np.int64)
        self.task_queue[:] = 0
        self.started = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Have a thread for each worker that has none. Where two start one, the second ends at once."""
        for worker in range(1, self.count):
            if worker_pool.is_served(self.task_queue, worker):
                continue
            thread = threading.Thread(target=self._work, args=(worker,), name=f"edgeattn-{worker - 1}", daemon=True)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads for this process: those there are do the work
                break
        self.started = True

    def _work(self, worker: int) -> None:
        while worker_pool.worker_loop(self.task_queue, worker, threading.get_native_id(), worker_pool.PATIENCE):
            time.sleep(_NAP)

    def end(self) -> None:
        """End the threads once they have done what they have begun, and wait for that."""
        worker_pool.dismiss(self.task_queue)
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):  # of one that was never started
                thread.join()


def set_num_threads(n: int | np.integer[Any]) -> None:
    """Use at most `n` threads for a call; 1 keeps every call on its caller's thread.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer of at least 1.
    """
    global _wanted
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int, got {type(n).__name__}; pass the number of threads, 1 or more")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 1 keeps every call on its caller's thread")
    if n != _wanted[1]:
        _wanted = next(_numbers), int(n)
    _settle()


def get_num_threads() -> int:
    """The number of threads a call may use."""
    return _wanted[1]


def _settle() -> None:
    """End the threads of every change but the last."""
    global _settled, _pool
    change = _wanted[0]
    for old in list(_pools):
        if old != _wanted[0]:
            if (unwanted := _pools.get(old)) is not None:
                unwanted.end()
            _pools.pop(old, None)
    if _pool is not None and _pool.change != _wanted[0]:
        _pool = None
    _settled = change


def _forget_after_fork() -> None:
    """A forked child has none of its parent's threads: start afresh."""
    global _pools, _pool
    _pools, _pool = {}, None
    scratch.clear()


def _end() -> None:
    """Threads must not be inside compiled code when the interpreter takes it down."""
    for old in list(_pools.values()):
        old.end()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _mates() -> _WorkerPool | None:
    """The pool, its threads started; None with one thread."""
    global _pool
    change, count = _wanted
    if _settled != change:
        _settle()
    if count == 1:
        return None
    found = _pool
    if found is None or found.change != change:
        found = _pool = _pools.setdefault(change, _WorkerPool(change, count))
    if not found.started:
        found.start()
        if change != _wanted[0]:  # since then, in another thread, which may not have seen this pool
            _settle()
    return found


def serving() -> tuple[NDArray[np.int64], int]:
    """The task_queue of those who serve a call that is shared, and how many they are, its caller included."""
    mates = _mates()
    return (_ALONE, 1) if mates is None else (mates.task_queue, mates.count)


def aligned(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialized one-dimensional array of `count` elements that starts on a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start:start + size].view(dtype)


def borrow(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """A scratch array of at least `size` elements, to be given back with `give_back`."""
    try:
        array = scratch.pop()
    except IndexError:
        array = None
    if array is not None and array.dtype.type is not dtype:
        array = array.view(dtype)
    if array is None or array.size < size:
        raw = aligned((size * np.dtype(dtype).itemsize + 63) // 64 * 64, np.uint8)
        raw.fill(0)
        array = raw.view(dtype)
    return array


def give_back(array: NDArray[Any]) -> None:
    """Keep `array` for the next `borrow`, unless enough are kept already."""
    if len(scratch) < KEPT:
        scratch.append(array)


@functools.cache
def _functions() -> NDArray[np.int64] | None:
    """Where the functions of the C library and of Python are that edgeattn/runtime/worker_pool.py calls; None without
    one of them.
    """
    python = ctypes.pythonapi
    try:
        found = (ctypes.CDLL(None).clock_gettime, python.PyGILState_Ensure, python.PyErr_CheckSignals,
                 python.PyErr_Fetch, python.PyGILState_Release)
    except (AttributeError, OSError, TypeError):
        return None
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in found], np.int64)


def _long_task_queue(task_queue: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The task_queue of a call that signals may end, for the threads that serve `task_queue`; None where they are not
    handled.
    """
    if threading.get_ident() != threading.main_thread().ident or (functions := _functions()) is None:
        return None
    long = np.zeros(worker_pool.LONG_SIZE, np.int64)
    long[worker_pool.POOL], long[worker_pool.POOL_SIZE] = task_queue.ctypes.data, task_queue.size
    long[worker_pool.PAUSE] = _LOOK
    long[worker_pool.FUNCTIONS:] = functions
    return long


# Raises what it is given: a type, a value and a traceback, or null.
_restore = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("PyErr_Restore", ctypes.pythonapi))


def work_of_reading(weights: NDArray[Any]) -> int:
    """How many operations take as long as it takes one thread to read weights: what few rows wait for."""
    return 4 * weights.nbytes


def run(function: Callable[..., object], dtype: DTypeLike, shared_size: int, private_size: int, work: int,
        jobs: int = 1) -> None:
    """function(scratch, task_queue, count): alone if the work is small, else with up to `count` threads.

    The scratch holds `shared_size` elements for all threads and then `private_size` for each; both whole cache lines.
    A long call, of whose `work` each of `jobs` is an equal part, is cut finer, by a larger `count`, and what a signal's
    handler raises meanwhile ends it: its results are unfinished then.
    """
    if work < SMALLEST_SHARED_WORK:
        size = shared_size + private_size
        try:  # as `borrow` and `give_back`, for calls so short that these would show
            memory = scratch.pop()
        except IndexError:
            memory = borrow(size, dtype)
        if memory.size < size or memory.dtype.type is not dtype:
            scratch.append(memory)
            memory = borrow(size, dtype)
        function(memory, _ALONE, 1)
        if len(scratch) < KEPT:
            scratch.append(memory)
        return
    task_queue, count = serving()
    long = _long_task_queue(task_queue) if work >= LONG_WORK else None
    memory = borrow(shared_size + count * private_size, dtype)
    if long is None:
        function(memory, task_queue, count)
    else:
        function(memory, long, max(count, min(work // jobs // (LONG_WORK // 2), MOST_PARTS)))
    give_back(memory)
    if long is not None and long[worker_pool.RAISED]:
        _restore(*long[worker_pool.ERROR:worker_pool.ERROR + 3].tolist())
