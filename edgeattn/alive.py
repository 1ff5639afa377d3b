"""A sign of life on standard error of what takes longer than a second, for commands."""
import contextlib
import sys
import threading
import time

from edgeattn.messages import LOG

PATIENCE = 1.0  # seconds without a word, on a terminal
LOG_PATIENCE, LOG_EVERY = 10.0, 30.0  # elsewhere, where every word is a line that stays


@contextlib.contextmanager
def alive(what, *, bar=False):
    """Say that `what` is at work: with its seconds, in a line of a terminal that goes; elsewhere in lines of the log.

    Parameters
    ----------
    what : str
    bar : bool
        Whether a progress bar says it already, on a terminal.
    """
    stream = sys.stderr
    terminal = stream.isatty()
    if terminal and bar:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_draw if terminal else _log, args=(what, done, stream), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _draw(what, done, stream):
    began = time.perf_counter()
    if done.wait(PATIENCE):
        return
    while True:
        stream.write(f"\r\033[K{what} ... {time.perf_counter() - began:.0f} s")
        stream.flush()
        if done.wait(1.0):
            break
    stream.write("\r\033[K")
    stream.flush()


def _log(what, done, _):
    began, patience = time.perf_counter(), LOG_PATIENCE
    while not done.wait(patience):
        LOG.info("%s: at work for %.0f s", what, time.perf_counter() - began)
        patience = LOG_EVERY
