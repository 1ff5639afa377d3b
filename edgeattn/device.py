"""Where layers, caches and arrays lie: "cpu", which is here, or "cuda", a GPU.

The one module that asks which. What a device is able to do is found by its name, in the call that asks for it: nobody
below `edgeattn.executors.cuda` imports it, and without a GPU nobody pays for it.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, Literal

    from typing_extensions import Self

    from edgeattn.types import Device, EncoderOnDevice

_EXECUTORS = {"cuda": "edgeattn.executors.cuda"}


def place(thing: Any, device: object, **options: Any) -> Any:
    """`thing.to(device)` of a layer or a cache: itself for "cpu", for "cuda" what takes its place on a GPU.

    Parameters
    ----------
    thing : object
        Whose class `edgeattn.executors.cuda.placement` knows.
    device : {"cpu", "cuda"}
    options
        What a class of things may be told on its way to a GPU, as `precision`.

    Raises
    ------
    ValueError
        For another device.
    RuntimeError
        Where CUDA is missing, saying what of it.
    """
    if device == "cpu":
        return thing
    if device != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return executor(device, "placement").place(thing, **options)


class Placeable:
    """An encoder, or a model with one, which can take its place on a GPU."""

    @overload
    def to(self, device: Literal["cpu"]) -> Self: ...

    @overload
    def to(self, device: Literal["cuda"]) -> EncoderOnDevice: ...

    def to(self, device: Device) -> Self | EncoderOnDevice:
        """Place it on `device`: "cpu", or "cuda", a GPU (docs/cuda.md); `.layer` of that is this one.

        Parameters
        ----------
        device : {"cpu", "cuda"}

        Returns
        -------
        the encoder or model itself, or one whose layers compute on the GPU

        Raises
        ------
        ValueError
            For another device.
        RuntimeError
            Where there is no CUDA, saying what of it is missing.
        """
        placed: Self | EncoderOnDevice = place(self, device)
        return placed


@functools.cache
def executor(device: str, name: str) -> ModuleType:
    """A module of what computes on a device other than the CPU, imported by the first call that needs it."""
    return importlib.import_module(f"{_EXECUTORS[device]}.{name}")


def is_on_gpu(array: object) -> bool:
    """Whether an array that is not NumPy's lies in a GPU's memory."""
    here = getattr(array, "is_cuda", None)  # torch says so at once, and takes microseconds to describe an array
    if here is True or here is False:
        return here
    if hasattr(array, "__cuda_array_interface__"):
        return True
    if not hasattr(array, "__dlpack_device__"):
        return False
    from edgeattn.kernels.cuda import dlpack

    found: bool = dlpack.on_gpu(array)
    return found
