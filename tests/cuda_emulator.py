"""CUDA kernels in NumPy, without a GPU: all threads of a block in lock step, a value of a thread being a lane of a vector.

`run` takes the very functions that are compiled (edgeattn/kernels/cuda/language.py binds their names). What differs by thread may
not decide a branch: that raises here. So does an access outside the memory that was lent, a misaligned one, a read of
shared memory that nothing wrote, and a shuffle or matrix operation of a block that is no whole number of warps. What it
cannot see is a missing barrier between threads of different warps when the order of statements hides it; shared memory
written and read without a barrier in between by another warp is noticed (`Block.sync`).
"""
import functools

import numpy as np

from edgeattn.kernels.cuda import ptx
from edgeattn.kernels.cuda.language import Device, Instruction, bind

MEMORY = 48 * 1024  # static shared memory of a block, at most
NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # the one that every operation on float32 makes of a NaN or for want of a number
NUMBERS = {"i": np.int32, "l": np.int64, "f": np.float32, "d": np.float64, "b": np.bool_}


class Bits(np.ndarray):
    """float32 numbers that came as bits, from memory or by `float_of_bits`: what is computed of them is not of this type."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Bits) else x for x in inputs]
        return getattr(ufunc, method)(*plain, **options)


def in_registers(x):
    """float32 numbers with the bits that a GPU would have: as they came, or, where they were computed, one NaN."""
    x = np.asanyarray(x, np.float32)
    if isinstance(x, Bits):
        return x.view(np.ndarray)
    bad = np.isnan(x)
    return np.where(bad, NAN, x) if bad.any() else x


class LocalArray:
    """cuda.local.array: registers of each thread."""

    def __init__(self, threads, shape, dtype):
        shape = shape if isinstance(shape, tuple) else (shape,)
        self.values = np.full((*shape, threads), np.nan if dtype is np.float32 else -858993460, dtype)

    def __getitem__(self, index):
        return self.values[index].copy()

    def __setitem__(self, index, value):
        self.values[index] = value


class Memory:
    """Global memory: the arrays that were lent, by their addresses."""

    def __init__(self):
        self.lent = []

    def lend(self, array, writable=False):
        """The address of an array, or 0 for None."""
        if array is None:
            return 0
        assert array.flags.c_contiguous
        low = array.ctypes.data
        self.lent.append((low, low + array.nbytes, array.reshape(-1).view(np.uint8), writable))
        return low

    def bytes(self, addresses, size, write):
        """(flat bytes, offsets) for so many bytes at each address."""
        first, last = addresses.min(), addresses.max() + size
        for low, high, flat, writable in self.lent:
            if first >= low and last <= high:
                assert writable or not write, "a kernel writes to an array that it was lent for reading"
                assert not np.bitwise_or.reduce(addresses) & (size - 1), f"a global access of {size} bytes is misaligned"
                return flat, addresses - low
        raise AssertionError("a global access lies outside the arrays that were lent")


class Block:
    """One block: its shared memory, and the meaning of every instruction for its threads."""

    def __init__(self, memory, kernel, block):
        self.global_memory, self.threads, self.block, self.size = memory, kernel.threads, block, kernel.shared
        assert self.size <= MEMORY, f"{self.size} bytes of shared memory are more than {MEMORY}"
        threads = kernel.threads
        self.lanes = np.arange(threads, dtype=np.int32)
        self.shared = np.zeros(MEMORY, np.uint8)
        self.written = np.zeros(MEMORY, bool)
        self.writers, self.readers = (np.zeros((-(-threads // 32), MEMORY), bool) for _ in range(2))  # warps since a barrier
        self.wrote = self.used = False  # whether there are any
        self._all, self._warp = np.ones(threads, bool), self.lanes // 32
        self._true = {size: np.ones(size, bool).view(f"V{size}") for size in (1, 2, 4, 8, 16)}

    def begin(self, block):
        """Be another block: nothing has been written."""
        self.block = block
        self.written[:self.size] = False
        self.sync()

    # -- helpers ------------------------------------------------------------------------------------------------------

    def vector(self, value, dtype=None):
        value = np.asarray(value, dtype)
        return value if value.shape == (self.threads,) else np.full(self.threads, value)

    def threads_where(self, good):
        """Which threads a predicate lets through, True where it is all of them, False where it is none."""
        if np.ndim(good) == 0:
            return bool(good)
        count = np.count_nonzero(good)
        return good if 0 < count < self.threads else bool(count)

    def warps(self, value, dtype):
        assert self.threads % 32 == 0, "a warp is not whole"
        return self.vector(value, dtype).reshape(-1, 32)

    def sync(self):
        if self.used:
            self.writers[:, :self.size] = self.readers[:, :self.size] = self.wrote = self.used = False

    def _shared_at(self, address, size):
        """Which of the pieces of `size` bytes each thread means."""
        at = self.vector(address, np.int64)
        assert not np.bitwise_or.reduce(at) & (size - 1), f"a shared access of {size} bytes is misaligned"
        assert at.min() >= 0 and at.max() + size <= self.size, "a shared access lies outside the block's memory"
        return at // size

    def _others(self, users, at, size):
        """Whether another warp than a thread's own is among those that used its piece since the last barrier."""
        if len(users) == 1:
            return False
        found = users.view(f"V{size}").take(at, 1).view(bool).reshape(len(users), self.threads, size).any(2)
        found[self._warp, self.lanes] = False
        return found.any()

    def _uses(self, users, at, size):
        users.view(f"V{size}")[self._warp, at] = self._true[size]
        self.used = True

    def read(self, address, size):
        at = self._shared_at(address, size)
        assert self.written.view(f"V{size}").take(at).view(bool).all(), "shared memory is read that nothing wrote"
        assert not (self.wrote and self._others(self.writers, at, size)), \
            "shared memory is read before a barrier after another warp wrote it"
        self._uses(self.readers, at, size)
        return self.shared.view(f"V{size}").take(at).view(np.uint8).reshape(-1, size)

    def write(self, address, data):
        size = data.shape[1]
        at = self._shared_at(address, size)
        assert not (self.used and (self._others(self.writers, at, size) or self._others(self.readers, at, size))), \
            "shared memory is overwritten before a barrier"
        self._uses(self.writers, at, size)
        self.wrote = True
        self.shared.view(f"V{size}")[at] = data.view(f"V{size}")[:, 0]
        self.written.view(f"V{size}")[at] = self._true[size]

    def as_bytes(self, *values, dtype):
        """Bytes of each thread's values, made the dtype."""
        if dtype is np.float32:
            values = [in_registers(value) for value in values]
        if dtype is np.float16:
            values = [to_half(value) for value in values]
        columns = np.empty((self.threads, len(values)), dtype)
        for i, value in enumerate(values):
            columns[:, i] = value
        return columns.view(np.uint8)

    def load(self, good, address, count, dtype):
        mask, at = self.threads_where(good), self.vector(address, np.int64)
        size = count * np.dtype(dtype).itemsize
        if mask is False:
            return [np.zeros(self.threads, dtype) for _ in range(count)]
        flat, offsets = self.global_memory.bytes(at if mask is True else at[mask], size, False)
        data = flat.take(offsets[:, None] + np.arange(size)).view(dtype)
        if mask is not True:
            found = np.zeros((self.threads, count), dtype)
            found[mask] = data
            data = found
        return list(data.T)

    def store(self, good, address, *values, dtype):
        mask, at = self.threads_where(good), self.vector(address, np.int64)
        data = self.as_bytes(*values, dtype=dtype)
        if mask is False:
            return
        if mask is not True:
            at, data = at[mask], data[mask]
        flat, offsets = self.global_memory.bytes(at, data.shape[1], True)
        flat[offsets[:, None] + np.arange(data.shape[1])] = data

    def uniform(self, address, dtype):
        assert np.ndim(address) == 0, "the address of a uniform load differs by thread"
        flat, offset = self.global_memory.bytes(np.array([address]), np.dtype(dtype).itemsize, False)
        return flat[offset[0]:offset[0] + np.dtype(dtype).itemsize].view(dtype)[0]

    # -- matrices -----------------------------------------------------------------------------------------------------

    def matrices(self, address, turned):
        rows = self.read(address, 16)
        rows = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        found = []
        for j in range(4):
            matrix = rows[:, j].swapaxes(1, 2) if turned else rows[:, j]
            low, high = matrix[:, g, 2 * t].astype(np.uint32), matrix[:, g, 2 * t + 1].astype(np.uint32)
            found.append((low | high << 16).view(np.int32).reshape(-1))
        return found

    def mma(self, left, right, K, result, *registers):
        """C (16, 8) += A (16, K) B (K, 8) for every warp; `left`, `right`, `result` the dtypes of A, B and C.

        Summed in float64, which is exact for the integers, and rounded once.
        """
        warps, per = self.threads // 32, 4 // np.dtype(left).itemsize
        in_a, in_b, in_c = _places(K, per)
        A, B = np.empty((warps, 16 * K)), np.empty((warps, K * 8))
        words = np.empty((warps, 32, 6), np.int32)
        for i in range(6):
            words[:, :, i] = self.warps(registers[i], np.int32)
        A[:, in_a] = words[:, :, :4].copy().view(left).reshape(warps, -1)
        B[:, in_b] = words[:, :, 4:].copy().view(right).reshape(warps, -1)
        C = (A.reshape(warps, 16, K) @ B.reshape(warps, K, 8)).reshape(warps, -1)[:, in_c]
        return [(self.warps(registers[6 + i], result) + C[:, :, i]).astype(result).reshape(-1) for i in range(4)]

    # -- the list -----------------------------------------------------------------------------------------------------

    def meanings(self):
        f32, i32, f64 = np.float32, np.int32, np.float64

        def view(x, dtype):
            return np.ascontiguousarray(x).view(dtype) if np.ndim(x) else np.asarray(x).reshape(1).view(dtype)[0]

        def clamped(x):
            x = np.where(np.isnan(x), 0, np.asarray(x, f64))
            return np.clip(x, -2.0**31, 2.0**31 - 1).astype(i32)

        def fma(a, b, c):
            product = np.asarray(a, f64) * np.asarray(b)
            product = product + np.asarray(c) if np.ndim(product) == 0 else np.add(product, np.asarray(c), product)
            return product.astype(f32)

        def floats(data):
            return [column.view(Bits) for column in np.ascontiguousarray(data).view(f32).T]

        def load_floats(good, address, count):
            return [column.view(Bits) for column in self.load(good, address, count, f32)]

        def signed(word):
            return np.ascontiguousarray(self.vector(word, i32)).view(np.int8).reshape(-1, 4).astype(i32)

        def half_pair(high, low):
            low, high = (to_half(self.vector(x, f32)).view(np.uint16).astype(np.uint32) for x in (low, high))
            return (low | high << 16).view(i32)

        def tf32(x):
            x = self.vector(x, f32)
            rounded = (view(x, np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            return np.where(np.isnan(x), NAN.view(np.uint32), rounded).view(i32)

        def lane_xor(x, distance):
            x = self.warps(x, None)
            return x[:, np.arange(32) ^ int(distance)].reshape(-1)

        def from_lane(x, source):
            return np.take_along_axis(self.warps(x, f32), self.warps(source, np.int64), 1).reshape(-1)

        return {
            "thread": lambda: self.lanes.copy(),
            "block_x": lambda: i32(self.block[0]), "block_y": lambda: i32(self.block[1]),
            "block_z": lambda: i32(self.block[2]),
            "times": lambda a, b: (np.asarray(a, np.int64) * np.asarray(b, np.int64)).astype(i32)[()],
            "times_wide": lambda a, b: np.asarray(a, np.int64) * np.asarray(b, np.int64),
            "quotient": lambda a, b: i32(a // b), "remainder": lambda a, b: i32(a % b),
            "fma": fma,
            "multiply": lambda a, b: np.asarray(a, f32) * np.asarray(b, f32),
            "add": lambda a, b: np.asarray(a, f32) + np.asarray(b, f32),
            "divide": lambda a, b: np.asarray(a, f32) / np.asarray(b, f32),
            "square_root": lambda a: np.sqrt(np.asarray(a, f32)),
            "maximum": lambda a, b: np.maximum(np.asarray(a, f32), np.asarray(b, f32)),
            "multiply_f64": lambda a, b: np.asarray(a, f64) * np.asarray(b, f64),
            "truncate_f64": lambda a: np.trunc(np.asarray(a, f64)),
            "nearest": lambda x: clamped(np.rint(x)), "truncate": lambda x: clamped(np.trunc(x)),
            "to_float": lambda x: np.asarray(x, i32).astype(f32)[()],
            "bits_of": lambda x: view(in_registers(x), i32),
            "float_of_bits": lambda x: np.asarray(view(np.asarray(x, i32), f32)).view(Bits),
            "double_of_words": lambda low, high: view(self.as_bytes(low, high, dtype=i32), f64)[:, 0],
            "select_f": lambda c, a, b: np.where(c, np.asarray(a, f32), np.asarray(b, f32)),
            "select_i": lambda c, a, b: np.where(c, np.asarray(a, i32), np.asarray(b, i32)),
            "leading_zeros": lambda x: i32(32) - np.array(
                [int(v).bit_length() for v in view(self.vector(x, i32), np.uint32)], i32),
            "dot_bytes": lambda a, b, c: (c + (signed(a) * signed(b)).sum(1, dtype=i32)).astype(i32),
            "half_pair": half_pair, "to_tf32": tf32,
            "shuffle_f": lane_xor, "shuffle_i": lane_xor, "from_lane_f": from_lane,
            "load_uniform": lambda at: self.uniform(at, i32), "load_uniform_64": lambda at: self.uniform(at, np.int64),
            "load_f32": lambda p, at: load_floats(p, at, 1)[0], "load_f32x4": lambda p, at: load_floats(p, at, 4),
            "load_b32": lambda p, at: self.load(p, at, 1, i32)[0], "load_b32x2": lambda p, at: self.load(p, at, 2, i32),
            "load_b32x4": lambda p, at: self.load(p, at, 4, i32),
            "load_u8": lambda p, at: self.load(p, at, 1, np.uint8)[0].astype(i32),
            "load_s8": lambda p, at: self.load(p, at, 1, np.int8)[0].astype(i32),
            "load_f16": lambda p, at: self.load(p, at, 1, np.float16)[0].astype(f32),
            "unpack_f16": lambda word: list(view(self.vector(word, i32), np.float16).reshape(-1, 2).astype(f32).T),
            "store_f32": lambda p, at, v: self.store(p, at, v, dtype=f32),
            "store_f32x2": lambda p, at, *v: self.store(p, at, *v, dtype=f32),
            "store_b32": lambda p, at, v: self.store(p, at, v, dtype=i32),
            "store_s8": lambda p, at, v: self.store(p, at, v, dtype=np.int8),
            "store_f16": lambda p, at, v: self.store(p, at, v, dtype=np.float16),
            "read_f32": lambda at: floats(self.read(at, 4))[0], "read_f32x2": lambda at: floats(self.read(at, 8)),
            "read_f32x4": lambda at: floats(self.read(at, 16)),
            "read_b32": lambda at: view(self.read(at, 4), i32)[:, 0],
            "write_f32": lambda at, v: self.write(at, self.as_bytes(v, dtype=f32)),
            "write_f32x4": lambda at, *v: self.write(at, self.as_bytes(*v, dtype=f32)),
            "write_b32": lambda at, v: self.write(at, self.as_bytes(v, dtype=i32)),
            "write_b32x2": lambda at, *v: self.write(at, self.as_bytes(*v, dtype=i32)),
            "write_b32x4": lambda at, *v: self.write(at, self.as_bytes(*v, dtype=i32)),
            "write_s8": lambda at, v: self.write(at, self.as_bytes(v, dtype=np.int8)),
            "read_matrices": lambda at: self.matrices(at, False), "read_turned": lambda at: self.matrices(at, True),
            "mma_s8": lambda *r: self.mma(np.int8, np.int8, 32, i32, *r),
            "mma_u8s8": lambda *r: self.mma(np.uint8, np.int8, 32, i32, *r),
            "mma_f16": lambda *r: self.mma(np.float16, np.float16, 16, f32, *r),
            "mma_tf32": lambda *r: self.mma(f32, f32, 8, f32, *r),
        }

    def supply(self, placeholder):
        """What a placeholder of language.py stands for in this block."""
        if isinstance(placeholder, Device):
            return placeholder.function
        if isinstance(placeholder, Instruction):
            return self._instructions[_NAMES[placeholder]]
        return self._supplied[placeholder.name]

    def kernel(self, function):
        """`function`, to be called once for all threads of this block."""
        self._instructions = self.meanings()
        threads, block = self.threads, self

        class Local:
            @staticmethod
            def array(shape, dtype):
                return LocalArray(threads, shape, dtype.kind)

        class Cuda:
            local = Local

            @staticmethod
            def syncthreads():
                block.sync()

            @staticmethod
            def syncwarp():
                """Threads of a warp are in step here anyway."""

            @staticmethod
            def syncthreads_or(flag):
                block.sync()
                return bool(np.any(flag))

        self._supplied = {
            "cuda": Cuda, "shared": lambda: np.int32(0), "larger": np.maximum, "smaller": np.minimum, "tanh": _float32(np.tanh),
            "log": _float32(np.log), **{name: Cast(getattr(np, name)) for name in "int32 int64 float32 float64".split()}}
        return bind(function, self.supply)


@functools.cache
def _places(K, per):
    """Where the lanes of a warp have the elements of A (16, K), B (K, 8) and C (16, 8), counted row by row."""
    lane, word, part = np.ogrid[:32, :4, :per]
    g, along = lane // 4, lane % 4 * per + part  # row or column, and depth
    j = np.arange(4)
    return (((g + 8 * (word % 2)) * K + along + K // 2 * (word // 2)).reshape(-1),
            ((along + K // 2 * word[:, :2]) * 8 + g).reshape(-1),
            (g[..., 0] + 8 * (j // 2)) * 8 + lane[..., 0] % 4 * 2 + j % 2)


class Cast:
    """A number type: converts as the machine does, and names the dtype of local arrays."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, value):
        return value if type(value) is self.kind else np.asarray(value).astype(self.kind)[()]


def to_half(x):
    """float32 numbers as float16, every NaN as the one that a GPU makes."""
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        return np.where(np.isnan(x), np.uint16(0x7FFF).view(np.float16), x.astype(np.float16))


def _float32(function):
    return lambda x: function(np.asarray(x, np.float32)).astype(np.float32)


_NAMES = {instruction: name for name, instruction in ptx.INSTRUCTIONS.items()}


def run(kernel, grid, addresses, numbers, memory):
    """Run a Kernel for every block of a grid, in an order that no kernel may rely on; the last block is returned."""
    assert (len(addresses), len(numbers)) == (kernel.addresses, kernel.numbers)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    block = Block(memory, kernel, blocks[-1])
    function = block.kernel(kernel.function)
    a, p = tuple(np.int64(x) for x in addresses), tuple(np.int32(x) for x in numbers)
    with np.errstate(all="ignore"):
        for where in reversed(blocks):
            block.begin(where)
            function(a, p)
    return block
