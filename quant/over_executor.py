"""Calibration in pieces, by whatever runs functions: the pieces are merged, in which order makes no difference."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from typing import Any, TypeVar

    T = TypeVar("T")

BATCHES_AT_ONCE = 8  # of a task, which carries the layer too
TASKS_AHEAD = 32  # that wait or run: batches are read as they are needed


def merged(executor: Executor, function: Callable[[list[Any]], T | None], batches: Iterable[Any]) -> T | None:
    """What ``function`` gives of some batches at a time, merged; None where it gives None of all.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    function : callable
        What can be pickled, where the executor has other processes.
    batches : iterable

    Raises
    ------
    TypeError
        For another executor.
    Exception
        What ``function`` raises; "batches[i]" in it counts all batches. Tasks that have not begun are cancelled.
    """
    if not isinstance(executor, Executor):  # a Dask client has a submit, too, whose futures are others
        got = f"the class {executor.__name__}" if isinstance(executor, type) else type(executor).__name__
        raise TypeError("executor must be a concurrent.futures.Executor, as ThreadPoolExecutor(4) is, and a Dask "
                        f"client's client.get_executor(); got {got}")
    total: Any = None
    running: set[Future[Any]] = set()
    pieces = _pieces(batches)
    try:
        while True:
            for begin, some in itertools.islice(pieces, TASKS_AHEAD - len(running)):
                running.add(executor.submit(_of_some, function, begin, some))
            if not running:
                return total  # type: ignore[no-any-return]
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                total = found if total is None else total if found is None else total.merge(found)
    finally:
        for future in running:
            future.cancel()


def _pieces(batches: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """(the number of the first, batches) of a few batches at a time."""
    each, begin = iter(batches), 0
    while some := list(itertools.islice(each, BATCHES_AT_ONCE)):
        yield begin, some
        begin += len(some)


def _of_some(function: Callable[[list[Any]], Any], begin: int, some: list[Any]) -> Any:
    """function(some), whose errors name the batches by their numbers among all."""
    try:
        return function(some)
    except (TypeError, ValueError) as error:
        words = re.sub(r"batches\[(\d+)\]", lambda found: f"batches[{begin + int(found[1])}]", str(error))
        if words == str(error):  # nobody's words about batches: its class may want other arguments
            raise
        raise type(error)(words) from None
