"""Weights side by side in one array, which a kernel is given with the position of each."""
from edgeattn import threads

from .matmul import round_up


class Packer:
    """Arrays of one dtype for one array, each from a cache line on.

    Attributes
    ----------
    at : dict
        Where each begins, by its name.
    """

    def __init__(self, dtype):
        self._dtype, self._parts, self._size, self.at = dtype, [], 0, {}

    def put(self, name, array):
        """Add an array, of any shape, as its elements in C order."""
        self.at[name] = self._size
        self._parts.append(array)
        self._size += round_up(array.size, 16)

    def packed(self):
        """All in one aligned array, zeros between."""
        weights = threads.aligned(self._size, self._dtype)
        for at, array in zip(self.at.values(), self._parts, strict=True):
            end = at + array.size
            weights[at:end] = array.ravel()
            weights[end:at + round_up(array.size, 16)] = 0
        return weights
