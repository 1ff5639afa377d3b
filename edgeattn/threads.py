"""Our own threads over kernels that release the GIL, and the scratch memory they borrow.

Numba's own layers are not used: `workqueue` aborts when two Python threads enter it, `omp` kills a forked child.
"""
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Below this many operations a hand-over to another thread costs more than it saves.
SMALLEST_SHARED_WORK = 4_000_000
ALIGNMENT = 64  # bytes: one cache line, and the widest vector
_KEPT = 8  # scratch buffers kept for the next call

_lock = threading.Lock()
_count = 1
_pool = None
_scratch = []


def set_num_threads(n):
    """Use at most `n` threads for a call; 1 keeps every call on its caller's thread.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer of at least 1.
    """
    global _count, _pool
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"n must be an int, got {type(n).__name__}; pass the number of threads, 1 or more")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 1 keeps every call on its caller's thread")
    with _lock:
        if n != _count:
            old, _pool, _count = _pool, None, int(n)
            if old is not None:
                old.shutdown(wait=False)


def get_num_threads():
    """The number of threads a call may use."""
    return _count


def _forget_after_fork():
    """A forked child has none of its parent's threads: start afresh, with a lock nobody holds."""
    global _lock, _pool, _scratch
    _lock, _pool, _scratch = threading.Lock(), None, []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _submit(jobs):
    """Run callables, the last one on this thread; return when all are done, raising what they raised."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=max(_count - 1, 1), thread_name_prefix="edgeattn")
        # Submitting under the lock: set_num_threads cannot shut this pool down in between.
        waiting = [_pool.submit(job) for job in jobs[:-1]]
    try:
        jobs[-1]()
    finally:
        for future in waiting:
            # A pool busy with other callers may not have started it: then it is done here.
            if future.cancel():
                jobs[waiting.index(future)]()
            else:
                future.result()


def aligned(count, dtype):
    """An uninitialized one-dimensional array of `count` elements that starts on a cache line."""
    size = count * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start:start + size].view(dtype)


def borrow(size, dtype):
    """A scratch array of at least `size` elements, to be given back with `give_back`."""
    needed = size * np.dtype(dtype).itemsize
    try:
        raw = _scratch.pop()
        if raw.size >= needed:
            return raw, raw.view(dtype)
    except IndexError:
        pass
    raw = aligned((needed + 63) // 64 * 64, np.uint8)
    raw.fill(0)
    return raw, raw.view(dtype)


def give_back(raw):
    """Keep `raw` for the next `borrow`, unless enough are kept already."""
    if len(_scratch) < _KEPT:
        _scratch.append(raw)


def _ranges(total, unit, parts):
    """Split range(total) into at most `parts` pieces whose bounds are multiples of `unit`."""
    units = -(-total // unit)
    parts = min(parts, units)
    edges = [units * i // parts * unit for i in range(parts)] + [total]
    return list(zip(edges[:-1], edges[1:], strict=False))


def run_layer(function, fixed, arguments, dtype, shared_size, private_size, batch, tokens, token_unit, blocks, work):
    """Run a layer kernel over all batch entries: on this thread if small, else its two phases split over threads.

    The kernel is called as function(*fixed, *arguments, shared, private, batch entry, phase, begin, end).
    """
    shared_size, private_size = -(-shared_size // 16) * 16, -(-private_size // 16) * 16  # whole cache lines
    count = _count if work >= SMALLEST_SHARED_WORK else 1
    if count == 1:
        raw, memory = borrow(shared_size + private_size, dtype)
        shared, private = memory[:shared_size], memory[shared_size:]
        for b in range(batch):
            function(*fixed, *arguments, shared, private, b, 0, 0, 0)
        give_back(raw)
        return
    raw, memory = borrow(shared_size + count * private_size, dtype)
    shared = memory[:shared_size]
    privates = [memory[shared_size + i * private_size:shared_size + (i + 1) * private_size] for i in range(count)]

    def job(b, phase, bounds, private):
        return lambda: function(*fixed, *arguments, shared, private, b, phase, bounds[0], bounds[1])

    for b in range(batch):
        _submit([job(b, 1, r, m) for r, m in zip(_ranges(tokens, token_unit, count), privates, strict=False)])
        _submit([job(b, 2, r, m) for r, m in zip(_ranges(blocks, 1, count), privates, strict=False)])
    give_back(raw)


def run_items(function, arguments, dtype, private_size, items, work):
    """Run function(*arguments, private, begin, end) over range(items): here if small, else split over threads."""
    private_size = -(-private_size // 16) * 16
    count = min(_count, items) if work >= SMALLEST_SHARED_WORK else 1
    raw, memory = borrow(count * private_size, dtype)
    if count <= 1:
        function(*arguments, memory, 0, items)
    else:
        def job(bounds, i):
            private = memory[i * private_size:(i + 1) * private_size]
            return lambda: function(*arguments, private, bounds[0], bounds[1])
        _submit([job(bounds, i) for i, bounds in enumerate(_ranges(items, 1, count))])
    give_back(raw)
