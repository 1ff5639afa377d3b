"""The node cases that the onnx package generates for Attention and RotaryEmbedding, through edgeattn.

Their "_expanded" twins, which spell the operator out in MatMul, Softmax and so on, are not among them.
"""

import warnings

import numpy as np
import pytest

import edgeattn

onnx = pytest.importorskip("onnx", minversion="1.18", reason="needs onnx: pip install edgeattn[test]")
onnx_backend = pytest.importorskip("onnx_backend")

from onnx.backend.test.case.node import collect_testcases  # noqa: E402


def cases(operator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generating code
        found = [case for case in collect_testcases(operator) if case.model.graph.node[0].op_type == operator]
    return [pytest.param(case, id=case.name.removeprefix("test_")) for case in found]


ATTENTION = cases("Attention")
ROTARY = cases("RotaryEmbedding")


def check(case):
    """Compare every output that edgeattn can give with the case's own; return the names of those."""
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
            if output is None:
                continue
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
    c for c in ATTENTION if "scores" in (onnx_backend.unsupported(c.values[0].model) or "")])
def test_attention_but_for_the_scores(case):
    names = {name for name in case.model.graph.node[0].output if name}
    assert check(case) == names - {"qk_matmul_output"}


@pytest.mark.parametrize("case", [
    c for c in ATTENTION if "bfloat16" in (onnx_backend.unsupported(c.values[0].model) or "")])
def test_bfloat16_is_refused(case):
    with pytest.raises(TypeError, match="query must be a float16, float32 or float64 array, got dtype bfloat16"):
        onnx_backend.run(case.model, [np.asarray(array) for array in case.data_sets[0][0]])


@pytest.mark.skipif(not hasattr(edgeattn, "apply_rotary_embedding"), reason="runs once there is a rotary embedding")
@pytest.mark.parametrize("case", ROTARY)
def test_rotary_embedding(case):
    assert check(case) == {"output"}


def test_most_cases_can_be_run():
    reasons = [onnx_backend.unsupported(case.values[0].model) for case in ATTENTION]
    assert len(reasons) >= 50
    assert reasons.count(None) >= 0.7 * len(reasons)
