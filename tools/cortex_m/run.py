"""Exported C on emulated processors: equality on every target, then flash, RAM and instructions of layers and encoders.

``make test-cortex-m``, or ``python tools/cortex_m/run.py --help``. Emulators say what is computed and how many
instructions that takes. They know nothing of pipelines, caches and wait states: these are not times.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from c_cases import CASES, Exported  # noqa: E402
from c_encoders import CASES as ENCODERS  # noqa: E402
from c_encoders import ExportedEncoder  # noqa: E402
from safetensors import safe_open  # noqa: E402
from workbench import random_input, random_layer  # noqa: E402

import edgeattn  # noqa: E402
import quant  # noqa: E402

VECTORS = 6
WARNINGS = ["-std=gnu99", "-Wall", "-Wextra", "-Werror"]
# What the exported C calls, and what that calls; -O3 is how CMSIS-NN is built.
CMSIS_NN_FILES = """arm_fully_connected_per_channel_s8 arm_batch_matmul_s8 arm_softmax_s8 arm_nn_softmax_common_s8
    arm_vector_sum_s8 arm_nn_vec_mat_mult_t_per_ch_s8 arm_nn_vec_mat_mult_t_s8""".split()
# Every fourth case, for CI; the last ones have the masks.
SHORT_CASES = [*CASES[::4], *ENCODERS[1::6]]


@dataclass(frozen=True)
class Target:
    """A processor: how to compile for it, and how to run what came out."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...]
    packages: str

    @property
    def bare_metal(self) -> bool:
        """Whether there is no operating system: our own start-up, and counters to read."""
        return "system" in self.emulator[0]


def _cortex_m(name: str, machine: str, *flags: str) -> Target:
    # The clock advances by one nanosecond an instruction: counts are the same in every run.
    emulator = ("qemu-system-arm", "-M", machine, "-nographic", "-monitor", "none", "-serial", "none",
                "-semihosting-config", "enable=on,target=native", "-icount", "shift=0", "-kernel")
    return Target(f"Cortex-{name.upper()}", "arm-none-eabi-gcc", (f"-mcpu=cortex-{name}", "-mthumb", *flags), emulator,
                  "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm")


def _linux(name: str, compiler: str, emulator: str, *flags: str, packages: str) -> Target:
    return Target(name, compiler, ("-static", *flags), (emulator,), packages)


TARGETS = (
    _cortex_m("m3", "mps2-an385"),
    _cortex_m("m4", "mps2-an386", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    _cortex_m("m7", "mps2-an500", "-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"),
    _cortex_m("m55", "mps3-an547", "-mfloat-abi=hard"),
    _linux("aarch64", "aarch64-linux-gnu-gcc", "qemu-aarch64-static",
           packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"),
    _linux("armv7 hard float", "arm-linux-gnueabihf-gcc", "qemu-arm-static", "-march=armv7-a+neon-vfpv4", "-mthumb",
           packages="gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user-static"),
)


def missing_packages(targets) -> list[str]:
    """Debian packages of the compilers and emulators that are not on PATH."""
    return sorted({package for target in targets if not (shutil.which(target.compiler) and
                                                         shutil.which(target.emulator[0]))
                   for package in target.packages.split()})


def with_cmsis_nn(target: Target, sources: Path, work: Path) -> Target:
    """A target whose programs call into CMSIS-NN, compiled from its sources."""
    flags = ["-DATTENTION_USE_CMSIS_NN", f"-I{sources / 'Include'}"]
    for name in CMSIS_NN_FILES:
        (source,) = sources.glob(f"Source/*/{name}.c")
        work.mkdir(parents=True, exist_ok=True)
        compiled = work / f"{target.name}-{name}.o"
        _run([target.compiler, "-O3", *target.flags, *flags[:2], "-c", str(source), "-o", str(compiled)])
        flags.append(str(compiled))
    return dataclasses.replace(target, flags=(*target.flags, *flags))


def build(target: Target, folder: Path, optimize: str, program: Path) -> None:
    """Compile the export in ``folder``, and what checks it, for a target."""
    command = [target.compiler, *WARNINGS, optimize, *target.flags, f"-I{folder}"]
    if target.bare_metal:
        header = (folder / "attention_test.h").read_text(encoding="ascii")
        fields = re.findall(r"^    (int8_t|float|int32_t) (\w+)", header, re.MULTILINE)
        ctype, _ = fields.pop()
        call = ", ".join(f"(v)->{name}" for _, name in sorted(fields, key=lambda field: field[1] == "length"))
        function = "attention_f32" if ctype == "float" else "attention_s8"
        command += [f"-DCALL(v, output, scratch)={function}({call}, output, scratch, ATTENTION_SCRATCH_BYTES)",
                    f"-DOUTPUT={ctype}",
                    "-ffreestanding", "-ffunction-sections", "-nostartfiles", "--specs=nano.specs", "-Wl,--gc-sections",
                    "-Wl,--no-warn-rwx-segments", f"-T{HERE / 'memory.ld'}", str(HERE / "start.c"),
                    str(HERE / "measure.c"), str(folder / "attention.c")]
    else:
        command += [str(folder / "attention.c"), str(folder / "attention_test.c")]
    _run([*command, "-o", str(program), "-lm"])


def execute(target: Target, program: Path) -> dict[str, int]:
    """Run a program; what it printed as name -> number. Its exit status says whether all vectors were equal."""
    printed = _run([*target.emulator, str(program)])
    words = printed.split() if target.bare_metal else []
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr  # an emulator without a console sends the program's text to stderr


def export(case: Exported | ExportedEncoder, folder: Path) -> None:
    """Write a case's C and test vectors; encoders' files are called attention.c too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layer = case.layer if isinstance(case, Exported) else case.encoder
    quant.export(layer, folder / "attention.c", **case.arguments, test_vectors=VECTORS)


def check_equality(targets, cases, work: Path, optimize: str) -> None:
    """Every case on every target; ends the program at the first that differs."""
    for n, case in enumerate(cases):
        export(case, work / f"case-{n}")
    for target in targets:
        began = time.monotonic()
        for n, _ in enumerate(cases):
            program = work / f"case-{n}" / "program"
            build(target, work / f"case-{n}", optimize, program)
            execute(target, program)
        print(f"{target.name:<17} {len(cases)} layers and encoders, {VECTORS} test vectors each: all bytes equal  "
              f"({time.monotonic() - began:.0f} s)", flush=True)


# -- the table -------------------------------------------------------------------------------------------------------

# E, H, L, mask
MEASURED = ((16, 1, 8, None), (32, 4, 16, None), (64, 4, 32, None), (64, 4, 32, "causal"), (128, 4, 64, None))


def measured_case(E: int, H: int, L: int, mask) -> Exported:
    """A layer as ``quant.quantize`` makes it: K and V without zero points."""
    layer = random_layer(E=E, H=H, D=E // H)
    calls = [{"query": random_input(seed, 4, L, E), "is_causal": mask is not None} for seed in range(3)]
    static = quant.quantize(layer, quant.calibrate(layer, calls), arithmetic="tflm")
    return Exported(f"{E}-{H}-{L}-{mask}", static, 1, L, None, mask)


def products(E: int, L: int, mask) -> int:
    """Multiplications of 8-bit numbers in one call: four projections, and two products of the permitted or all keys."""
    scores = E * L * (L + 1) // 2 if mask == "causal" else E * L * L
    return 4 * L * E * E + scores + E * L * L


def object_sizes(target: Target, folder: Path, optimize: str) -> tuple[int, int]:
    """Bytes of constants and of code in attention.o."""
    flags = [flag for flag in target.flags if not flag.endswith(".o")]
    _run([target.compiler, *WARNINGS, optimize, *flags, "-ffunction-sections", "-c", str(folder / "attention.c"),
          "-o", str(folder / "attention.o")])
    listing = _run(["arm-none-eabi-size", "-A", str(folder / "attention.o")])
    sizes = {}
    for line in listing.splitlines():
        if line.startswith("."):
            section, size = line.split()[:2]
            kind = section.split(".")[1]
            sizes[kind] = sizes.get(kind, 0) + int(size)
    if sizes["data"] or sizes["bss"]:
        raise SystemExit(f"{folder / 'attention.c'} has variables of its own: {sizes}")
    return sizes["rodata"], sizes["text"]


def print_table(targets, work: Path, optimize: str) -> None:
    """Flash, RAM and instructions of MEASURED, as Markdown. Code and stack: of the core that needs most of it."""
    targets = [target for target in targets if target.bare_metal]
    print(f"\n{_run([targets[0].compiler, '--version']).splitlines()[0]}, {optimize}\n")
    names = ["E", "H", "L", "mask", "constants", "code", "scratch", "in + out", "stack", "products",
             *(target.name for target in targets)]
    print("| " + " | ".join(names) + " |\n" + "| ---: " * len(names) + "|")
    for E, H, L, mask in MEASURED:
        numbers = _measured(targets, measured_case(E, H, L, mask), work / f"measured-{E}-{H}-{L}-{mask}", optimize)
        numbers[3:3] = [2 * L * E]
        numbers[5:5] = [products(E, L, mask)]
        print(f"| {E} | {H} | {L} | {mask or ''} | " + " | ".join(f"{n:,}" for n in numbers) + " |", flush=True)
    names = ["encoder", "layers", "E", "F", "H", "L", *names[4:]]
    print("\n| " + " | ".join(names) + " |\n| --- " + "| ---: " * (len(names) - 1) + "|")
    for name in ("sensor", "digits"):
        case = shipped_encoder(name)
        layers, E, L = case.encoder.layers, case.encoder.embed_dim, case.L
        F, H = layers[0].feed_forward.hidden, layers[0].attention.num_heads
        numbers = _measured(targets, case, work / f"measured-{name}", optimize)
        numbers[3:3] = [2 * 4 * L * E]
        numbers[5:5] = [len(layers) * (products(E, L, None) + 2 * L * E * F)]
        print(f"| {name} | {len(layers)} | {E} | {F} | {H} | {L} | " + " | ".join(f"{n:,}" for n in numbers) + " |",
              flush=True)


def shipped_encoder(name: str) -> ExportedEncoder:
    """The encoder of examples/sensor or examples/digits, calibrated on random numbers: sizes are those of any."""
    path = ROOT / "examples" / name / f"{name}.safetensors"
    encoder = edgeattn.TransformerEncoder.from_torch(path, 4, activation="gelu", norm_first=True, prefix="encoder.")
    with safe_open(path, framework="numpy") as file:
        position = file.get_tensor("position").astype(np.float32)
    x = random_input(0, 8, *position.shape) + position
    static = quant.quantize(encoder, quant.calibrate(encoder, [x]), arithmetic="tflm")
    return ExportedEncoder(name, static, len(position))


def _measured(targets, case: Exported | ExportedEncoder, folder: Path, optimize: str) -> list[int]:
    """Constants, code, scratch, stack, and instructions on each target."""
    export(case, folder)
    constants, code, stack, instructions = 0, 0, 0, []
    for target in targets:
        sizes = object_sizes(target, folder, optimize)
        build(target, folder, optimize, folder / "program")
        seen = execute(target, folder / "program")
        constants, code, stack = max(constants, sizes[0]), max(code, sizes[1]), max(stack, seen["stack"])
        instructions.append(seen["ticks"] * seen["calibration_instructions"] // seen["calibration_ticks"])
    (folder / "scratch.c").write_text('#include "attention.h"\nATTENTION_SCRATCH_BYTES\n', encoding="ascii")
    sum_of_bytes = _run([targets[0].compiler, "-DATTENTION_PORTABLE", "-E", "-P", str(folder / "scratch.c")])
    scratch = eval(sum_of_bytes.splitlines()[-1], {})  # of C alone
    return [constants, code, scratch, stack, *(round(n, -3) for n in instructions)]


def main() -> int:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="every fourth layer, and no table")
    parser.add_argument("--cortex-m", action="store_true", help="on the Cortex-M alone")
    parser.add_argument("--table", action="store_true", help="the table alone, of the Cortex-M")
    parser.add_argument("--cmsis-nn", type=Path, help="a checkout of CMSIS-NN: the Cortex-M alone, by its kernels")
    parser.add_argument("--optimize", default="-O2", help="for the compilers (default -O2)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cortex_m", help="folder for what is built")
    arguments = parser.parse_args()
    alone = arguments.cortex_m or arguments.table or arguments.cmsis_nn is not None
    targets = [target for target in TARGETS if target.bare_metal or not alone]
    missing = missing_packages(targets)
    if missing:
        print("test-cortex-m: compilers or emulators are missing; on Debian and Ubuntu they come with\n"
              f"    apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    if arguments.cmsis_nn is not None:
        if not (arguments.cmsis_nn / "Include" / "arm_nnfunctions.h").is_file():
            parser.error(f"--cmsis-nn must be a folder with CMSIS-NN's Include and Source; got {arguments.cmsis_nn}")
        targets = [with_cmsis_nn(target, arguments.cmsis_nn, arguments.work) for target in targets]
    if not arguments.table:
        cases = SHORT_CASES if arguments.short else [*CASES, *ENCODERS]
        check_equality(targets, cases, arguments.work, arguments.optimize)
    if not arguments.short:
        print_table(targets, arguments.work, arguments.optimize)
    return 0


if __name__ == "__main__":
    sys.exit(main())
