"""What people do with things beside calling them: print, compare, list, misspell, log."""
import copy
import logging
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import whole_models
from places import ROOT
from workbench import random_input, random_layer

import edgeattn
import quant
from edgeattn.hints import hinted

layer = random_layer(1)
calibration = quant.calibrate(layer, [random_input(0, 2, 9, 32)])
encoder = whole_models.encoder()
THINGS = {
    "layer": layer, "one head": edgeattn.SelfAttention(*[np.eye(8, dtype=np.float32)] * 3),
    "dynamic": quant.quantize(layer, scheme="dynamic"), "static": quant.quantize(layer, calibration),
    "encoder": encoder, "encoder layer": encoder.layers[0], "dynamic encoder": quant.quantize(encoder, scheme="dynamic"),
    "text encoder": whole_models.text_encoder(), "image encoder": whole_models.image_encoder(),
    "feed-forward": encoder.layers[0].feed_forward, "linear": encoder.layers[0].feed_forward.linear1,
    "norm": encoder.layers[0].norm1, "embedding": whole_models.text_encoder().embedding,
    "patches": whole_models.image_encoder().embedding,
}
OTHERS = {
    "calibration": calibration, "cache": edgeattn.KVCache(1, 2, 8, 16), "rotary": edgeattn.RotaryEmbedding(8),
    "model calibration": quant.calibrate(encoder, [random_input(0, 1, 4, 32)]),
}


@pytest.mark.parametrize("thing", [*THINGS.values(), *OTHERS.values()], ids=[*THINGS, *OTHERS])
def test_printed_with_its_sizes(thing):
    shown = repr(thing)
    assert type(thing).__name__ in shown and " object at 0x" not in shown
    assert any(character.isdigit() for character in shown) and len(shown) < 1200 and "array(" not in shown


def test_printed_encoders_tell_what_is_int8():
    static = quant.quantize(encoder, quant.calibrate(encoder, [random_input(0, 1, 4, 32)]))
    partly = quant.quantize(encoder, scheme="dynamic", attention="float32")
    shown = [repr(each) for each in (encoder, THINGS["dynamic encoder"], static, partly)]
    assert len(set(shown)) == 4 and "Dynamic" not in shown[0] and "DynamicMultiHeadAttention" in shown[1]
    assert "StaticFeedForward" in shown[2] and "DynamicLinear, MultiHeadAttention" in shown[3]


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_equal_where_all_is(thing):
    again = copy.deepcopy(thing)
    assert again is not thing and again == thing and hash(again) == hash(thing)
    assert thing != whole_models.encoder(seed=5) and thing != 3
    config, tensors = thing.to_state()
    name = next(name for name, tensor in tensors.items() if tensor.dtype != np.int64 and tensor.size)
    changed = {**tensors, name: tensors[name].copy()}
    changed[name].flat[0] += 1
    assert type(thing).from_state(config, changed) != thing


def test_reports_show_as_pages_in_notebooks():
    reports = (quant.compare(layer, THINGS["static"], [random_input(2, 1, 9, 32)]),
               quant.compare(encoder, THINGS["dynamic encoder"], [random_input(2, 1, 9, 32)]))
    for report in reports:
        assert "<table" in report._repr_html_() and "<script" not in report._repr_html_()


def test_lists_of_names_hold_no_modules():
    import edgeattn.layers
    import edgeattn.models
    import edgeattn.quantized

    for package in (edgeattn, edgeattn.layers, edgeattn.models, edgeattn.quantized, quant):
        names = [name for name in dir(package) if not name.startswith("__")]
        assert set(names) == set(package.__all__)
        assert [name for name in names if isinstance(getattr(package, name), ModuleType)] == []


@pytest.mark.parametrize("call, name", [
    (lambda: edgeattn.MultiHeadAttention(2, *[np.eye(8)] * 3, num_kv_head=2), "num_kv_heads"),
    (lambda: edgeattn.TransformerEncoderLayer(layer, None, None, None, norm_frist=True), "norm_first"),
    (lambda: edgeattn.KVCache(1, 2, 8, 16, dtpye="int8"), "dtype"),
    (lambda: edgeattn.RotaryEmbedding(8, interleave=True), "interleaved"),
    (lambda: quant.quantize(layer, shceme="dynamic"), "scheme"),
    (lambda: quant.calibrate(layer, [], observers="mse"), "observer"),
    (lambda: quant.compare(layer, layer, [], details=None), "detail"),
    (lambda: quant.export(layer, "a.tflite", sequence_lenght=4), "sequence_length"),
    (lambda: edgeattn.load("a.tflite", arithmetics="tflm"), "arithmetic"),
    (lambda: edgeattn.MultiHeadAttention.from_onnx("a.onnx", nodes=1), "node"),
    (lambda: edgeattn.TransformerEncoder.from_onnx("a.onnx", sheme="static"), "scheme"),
    (lambda: edgeattn.TextEncoder.from_onnx("a.onnx", tokeniser="a"), "tokenizer"),
    (lambda: edgeattn.ImageEncoder.from_onnx("a.onnx", arithmetics="tflm"), "arithmetic"),
    (lambda: edgeattn.from_pretrained(folders="a"), "folder"),
])
def test_a_misspelt_argument_is_told_what_was_meant(call, name):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '\w+'\. Did you mean '{name}'\?"):
        call()


def test_only_misspelt_arguments_are_told():
    @hinted
    def function(a, *, number=1):
        raise TypeError("of its own")
    with pytest.raises(TypeError, match="^of its own$"):
        function(1, number=2)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'a'$"):
        function()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'qqq'$"):
        function(1, qqq=2)
    assert function.__name__ == "function" and hasattr(function, "__wrapped__") == (sys.version_info < (3, 13))


def test_everything_is_logged_under_one_name():
    """And nothing but commands, and progress that is asked for, prints."""
    printing = set()
    for path in [*(ROOT / "edgeattn").rglob("*.py"), *(ROOT / "quant").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if re.search(r"(?<![\w.])print\(", text):
            printing.add(path.relative_to(ROOT).as_posix())
        assert set(re.findall(r"getLogger\((.*?)\)", text)) <= {'"edgeattn"'}, path
    commands = {"edgeattn/cli.py", "edgeattn/cli_encode.py", "edgeattn/cli_info.py", "quant/cli.py", "quant/__main__.py",
                "quant/export/kernels.py"}
    assert printing <= {*commands, "edgeattn/models/text_encoder.py"}
    assert logging.getLogger("edgeattn").parent is logging.getLogger()
