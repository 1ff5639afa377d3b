"""What programs and shells take from the commands: JSON, exit statuses, completion, nearest names, signs of life."""
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import test_cli
import test_cli_models
from places import ROOT
from workbench import random_input, random_layer

import edgeattn.cli
import quant.cli
from edgeattn import alive as alive_module
from edgeattn.alive import alive

MAINS = {"edgeattn": edgeattn.cli.main, "quant": quant.cli.main}
# What belongs to Python in a message. Names of arrays in .npz files (attn_mask) are in the help of the commands.
PYTHON = re.compile(r"\b(\w+Error|Traceback|dict|list|tuple|ndarray|None|False|NoneType|dtype|kwargs|mapping)\b"
                    r"|\bquant\.\w|\bedgeattn\.\w|\b\w+='|\w\(\)|\bobject at\b")
made, awkward = test_cli_models.made, test_cli.awkward


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A folder with a layer, a calibration and int8 layers."""
    folder = tmp_path_factory.mktemp("layers")
    layer = random_layer(1)
    calibration = quant.calibrate(layer, [random_input(0, 2, 9, 32)])
    edgeattn.save(layer, folder / "layer.safetensors")
    calibration.save(folder / "c.safetensors")
    edgeattn.save(quant.quantize(layer, calibration), folder / "int8.safetensors")
    np.save(folder / "x.npy", random_input(1, 2, 9, 32))
    return folder


@pytest.fixture
def command(layers, tmp_path, monkeypatch, capsys):
    """Run a command in a copy of it: (exit status, standard output, standard error)."""
    shutil.copytree(layers, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(line):
        kind, *arguments = line.split(" ")
        try:
            status = MAINS[kind](arguments)
        except SystemExit as left:
            status = left.code
        return status or 0, *capsys.readouterr()
    return run


JSON = {
    "edgeattn info": {"edgeattn": edgeattn.__version__, "number of threads": edgeattn.get_num_threads()},
    "edgeattn bench layer.safetensors --length 4": {"threads": edgeattn.get_num_threads()},
    "edgeattn warmup layer.safetensors --length 4": {},
    f"edgeattn encode {test_cli_models.SENTENCES} a -o v.npy": {"output": "v.npy", "vectors": 1, "width": 16},
    "quant calibrate layer.safetensors x.npy -o new.safetensors": {
        "output": "new.safetensors", "data": ["x.npy"], "calls": 1, "tokens": 18},
    "quant quantize layer.safetensors c.safetensors -o q.safetensors": {"scheme": "static", "arithmetic": "litert"},
    "quant quantize layer.safetensors -o q.safetensors --scheme dynamic": {"scheme": "dynamic"},
    "quant compare layer.safetensors int8.safetensors x.npy": {},
    "quant report layer.safetensors int8.safetensors x.npy -o r.html": {"output": "r.html"},
    "quant export int8.safetensors a.tflite --sequence-length 9": {"output": "a.tflite"},
    "quant inspect int8.safetensors": {"file": "int8.safetensors", "arithmetic": "litert"},
    "quant inspect c.safetensors": {"observer": "minmax"},
}


@pytest.mark.parametrize("line, expected", JSON.items())
def test_every_command_prints_json(command, line, expected):
    status, out, _ = command(f"{line} --json")
    found = json.loads(out)
    assert status == 0 and {name: found[name] for name in expected} == expected


def test_json_of_files_and_tables_holds_numbers(command):
    found, = json.loads(command("edgeattn info layer.safetensors --json")[1])
    assert found["file"] == "layer.safetensors" and found["heads"].startswith("4 of 8")
    shown = json.loads(command("quant inspect int8.safetensors --json")[1])
    assert shown["tables"][0][0].keys() == {"tensor", "scale", "zero point", "lowest", "highest"}
    assert all(type(row["zero point"]) is int and type(row["scale"]) is float for row in shown["tables"][0])
    timed = json.loads(command("edgeattn bench layer.safetensors --length 4 8 --json")[1])["calls"]
    assert [call["length"] for call in timed] == [4, 8] and all(call["microseconds"] > 0 for call in timed)


def test_every_command_has_json():
    from edgeattn.cli_parser import commands_of, options_of

    edgeattn_commands = commands_of(edgeattn.cli._parser())
    lacking = [name for name, command in edgeattn_commands.items() if "--json" not in options_of(command)]
    lacking += [name for name, command in quant.cli.commands.commands.items()
                if "--json" not in [option for parameter in command.params for option in parameter.opts]]
    assert lacking == ["completion", "completion"]
    run = {tuple(line.split()[:2]) for line in JSON}
    assert run == {("edgeattn", name) for name in edgeattn_commands if name != "completion"} | {
        ("quant", name) for name in quant.cli.commands.commands if name != "completion"}


@pytest.mark.parametrize("line, message", [
    ("edgeattn enc a", "edgeattn: No such command 'enc'. Did you mean 'encode'?\n"),
    ("edgeattn xyz", "edgeattn: No such command 'xyz'.\n"),
    ("edgeattn info --jsn", "edgeattn info: No such option '--jsn'. Did you mean '--json'?\n"),
    ("edgeattn bench layer.safetensors --lenght=3", "edgeattn bench: No such option '--lenght'. Did you mean '--length'?\n"),
    ("edgeattn bench", "edgeattn bench: Missing argument 'FILE'.\n"),
    ("edgeattn encode m a", "edgeattn encode: Missing option '-o' / '--output'.\n"),
    ("edgeattn bench layer.safetensors --length x", "edgeattn bench: Invalid value for '--length': 'x' is not a valid integer.\n"),
    ("edgeattn bench layer.safetensors --length", "edgeattn bench: Option '--length' requires an argument.\n"),
    ("edgeattn info --part x", "edgeattn info: Invalid value for '--part': 'x' is not one of 'text', 'vision', 'encoder'.\n"),
    ("edgeattn completion x", "edgeattn completion: Invalid value for 'SHELL': 'x' is not one of 'bash', 'zsh', 'fish'.\n"),
    ("edgeattn info no", "edgeattn: no: No such file or directory\n"),
    ("edgeattn info .", "edgeattn: config.json: No such file or directory; a model's folder holds one, as transformers and "),
    ("quant compare layer.safetensors . x.npy", "quant: . is a folder, of a float model: `quant quantize` makes the int8 "),
    ("quant export layer.safetensors a.tflit", "quant: OUT must end in one of .tflite, .onnx, .safetensors, .c, .so; got "),
    ("quant export layer.safetensors a.tflite --seqence-length 4",
     "quant export: No such option '--seqence-length'. Did you mean '--sequence-length'?\n"),
    ("edgeattn encode m a -o v.npy --tokenizer t", "edgeattn: --tokenizer must be left out but for an .onnx file, got m: "
     "what else holds a model holds its tokenizer\n"),
    ("quant quantise a", "quant: No such command 'quantise'. Did you mean 'quantize'?\n"),
    ("quant inspect a --arithmetc tflm", "quant inspect: No such option '--arithmetc'. Did you mean '--arithmetic'?\n"),
    ("quant inspect layer.safetensors --arithmetic tflm",
     "quant: --arithmetic tflm applies to int8 layers, but layer.safetensors holds a MultiHeadAttention\n"),
    ("quant inspect --node", "quant inspect: No such option '--node'."),
    ("quant export layer.safetensors a.onnx --node n", "quant export: --node needs an .onnx, .keras or .h5 file; got layer."),
    ("quant export layer.safetensors a.onnx --node n --prefix p", "--node and --prefix exclude each other\n"),
    ("quant export layer.safetensors a.onnx --norm-first", "--activation and --norm-first need --torch-encoder"),
])
def test_errors_say_what_was_meant(command, line, message):
    status, out, err = command(line)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not PYTHON.search(err)


def test_no_message_of_a_command_speaks_python(awkward, made, monkeypatch, capsys):
    """Every line of wrong input that other tests know, and files of the wrong kind for every command."""
    models = [case for name in ("test_edgeattn_errors_are_one_line", "test_quant_errors_are_one_line")
              for case in getattr(test_cli_models, name).pytestmark[0].args[1]]
    of_quant = len(test_cli_models.test_quant_errors_are_one_line.pytestmark[0].args[1])
    kinds = ["edgeattn"] * (len(models) - of_quant) + ["quant"] * of_quant
    lines = [(awkward, f"quant {line}") for line, _ in test_cli.ERRORS]
    lines += [(made, f"{kind} {line}") for (line, _), kind in zip(models, kinds, strict=True)]
    wrong = ("x.npy", "cut.safetensors", "cut.tflite", "none.safetensors", "objects.npy", "names.npz")
    for file in wrong:
        lines += [(awkward, f"edgeattn {verb} {file}") for verb in ("info", "bench", "warmup")]
        lines += [(awkward, f"edgeattn encode {file} a -o v.npy"), (awkward, f"quant inspect {file}"),
                  (awkward, f"quant quantize {file} -o q.safetensors --scheme dynamic"),
                  (awkward, f"quant calibrate {file} x.npy -o q.safetensors"),
                  (awkward, f"quant compare layer.safetensors {file} x.npy"),
                  (awkward, f"quant report {file} {file} x.npy -o r.html"),
                  (awkward, f"quant export {file} a.tflite --sequence-length 4")]
    (made / "long.txt").write_text("a\n" + "dog " * 40)
    spoken = {}
    for folder, line in lines:
        monkeypatch.chdir(folder)
        kind, *arguments = line.split(" ")
        try:
            status = MAINS[kind](arguments)
        except SystemExit as left:
            status = left.code
        err = capsys.readouterr().err
        if line != "edgeattn info x.npy":
            assert status == 2 and err.count("\n") == 1, (line, err)
        if PYTHON.search(err.replace(str(ROOT), "")):
            spoken[line] = err
    assert len(lines) > 120 and spoken == {}


@pytest.mark.parametrize("kind, line", [("edgeattn", "info int8.safetensors"), ("quant", "inspect int8.safetensors")])
def test_output_that_cannot_be_written(layers, kind, line):
    for buffered in ("", "1"):
        told = {"cwd": layers, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONUNBUFFERED": buffered}}
        command = [sys.executable, "-c", f"import sys; from {kind}.__main__ import main; sys.exit(main())", *line.split()]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, **told)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")  # as `| head` leaves a command
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run(command, stdout=full, **told)
        assert (done.returncode, done.stderr) == (2, f"{kind}: No space left on device\n")


def test_exit_statuses_are_those_of_the_help(command, monkeypatch, capsys):
    for line in ("edgeattn --help", "quant --help", "edgeattn info --help"):
        assert "0 done, 2 an error," in " ".join(command(line)[1].split())
    page = " ".join((ROOT / "docs/commands.md").read_text(encoding="utf-8").split())
    assert "0 done, 2 an error" in page and "130 interrupted, 141 nobody reads the output" in page

    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(edgeattn.cli, "open_model", interrupted)
    monkeypatch.setattr(quant.cli, "describe_file", interrupted)
    assert command("edgeattn bench a") == (130, "", "edgeattn: interrupted\n")
    status, _, err = command("quant inspect a")
    assert (status, err.lstrip("\n")) == (130, "quant: interrupted\n")  # click ends the line of ^C


BASH = """
{completion}
COMP_WORDS=({words})
COMP_CWORD={at}
{function}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize("words, at, expected", [
    ("edgeattn wa", 1, ["warmup"]), ("edgeattn bench --le", 2, ["--length"]), ("edgeattn completion fi", 2, ["fish"])])
def test_bash_completes_edgeattn(command, words, at, expected):
    script = BASH.format(completion=command("edgeattn completion bash")[1], words=words, at=at, function="_edgeattn")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


def test_bash_completes_quant(command):
    assert "_QUANT_COMPLETE=bash_complete" in command("quant completion bash")[1]
    done = subprocess.run([sys.executable, "-m", "quant"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "_QUANT_COMPLETE": "bash_complete", "COMP_WORDS": "quant qu", "COMP_CWORD": "1"})
    assert done.stdout == "plain,quantize\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_every_option(command, shell):
    script = command(f"edgeattn completion {shell}")[1]
    assert script.count("batch-size") == 1 and script.count("warmup") >= 1
    assert command(f"quant completion {shell}")[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_what_takes_long(monkeypatch):
    monkeypatch.setattr(alive_module, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with alive("compiling"):
        while "compiling" not in sys.stderr.getvalue():
            threading.Event().wait(0.01)
    assert re.fullmatch(r"(\r\033\[Kcompiling \.\.\. \d+ s)+\r\033\[K", sys.stderr.getvalue())
    monkeypatch.setattr(sys, "stderr", Terminal())
    with alive("compiling", bar=True):
        threading.Event().wait(0.05)
    assert sys.stderr.getvalue() == ""


def test_a_log_is_told_what_takes_long(monkeypatch, caplog):
    monkeypatch.setattr(alive_module, "LOG_PATIENCE", 0.0)
    with caplog.at_level(logging.INFO, "edgeattn"), alive("compiling"):
        while not caplog.records:
            threading.Event().wait(0.01)
    assert caplog.records[0].getMessage() == "compiling: at work for 0 s"
    monkeypatch.setattr(alive_module, "LOG_PATIENCE", 60.0)
    caplog.clear()
    with alive("compiling"):
        pass
    assert caplog.records == []


def test_info_names_no_folder_that_is_not_there(monkeypatch, tmp_path, capsys):
    from edgeattn import cli_info
    from edgeattn.runtime import kernel_cache

    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(cli_info.prebuilt, "LIBRARY", None)
    monkeypatch.setattr(kernel_cache, "folders", lambda _: [str(there), str(tmp_path / "gone"), str(tmp_path / "a")])
    assert list(cli_info._cache()) == [("cache", f"{there} (used)")]
    monkeypatch.setattr(kernel_cache, "folders", lambda _: [str(tmp_path / "gone")])
    assert list(cli_info._cache()) == [("cache", f"{tmp_path / 'gone'} (made when a kernel is compiled)")]


def test_readers_of_checkpoints(command, tmp_path):
    """An encoder of torch, a Keras layer, an ONNX file, by the command as by the function."""
    layer = random_layer(1)
    torch = {"enc.layers.0.self_attn.in_proj_weight": np.concatenate([layer.q_weight, layer.k_weight, layer.v_weight]),
             "enc.layers.0.self_attn.in_proj_bias": np.zeros(96, np.float32),
             "enc.layers.0.self_attn.out_proj.weight": layer.out_weight,
             "enc.layers.0.self_attn.out_proj.bias": np.zeros(32, np.float32)}
    for name, shape in (("linear1", (64, 32)), ("linear2", (32, 64))):
        torch[f"enc.layers.0.{name}.weight"] = random_input(3, *shape)
        torch[f"enc.layers.0.{name}.bias"] = np.zeros(shape[0], np.float32)
    for name in ("norm1", "norm2"):
        torch[f"enc.layers.0.{name}.weight"], torch[f"enc.layers.0.{name}.bias"] = np.ones(32, "f"), np.zeros(32, "f")
    np.savez("torch.npz", **torch)
    status, out, err = command("quant export torch.npz e.safetensors --torch-encoder enc. --num-heads 4 "
                               "--activation gelu --norm-first")
    assert status == 0, err
    assert edgeattn.load("e.safetensors") == edgeattn.TransformerEncoder.from_torch(
        "torch.npz", 4, prefix="enc.", activation="gelu", norm_first=True)
    assert command("quant export layer.safetensors layer.onnx --batch 1 --sequence-length 9")[0] == 0
    status, _, err = command("edgeattn info layer.onnx --arithmetic tflm")
    assert status == 2 and "edgeattn: --arithmetic must be left out but for --scheme static" in err
    for line in ("edgeattn info layer.onnx", "quant inspect layer.onnx"):
        status, out, err = command(line)
        assert status == 0 and "MultiHeadAttention, float32" in out, err


def test_options_have_the_values_that_arguments_have():
    from typing import get_args

    from edgeattn import cli_parser, types
    from edgeattn.models import pretrained

    assert get_args(types.ModelPart) == cli_parser.PARTS == pretrained.PARTS
    assert get_args(types.OnnxScheme) == cli_parser.SCHEMES


def test_encode_reads_onnx_with_a_tokenizer_and_bundles(command, monkeypatch):
    """Which reader is asked, with what; tests/models and tests/test_bundle.py have what these read."""
    model = edgeattn.from_pretrained(test_cli_models.SENTENCES)
    asked = []
    for name in ("m.onnx", "m.so"):
        open(name, "wb").close()
    monkeypatch.setattr(edgeattn.TextEncoder, "from_onnx", lambda *given, **named: asked.append((given, named)) or model)
    monkeypatch.setattr("edgeattn.bundle.load", lambda path: asked.append(path) or model)
    status, out, err = command("edgeattn encode m.onnx dog -o v.npy --tokenizer folder")
    assert status == 0 and [str(asked[0][0][0]), str(asked[0][1]["tokenizer"])] == ["m.onnx", "folder"], err
    assert command("edgeattn encode m.so dog -o w.npy")[0] == 0 and asked[1] == "m.so"
    np.testing.assert_array_equal(np.load("v.npy"), np.load("w.npy"))


def test_help_of_both_commands_has_one_form_and_fits_a_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [f"{name} {each}".strip() for name, commands in (
        ("edgeattn", edgeattn.cli_parser.commands_of(edgeattn.cli._parser())), ("quant", quant.cli.commands.commands))
        for each in ("", *commands)]
    for line in lines:
        _, out, _ = command(f"{line} --help")
        assert out.startswith(f"Usage: {line} ") and "\nOptions:\n" in out and "Show this message and exit." in out
        assert "positional" not in out and "..." not in out.partition("\nCommands:\n")[2].partition("Exit status")[0]
        # the names of kernel sets or of targets are one word to argparse and to click
        assert [each for each in out.splitlines() if len(each) > 80 and "litert-arm" not in each and "cortex-a53" not in each] == []
