"""Our own threads over kernels that release the GIL, and the scratch memory they borrow.

Numba's own layers are not used: `workqueue` aborts when two Python threads enter it, `omp` kills a forked child.
"""
import atexit
import os
import threading
import time

import numpy as np

from edgeattn import crew

# Below this many operations a hand-over to another thread costs more than it saves.
SMALLEST_SHARED_WORK = 2_000_000
ALIGNMENT = 64  # bytes: one cache line, and the widest vector
_NAP = 1e-3  # seconds between a thread's looks for work, where compiled code cannot sleep until there is some
_KEPT = 8  # scratch buffers kept for the next call

_lock = threading.Lock()
_count = 1
_crew = None
_scratch = []
_ALONE = np.zeros(0, np.int64)


class _Crew:
    """Threads that wait for the jobs of one caller at a time; see edgeattn/crew.py."""

    def __init__(self, workers):
        self.taken = threading.Lock()
        self.board = aligned(crew.board_size(workers), np.int64)
        self.board[:] = 0
        self._threads = []
        for i in range(workers):
            thread = threading.Thread(target=self._work, args=(i + 1,), name=f"edgeattn-{i}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads for this process: those there are do the work
                break
            self._threads.append(thread)
        self.count = len(self._threads) + 1

    def _work(self, worker):
        while crew.serve(self.board, worker, threading.get_native_id(), crew.PATIENCE):
            time.sleep(_NAP)

    def dismiss(self):
        """End the threads once they have done what they have begun."""
        crew.dismiss(self.board)

    def join(self):
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join()


def set_num_threads(n):
    """Use at most `n` threads for a call; 1 keeps every call on its caller's thread.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer of at least 1.
    """
    global _count, _crew
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int, got {type(n).__name__}; pass the number of threads, 1 or more")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 1 keeps every call on its caller's thread")
    with _lock:
        if n == _count:
            return
        old, _crew, _count = _crew, None, int(n)
    if old is not None:
        old.dismiss()
        old.join()


def get_num_threads():
    """The number of threads a call may use."""
    return _count


def _forget_after_fork():
    """A forked child has none of its parent's threads: start afresh, with a lock nobody holds."""
    global _lock, _crew, _scratch
    _lock, _crew, _scratch = threading.Lock(), None, []


def _end():
    """Threads must not be inside compiled code when the interpreter takes it down."""
    if _crew is not None:
        _crew.dismiss()
        _crew.join()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _take_crew():
    """The crew, now this caller's, or None: with one thread, or where another caller has it."""
    global _crew
    with _lock:
        if _crew is None:
            if _count == 1:
                return None
            _crew = _Crew(_count - 1)
        return _crew if _crew.taken.acquire(blocking=False) else None


def aligned(count, dtype):
    """An uninitialized one-dimensional array of `count` elements that starts on a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start:start + size].view(dtype)


def borrow(size, dtype):
    """A scratch array of at least `size` elements, to be given back with `give_back`."""
    try:
        array = _scratch.pop()
    except IndexError:
        array = None
    if array is not None and array.dtype.type is not dtype:
        array = array.view(dtype)
    if array is None or array.size < size:
        raw = aligned((size * np.dtype(dtype).itemsize + 63) // 64 * 64, np.uint8)
        raw.fill(0)
        array = raw.view(dtype)
    return array


def give_back(array):
    """Keep `array` for the next `borrow`, unless enough are kept already."""
    if len(_scratch) < _KEPT:
        _scratch.append(array)


def run(function, arguments, dtype, shared_size, private_size, work):
    """function(*arguments, scratch, board, count): alone if the work is small, else with up to `count` threads.

    The scratch holds `shared_size` elements for all threads and then `private_size` for each; both whole cache lines.
    """
    mates = _take_crew() if _count > 1 and work >= SMALLEST_SHARED_WORK else None
    if mates is None:
        memory = borrow(shared_size + private_size, dtype)
        function(*arguments, memory, _ALONE, 1)
    else:
        try:
            count = mates.count
            memory = borrow(shared_size + count * private_size, dtype)
            function(*arguments, memory, mates.board, count)
        finally:
            mates.taken.release()
    give_back(memory)
