"""The runtimes that define the kernel sets: whether each can run here, and a .tflite file run in it."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from edgeattn.files.tflite_file import parse, read_bytes

# Older ones, back to 2.0.2, silently ignore the zero point of a BATCH_MATMUL's right side.
OLDEST_LITERT = (2, 1, 3)
NEWEST_TFLITE_RUNTIME_PYTHON = (3, 11)
# What a TFLite Micro arena needs besides the activations: its records of tensors, operators and channels.
_ARENA_BASE = 1 << 16
_ARENA_PER_RECORD = 1 << 10


class Session:
    """A model loaded in a runtime, to be run many times. Made by ``Runtime.session``.

    Attributes
    ----------
    inputs : list of (name, shape, dtype)
        In the model's order.
    """

    def __init__(self, name: str, inputs: list[tuple[str, tuple[int, ...], np.dtype]],
                 invoke: Callable[[Sequence[np.ndarray]], list[np.ndarray]]):
        self.name = name
        self.inputs = inputs
        self._invoke = invoke

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Run once.

        Parameters
        ----------
        *inputs : ndarray
            As many as the model has, of exactly its shapes and dtypes: nothing is resized or converted.

        Returns
        -------
        list of ndarray
            Copies of the outputs.

        Raises
        ------
        TypeError, ValueError
            When an input does not fit.
        RuntimeError
            When the runtime fails.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"the model has {len(self.inputs)} inputs "
                             f"({', '.join(name for name, _, _ in self.inputs)}); got {len(inputs)}")
        for x, (name, shape, dtype) in zip(inputs, self.inputs, strict=True):
            if not isinstance(x, np.ndarray) or x.dtype != dtype:
                raise TypeError(
                    f"input {name!r} must be an array of {dtype}; got {getattr(x, 'dtype', type(x).__name__)}"
                )
            if x.shape != shape:
                raise ValueError(
                    f"input {name!r} must have shape {shape}; got {x.shape} (a .tflite file has fixed"
                    " lengths: export one for these)"
                )
        return self._invoke([np.asarray(x, order="C") for x in inputs])


@dataclass(frozen=True)
class Runtime:
    """A runtime that computes as one kernel set says.

    Parameters
    ----------
    kernel_set : str
        A name in ``edgeattn.arithmetic.KERNEL_SETS``.
    name : str
        For people: the package and how it is used.
    package : str
        The package's name, as ``pip install`` takes it.
    """

    kernel_set: str
    name: str
    package: str
    _why_not: Callable[[], str | None]
    _open: Callable[[bytes, str], Session]

    def available(self) -> str | None:
        """None when the runtime can run here, else why it cannot, in words."""
        return self._why_not()

    def session(self, model) -> Session:
        """Load a model.

        Parameters
        ----------
        model : str, os.PathLike or bytes
            A .tflite file.

        Raises
        ------
        RuntimeError
            When the runtime cannot run here, or refuses the model.
        ValueError
            When the file is damaged.
        """
        reason = self.available()
        if reason is not None:
            raise RuntimeError(f"cannot run {self.kernel_set!r} here: {reason}")
        data, name = read_bytes(model)
        # First our own reader: TFLite Micro trusts a file, and dies of a damaged one without a Python error.
        parse(data, name)
        try:
            return self._open(data, self.name)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"{self.name} refuses {name}: {error}") from error

    def run(self, model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Load a model and run it once; parameters as for ``session`` and ``Session.run``."""
        return self.session(model).run(*inputs)


# -- ai-edge-litert and tflite-runtime: one interface

def _interpreter_session(interpreter, name: str) -> Session:
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def invoke(arrays):
        for details, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(details["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(details["index"]) for details in outputs]

    return Session(
        name,
        [
            (details["name"], tuple(int(size) for size in details["shape"]), np.dtype(details["dtype"]))
            for details in inputs
        ],
        invoke,
    )


_GREETING = b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"


_descriptor_lock = threading.Lock()  # the descriptor is the whole process's


def _allocate_without_greeting(interpreter) -> None:
    """Allocate, and keep back the line in which LiteRT says, past Python on descriptor 2, that it runs as usual.

    No setting of LiteRT turns it off. Whatever else is written meanwhile arrives a moment later.
    """
    with _descriptor_lock, tempfile.TemporaryFile() as said:
        try:
            stderr = os.dup(2)
        except OSError:  # closed: there is nothing to keep clean
            interpreter.allocate_tensors()
            return
        os.dup2(said.fileno(), 2)
        try:
            interpreter.allocate_tensors()
        finally:
            os.dup2(stderr, 2)
            said.seek(0)
            os.write(stderr, said.read().replace(_GREETING, b""))
            os.close(stderr)


def _litert(resolver: str) -> Callable[[bytes, str], Session]:
    def open_model(data: bytes, name: str) -> Session:
        litert = importlib.import_module("ai_edge_litert.interpreter")
        interpreter = litert.Interpreter(
            model_content=data, experimental_op_resolver_type=getattr(litert.OpResolverType, resolver)
        )
        _allocate_without_greeting(interpreter)
        return _interpreter_session(interpreter, name)

    return open_model


def _tflite_runtime(data: bytes, name: str) -> Session:
    # The default resolver only: this release's BUILTIN_REF corrupts the heap with per-channel weights.
    interpreter = importlib.import_module("tflite_runtime.interpreter").Interpreter(model_content=data)
    interpreter.allocate_tensors()
    return _interpreter_session(interpreter, name)


# -- TFLite Micro

def arena_size(data: bytes, name: str) -> int:
    """Bytes to give TFLite Micro for a model: generous, because it dies without a Python error in a far too
    small arena.

    Every activation twice (they may all be alive, and products transpose a side into scratch memory), 16
    bytes for each quantized channel, and a fixed part.
    """
    graph = parse(data, name)
    channels = sum(tensor.scale.size for tensor in graph.tensors if tensor.scale is not None)
    activations = sum(math.prod(tensor.shape) * (8 if tensor.dtype is None else tensor.dtype.itemsize)
                      for tensor in graph.tensors if tensor.data is None)
    return (
        _ARENA_BASE
        + _ARENA_PER_RECORD * (len(graph.tensors) + len(graph.operators))
        + 16 * channels
        + 2 * activations
    )


def _tflm(data: bytes, name: str) -> Session:
    runtime = importlib.import_module("tflite_micro.python.tflite_micro.runtime")
    size = arena_size(data, "the model")
    if size >= 2**31:
        raise RuntimeError(f"its arena would take {size} bytes; at most {2**31 - 1} are possible")
    interpreter = runtime.Interpreter.from_bytes(data, arena_size=size)
    # It keeps no count of inputs and outputs that Python could ask for, so the file says how many.
    graph = parse(data, "the model")
    inputs = []
    for i, number in enumerate(graph.inputs):
        details = interpreter.get_input_details(i)
        inputs.append((graph.tensors[number].name, tuple(int(size) for size in details["shape"]),
                       np.dtype(details["dtype"])))

    def invoke(arrays):
        for i, array in enumerate(arrays):
            interpreter.set_input(array, i)
        interpreter.invoke()
        return [np.array(interpreter.get_output(i)) for i in range(len(graph.outputs))]

    return Session(name, inputs, invoke)


# -- what can run here

_MACHINES = {"x86-64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}


def _wrong_machine(kernel_set: str, *wanted: str) -> str | None:
    machine = platform.machine().lower()
    if any(machine in _MACHINES[name] for name in wanted):
        return None
    return f"{kernel_set!r} is what its runtime computes on {' and '.join(wanted)}; this machine is {machine}"


def _installed(package: str) -> tuple[str | None, str | None]:
    """A package's version, or None and a reason."""
    try:
        return importlib.metadata.version(package), None
    except importlib.metadata.PackageNotFoundError:
        return None, f"{package} is not installed"


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    return None


def _litert_why_not(kernel_set: str, *machines: str) -> Callable[[], str | None]:
    def why_not():
        reason = _wrong_machine(kernel_set, *machines)
        if reason is not None:
            return reason
        version, reason = _installed("ai-edge-litert")
        oldest = ".".join(map(str, OLDEST_LITERT))
        if version is None:
            return f"{reason} (pip install 'ai-edge-litert>={oldest}')"
        if _release(version) < OLDEST_LITERT:
            return (
                f"ai-edge-litert {version} ignores the zero point of keys and values; {oldest} or newer is"
                " needed"
            )
        return _import_error("ai_edge_litert.interpreter")

    return why_not


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 1, 3) of "2.1.3rc1", and of "2.1.3"."""
    numbers = []
    for part in version.split("."):
        digits = part[:len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _tflite_runtime_why_not() -> str | None:
    python = ".".join(map(str, sys.version_info[:2]))
    reason = _wrong_machine("tflite-runtime", "x86-64")
    if reason is not None:
        return reason
    if sys.version_info[:2] > NEWEST_TFLITE_RUNTIME_PYTHON:
        return f"tflite-runtime has no wheel for Python {python} (works on 3.11 and earlier on x86-64)"
    version, reason = _installed("tflite-runtime")
    if version is None:
        return f"{reason} (pip install tflite-runtime==2.14.0 'numpy<2')"
    if _release(version)[:2] != (2, 14):
        return f"'tflite-runtime' is what tflite-runtime 2.14 computes; {version} is installed"
    # It imports under numpy 2 and fails only when a model is loaded.
    if _release(np.__version__)[0] >= 2:
        return (
            f"tflite-runtime 2.14 is built for numpy 1; numpy {np.__version__} is installed (pip install"
            " 'numpy<2')"
        )
    return _import_error("tflite_runtime.interpreter")


def _tflm_why_not() -> str | None:
    version, reason = _installed("tflite-micro")
    if version is not None:
        return _import_error("tflite_micro.python.tflite_micro.runtime")
    python = ".".join(map(str, sys.version_info[:2]))
    if (
        sys.version_info[:2] != (3, 11)
        or _wrong_machine("tflm", "x86-64") is not None
        or sys.platform != "linux"
    ):
        return (f"tflite-micro has no wheel for Python {python} on {sys.platform} {platform.machine()} "
                "(there is one for 3.11 on Linux x86-64)")
    return f"{reason} (pip install tflite-micro)"


_LITERT = "ai-edge-litert"
RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        runtime.kernel_set: runtime
        for runtime in (
            Runtime(
                "litert", "LiteRT (XNNPACK)", _LITERT, _litert_why_not("litert", "x86-64"), _litert("AUTO")
            ),
            Runtime(
                "litert-arm",
                "LiteRT (XNNPACK) on ARM",
                _LITERT,
                _litert_why_not("litert-arm", "aarch64"),
                _litert("AUTO"),
            ),
            Runtime(
                "litert-builtin",
                "LiteRT without XNNPACK",
                _LITERT,
                _litert_why_not("litert-builtin", "x86-64"),
                _litert("BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
            ),
            Runtime(
                "litert-reference",
                "LiteRT reference kernels",
                _LITERT,
                _litert_why_not("litert-reference", "x86-64", "aarch64"),
                _litert("BUILTIN_REF"),
            ),
            Runtime(
                "tflite-runtime", "tflite-runtime", "tflite-runtime", _tflite_runtime_why_not, _tflite_runtime
            ),
            Runtime("tflm", "TFLite Micro", "tflite-micro", _tflm_why_not, _tflm),
        )
    }
)
