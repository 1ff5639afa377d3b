"""Encoders as C: compiled with warnings as errors and sanitizers, their bytes those of the encoder."""

import ctypes
import functools
import platform
import re
import subprocess

import numpy as np
import pytest
from arrays import numbers as random
from c_encoders import CASES, attention, case, feed_forward
from places import ROOT
from test_export_c import ACLE, CMSIS_NN, WARNINGS, compiler, macro, run
from whole_models import encoder as float_encoder
from whole_models import text_encoder

import edgeattn
import quant
from edgeattn.layers import TransformerEncoder, TransformerEncoderLayer
from quant.cli import main
from quant.export.c_encoder import carried, write_encoder_c

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
VECTORS = 7
PASSED = f"model: {VECTORS} of {VECTORS} test vectors equal; too small scratch refused\n"


def export(of, folder, **more):
    return quant.export(of.encoder, folder / "model.c", **of.arguments, **more)


def check(folder, *flags, cc="gcc", std=True):
    """Compile what was exported with its test vectors, and run it."""
    warnings = WARNINGS if std else WARNINGS[1:]
    run(compiler(cc), *warnings, *flags, folder / "model.c", folder / "model_test.c", "-o", folder / "program", "-lm")
    assert run(folder / "program") == PASSED


@functools.cache
def by_name(name):
    return next(of for of in CASES if of.name == name)


# What the written test compares is what the encoder gives on this machine, bit for bit.
@pytest.mark.parametrize("of", CASES, ids=lambda of: of.name)
def test_bytes_are_the_encoders(tmp_path, of):
    export(of, tmp_path, test_vectors=VECTORS)
    check(tmp_path, "-O1", *SANITIZERS)


@pytest.mark.parametrize("of", CASES[1::4], ids=lambda of: of.name)
def test_the_dsp_extension_means_the_same(tmp_path, of):
    export(of, tmp_path, test_vectors=VECTORS)
    check(tmp_path, "-O1", "-D__ARM_FEATURE_SIMD32=1", f"-I{ACLE}", *SANITIZERS)


@pytest.mark.parametrize("name", ["causal", "gates", "further columns and outputs"])
def test_calls_into_cmsis_nn_mean_the_same(tmp_path, name):
    export(by_name(name), tmp_path, test_vectors=VECTORS)
    stand_in = CMSIS_NN / "stand_in.c"
    check(tmp_path, "-O1", "-DMODEL_USE_CMSIS_NN", f"-I{CMSIS_NN}", *SANITIZERS, stand_in)


FUSED = ["-mfma"] if platform.machine() == "x86_64" else []


@pytest.mark.parametrize(("name", "cc"), [
    ("norm first, and one at the end", "gcc"), ("further columns and outputs", "gcc"), ("further columns and outputs", "clang"),
    ("one token", "clang")])
def test_compilers_that_fuse_what_they_can_change_nothing(tmp_path, name, cc):
    """Instructions that multiply and add are used where it says so alone, whatever the optimization."""
    export(by_name(name), tmp_path, test_vectors=VECTORS)
    check(tmp_path, "-std=gnu99", "-O3", "-ffp-contract=fast", *FUSED, cc=cc, std=False)


def test_fast_mathematics_is_refused(tmp_path):
    export(by_name("relu"), tmp_path)
    done = subprocess.run([compiler("gcc"), "-ffast-math", "-c", tmp_path / "model.c", "-o", tmp_path / "model.o"],
                          capture_output=True, text=True)
    assert done.returncode != 0
    assert "compile without -ffast-math" in done.stderr


def call(library, x, tokens, L, scratch_bytes, *, in_place=False):
    """The function's status and output."""
    function = ctypes.CDLL(str(library)).model_f32
    function.restype, function.argtypes = ctypes.c_int, [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    scratch = np.full(scratch_bytes // 4, -7, np.float32)
    given = np.full((L, x.shape[-1]), np.float32(1e9))
    given[:len(x)] = x
    output = given if in_place else np.full_like(given, 5)
    status = function(given.ctypes.data, tokens, output.ctypes.data, scratch.ctypes.data, scratch_bytes)
    return status, output


@pytest.mark.parametrize("name", ["norm last", "norm first, and one at the end", "a network of large features"])
def test_a_call_is_a_call_of_the_encoder(tmp_path, name):
    """Of any length up to the one it was made for; what is behind it comes out as zeros, as with `lengths`."""
    of = by_name(name)
    source = export(of, tmp_path)
    run(compiler("gcc"), *WARNINGS, "-O2", "-shared", "-fPIC", source, "-o", tmp_path / "model.so", "-lm")
    size = macro(source, "MODEL_SCRATCH_BYTES")
    for tokens in (1, 4, of.L):
        x = random(of.L, of.encoder.embed_dim, seed=tokens)
        want = of.encoder(x[None], lengths=[tokens])[0]
        for in_place in (False, True):
            status, found = call(tmp_path / "model.so", x, tokens, of.L, size, in_place=in_place)
            assert status == 0
            np.testing.assert_array_equal(found, want)
    for tokens in (0, of.L + 1, -1):
        status, found = call(tmp_path / "model.so", x, tokens, of.L, size)
        assert status == macro(source, "MODEL_BAD_LENGTH")
        assert (found == 5).all()


def test_an_encoder_that_was_calibrated(tmp_path):
    """As `quant.quantize` makes it, with what reaches beyond the range of the codes, for masks and padding."""
    made = float_encoder(norm_first=True)
    x = random(3, 8, 32)
    x[..., 5] *= 40
    static = quant.quantize(made, quant.calibrate(made, [x]), arithmetic="tflm", room_for_masks=True)
    assert static.layers[0].attention.more_inputs
    quant.export(static, tmp_path / "model.c", sequence_length=8, mask="causal", test_vectors=VECTORS)
    check(tmp_path, "-O2")
    assert "causal: query i sees the keys 0 to i" in (tmp_path / "model.h").read_text()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="fmaf of the C library must be exact")
def test_sums_rounded_once_without_the_instruction(tmp_path):
    """fma_f32 of integers against the C library's, of random bits and of numbers that nearly cancel."""
    export(by_name("relu"), tmp_path)
    text = (tmp_path / "model.c").read_text()
    begin, end = text.index("static inline float rounded_f32"), text.index("/* A norm of E features")
    body = re.sub(r"#if defined\(__GNUC__\) && \(defined\(__FP_FAST_FMAF\).*?#else", "#if 1", text[begin:end], flags=re.DOTALL)
    (tmp_path / "fma.c").write_text("#include <math.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <string.h>\n"
                                    + body + """
static uint32_t state = 1;
static uint32_t next_u32(void) { state ^= state << 13; state ^= state >> 17; state ^= state << 5; return state; }
static float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
int main(void)
{
    for (int n = 0; n < 1000000; n++) {
        float a = of_bits(next_u32()), b = of_bits(next_u32()), c = of_bits(next_u32());
        if (n % 4 == 1) { a = of_bits(next_u32() % 0x1000000); b = of_bits(0x3f800000 | next_u32() % 0x4000000); }
        if (n % 4 == 2) { c = -a * b * of_bits(0x3f800000 + next_u32() % 8); }
        if (n % 4 == 3) { a = of_bits(0x1f000000 + next_u32() % 0x2000000); b = of_bits(0x20000000 + next_u32() % 0x800000);
                          c = of_bits(next_u32() % 0x1800000 | (next_u32() & 0x80000000)); }
        const float want = fmaf(a, b, c), found = fma_f32(a, b, c);
        if (memcmp(&want, &found, 4) != 0 && !(want != want && found != found)) {
            printf("%a * %a + %a: %a, not %a\\n", (double)a, (double)b, (double)c, (double)found, (double)want);
            return 1;
        }
    }
    return 0;
}
""")
    run(compiler("gcc"), "-std=c99", "-O2", "-ffp-contract=off", "-fsanitize=undefined", "-fno-sanitize-recover=all",
        tmp_path / "fma.c", "-o", tmp_path / "fma", "-lm")
    run(tmp_path / "fma")


def test_little_is_taken_from_libc_and_one_name_is_given(tmp_path):
    for of in CASES[::6]:
        source = export(of, tmp_path)
        run(compiler("gcc"), "-std=c99", "-O2", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-c", source,
            "-o", tmp_path / "model.o")
        lines = [line.split() for line in run("nm", tmp_path / "model.o").splitlines()]
        assert {words[-1] for words in lines if words[-2] == "U"} <= {"memset", "memcpy", "memmove", "sqrtf"}
        assert [words[-1] for words in lines if words[-2].isupper() and words[-2] != "U"] == ["model_f32"]
        assert not {words[-2] for words in lines} & set("bBdDC"), "variables"


def test_the_written_test_sees_a_wrong_number(tmp_path):
    export(by_name("norm last"), tmp_path, test_vectors=VECTORS)
    text = (tmp_path / "model.c").read_text()
    at = text.index("layer_1_norm2_weight_f32[")
    brace = text.index("{", at)
    number = text[brace:].split(",")[0].strip("{\n ")
    (tmp_path / "model.c").write_text(text[:brace] + text[brace:].replace(number, "0.999999f", 1))
    run(compiler("gcc"), tmp_path / "model.c", tmp_path / "model_test.c", "-o", tmp_path / "program", "-lm")
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "numbers differ; it catches: anything" in done.stdout


def test_the_text_is_plain_and_says_what_it_is():
    for of in CASES[:4] + CASES[-2:]:
        mask = np.tri(of.L, dtype=bool) if isinstance(of.mask, str) else of.mask
        texts, again = (write_encoder_c(of.encoder, "model", sequence_length=of.L, mask=mask, test_vectors=1)
                        for _ in range(2))
        assert texts == again
        for name, text in texts.items():
            assert text.isascii() and text.endswith("\n") and "\t" not in text and "$" not in text, name
            assert [line for line in text.splitlines() if len(line) > 120] == [], name
        for i, layer in enumerate(carried(of.encoder, of.L, mask).layers):
            tensors = {f"layers.{i}.attention.{name}": t for name, t in layer.attention.attention.tensors.items()}
            tensors |= {f"layers.{i}.feed_forward.{name}": t for name, t in layer.feed_forward.tensors.items()}
            for name, tensor in tensors.items():
                if i == 0 or layer is not of.encoder.layers[0]:
                    assert re.search(rf" \* +{re.escape(name)} .*{re.escape(f'{tensor.scale:.9g}')}", texts["model.c"]) \
                        or of.name == "a layer that stands there twice"


def test_memory_is_the_largest_stage_and_layers_that_are_one_stand_there_once(tmp_path):
    source = export(by_name("a layer that stands there twice"), tmp_path)
    text = source.read_text()
    assert text.count("layer_0_attend_s8(") == 3  # the function, and two calls
    assert "layer_2_" not in text
    assert macro(source, "MODEL_LAYERS") == 3
    one, two = (macro(export(case("", layers=n, L=8), tmp_path), "MODEL_SCRATCH_BYTES") for n in (1, 2))
    assert one == two


# -- refusals --------------------------------------------------------------------------------------------------------------


def static(**options):
    return case("", layers=1, E=32, **options).encoder


def dynamic():
    return quant.quantize(float_encoder(), scheme="dynamic")


def mixed(attend, feed):
    return TransformerEncoder([TransformerEncoderLayer(attend, feed)])


def other_arithmetic():
    of = static().layers[0].attention
    return mixed(type(of)(of.attention.with_arithmetic("litert")), feed_forward(0, 32, 8))


REFUSED = {
    "float32": (float_encoder, {}, ValueError, "layers.0.attention must be static int8 for C, .* got a float32 "
                "MultiHeadAttention: quantize the float encoder with quant.quantize"),
    "rotary": (lambda: float_encoder(rotary=edgeattn.RotaryEmbedding(8)), {}, ValueError, "layers.0.attention must be static"),
    "dynamic": (dynamic, {}, ValueError, "layers.0.attention must be static int8 .* got a dynamic int8 Dynamic"),
    "attention in float32": (lambda: mixed(float_encoder().layers[0].attention, feed_forward(0, 32, 8)), {}, ValueError,
                             "layers.0.attention must be static int8"),
    "a feed-forward in float32": (lambda: mixed(attention(0, 32), float_encoder().layers[0].feed_forward), {}, ValueError,
                                  "layers.0.feed_forward must be static int8 .* got a float32 FeedForward"),
    "another arithmetic": (other_arithmetic, {}, ValueError, "layers.0.attention must have the arithmetic 'tflm' .* got 'litert'"),
    "a model": (text_encoder, {}, TypeError, r"export its encoder, model\.encoder"),
    "a batch": (static, {"batch": 2}, ValueError, "batch must be 1 for an encoder in C, .* call it for each; got 2"),
    "key_length": (static, {"key_length": 3}, ValueError, "key_length must be left out for an encoder"),
    "no length": (static, {"sequence_length": 0}, ValueError, "sequence_length must be at least 1, got 0"),
    "no lengths": (static, {"sequence_length": None}, ValueError, "sequence_length is required for a .c"),
    "several lengths": (static, {"sequence_length": [3, 4]}, ValueError, r"must be one number but for a \.tflite"),
    "too many keys": (static, {"sequence_length": 4096}, ValueError, "layers.0.attention: there may be at most 4095 keys"),
    "a mask of other lengths": (static, {"mask": np.ones((8, 8), bool)}, ValueError, "^mask must .*export with the lengths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_c_does_not_hold_is_refused(tmp_path, name):
    made, options, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        quant.export(made(), tmp_path / "model.c", **{"sequence_length": 5} | options)
    assert not list(tmp_path.iterdir())


def test_masks_need_room(tmp_path):
    made = float_encoder()
    of = quant.quantize(made, quant.calibrate(made, [random(2, 5, 32)]), arithmetic="tflm")
    with pytest.raises(ValueError, match="layers.0.attention: mask needs attention .*room_for_masks=True"):
        quant.export(of, tmp_path / "model.c", sequence_length=5, mask="causal")


def test_the_command_writes_it_and_says_how_to_make_what_it_takes(tmp_path, capsys):
    for name, of in (("static", by_name("relu").encoder), ("float", float_encoder())):
        edgeattn.save(of, tmp_path / f"{name}.safetensors")
    options = ["--sequence-length", "5", "--test-vectors", "1"]
    assert main(["export", str(tmp_path / "static.safetensors"), str(tmp_path / "model.c"), *options]) == 0
    assert (tmp_path / "model_test.c").is_file()
    assert main(["export", str(tmp_path / "float.safetensors"), str(tmp_path / "other.c"), *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "layers.0.attention must be static int8 for C" in said
    assert "with `quant calibrate` and `quant quantize --arithmetic tflm`" in said


@pytest.mark.parametrize("name", ["norm_row", "last_norm", "fma", "int", "math"])
def test_names_that_the_file_has_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="path must not be named"):
        quant.export(by_name("causal").encoder, tmp_path / f"{name}.c", sequence_length=3)


def test_the_page_says_that_encoders_are_there():
    rows = [line for line in (ROOT / "docs" / "formats.md").read_text("utf-8").splitlines() if line.startswith("| encoder, static")]
    assert len(rows) == 1
    assert "yes" in rows[0].split("|")[4]
