"""The page of a comparison: what it shows, that it stands alone, and that it is written whole."""

import base64
import re
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import whole_models
from arrays import numbers

import edgeattn
import quant
import quant.cli
from quant.report import pair_order


class Tags(HTMLParser):
    """What is open, so that all is closed; what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    """The text of a page; its pictures are checked."""
    source = path.read_text()
    tags = Tags()
    tags.feed(source)
    assert tags.open == [] and tags.fetched == [] and "url(" not in source and "@import" not in source
    for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        for number in re.findall(r'(?:points|x|y|width|height)="([^"]*)"', picture):
            assert "nan" not in number and "inf" not in number
        ElementTree.fromstring(picture)
    for image in re.findall(r"base64,([^\"]*)", source):
        data = base64.b64decode(image)
        assert data.startswith(b"\x89PNG") and data[12:16] == b"IHDR"
        width, height = (int.from_bytes(data[at:at + 4], "big") for at in (16, 20))
        begin = data.index(b"IDAT") + 4
        raw = zlib.decompress(data[begin:begin + int.from_bytes(data[begin - 8:begin - 4], "big")])
        assert len(raw) == height * (4 * width + 1)
    return source, " ".join(" ".join(tags.text).split())


def test_a_model_in_dynamic_int8(tmp_path):
    model, rng = whole_models.text_encoder(), np.random.default_rng(0)
    int8 = quant.quantize(model, scheme="dynamic")
    batches = [rng.integers(0, 50, (8, 9)), {"ids": rng.integers(0, 50, (2, 9)), "attention_mask": np.arange(9) < [[9], [4]]}]
    report = quant.write_report(model, int8, batches, tmp_path / "a.html", title="a <b> & c")
    source, text = read(tmp_path / "a.html")
    assert "a <b> & c" in text and report.verdict() in text and all(lint in text for lint in report.lints)
    for name in (*report.alone, "layers.0.attention.query", "layers.1.attention.context", "layers.1.feed_forward.linear1"):
        assert f"<td>{name.replace('.', '.<wbr>')}</td>" in source
    for heading in ("Error by layer", "Halves of layers", "Tensors", "Heads", "Values", "Attention", "Channels of attention"):
        assert heading in text
    assert source.count("<svg") > 8 and source.count("base64,") == 3 * 4
    plain = quant.compare(model, int8, batches)
    assert plain.alone == report.alone and plain.cosines == report.cosines
    assert "<table>" in report._repr_html_() and report.verdict().split(":")[0] in report._repr_html_()


def test_a_layer_of_either_scheme(tmp_path):
    layer = whole_models.encoder().layers[0].attention
    batches = [numbers(2, 9, whole_models.E), {"query": numbers(2, 9, whole_models.E, seed=1), "is_causal": True}]
    for int8, part in ((quant.quantize(layer, quant.calibrate(layer, batches)), "scores"),
                       (quant.quantize(layer, scheme="dynamic"), "probabilities")):
        report = quant.write_report(layer, int8, batches, tmp_path / "layer.html")
        _, text = read(tmp_path / "layer.html")
        assert report.verdict() in text and part in text and "head 3" in text
        assert "output" in report._repr_html_()


def test_a_channel_that_sets_the_scale_is_a_note_with_its_remedy(tmp_path):
    layer, x = whole_models.encoder().layers[0].attention, numbers(2, 9, whole_models.E)
    x[..., 5] *= 100
    report = quant.write_report(layer, quant.quantize(layer, scheme="dynamic"), [x], tmp_path / "a.html")
    assert any("outliers: the codes of layer's input" in lint and "quantize the whole encoder" in lint for lint in report.lints)


def test_what_helps_a_model_against_a_large_channel_is_what_it_lacks(tmp_path):
    model, x = whole_models.encoder(), numbers(2, 9, whole_models.E)
    x[..., 5] *= 100

    def outliers(**settings):
        report = quant.write_report(model, quant.quantize(model, **settings), [x], tmp_path / "a.html")
        return [lint for lint in report.lints if "layers.0.attention's input" in lint]

    seen = quant.calibrate(model, [x])
    assert "quantize with a calibration" in outliers(scheme="dynamic")[0]
    assert outliers(calibration=seen, scheme="dynamic") == outliers(scheme="dynamic", attention="float32") == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what leaves float32
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_values_that_leave_float32_have_a_page(size, tmp_path):
    model, x = whole_models.encoder(), numbers(1, 3, whole_models.E)
    x *= np.float32(size) / np.abs(x).max()
    report = quant.write_report(model, quant.quantize(model, scheme="dynamic"), [x], tmp_path / "huge.html")
    read(tmp_path / "huge.html")
    assert report.verdict()


def test_constant_values_have_no_histogram_but_a_word(tmp_path):
    model = whole_models.encoder()
    report = quant.write_report(model, quant.quantize(model, scheme="dynamic"), [np.zeros((1, 3, whole_models.E), np.float32)],
                                tmp_path / "zeros.html")
    read(tmp_path / "zeros.html")
    assert report.verdict()


def test_the_command_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = whole_models.encoder()
    edgeattn.save(model, "m.safetensors")
    edgeattn.save(quant.quantize(model, scheme="dynamic"), "q.safetensors")
    np.save("x.npy", numbers(3, 9, whole_models.E))
    assert quant.cli.main("report m.safetensors q.safetensors x.npy -o r.html".split()) == 0
    out, _ = capsys.readouterr()
    assert "wrote r.html" in out and "The int8 model is" in out
    assert "q.safetensors beside m.safetensors" in read(tmp_path / "r.html")[1]
    assert quant.cli.main("report m.safetensors q.safetensors x.npy -o r.txt".split()) == 2
    assert "must end in .html" in capsys.readouterr().err


def test_the_order_of_pairs_is_spearmans():
    real, got = numbers(9, 4), numbers(9, 4, seed=1)

    def similar(rows):
        rows = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return (rows @ rows.T)[np.triu_indices(9, 1)]

    ranks = [np.argsort(np.argsort(similar(rows))) for rows in (real, got)]
    assert pair_order(list(zip(real, got, strict=True))) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert pair_order(list(zip(real, real, strict=True))) == pytest.approx(1)
    assert np.isnan(pair_order([(real[0], got[0])] * 2)) and np.isnan(pair_order([(real, got)] * 3))
