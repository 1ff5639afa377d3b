"""The list of instructions, its emulated meanings, and what the emulator must notice."""
import numpy as np
import pytest
from cuda_emulator import Block, Memory, run

from edgeattn.cuda import ptx
from edgeattn.cuda.language import Kernel, cuda, int32, shared
from edgeattn.cuda.ptx import load_f32, read_b32, read_f32, store_b32, thread, write_b32, write_f32


def test_every_instruction_has_a_meaning():
    block = Block(Memory(), Kernel(None, 0, 0, 32, 0), (0, 0, 0))
    assert set(block.meanings()) == set(ptx.INSTRUCTIONS)


def test_every_text_uses_each_of_its_values_once_or_more():
    for name, instruction in ptx.INSTRUCTIONS.items():
        values = len(instruction.results) + len(instruction.arguments)
        used = {i for i in range(values) if any(f"${i}{end}" in instruction.text + " " for end in " ,;]})")}
        assert used == set(range(values)) or not instruction.text, name


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


def test_a_matrix_product_by_fragments():
    rng = np.random.default_rng(0)
    block = Block(Memory(), Kernel(None, 0, 0, 32, 2048), (0, 0, 0))
    left, right = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (8, 32)).astype(np.int8)
    block.shared[:512], block.shared[512:768] = left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)
    block.written[:768] = True
    lane = block.lanes
    meaning = block.meanings()
    a = meaning["read_matrices"]((lane & 15) * 32 + (lane >> 4) * 16)
    b = meaning["read_matrices"](512 + (lane & 7) * 32 + ((lane >> 3) & 1) * 16)
    c = meaning["mma_s8"](*a, *b[:2], *[np.zeros(32, np.int32)] * 4)
    got = np.empty((16, 8), np.int32)
    for j in range(4):
        got[lane // 4 + 8 * (j // 2), lane % 4 * 2 + j % 2] = c[j]
    np.testing.assert_array_equal(got, left.astype(np.int32) @ right.T.astype(np.int32))
