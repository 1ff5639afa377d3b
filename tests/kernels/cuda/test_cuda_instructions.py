"""The list of instructions, its emulated meanings, and what the emulator must notice."""
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import Block, Memory, run

from edgeattn.kernels.cuda import ptx
from edgeattn.kernels.cuda.language import Kernel, cuda, int32, shared
from edgeattn.kernels.cuda.ptx import (
    bits_of,
    fma,
    load_f32,
    maximum,
    read_b32,
    read_f32,
    store_b32,
    store_f16,
    store_f32,
    thread,
    to_tf32,
    write_b32,
    write_f32,
)


def test_every_instruction_has_a_meaning():
    block = Block(Memory(), Kernel(None, 0, 0, 32, 0), (0, 0, 0))
    assert set(block.meanings()) == set(ptx.INSTRUCTIONS)


def test_every_text_uses_each_of_its_values_once_or_more():
    for name, instruction in ptx.INSTRUCTIONS.items():
        values = len(instruction.results) + len(instruction.arguments)
        used = {i for i in range(values) if any(f"${i}{end}" in instruction.text + " " for end in " ,;]})")}
        assert used == set(range(values)) or not instruction.text, name


def test_ptx_stands_in_one_file():
    folder = Path(ptx.__file__).parent
    assert {path.name for path in folder.glob("*.py") if "Instruction(" in path.read_text(encoding="utf-8")} == {"ptx.py"}


def test_an_instruction_outside_a_kernel_says_so():
    with pytest.raises(TypeError, match="for kernels only"):
        ptx.fma(1.0, 2.0, 3.0)
    with pytest.raises(AttributeError, match="cuda is for kernels only"):
        cuda.syncthreads()


def launch(function, threads=64, shared_bytes=256, arrays=()):
    memory = Memory()
    addresses = [memory.lend(array, writable) for array, writable in arrays]
    return run(Kernel(function, len(addresses), 0, threads, shared_bytes), (1, 1, 1), addresses, [], memory)


def reads_too_far(a, p):
    load_f32(thread() >= 0, a[0] + thread() * 4)


def reads_misaligned(a, p):
    load_f32(thread() == 0, a[0] + 2)


def writes_what_was_lent_to_read(a, p):
    store_b32(thread() == 0, a[0], int32(1))


def reads_unwritten(a, p):
    read_f32(int32(shared() + (thread() & 31) * 4))


def forgets_a_barrier(a, p):
    base = shared()
    write_b32(int32(base + thread() * 4), thread())
    read_b32(int32(base + (63 - thread()) * 4))


def overwrites_before_a_barrier(a, p):
    base = shared()
    write_b32(int32(base + thread() * 4), thread())
    cuda.syncthreads()
    read_b32(int32(base + (63 - thread()) * 4))
    write_b32(int32(base + thread() * 4), thread())


def branches_by_thread(a, p):
    if thread() > 3:
        cuda.syncthreads()


def leaves_its_memory(a, p):
    write_f32(int32(shared() + thread() * 8), thread())


@pytest.mark.parametrize(("kernel", "words"), [
    (reads_too_far, "outside the arrays"), (reads_misaligned, "misaligned"),
    (writes_what_was_lent_to_read, "lent for reading"), (reads_unwritten, "that nothing wrote"),
    (forgets_a_barrier, "before a barrier after another warp wrote"), (overwrites_before_a_barrier, "overwritten before"),
    (branches_by_thread, "truth value"), (leaves_its_memory, "outside the block's memory")])
def test_the_emulator_notices(kernel, words):
    with pytest.raises((AssertionError, ValueError), match=words):
        launch(kernel, arrays=[(np.zeros(40, np.float32), False)])


def computes(a, p):
    x = load_f32(thread() >= 0, a[0] + thread() * 4)
    store_f32(thread() >= 0, a[1] + thread() * 4, x)
    store_f32(thread() >= 0, a[2] + thread() * 4, maximum(x, x))
    store_b32(thread() >= 0, a[3] + thread() * 4, bits_of(fma(x, x, x)))
    store_b32(thread() >= 0, a[4] + thread() * 4, bits_of(x - x))
    store_f16(thread() >= 0, a[5] + thread() * 2, x)
    store_b32(thread() >= 0, a[6] + thread() * 4, to_tf32(x))


def test_every_operation_makes_the_same_nan():
    """PTX ISA, "Floating Point Instructions": 0x7fffffff, whatever went in; what only moves keeps its bits."""
    bits = np.resize(np.array([0x7FC00000, 0xFFC00001, 0x7F812345, 0x7F800000, 0x3F800000], np.uint32), 64)
    x, made = bits.view(np.float32), [np.zeros(64, np.uint32) for _ in range(6)]
    made[4] = np.zeros(64, np.uint16)
    launch(computes, arrays=[(x, False), *((array, True) for array in made)])
    moved, largest, product, difference, half, rounded = made
    np.testing.assert_array_equal(moved, bits)
    bad = np.isnan(x)
    for array in (largest, product, rounded):
        np.testing.assert_array_equal(array == 0x7FFFFFFF, bad)
    np.testing.assert_array_equal(difference == 0x7FFFFFFF, bad | np.isinf(x))
    np.testing.assert_array_equal(half == 0x7FFF, bad)


def tile(block, at, array):
    """An array's bytes in the block's shared memory."""
    data = array.reshape(-1).view(np.uint8)
    block.shared[at:at + data.size], block.written[at:at + data.size] = data, True


@pytest.mark.parametrize(("name", "left_type", "right_type", "per_word"), [
    ("mma_s8", np.int8, np.int8, 4), ("mma_u8s8", np.uint8, np.int8, 4), ("mma_f16", np.float16, np.float16, 2),
    ("mma_tf32", np.float32, np.float32, 1)])
def test_a_matrix_product_by_fragments(name, left_type, right_type, per_word):
    rng = np.random.default_rng(0)
    block = Block(Memory(), Kernel(None, 0, 0, 32, 2048), (0, 0, 0))
    depth = 8 * per_word
    left = rng.integers(0 if left_type == np.uint8 else -128, 128, (16, depth)).astype(left_type)
    right = rng.integers(-128, 128, (8, depth)).astype(right_type)
    tile(block, 0, left)
    tile(block, 512, right)
    lane, meaning = block.lanes, block.meanings()
    a = meaning["read_matrices"]((lane & 15) * 32 + (lane >> 4) * 16)
    b = meaning["read_matrices"](512 + (lane & 7) * 32 + ((lane >> 3) & 1) * 16)
    before = rng.integers(-9, 9, (4, 32)).astype(np.int32 if per_word == 4 else np.float32)
    c = meaning[name](*a, *b[:2], *before)
    want = left.astype(np.int64) @ right.astype(np.int64).T  # small enough for all formats
    for j in range(4):
        np.testing.assert_array_equal(c[j] - before[j], want[lane // 4 + 8 * (j // 2), lane % 4 * 2 + j % 2])


def test_turned_matrices_are_the_right_operand_of_rows():
    rng = np.random.default_rng(1)
    block = Block(Memory(), Kernel(None, 0, 0, 32, 2048), (0, 0, 0))
    left, right = (rng.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (16, 16)))
    tile(block, 0, left)
    tile(block, 512, right)
    lane, meaning = block.lanes, block.meanings()
    a = meaning["read_matrices"]((lane & 15) * 32 + (lane >> 4) * 16)
    b = meaning["read_turned"](512 + (lane & 15) * 32 + (lane >> 4) * 16)
    want = left.astype(np.float32) @ right.astype(np.float32)
    for half in range(2):
        c = meaning["mma_f16"](*a, *b[2 * half:2 * half + 2], *np.zeros((4, 32), np.float32))
        for j in range(4):
            np.testing.assert_array_equal(c[j], want[lane // 4 + 8 * (j // 2), 8 * half + lane % 4 * 2 + j % 2])


def test_rounding_to_the_tensor_cores_formats():
    meaning = Block(Memory(), Kernel(None, 0, 0, 32, 0), (0, 0, 0)).meanings()
    ulp = np.float32(2.0**-10)  # of 1 in both formats
    x = np.resize(np.array([1, 1 + ulp / 2, 1 + ulp * 1.5, -1 - ulp / 2, 1 + ulp * 0.49, 65520, -1e30, 0], np.float32), 32)
    with np.errstate(over="ignore"):
        words = meaning["half_pair"](x, -x)
    halves = words.view(np.float16).reshape(32, 2)
    even = [1, 1, 1 + 2 * ulp, -1, 1, np.inf, -np.inf, 0]
    np.testing.assert_array_equal(halves[:8, 1], np.array(even, np.float16))  # the first is the high one
    np.testing.assert_array_equal(halves[:8, 0], -np.array(even, np.float16))
    away = [1, 1 + ulp, 1 + 2 * ulp, -1 - ulp, 1, 65536, -1e30, 0]
    np.testing.assert_allclose(meaning["to_tf32"](x).view(np.float32)[:8], np.array(away, np.float32), rtol=2.0**-11)
    np.testing.assert_array_equal(meaning["to_tf32"](x).view(np.float32)[:6], np.array(away[:6], np.float32))
    np.testing.assert_array_equal(meaning["to_tf32"](x) & 0x1FFF, 0)
