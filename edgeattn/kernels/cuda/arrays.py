"""Arrays on the device: an address, a shape, strides, and whoever made them."""
import dataclasses
import itertools
import math

import numpy as np

from edgeattn.kernels.cuda import dlpack


@dataclasses.dataclass(slots=True, eq=False)
class View:
    """What `__cuda_array_interface__` (version 2 or 3) or DLPack says about an array. Nobody changes one.

    An axis of size 1 has the stride that it would have beside the next one, whatever it came with: nobody steps along
    it, and libraries write there what they please.

    Parameters
    ----------
    owner : object
        The array itself, and what else its memory lives as long as.
    pointer : int
    shape, strides : tuple of int
        Strides in bytes.
    dtype : numpy.dtype
    read_only : bool
    """

    owner: object
    pointer: int
    shape: tuple
    strides: tuple
    dtype: np.dtype
    read_only: bool = False

    @property
    def ndim(self):
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self):
        """Whether the elements lie side by side in C order."""
        return self.strides == c_strides(self.shape, self.dtype) or self.size == 0

    def reshape(self, *shape):
        """The same elements in C order under other axes; the axes put together must be contiguous among themselves."""
        return dataclasses.replace(self, shape=shape, strides=_reshaped(self, shape))

    def span(self):
        """(first, last + 1) byte address that the elements touch."""
        low = high = int(self.pointer)
        for n, step in zip(self.shape, self.strides, strict=True):
            if step < 0:
                low += (n - 1) * step
            else:
                high += (n - 1) * step
        return low, high + self.dtype.itemsize


def c_strides(shape, dtype):
    """Strides in bytes of a C-contiguous array."""
    strides, step = [], np.dtype(dtype).itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _stepped(shape, strides, itemsize):
    """Strides with those of axes of size 1 made what they would be beside the next axis, as far as that is an int32."""
    made, beside = [], itemsize
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        step = step if n != 1 else beside if abs(beside) < 2**31 else 0
        made.append(step)
        beside = step * n
    return tuple(reversed(made))


def _reshaped(view, shape):
    """Strides for `shape`, or ValueError where the elements would have to move."""
    if view.size == 0:
        return c_strides(shape, view.dtype)
    old = [(n, step) for n, step in zip(view.shape, view.strides, strict=True) if n != 1]
    new = [axis for axis, n in enumerate(shape) if n != 1]
    strides = [0] * len(shape)
    while old:  # the fewest first axes of both that hold as many elements
        i = j = 1
        before, after = old[0][0], shape[new[0]]
        while before != after:
            if before < after:
                before, i = before * old[i][0], i + 1
            else:
                after, j = after * shape[new[j]], j + 1
        if any(step != n * inner for (_, step), (n, inner) in itertools.pairwise(old[:i])):
            raise ValueError(f"axes of shape {view.shape} and strides {view.strides} cannot be joined to {shape} "
                             "without a copy; pass a contiguous array")
        step = old[i - 1][1]
        for axis in reversed(new[:j]):
            strides[axis] = step
            step *= shape[axis]
        old, new = old[i:], new[j:]
    return _stepped(shape, strides, view.dtype.itemsize)


def on_device(array):
    """Whether an array lies in a GPU's memory."""
    return hasattr(array, "__cuda_array_interface__") or dlpack.on_gpu(array)


def view(name, array, stream=0, by_dlpack=False):
    """The View of an array on the device.

    Parameters
    ----------
    name : str
        For messages.
    array : object
    stream : int
        On which it will be used: where an array is read by DLPack, its library is told, and sees to the order itself.
    by_dlpack : bool
        Read it so where `__cuda_array_interface__` is there as well.

    Raises
    ------
    TypeError
        When it lies elsewhere.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if (interface is None or by_dlpack) and dlpack.on_gpu(array):
        capsule, pointer, shape, strides, dtype = dlpack.described(name, array, stream)
        owner, read_only = (array, capsule), False
    elif interface is None:
        raise TypeError(f"{name} must be an array on the device like query (__cuda_array_interface__ or DLPack), got "
                        f"{type(array).__name__}; nothing is copied there behind your back")
    else:
        dtype, shape, strides = np.dtype(interface["typestr"]), tuple(interface["shape"]), interface.get("strides")
        owner, (pointer, read_only) = array, interface["data"]
    strides = c_strides(shape, dtype) if strides is None else _stepped(shape, strides, dtype.itemsize)
    return View(owner, pointer or 0, shape, strides, dtype, read_only)
