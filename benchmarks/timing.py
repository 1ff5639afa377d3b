"""Timing that a busy machine disturbs least: every round calls each contender in turn, in an order drawn anew.

Only numbers of one round are compared, so what slows the machine for a second slows all of them. A contender's time is
the median over the rounds; a ratio is the median of the rounds' ratios.

A contender with a method `seconds(calls)` is timed by itself, in a process of its own.

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


def interleave(calls: Mapping[str, Callable], *, seconds: float, threads: int = 1, seed: int = 0, warm: float = 0,
               cold: dict[str, list] | None = None) -> dict[str, list]:
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
    warm : float
        Seconds of untimed calls before each block: megabytes of weights are back in the caches after some five calls.
    cold : dict of str to list, optional
        To hold the seconds of the first of those untimed calls, of each round, as the times are held.

    Returns
    -------
    dict of str to list of float
        Seconds per call, one number per round; the same rounds for all.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {name: _repeats(call, clock, warm) for name, call in calls.items()}
    times = {name: [] for name in calls}
    if cold is not None:
        cold |= {name: [] for name in calls}
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
                counted, untimed = repeats[name]
                if untimed:
                    first = _block(calls[name], clock, 1)
                    if cold is not None:
                        cold[name].append(first)
                    for _ in range(untimed - 1):
                        calls[name]()
                times[name].append(_block(calls[name], clock, counted))
    finally:
        if collecting:
            gc.enable()
    return times


def _repeats(call, clock, warm):
    """(calls in a block, untimed ones before it): from three calls, the second and third timed."""
    call()
    once = max(min(_block(call, clock, 1) for _ in range(2)), 1e-7)  # seconds
    return max(1, int(BLOCK / once)), max(int(once < WARM_BELOW), int(np.ceil(warm / once)))


def _settle():
    """Wait until the threads of the call before sleep; awake they look for work, on a processor that others need."""
    end = time.perf_counter() + LONGEST_SETTLE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(SETTLE)
        if time.process_time() - before < SETTLE / 10:
            break


def _block(call, clock, repeats):
    if hasattr(call, "seconds"):
        return call.seconds(repeats)
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def median_ratio(slower: list, faster: list) -> float:
    """Median over rounds of ``slower / faster``: how many times as fast the second is."""
    return float(np.median(np.divide(slower, faster)))
