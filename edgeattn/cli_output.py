"""Standard output of commands that nobody reads, or that has no room."""
import contextlib
import os
import sys

UNREAD = 141  # the exit status of a command whose reader went away, as a shell has it of SIGPIPE


def let_go_of_output():
    """Standard output leads nowhere from here on, so that Python does not fail at its end on what cannot be written."""
    with contextlib.suppress(OSError, ValueError):  # of one that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
