"""Node data for Model Explorer: by the names of the nodes of exported files."""
import json

import numpy as np
import pytest
from arrays import numbers as random
from click.testing import CliRunner
from whole_models import E, encoder
from workbench import random_input, random_layer

import edgeattn
import quant
from edgeattn.files.tflite_file import parse
from quant import cli
from quant.model_explorer import COLOURS


def nodes_of(path):
    """The tensors that the operators of a file give."""
    graph = parse(path.read_bytes(), path.name)
    return {graph.tensors[number].name for operator in graph.operators for number in operator.outputs}


def test_every_node_of_a_layer_has_its_tensors_figure(tmp_path):
    layer, x = random_layer(1), random_input(0, 2, 9, 32)
    made = quant.quantize(layer, quant.calibrate(layer, [x]))
    report = quant.compare(layer, made, [x])
    path = quant.export(made, tmp_path / "a.tflite", sequence_length=9)
    found = json.loads(report.to_model_explorer(path))
    assert list(found) == ["main"] and set(found["main"]) == {"results", "thresholds"}
    results = {name: node["value"] for name, node in found["main"]["results"].items()}
    assert results.keys() == nodes_of(path)
    for name, value in results.items():
        assert value == pytest.approx(report.tensors[name.partition("/")[0]].sqnr_db, abs=0.01)
    assert {"query", "query/split", "scores", "probabilities", "output"} <= results.keys()
    values = [each["value"] for each in found["main"]["thresholds"]]
    assert values == sorted(values) and [each["bgColor"] for each in found["main"]["thresholds"]] == [
        colour for _, colour in COLOURS]


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}])
def test_every_node_of_a_half_has_its_figure(tmp_path, settings):
    made, x = encoder(**settings), [random(3, 9, E)]
    mixed = quant.quantize(made, quant.calibrate(made, x), overrides={
        "layers.1.*": "dynamic", "layers.0.attention": "float32"})
    report = quant.compare(made, mixed, x)
    path = quant.export(mixed, tmp_path / "a.tflite", sequence_length=9)
    results = json.loads(report.to_model_explorer(path))["main"]["results"]
    assert results.keys() == {  # what is float32 has no error
        name for name in nodes_of(path) if not name.startswith(("layers.0.attention", "layers.0.norm1", "layers.0.sum1"))}
    for name, half in (("layers.1.attention.query", "layers.1.attention"), ("layers.1.sum1", "layers.1.attention"),
                       ("layers.0.sum2", "layers.0.feed_forward"),
                       ("layers.0.feed_forward.linear2", "layers.0.feed_forward"), ("output", "layers.1.feed_forward")):
        assert results[name]["value"] == pytest.approx(report.alone[half].sqnr_db, abs=0.01)


def test_a_file_of_something_else_is_refused(tmp_path):
    made, x = encoder(), [random(3, 9, E)]
    report = quant.compare(made, quant.quantize(made, scheme="dynamic"), x)
    layer = random_layer(1)
    path = quant.export(layer, tmp_path / "layer.tflite", sequence_length=9)
    with pytest.raises(ValueError, match=r"layer\.tflite: must be what quant\.export wrote of the model compared"):
        report.to_model_explorer(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"layer\.tflite: .*"):
        report.to_model_explorer(path)


def test_the_command_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer, x = random_layer(1), random_input(0, 2, 9, 32)
    made = quant.quantize(layer, quant.calibrate(layer, [x]))
    edgeattn.save(layer, "layer.safetensors")
    edgeattn.save(made, "int8.safetensors")
    np.save("x.npy", x)
    quant.export(made, tmp_path / "a.tflite", sequence_length=9)
    words = ["compare", "layer.safetensors", "int8.safetensors", "x.npy", "--model-explorer", "nodes.json"]
    result = CliRunner().invoke(cli.commands, [*words, "--tflite", "a.tflite"])
    assert result.exit_code == 0, result.output
    written = (tmp_path / "nodes.json").read_text()
    assert written == quant.compare(layer, made, [x]).to_model_explorer("a.tflite")
    words[2] = "a.tflite"
    result = CliRunner().invoke(cli.commands, words)
    assert result.exit_code == 0 and (tmp_path / "nodes.json").read_text() == written
    words[2] = "int8.safetensors"
    result = CliRunner().invoke(cli.commands, words)
    assert result.exit_code == 2 and "--model-explorer needs --tflite" in result.output
