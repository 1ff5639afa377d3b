"""Timing that a busy machine disturbs least: every round calls each contender in turn, in an order drawn anew.

Only numbers of one round are compared, so what slows the machine for a second slows all of them. A contender's time is
the median over the rounds; a ratio is the median of the rounds' ratios.

On one thread the clock is the processor time of the whole process: what other processes take does not count, what a
contender's secret helpers take does. On several it is the clock on the wall.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np

BLOCK = 1e-3  # seconds that one contender is timed in one round, or one call where that takes longer
WARM_BELOW = 3e-3  # a call shorter than this is made once untimed before its block, to find its data in the caches
FEWEST_ROUNDS, MOST_ROUNDS = 7, 61
SETTLE = 2e-3  # seconds without work of any thread, before a block on several threads
LONGEST_SETTLE = 0.5  # OpenBLAS's threads look for work for 0.1 s after a product, onnxruntime's for 25 ms


def interleave(calls: Mapping[str, Callable], *, seconds: float, threads: int = 1, seed: int = 0) -> dict[str, list]:
    """Time several calls against each other.

    Parameters
    ----------
    calls : mapping of str to callable
    seconds : float
        How long to go on, about. At least FEWEST_ROUNDS rounds are made.
    threads : int
        With more than one, every block waits until the threads of the one before have gone to sleep.
    seed : int
        Of the order within rounds.

    Returns
    -------
    dict of str to list of float
        Seconds per call, one number per round; the same rounds for all.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    times = {name: [] for name in calls}
    rng = np.random.default_rng(seed)
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for i in rng.permutation(len(names)):
                name = names[i]
                if threads > 1:
                    _settle()
                times[name].append(_block(calls[name], clock, *repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def _repeats(call, clock):
    """(calls in a block, whether to warm up): from three calls, the second and third timed."""
    call()
    once = min(_block(call, clock, 1, False) for _ in range(2))
    return max(1, int(BLOCK / max(once, 1e-7))), once < WARM_BELOW


def _settle():
    """Wait until the threads of the call before sleep; awake they look for work, on a processor that others need."""
    end = time.perf_counter() + LONGEST_SETTLE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(SETTLE)
        if time.process_time() - before < SETTLE / 10:
            break


def _block(call, clock, repeats, warm):
    if warm:
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def median_ratio(slower: list, faster: list) -> float:
    """Median over rounds of ``slower / faster``: how many times as fast the second is."""
    return float(np.median(np.divide(slower, faster)))
