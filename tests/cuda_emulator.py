"""CUDA kernels in NumPy, without a GPU: all threads of a block in lock step, a value of a thread being a lane of a vector.

`run` takes the very functions that are compiled (edgeattn/cuda/language.py binds their names). What differs by thread may
not decide a branch: that raises here. So does an access outside the memory that was lent, a misaligned one, a read of
shared memory that nothing wrote, and a shuffle or matrix operation of a block that is no whole number of warps. What it
cannot see is a missing barrier between threads of different warps when the order of statements hides it; shared memory
written and read without a barrier in between by another warp is noticed (`Block.sync`).
"""
import collections

import numpy as np

from edgeattn.cuda import ptx
from edgeattn.cuda.language import Device, Instruction, bind

MEMORY = 48 * 1024  # static shared memory of a block, at most
NUMBERS = {"i": np.int32, "l": np.int64, "f": np.float32, "d": np.float64, "b": np.bool_}


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

    def bytes(self, addresses, size, mask, write):
        """(flat bytes, offsets) for so many bytes at each address."""
        wanted = addresses[mask]
        for low, high, flat, writable in self.lent:
            if (wanted >= low).all() and (wanted + size <= high).all():
                assert writable or not write, "a kernel writes to an array that it was lent for reading"
                assert (wanted % size == 0).all(), f"a global access of {size} bytes is misaligned"
                return flat, np.where(mask, addresses - low, 0)
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
        self.writer = np.full(MEMORY, -1, np.int32)  # warp that wrote a byte since the last barrier
        self.reader = np.full(MEMORY, -1, np.int32)  # warp that read a byte since, -2 for several
        self.counts = collections.Counter()
        self.wavefronts = collections.Counter()  # of shared memory: needed, and fewest possible

    # -- helpers ------------------------------------------------------------------------------------------------------

    def vector(self, value, dtype=None):
        return np.broadcast_to(np.asarray(value, dtype), (self.threads,))

    def warps(self, value, dtype):
        assert self.threads % 32 == 0, "a warp is not whole"
        return self.vector(value, dtype).reshape(-1, 32)

    def sync(self):
        self.writer[:] = -1
        self.reader[:] = -1

    def _shared_at(self, address, size, mask=None):
        at = self.vector(address, np.int64)
        assert (at % size == 0).all(), f"a shared access of {size} bytes is misaligned"
        assert (at >= 0).all() and (at + size <= self.size).all(), "a shared access lies outside the block's memory"
        warp = self.lanes // 32
        per = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}[size]  # threads served together
        for begin in range(0, self.threads, per):
            words = np.unique(at[begin:begin + per, None] // 4 + np.arange(max(size // 4, 1)))
            self.wavefronts["needed"] += int(np.bincount(words % 32).max())
            self.wavefronts["fewest"] += -(-len(words) // 32)
        return at[:, None] + np.arange(size), warp[:, None]

    def read(self, address, size):
        at, warp = self._shared_at(address, size)
        assert self.written[at].all(), "shared memory is read that nothing wrote"
        other = self.writer[at]
        assert ((other == -1) | (other == warp)).all(), "shared memory is read before a barrier after another warp wrote it"
        before = self.reader[at]
        self.reader[at] = np.where((before == -1) | (before == warp), warp, -2)
        self.counts["shared"] += 1
        return self.shared[at]

    def write(self, address, data):
        at, warp = self._shared_at(address, data.shape[1])
        for others in (self.writer[at], self.reader[at]):
            assert ((others == -1) | (others == warp)).all(), "shared memory is overwritten before a barrier"
        self.shared[at], self.written[at], self.writer[at] = data, True, np.broadcast_to(warp, at.shape)
        self.counts["shared"] += 1

    def as_bytes(self, *values, dtype):
        columns = [np.ascontiguousarray(self.vector(value).astype(dtype)) for value in values]
        return np.stack(columns, 1).view(np.uint8).reshape(self.threads, -1)

    def load(self, good, address, count, dtype):
        mask, at = self.vector(good, bool), self.vector(address, np.int64)
        size = count * np.dtype(dtype).itemsize
        if not mask.any():
            return [np.zeros(self.threads, dtype) for _ in range(count)]
        flat, offsets = self.global_memory.bytes(at, size, mask, False)
        data = flat[offsets[:, None] + np.arange(size)]
        data[~mask] = 0
        self.counts["global"] += 1
        return list(np.ascontiguousarray(data).view(dtype).T)

    def store(self, good, address, *values, dtype):
        mask, at = self.vector(good, bool), self.vector(address, np.int64)
        data = self.as_bytes(*values, dtype=dtype)
        self.counts["global"] += 1
        if mask.any():
            flat, offsets = self.global_memory.bytes(at, data.shape[1], mask, True)
            flat[offsets[mask][:, None] + np.arange(data.shape[1])] = data[mask]

    def uniform(self, address, dtype):
        assert np.ndim(address) == 0, "the address of a uniform load differs by thread"
        flat, offset = self.global_memory.bytes(np.array([address]), np.dtype(dtype).itemsize, np.array([True]), False)
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

    def mma(self, left, right, K, wide, *registers):
        """C (16, 8) += A (16, K) B (K, 8) for every warp; `left`, `right` the dtypes of A and B."""
        a_words = [np.ascontiguousarray(self.warps(r, np.int32)) for r in registers[:4]]
        b_words = [np.ascontiguousarray(self.warps(r, np.int32)) for r in registers[4:6]]
        warps, lane = self.threads // 32, np.arange(32)
        g, t, per = lane // 4, lane % 4, 4 // np.dtype(left).itemsize
        A, Bm = np.zeros((warps, 16, K), wide), np.zeros((warps, K, 8), wide)
        for j, word in enumerate(a_words):
            parts = word.view(left).reshape(warps, 32, per)
            for e in range(per):
                A[:, g + 8 * (j % 2), t * per + e + K // 2 * (j // 2)] = parts[:, :, e]
        for j, word in enumerate(b_words):
            parts = word.view(right).reshape(warps, 32, per)
            for e in range(per):
                Bm[:, t * per + e + K // 2 * j, g] = parts[:, :, e]
        C = A @ Bm
        result = np.int32 if wide is np.int64 else np.float32
        self.counts["mma"] += 1
        return [(self.warps(registers[6 + j], result) + C[:, g + 8 * (j // 2), 2 * t + j % 2]).astype(result).reshape(-1)
                for j in range(4)]

    # -- the list -----------------------------------------------------------------------------------------------------

    def meanings(self):
        f32, i32, f64 = np.float32, np.int32, np.float64

        def view(x, dtype):
            return np.ascontiguousarray(x).view(dtype) if np.ndim(x) else np.asarray(x).reshape(1).view(dtype)[0]

        def clamped(x):
            x = np.where(np.isnan(x), 0, np.asarray(x, f64))
            return np.clip(x, -2.0**31, 2.0**31 - 1).astype(i32)

        def floats(data):
            return list(np.ascontiguousarray(data).view(f32).T)

        def signed(word):
            return np.ascontiguousarray(self.vector(word, i32)).view(np.int8).reshape(-1, 4).astype(i32)

        def half_pair(high, low):
            low, high = (self.vector(x, f32).astype(np.float16).view(np.uint16).astype(np.uint32) for x in (low, high))
            return (low | high << 16).view(i32)

        def tf32(x):
            return ((view(self.vector(x, f32), np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(i32)

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
            "fma": lambda a, b, c: (np.asarray(a, f64) * np.asarray(b, f64) + np.asarray(c, f64)).astype(f32),
            "multiply": lambda a, b: np.asarray(a, f32) * np.asarray(b, f32),
            "add": lambda a, b: np.asarray(a, f32) + np.asarray(b, f32),
            "divide": lambda a, b: np.asarray(a, f32) / np.asarray(b, f32),
            "maximum": lambda a, b: np.maximum(np.asarray(a, f32), np.asarray(b, f32)),
            "multiply_f64": lambda a, b: np.asarray(a, f64) * np.asarray(b, f64),
            "truncate_f64": lambda a: np.trunc(np.asarray(a, f64)),
            "nearest": lambda x: clamped(np.rint(x)), "truncate": lambda x: clamped(np.trunc(x)),
            "to_float": lambda x: np.asarray(x, i32).astype(f32)[()],
            "bits_of": lambda x: view(np.asarray(x, f32), i32), "float_of_bits": lambda x: view(np.asarray(x, i32), f32),
            "double_of_words": lambda low, high: view(self.as_bytes(low, high, dtype=i32), f64)[:, 0],
            "select_f": lambda c, a, b: np.where(c, np.asarray(a, f32), np.asarray(b, f32)),
            "select_i": lambda c, a, b: np.where(c, np.asarray(a, i32), np.asarray(b, i32)),
            "leading_zeros": lambda x: i32(32) - np.array(
                [int(v).bit_length() for v in view(self.vector(x, i32), np.uint32)], i32),
            "dot_bytes": lambda a, b, c: (c + (signed(a) * signed(b)).sum(1, dtype=i32)).astype(i32),
            "half_pair": half_pair, "to_tf32": tf32,
            "shuffle_f": lane_xor, "shuffle_i": lane_xor, "from_lane_f": from_lane,
            "load_uniform": lambda at: self.uniform(at, i32), "load_uniform_64": lambda at: self.uniform(at, np.int64),
            "load_f32": lambda p, at: self.load(p, at, 1, f32)[0], "load_f32x4": lambda p, at: self.load(p, at, 4, f32),
            "load_b32": lambda p, at: self.load(p, at, 1, i32)[0], "load_b32x2": lambda p, at: self.load(p, at, 2, i32),
            "load_b32x4": lambda p, at: self.load(p, at, 4, i32),
            "load_u8": lambda p, at: self.load(p, at, 1, np.uint8)[0].astype(i32),
            "load_s8": lambda p, at: self.load(p, at, 1, np.int8)[0].astype(i32),
            "load_f16": lambda p, at: self.load(p, at, 1, np.float16)[0].astype(f32),
            "unpack_f16": lambda word: list(view(self.vector(word, i32), np.float16).reshape(-1, 2).astype(f32).T),
            "store_f32": lambda p, at, v: self.store(p, at, v, dtype=f32),
            "store_f32x4": lambda p, at, *v: self.store(p, at, *v, dtype=f32),
            "store_b32": lambda p, at, v: self.store(p, at, v, dtype=i32),
            "store_s8": lambda p, at, v: self.store(p, at, v, dtype=np.int8),
            "store_f16": lambda p, at, v: self.store(p, at, v, dtype=np.float16),
            "read_f32": lambda at: floats(self.read(at, 4))[0], "read_f32x2": lambda at: floats(self.read(at, 8)),
            "read_f32x4": lambda at: floats(self.read(at, 16)),
            "read_b32": lambda at: view(self.read(at, 4), i32)[:, 0],
            "write_f32": lambda at, v: self.write(at, self.as_bytes(v, dtype=f32)),
            "write_f32x4": lambda at, *v: self.write(at, self.as_bytes(*v, dtype=f32)),
            "write_b32": lambda at, v: self.write(at, self.as_bytes(v, dtype=i32)),
            "write_b32x4": lambda at, *v: self.write(at, self.as_bytes(*v, dtype=i32)),
            "write_s8": lambda at, v: self.write(at, self.as_bytes(v, dtype=np.int8)),
            "read_matrices": lambda at: self.matrices(at, False), "read_turned": lambda at: self.matrices(at, True),
            "mma_s8": lambda *r: self.mma(np.int8, np.int8, 32, np.int64, *r),
            "mma_u8s8": lambda *r: self.mma(np.uint8, np.int8, 32, np.int64, *r),
            "mma_f16": lambda *r: self.mma(np.float16, np.float16, 16, f64, *r),
            "mma_tf32": lambda *r: self.mma(f32, f32, 8, f64, *r),
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


class Cast:
    """A number type: converts as the machine does, and names the dtype of local arrays."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, value):
        return np.asarray(value).astype(self.kind)[()]


def _float32(function):
    return lambda x: function(np.asarray(x, np.float32)).astype(np.float32)


_NAMES = {instruction: name for name, instruction in ptx.INSTRUCTIONS.items()}


def run(kernel, grid, addresses, numbers, memory):
    """Run a Kernel for every block of a grid, in an order that no kernel may rely on; the last block is returned."""
    assert (len(addresses), len(numbers)) == (kernel.addresses, kernel.numbers)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    block = None
    with np.errstate(all="ignore"):
        for where in reversed(blocks):
            block = Block(memory, kernel, where)
            block.kernel(kernel.function)(tuple(np.int64(x) for x in addresses), tuple(np.int32(x) for x in numbers))
    return block
