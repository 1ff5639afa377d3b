"""The GPU and the stream of a call, and the order that it keeps with arrays used on other streams."""

from edgeattn.kernels.cuda.array_provider import kind
from edgeattn.kernels.cuda.arrays import view
from edgeattn.kernels.cuda.driver import driver


class Call:
    """A call, launched on the stream and the GPU of its first array; a context in which that GPU is the current one.

    Launches wait for what is queued on the streams of the other arrays, and those streams for the launches, since both
    sides write. At the end what nobody else keeps is held until the launches have passed.

    Parameters
    ----------
    name : str
        The first array's, for messages.
    like : object
        The first array, of whose kind results are.

    Attributes
    ----------
    device, stream : int
        `stream` within the context alone.
    """

    def __init__(self, name, like):
        self.name, self.like = name, like
        found = kind(like).device(like)
        self.device = driver().device() if found is None else found
        self._others, self._kept = [], []

    def __enter__(self):
        self._guard = driver().on(self.device)
        self._guard.__enter__()
        self.stream = kind(self.like).stream(self.like) or 0
        return self

    def __exit__(self, *error):
        gpu = driver()
        try:
            for other in self._others:
                gpu.order(self.stream, other)
            if self._kept:
                gpu.keep(self._kept, self.stream)
        finally:
            self._guard.__exit__(*error)

    def view(self, name, array):
        """The View of an array of this call, with what is queued on its stream done before what is launched now.

        Raises
        ------
        TypeError
            When it lies elsewhere than on a GPU.
        ValueError
            When it lies on another GPU.
        """
        of = kind(array)
        made = view(name, array, self.stream, of.by_dlpack(array))
        device = of.device(array)
        if device not in (None, self.device):
            raise ValueError(f"{name} must lie on the GPU of {self.name}, number {self.device}, got an array on number "
                             f"{device}; copy one of them")
        self.after(of.stream(array))
        if of.kept:
            self._kept.append(made.owner)
        return made

    def after(self, stream):
        """Keep order with a stream: wait for it now, and let it wait at the end; None is nothing to wait for."""
        if stream is not None and stream != self.stream and stream not in self._others:
            driver().order(stream, self.stream)
            self._others.append(stream)
