"""What edgeattn says beside its results: warnings, and what a long first call is at. Through `logging`."""
import logging
import sys

LOG = logging.getLogger("edgeattn")


class _Stderr(logging.StreamHandler):
    """Writes to what is sys.stderr at the time."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def show():
    """Show messages from INFO on at stderr, as commands and programs do; a library leaves that to its user.

    Nothing is changed where the logger, or the root one, has been set up already.
    """
    if LOG.hasHandlers():
        return
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("edgeattn: %(message)s"))
    LOG.addHandler(handler)
    if LOG.level == logging.NOTSET:
        LOG.setLevel(logging.INFO)
