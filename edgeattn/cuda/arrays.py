"""Arrays on the device: an address, a shape, strides, and whoever made them."""
import dataclasses
import math

import numpy as np

from edgeattn.cuda import dlpack


@dataclasses.dataclass(slots=True, eq=False)
class View:
    """What `__cuda_array_interface__` (version 2 or 3) or DLPack says about an array. Nobody changes one.

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


def _reshaped(view, shape):
    """Strides for `shape`, or ValueError where the elements would have to move."""
    # NumPy knows whether they would: its array of the same layout holds no memory of its own.
    like = np.lib.stride_tricks.as_strided(np.empty(1, view.dtype), view.shape, view.strides, writeable=False)
    made = like.view()
    try:
        made.shape = shape
    except AttributeError:
        raise ValueError(f"axes of shape {view.shape} and strides {view.strides} cannot be joined to {shape} without a "
                         "copy; pass a contiguous array") from None
    return made.strides


def on_device(array):
    """Whether an array lies in a GPU's memory."""
    return hasattr(array, "__cuda_array_interface__") or dlpack.on_gpu(array)


def view(name, array):
    """The View of an array on the device.

    Raises
    ------
    TypeError
        When it lies elsewhere.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None and dlpack.on_gpu(array):
        capsule, pointer, shape, strides, dtype = dlpack.described(name, array)
        return View((array, capsule), pointer, shape, c_strides(shape, dtype) if strides is None else strides, dtype)
    if interface is None:
        raise TypeError(f"{name} must be an array on the device like query (__cuda_array_interface__ or DLPack), got "
                        f"{type(array).__name__}; nothing is copied there behind your back")
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides")
    pointer, read_only = interface["data"]
    strides = c_strides(shape, dtype) if strides is None else tuple(strides)
    return View(array, pointer or 0, shape, strides, dtype, read_only)
