"""Files that releases wrote, see tests/fixtures/README.md: read, with what they gave then."""

import gzip

import numpy as np
import pytest
from arrays import cosine
from places import TESTS

import edgeattn
import quant

FOLDERS = sorted(path for path in (TESTS / "fixtures").iterdir() if path.is_dir())
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*-*.safetensors"))]


def results(folder):
    return np.load(folder / "results.npz")


def test_this_release_has_its_files_and_they_are_small():
    series = edgeattn.__version__.rpartition(".")[0]
    assert series in [folder.name.rpartition(".")[0] for folder in FOLDERS]
    for folder in FOLDERS:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    assert {path.stem for path in FILES} >= {
        f"{kind}-{form}" for kind in ("attention", "encoder") for form in ("float32", "static", "dynamic")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_file_gives_what_it_gave(path):
    recorded = results(path.parent)
    layer = edgeattn.load(path)
    got = layer(recorded["ids" if path.stem.startswith("text") else "x"])
    if path.stem.endswith("float32"):  # sums in another order on another instruction set
        np.testing.assert_allclose(got, recorded[path.stem], atol=2e-6)
    else:
        np.testing.assert_array_equal(got, recorded[path.stem])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_tflite_gives_the_same_codes(folder):
    recorded = results(folder)
    layer = edgeattn.load(folder / "attention-static.tflite")
    np.testing.assert_array_equal(layer.run_int8(layer.quantize_input(recorded["x"])), recorded["tflite"])


@pytest.mark.parametrize("kind, name, loader", [("attention", "calibration", quant.Calibration),
                                                ("encoder", "calibration-model", quant.ModelCalibration)])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_calibration_is_read_or_says_what_makes_it_anew(folder, kind, name, loader, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(gzip.decompress((folder / f"{path.name}.gz").read_bytes()))
    try:
        calibration = loader.load(path)
    except ValueError as error:
        assert "calibrate again" in str(error)
        return
    made = quant.quantize(edgeattn.load(folder / f"{kind}-float32.safetensors"), calibration)
    recorded = results(folder)
    assert cosine(made(recorded["x"]), recorded[f"{kind}-float32"]) > 0.99
