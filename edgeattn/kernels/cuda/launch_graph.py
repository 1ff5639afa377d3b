"""A call taken down while it is made, so that one like it is the same launches with other addresses.

Addresses in the call's arrays say which array they point into and how far; so do those in memory for what lies between
the launches, which a repeated call gets in one piece.
"""
import contextlib
import dataclasses
import threading

from edgeattn.kernels.cuda.driver import driver

_ALIGNED = 256
_capturing = threading.local()


class Address(int):
    """An address, the place of its array among those of the call, and how many bytes into it.

    Parameters
    ----------
    value, place, offset : int
    """

    def __new__(cls, value, place, offset=0):  # noqa: D102
        made = super().__new__(cls, value)
        made.place, made.offset = place, offset
        return made

    def __add__(self, more):
        return Address(int(self) + more, self.place, self.offset + more)

    __radd__ = __add__


class LaunchGraph:
    """What a call did.

    Attributes
    ----------
    launches : list of (Kernel, grid, addresses, numbers)
        An address is (place, offset): places are the arrays' in the order that the call counts them, then SCRATCH, and
        NOWHERE, from where the offset is the address itself.
    scratch : int
        Bytes.
    device : int
        On which it was made, and is made again.
    """

    SCRATCH, NOWHERE = -2, -1

    def __init__(self, device):
        self.launches, self.scratch, self.device = [], 0, device
        self._end = 0  # of the scratch memory that is in use
        self._starters = {}  # by driver

    def launch(self, kernel, grid, addresses, numbers):
        """Note a launch."""
        places = [(a.place, a.offset) if isinstance(a, Address) else (self.NOWHERE, int(a)) for a in addresses]
        self.launches.append((kernel, grid, places, tuple(numbers)))

    def place(self, view):
        """The View of new memory with an address that tells its place."""
        offset = self._end
        self._end += -(-view.size * view.dtype.itemsize // _ALIGNED) * _ALIGNED
        self.scratch = max(self.scratch, self._end)
        return dataclasses.replace(view, pointer=Address(view.pointer, self.SCRATCH, offset))

    @contextlib.contextmanager
    def reusing(self):
        """A block after which nobody reads the memory that it made: launches keep their order."""
        begin = self._end
        yield
        self._end = begin

    def replay(self, gpu, pointers, stream):
        """All launches, `device` being the current one; pointers of the arrays, then of scratch memory, then 0."""
        starters = self._starters.get(gpu)
        if starters is None:
            starters = self._starters[gpu] = [gpu.starter(kernel, self.device) for kernel, *_ in self.launches]
        for start, (_, grid, places, numbers) in zip(starters, self.launches, strict=True):
            start(grid, [pointers[place] + offset for place, offset in places], numbers, stream)


def launch(kernel, grid, addresses, numbers, stream):
    """Start a Kernel, taken down where somebody does; an empty grid is nothing to start."""
    if 0 in grid:
        return
    driver().launch(kernel, grid, addresses, numbers, stream)
    if (record := capturing()) is not None:
        record.launch(kernel, grid, addresses, numbers)


def capturing():
    """The LaunchGraph of the call that this thread takes down, or None."""
    return getattr(_capturing, "record", None)


@contextlib.contextmanager
def capture(wanted=True):
    """A LaunchGraph of what is launched in this block by this thread; None where none is wanted."""
    _capturing.record = LaunchGraph(driver().device()) if wanted else None
    try:
        yield _capturing.record
    finally:
        _capturing.record = None


def as_argument(view, place):
    """A View whose address tells its place among the arrays of the call, where somebody takes the call down."""
    return view if capturing() is None else dataclasses.replace(view, pointer=Address(view.pointer, place))
