"""What one core, or several, can do at most: multiply and add in registers, and read memory.

Written with the vectors of edgeattn.kernels.cpu.simd, so each instruction set has its own limit: float32 by
multiply-add, int8 by the four-way dot product, or as words that are added first, and, where there is one, by the matrix
unit. Numba compiles them: in a process of their own where this one runs a library, see `Elsewhere`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.machine import cache_sizes
from benchmarks.timing import interleave
from edgeattn import threads
from edgeattn.kernels.cpu.simd import (
    ADDS_FIRST,
    COLUMNS,
    LANES,
    MATRIX_ROWS,
    ROWS,
    WIDTH,
    add_products_of_wide,
    matrix_configure,
    matrix_dot,
    matrix_load,
    matrix_release,
    matrix_store,
    outer_product,
    tile_add,
    tile_store,
    tile_zero,
)
from edgeattn.runtime.isa import ISA
from edgeattn.runtime.jit import compiled_for, jit
from edgeattn.runtime.worker_pool import parallel_for, task

STEPS = 80_000  # products of a tile in one call, and of four tiles of the matrix unit: some tenths of a millisecond
NEAR = 64  # products of words whose operands are in the first cache: of the same ones the compiler would make one
MATRIX_STEPS = 20_000
SHARED_FACTOR = 5  # more on several threads, which take a while to start


@jit
def tile_limit(steps, a, b, private, begin, end):
    """`steps` rank-one updates of a register tile per item; the operands change so that no product is computed once."""
    for _ in range(begin, end):
        tile = tile_zero(ROWS, COLUMNS, b)
        for k in range(steps):
            tile = outer_product(tile, a, 0, 1, b, (k & 1) * WIDTH)
        tile_store(tile, private, 0, WIDTH, LANES)


@jit
def word_limit(steps, a, b, private, begin, end):
    """tile_limit() of bytes that have become words, as word_products.py multiplies them."""
    for _ in range(begin, end):
        tile = tile_zero(ROWS, COLUMNS, b)
        for k in range(0, steps, 2):
            near = k & (NEAR - 1)
            tile = add_products_of_wide(tile, a, 2 * near, b, near * 2 * WIDTH)
            tile = add_products_of_wide(tile, a, 2 * near + 2, b, (near + 1) * 2 * WIDTH)
        tile_store(tile, private, 0, WIDTH, LANES)


@jit
def matrix_limit(steps, private, begin, end):
    """`steps` products of four tiles of the matrix unit per item, of zeros."""
    for _ in range(begin, end):
        unsigned = private.view(np.uint32)
        matrix_configure(private, 0)
        for i in range(16):
            private[i] = 0
        matrix_load(0, private, 0, 0)
        matrix_load(1, private, 0, 0)
        matrix_load(2, private, 0, 0)
        matrix_load(3, private, 0, 0)
        matrix_load(4, private, 0, 0)
        matrix_load(5, private, 0, 0)
        matrix_load(6, private, 0, 0)
        matrix_load(7, private, 0, 0)
        for _k in range(steps):
            matrix_dot(0, 4, 6, unsigned, private)
            matrix_dot(1, 4, 7, unsigned, private)
            matrix_dot(2, 5, 6, unsigned, private)
            matrix_dot(3, 5, 7, unsigned, private)
        matrix_store(0, private, 0, MATRIX_ROWS)
        matrix_release()


@task
def read_part(numbers, scratch, portion, worker, part):
    """Add up `portion` tiles of numbers, which is as much as loading them."""
    tile = tile_zero(ROWS, COLUMNS, numbers)
    size = ROWS * WIDTH
    for at in range(part * portion * size, min((part + 1) * portion * size, numbers.size // size * size), size):
        tile = tile_add(tile, numbers, at, WIDTH, LANES)
    tile_store(tile, scratch[worker * size:], 0, WIDTH, LANES)


@jit
def read(numbers, scratch, task_queue, count):
    """Read all numbers, on at most `count` threads."""
    tiles = numbers.size // (ROWS * WIDTH)
    parts = 1 if count == 1 else 2 * count
    parallel_for(task_queue, parts, read_part, numbers, scratch, (tiles + parts - 1) // parts)


def _reader(size: int) -> Callable:
    """A call that reads `size` bytes in one piece, on as many threads as a kernel would."""
    numbers = threads.aligned(-(-size // (4 * ROWS * WIDTH)) * ROWS * WIDTH, np.float32)
    numbers[:] = 1
    run = functools.partial(compiled_for(read, (numbers, np.zeros(1, np.float32), np.zeros(1, np.int64), 1)), numbers)
    return lambda: threads.run(run, np.float32, 0, ROWS * WIDTH, max(size, threads.SMALLEST_SHARED_WORK))


def read_limits(arrays: dict[str, tuple], operations: int) -> dict[str, tuple[Callable, int]]:
    """name -> (call, ``operations``): the call reads as many bytes, again and again, as the arrays have together."""
    return {name: (_reader(sum(array.nbytes for array in some)), operations) for name, some in arrays.items()}


def read_rates(count: int) -> dict[str, float]:
    """Bytes a second out of each cache, and out of memory where the last cache leaves it to be measured."""
    found = {}
    for name, size in cache_sizes().items():
        call = _reader(size)
        times = interleave({name: call}, seconds=0.2, threads=count)[name]
        found[f"{name} ({size / 2**20:g} MiB)"] = size / float(np.median(times))
    return found


def limits(count: int) -> dict[str, tuple[Callable, int]]:
    """name -> (call, its operations), for ``count`` threads.

    "float32 limit", "int8 limit" and, on a machine that has one, "matrix limit" (int8).
    """
    size = 2 * NEAR * WIDTH + 2 * ROWS
    floats, scratch = np.ones(size, np.float32), ROWS * WIDTH
    unsigned, signed = np.ones(size, np.uint32), np.ones(size, np.int32)

    pool = ThreadPoolExecutor(count)

    def call(function, arguments, dtype):
        privates = [threads.aligned(scratch, dtype) for _ in range(count)]

        def run(private):
            function(*arguments, private, 0, 1)

        return (lambda: run(privates[0])) if count == 1 else (lambda: list(pool.map(run, privates)))

    factor = 1 if count == 1 else SHARED_FACTOR
    steps, matrix_steps = factor * STEPS, factor * MATRIX_STEPS
    tile = 2 * ROWS * WIDTH * steps * count
    of_bytes = (word_limit, (steps, signed, signed)) if ADDS_FIRST else (tile_limit, (steps, unsigned, signed))
    found = {"float32 limit": (call(tile_limit, (steps, floats, floats), np.float32), tile),
             "int8 limit": (call(*of_bytes, np.int32), 4 * tile)}
    if ISA.amx:
        found["matrix limit"] = (call(matrix_limit, (matrix_steps,), np.int32),
                                 2 * 4 * MATRIX_ROWS * MATRIX_ROWS * 4 * MATRIX_ROWS * matrix_steps * count)
    return found
