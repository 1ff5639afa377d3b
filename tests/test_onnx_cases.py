"""The node cases that the onnx package generates for Attention and RotaryEmbedding, through edgeattn.

Their "_expanded" twins, which spell the operator out in MatMul, Softmax and so on, are not among them.
"""

import importlib
import warnings

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", minversion="1.18", reason="needs onnx: pip install edgeattn[test]")
onnx_backend = pytest.importorskip("onnx_backend")

from onnx.backend.test.case import node  # noqa: E402


def collect():
    """{operator: its cases}. onnx makes an operator's when its module is imported; those of all operators take 12 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generating code
        for module in ("attention", "rotaryembedding"):
            importlib.import_module(f"{node.__name__}.{module}")
        found = {}
        for case in node._NodeTestCases:
            # models may also be of several nodes, or not be made yet: those are other operators'
            if case.model is not None and len(case.model.graph.node) == 1:
                param = pytest.param(case, id=case.name.removeprefix("test_"))
                found.setdefault(case.model.graph.node[0].op_type, []).append(param)
    return found


CASES = collect()
ATTENTION, ROTARY = CASES["Attention"], CASES["RotaryEmbedding"]


def check(case):
    """Compare every output with the case's own; return their names."""
    names, compared = case.model.graph.node[0].output, set()
    for inputs, expected in case.data_sets:
        inputs = [np.asarray(array) for array in inputs]
        before = [array.copy() for array in inputs]
        outputs = onnx_backend.run(case.model, inputs)
        wanted = iter(expected)
        for name, output in zip(names, outputs, strict=True):
            if not name:
                continue
            want = np.asarray(next(wanted))
            compared.add(name)
            assert output.dtype == want.dtype
            np.testing.assert_allclose(output, want, rtol=case.rtol, atol=case.atol)
        for array, copy in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(array, copy)
    return compared


@pytest.mark.parametrize("case", [c for c in ATTENTION if onnx_backend.unsupported(c.values[0].model) is None])
def test_attention(case):
    assert check(case) == {name for name in case.model.graph.node[0].output if name}


@pytest.mark.parametrize("case", [
    c for c in ATTENTION if "bfloat16" in (onnx_backend.unsupported(c.values[0].model) or "")])
def test_bfloat16_is_refused(case):
    with pytest.raises(TypeError, match="query must be a float16, float32 or float64 array, got dtype bfloat16"):
        onnx_backend.run(case.model, [np.asarray(array) for array in case.data_sets[0][0]])


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_embedding(case):
    assert check(case) == {"output"}


def test_what_cannot_be_run_is_bfloat16_and_nothing_else():
    reasons = [onnx_backend.unsupported(case.values[0].model) for case in ATTENTION]
    assert len(reasons) >= 50
    assert sum(reason is not None for reason in reasons) <= 5
    assert all(reason is None or reason.startswith("bfloat16 is refused") for reason in reasons)
