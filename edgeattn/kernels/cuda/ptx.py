"""Every instruction that kernels use, with its PTX and, in words, what it means.

tests/cuda_emulator.py states each meaning as NumPy over a block's threads, and test_cuda_instructions.py holds
the two lists together. Sources: PTX ISA 8.x, sections "Instruction Set" and "Matrix Fragments for mma".
Addresses: int64 for global memory, int32 for the block's shared memory, both in bytes.
A predicated load whose predicate is false gives zeros and touches no memory.
"""
import re

from edgeattn.kernels.cuda.language import Instruction

FULL = "31, -1"  # clamp and member mask of a shuffle among the 32 threads of a warp


def _load(kind, registers, register):
    """A predicated load from read-only global memory of one vector."""
    outs = ", ".join(f"${i}" for i in range(registers))
    listed = f"{{{outs}}}" if registers > 1 else outs
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(registers))
    return Instruction(f"{{ .reg .pred p; setp.ne.b32 p, ${registers}, 0; {zeros} "
                       f"@p ld.global.nc.{kind} {listed}, [${registers + 1}]; }}", register * registers, "bl")


def _store(kind, registers, register):
    """A predicated store to global memory of one vector."""
    values = ", ".join(f"${i + 2}" for i in range(registers))
    listed = f"{{{values}}}" if registers > 1 else values
    return Instruction(f"{{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.{kind} [$1], {listed}; }}",
                       "", "bl" + register * registers, True)


def _mma(shape, result, left, right, registers):
    a = ", ".join(f"${i}" for i in range(4, 8))
    return Instruction(
        f"mma.sync.aligned.{shape}.row.col.{result}.{left}.{right}.{result} {{$0, $1, $2, $3}}, {{{a}}}, {{$8, $9}}, "
        "{$10, $11, $12, $13};", registers * 4, "iiiiii" + registers * 4, True)


# -- where a thread stands -------------------------------------------------------------------------------------------
thread = Instruction("mov.u32 $0, %tid.x;", "i", "")
block_x = Instruction("mov.u32 $0, %ctaid.x;", "i", "")
block_y = Instruction("mov.u32 $0, %ctaid.y;", "i", "")
block_z = Instruction("mov.u32 $0, %ctaid.z;", "i", "")

# -- numbers: -------
times = Instruction("mul.lo.s32 $0, $1, $2;", "i", "ii")
times_wide = Instruction("mul.wide.s32 $0, $1, $2;", "l", "ii")
quotient = Instruction("div.u32 $0, $1, $2;", "i", "ii")  # of numbers >= 0
remainder = Instruction("rem.u32 $0, $1, $2;", "i", "ii")
fma = Instruction("fma.rn.f32 $0, $1, $2, $3;", "f", "fff")  # a b + c, rounded once
multiply = Instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")  # a b, never fused with what follows
add = Instruction("add.rn.f32 $0, $1, $2;", "f", "ff")  # a + b, never fused with what precedes
divide = Instruction("div.rn.f32 $0, $1, $2;", "f", "ff")
square_root = Instruction("sqrt.rn.f32 $0, $1;", "f", "f")
maximum = Instruction("max.NaN.f32 $0, $1, $2;", "f", "ff")  # NaN where either is
multiply_f64 = Instruction("mul.rn.f64 $0, $1, $2;", "d", "dd")
truncate_f64 = Instruction("cvt.rzi.f64.f64 $0, $1;", "d", "d")
nearest = Instruction("cvt.rni.s32.f32 $0, $1;", "i", "f")  # ties to even, saturating, 0 for NaN
truncate = Instruction("cvt.rzi.s32.f32 $0, $1;", "i", "f")  # toward zero, saturating, 0 for NaN
to_float = Instruction("cvt.rn.f32.s32 $0, $1;", "f", "i")
bits_of = Instruction("", "i", "f")
float_of_bits = Instruction("", "f", "i")
double_of_words = Instruction("mov.b64 $0, {$1, $2};", "d", "ii")  # low word, high word
select_f = Instruction("", "f", "bff")  # condition, where true, where false
select_i = Instruction("", "i", "bii")
leading_zeros = Instruction("clz.b32 $0, $1;", "i", "i")
dot_bytes = Instruction("dp4a.s32.s32 $0, $1, $2, $3;", "i", "iii")  # c + the products of four signed bytes
half_pair = Instruction("cvt.rn.f16x2.f32 $0, $1, $2;", "i", "ff")  # (high, low) as two float16 in a word
to_tf32 = Instruction("cvt.rna.tf32.f32 $0, $1;", "i", "f")  # the bits of a float with 10 bits of fraction

# -- between threads of a warp ---------------------------------------------------------------------------------------
shuffle_f = Instruction(f"shfl.sync.bfly.b32 $0, $1, $2, {FULL};", "f", "fi", True)  # the value of lane ^ distance
shuffle_i = Instruction(f"shfl.sync.bfly.b32 $0, $1, $2, {FULL};", "i", "ii", True)
from_lane_f = Instruction(f"shfl.sync.idx.b32 $0, $1, $2, {FULL};", "f", "fi", True)  # the value of a lane

# -- global memory ---------------------------------------------------------------------------------------------------
load_uniform = Instruction("ld.global.nc.b32 $0, [$1];", "i", "l")  # one address for the whole block
load_uniform_64 = Instruction("ld.global.nc.b64 $0, [$1];", "l", "l")
load_f32 = _load("f32", 1, "f")
load_f32x4 = _load("v4.f32", 4, "f")
load_b32 = _load("b32", 1, "i")
load_b32x2 = _load("v2.b32", 2, "i")
load_b32x4 = _load("v4.b32", 4, "i")
load_u8 = _load("u8", 1, "i")
load_s8 = _load("s8", 1, "i")
load_f16 = Instruction("{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $1, 0; mov.b16 h, 0; @p ld.global.nc.b16 h, [$2]; "
                       "cvt.f32.f16 $0, h; }", "f", "bl")
unpack_f16 = Instruction("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }", "ff", "i")
store_f32 = _store("f32", 1, "f")
store_f32x2 = _store("v2.f32", 2, "f")
store_b32 = _store("b32", 1, "i")
store_s8 = _store("b8", 1, "i")  # the low byte
store_f16 = Instruction("{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $0, 0; cvt.rn.f16.f32 h, $2; "
                        "@p st.global.b16 [$1], h; }", "", "blf", True)

# -- shared memory ---------------------------------------------------------------------------------------------------
read_f32 = Instruction("ld.shared.f32 $0, [$1];", "f", "i", True)
read_f32x2 = Instruction("ld.shared.v2.f32 {$0, $1}, [$2];", "ff", "i", True)
read_f32x4 = Instruction("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "ffff", "i", True)
read_b32 = Instruction("ld.shared.b32 $0, [$1];", "i", "i", True)
write_f32 = Instruction("st.shared.f32 [$0], $1;", "", "if", True)
write_f32x4 = Instruction("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", "", "iffff", True)
write_b32 = Instruction("st.shared.b32 [$0], $1;", "", "ii", True)
write_b32x2 = Instruction("st.shared.v2.b32 [$0], {$1, $2};", "", "iii", True)
write_b32x4 = Instruction("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "", "iiiii", True)
write_s8 = Instruction("st.shared.b8 [$0], $1;", "", "ii", True)

# -- tensor cores, sm_80 ---------------------------------------------------------------------------------------------
# Lane l holds, with g = l // 4 and t = l % 4: of C (16, 8) the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); of
# A (16, K) and B (K, 8) words of four bytes along K: A rows g, g+8 at word t, then both at word t + K/2 bytes on; B
# column g at words t and t + K/2 bytes on.
read_matrices = Instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "iiii", "i", True)
read_turned = Instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "iiii", "i", True)
mma_s8 = _mma("m16n8k32", "s32", "s8", "s8", "i")
mma_u8s8 = _mma("m16n8k32", "s32", "u8", "s8", "i")
mma_f16 = _mma("m16n8k16", "f32", "f16", "f16", "f")
mma_tf32 = _mma("m16n8k8", "f32", "tf32", "tf32", "f")

INSTRUCTIONS = {name: value for name, value in dict(globals()).items() if isinstance(value, Instruction)}


# -- versions --------------------------------------------------------------------------------------------------------
# The PTX version that a driver of each CUDA release takes: PTX ISA, section "Release Notes", and
# cuda.bindings.utils.get_minimal_required_cuda_ver_from_ptx_ver. PTX 7 is CUDA 11's, minor by minor, 9 is CUDA 13's.
_RELEASES = {(12, minor): (8, minor) for minor in range(6)} | {
    (12, 6): (8, 5), (12, 7): (8, 6), (12, 8): (8, 7), (12, 9): (8, 8)}
_VERSION = re.compile(r"^\.version (\d+)\.(\d+)", re.MULTILINE)


def version_for(driver):
    """(major, minor) of the newest PTX that a driver of CUDA (major, minor) takes; None for one we know nothing of."""
    if driver[0] in (11, 13):
        return driver[0] - 4, driver[1]
    return _RELEASES.get(driver)


def for_driver(text, driver):
    """PTX with the version that the driver takes where its own is above: a compiler may be newer than the driver.

    Nothing here needs more than PTX 7.8, which sm_90 does; what a driver too old for its GPU says is the driver's.

    Parameters
    ----------
    text : str
    driver : int
        As cuDriverGetVersion has it: 1000 major + 10 minor.
    """
    newest = version_for((driver // 1000, driver % 1000 // 10))
    found = _VERSION.search(text)
    if newest is None or tuple(map(int, found.groups())) <= newest:
        return text
    return f"{text[:found.start()]}.version {newest[0]}.{newest[1]}{text[found.end():]}"
