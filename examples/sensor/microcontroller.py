"""The whole model of the sensor in C, as it would run on a microcontroller: python examples/sensor/microcontroller.py

Makes the encoder static int8 by TFLite Micro's rules and exports it, encoder.c; writes the weights around it and some
test recordings to model.h; compiles both with classify.c, a C program of a page, and runs it: here, and where
arm-none-eabi-gcc and qemu-system-arm are installed on an emulated Cortex-M4. Everything lies in out/sensor.

The exit status is 0 only when every answer of the C is that of Python.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from data import FAULTS, TEST_SEED, TRAIN_SEED, recordings
from safetensors import safe_open

import edgeattn
import quant
from edgeattn import messages

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "sensor"
CALIBRATION_RECORDINGS = 60
HERE_RECORDINGS, EMULATED_RECORDINGS = 120, 12
CORTEX_M4 = ["arm-none-eabi-gcc", "-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16",
             "-ffreestanding", "-nostartfiles", "--specs=nano.specs", "-Wl,--no-warn-rwx-segments"]
EMULATOR = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none",
            "-semihosting-config", "enable=on,target=native", "-kernel"]


def array(ctype: str, name: str, values: np.ndarray) -> str:
    """A constant of C."""
    numbers = ", ".join(f"{value:.9e}f" if ctype == "float" else str(value) for value in values.ravel().tolist())
    return f"static const {ctype} {name}[{values.size}] = {{{numbers}}};\n"


def main() -> int:
    messages.show()
    weights = HERE / "sensor.safetensors"
    with safe_open(weights, framework="numpy") as file:
        around = {name: file.get_tensor(name).astype(np.float32)
                  for name in ("embed.weight", "embed.bias", "position", "head.weight", "head.bias")}
    encoder = edgeattn.TransformerEncoder.from_torch(weights, 4, activation="gelu", norm_first=True, prefix="encoder.")

    def embed(samples: np.ndarray) -> np.ndarray:
        return samples @ around["embed.weight"].T + around["embed.bias"] + around["position"]

    seen, test = recordings(CALIBRATION_RECORDINGS, TRAIN_SEED), recordings(HERE_RECORDINGS, TEST_SEED)
    calibration = quant.calibrate(encoder, [{"x": embed(seen.x), "lengths": seen.lengths}])
    static = quant.quantize(encoder, calibration, arithmetic="tflm")
    mean = static(embed(test.x), lengths=test.lengths).sum(axis=1) / test.lengths[:, None]
    answers = (mean @ around["head.weight"].T + around["head.bias"]).argmax(axis=1)
    print(f"static int8 in Python: {(answers == test.labels).sum()} of {len(answers)} right")

    OUT.mkdir(parents=True, exist_ok=True)
    quant.export(static, OUT / "encoder.c", sequence_length=test.x.shape[1])
    right = {}
    for name, count, compiler, runner in (
            ("this machine", HERE_RECORDINGS, ["cc"], []),
            ("an emulated Cortex-M4", EMULATED_RECORDINGS, CORTEX_M4, EMULATOR)):
        if not shutil.which(compiler[0]) or (runner and not shutil.which(runner[0])):
            print(f"not run on {name}: {compiler[0]} or {(runner or compiler)[0]} is not installed")
            continue
        write_model(around, test.x[:count], test.lengths[:count], answers[:count])
        program = OUT / "classify"
        board = [f"-T{ROOT / 'tools/cortex_m/memory.ld'}", ROOT / "tools/cortex_m/start.c"] if runner else []
        sources = [*board, OUT / "encoder.c", HERE / "classify.c"]
        subprocess.run([*compiler, "-O2", f"-I{OUT}", *sources, "-o", program, "-lm"], check=True)
        right[name] = count - subprocess.run([*runner, program], timeout=300).returncode
        print(f"C on {name}: {right[name]} of {count} answers are Python's")
        if right[name] != count:
            return 1
    return 0 if right else 1


def write_model(around: dict[str, np.ndarray], samples: np.ndarray, lengths: np.ndarray, answers: np.ndarray) -> None:
    """model.h: what classify.c reads beside the encoder."""
    count, tokens, width = samples.shape
    text = f"enum {{ TOKEN_SAMPLES = {width}, FAULTS = {len(FAULTS)}, RECORDINGS = {count} }};\n"
    for name, values in around.items():
        text += array("float", name.replace(".", "_"), values)
    text += array("int32_t", "lengths", lengths) + array("int32_t", "answers", answers)
    rows = ",\n".join("{" + ", ".join(f"{value:.9e}f" for value in one.ravel().tolist()) + "}" for one in samples)
    text += f"static const float recordings[{count}][{tokens * width}] = {{\n{rows}}};\n"
    (OUT / "model.h").write_text(text, encoding="ascii")


if __name__ == "__main__":
    sys.exit(main())
