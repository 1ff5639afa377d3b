"""Which features of an ARM64 CPU lead to which instruction set."""
import importlib
import pkgutil

import pytest

from edgeattn.runtime import isa

# AT_HWCAP as Linux reports it: Cortex-A72 has fp, asimd, aes, ..., crc32; Cortex-A76 has asimddp (bit 20) too.
A72, A76 = 0x8FB, 0x119FFB


@pytest.mark.parametrize("hardware, cpu, expected", [
    (A76, "cortex-a76", "neondot"),
    (A72, "cortex-a72", "neon"),
    (A76, "generic", "neon"),  # LLVM knows no dot product there, and would stop the process
    (0, "cortex-a76", "neon"),  # a system that does not tell
])
def test_the_dot_product_needs_the_cpu_and_the_compiler(hardware, cpu, expected):
    assert isa.choose(None, isa.arm64_features(hardware, cpu)).name == expected


@pytest.mark.parametrize("name", ["AVX2", "nonsense", " avx2", "neondot"])
def test_a_forced_instruction_set_must_be_one_that_this_cpu_has(name):
    features = ("avx2", "fma")
    with pytest.raises(ValueError, match=f"EDGEATTN_ISA must be one of avx2, generic on this CPU, got '{name}'; unset it"):
        isa.choose(name, features)
    assert isa.choose("", features).name == isa.choose("avx2", features).name == "avx2"


def test_every_instruction_set_has_a_file_of_its_name():
    folder = "edgeattn.kernels.cpu.simd.instruction_sets"
    files = {module.name for module in pkgutil.iter_modules(importlib.import_module(folder).__path__)}
    assert files == {table.name for table in isa.TABLES}
    plainest = importlib.import_module(f"{folder}.generic").Code
    for table in isa.TABLES:
        code = importlib.import_module(f"{folder}.{table.name}").Code
        # Beside what all have: of those that multiply words, of those that add them first, of NEON's; of AVX2's single rows
        # and of what looks bytes up.
        own = {"half", "words", "dot_of_sums", "add_bytes", "add_neighbours", "add_two_products",
               "add_words", "add_pairs", "shuffle_bytes", "load_to_all"}
        assert {name for name in dir(code) if not name.startswith("_")} <= own | set(dir(plainest))
