"""What a CUDA kernel is written in: Python over names that a target supplies.

A kernel is a plain function. The names it uses for the machine (`Instruction`s of ptx.py, the number types and `cuda`
below) are placeholders, and so are the functions it calls (`device`). `bind` makes the same code object see what one
target supplies for them: compile.py Numba's intrinsics, tests/cuda_emulator.py NumPy vectors with one lane per thread.
So the function that is compiled is the function that is tested, and importing a kernel needs no CUDA package.

Two rules follow for kernels. Branches and loop bounds are the same for all threads of a block; what differs by thread
is selected (`select_f`) or predicated (`load_f32`, `store_f32`, ...). And sums of int32 are int64 to Numba, so an
address is made int32 again with `int32(...)` before it meets memory.
"""
import dataclasses
import functools
import types
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of the machine.

    Parameters
    ----------
    text : str
        PTX with $0, $1, ... for results, then arguments; empty where compile.py knows LLVM's own form.
    results, arguments : str
        A letter per value: i int32, l int64, f float32, d float64, b bool.
    effect : bool
        Reads or writes memory, or speaks to other threads: keeps its place.
    """

    text: str
    results: str
    arguments: str
    effect: bool = False

    def __call__(self, *arguments):  # noqa: D102
        raise TypeError("for kernels only: a target supplies what this stands for")


@dataclasses.dataclass(frozen=True)
class Supplied:
    """A name that each target has an object of its own for."""

    name: str

    def __call__(self, *arguments):  # noqa: D102
        raise TypeError(f"{self.name} is for kernels only: a target supplies it")

    def __getattr__(self, attribute):
        raise AttributeError(f"{self.name} is for kernels only: a target supplies it")


@dataclasses.dataclass(frozen=True)
class Device:
    """A function that kernels call."""

    function: Callable

    def __call__(self, *arguments):  # noqa: D102
        raise TypeError(f"{self.function.__name__} is for kernels only")


def device(function):
    """Mark a function as one that kernels call."""
    return Device(function)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and what launching it needs.

    Parameters
    ----------
    function : callable
        Taking (a, p): addresses as int64, numbers as int32.
    addresses, numbers : int
        How many of each.
    threads, shared : int
        Of a block: threads, and bytes of shared memory.
    name : str
        Which it is, for files and messages.
    """

    function: Callable
    addresses: int
    numbers: int
    threads: int
    shared: int
    name: str = ""


def specialised(factory):
    """A function that makes a Kernel, made to keep what it made and to name it after its arguments."""

    @functools.cache
    @functools.wraps(factory)
    def make(*arguments):
        return dataclasses.replace(factory(*arguments), name="-".join([factory.__name__, *map(str, arguments)]))

    return make


# cuda: syncthreads, syncwarp, syncthreads_or, local.array; shared(): the address of the block's shared memory
cuda, shared, int32, int64, float32, float64, larger, smaller, tanh, log = map(
    Supplied, "cuda shared int32 int64 float32 float64 larger smaller tanh log".split())


def bind(function, supply):
    """`function` with every placeholder that it can see, in globals and closure, replaced.

    Parameters
    ----------
    function : function
    supply : callable
        From a placeholder (Instruction, Supplied, or Device, whose function is bound already) to what it stands for.

    Returns
    -------
    function
    """
    made = {}

    def replace(value):
        if isinstance(value, Device):
            if value not in made:
                made[value] = supply(Device(rebuild(value.function)))
            return made[value]
        if isinstance(value, (Instruction, Supplied)):
            return supply(value)
        return value

    def rebuild(plain):
        names = {name: replace(plain.__globals__[name]) for name in plain.__code__.co_names
                 if name in plain.__globals__}
        cells = tuple(types.CellType(replace(cell.cell_contents)) for cell in plain.__closure__ or ())
        return types.FunctionType(plain.__code__, {"__builtins__": plain.__builtins__, **names,
                                                   "__name__": plain.__module__}, plain.__name__,
                                  plain.__defaults__, cells)

    return rebuild(function)
