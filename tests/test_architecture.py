"""The counts of docs/architecture.md, counted."""
import re
import sys

import pytest
from places import ROOT
from workbench import random_input, random_layer

import quant
from edgeattn.runtime import prebuilt

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
layer, x = random_layer(1), random_input(0, 1, 9, 32)
static = quant.quantize(layer, quant.calibrate(layer, [x]))
codes = static.quantize_input(x)


@pytest.mark.parametrize("call, said", [
    (lambda: layer(x), r"alone, in (\d) calls"), (lambda: layer(x, is_causal=True), r"(\d) calls of Python functions"),
    (lambda: static.run_int8(codes), r"without\s+masks (\d) calls"),
    (lambda: static.run_int8(codes, is_causal=True), r"as above: (\d) calls")])
def test_a_call_that_comes_again_is_as_many_calls_as_the_page_says(call, said):
    found = []
    for _ in range(2):
        call()
    sys.setprofile(lambda frame, event, _: found.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    less = prebuilt.LIBRARY is not None  # "A short call of a library's kernel needs one less"
    assert len(found) - 1 == int(re.search(said, PAGE)[1]) - less, found


def test_every_module_that_the_page_names_is_there():
    missing = []
    for name in re.findall(r"`([a-z_/0-9]+\.py)`", PAGE):
        tops = (ROOT, ROOT / "edgeattn", ROOT / "quant", ROOT / "quant/export", ROOT / "edgeattn/kernels/cpu", ROOT / "edgeattn/kernels/cpu/simd",
                ROOT / "edgeattn/executors/cuda", ROOT / "edgeattn/runtime", ROOT / "edgeattn/layers",
                ROOT / "edgeattn/quantized", ROOT / "edgeattn/executors")
        missing += [] if any((top / name).is_file() for top in tops) else [name]
    assert missing == []
