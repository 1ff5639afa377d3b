"""Feed-forwards of static int8: equal to a chain of TFLite operators by the oracle's rules, bit for bit, everywhere."""
import numpy as np
import pytest
import reference_int8_feed_forward as reference
from each_instruction_set import answers_of
from static_cases import CASES, FEW, RULES, make, run


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Instruction set -> what static_cases.py computes under it."""
    return answers_of("static_cases.py", tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_gives_the_bits_of_the_rule(answers, name):
    want = CASES[name].oracle()
    assert len(np.unique(want)) > 10
    for instruction_set, found in answers.items():
        assert str(found["instruction_set"]) == instruction_set
        np.testing.assert_array_equal(found[name], want, err_msg=instruction_set)
        np.testing.assert_array_equal(found[f"{name}, few"], want[:FEW], err_msg=instruction_set)


@pytest.mark.parametrize("name", ["litert gelu", "gated, tflm", "both", "alone"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads(name, count, many_threads):
    case = CASES[name]
    kernel, want = case.kernel(), case.oracle()
    many_threads(count)
    for rows in (*range(1, 10), 24, 25, len(case.x)):
        np.testing.assert_array_equal(run(kernel, case, slice(rows)), want[:rows])
        np.testing.assert_array_equal(run(kernel, case, slice(len(case.x) - rows, None)), want[len(case.x) - rows:])


def test_many_rows_are_the_rows_one_by_one(many_threads):
    case = make(11, 24, 48, 24, "relu", rows=300)
    kernel, want = case.kernel(), case.oracle()
    for count in (1, 2, 4):
        many_threads(count)
        np.testing.assert_array_equal(run(kernel, case), want)


@pytest.mark.parametrize("name", ["litert-reference gelu", "gated, litert-builtin", "gated relu", "both"])
def test_codes_alone_are_those_in_between(name):
    layer = CASES[name].layer
    x = np.random.default_rng(0).integers(-128, 128, (2, 9, layer.inputs + len(layer.more_inputs))).astype(np.int8)
    linears = {part: reference.Linear(linear.weight, linear.scale, linear.bias) for part, linear in layer.linears.items()}
    want = reference.codes(RULES[layer.arithmetic], layer.activation, x.reshape(18, -1).astype(np.int64),
                           linears["linear1"], linears.get("gate"), linears["linear2"],
                           {part: (t.scale, t.zero_point) for part, t in layer.tensors.items()})
    np.testing.assert_array_equal(layer.run_int8(x).reshape(want.shape), want)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_no_other_row(value):
    case = make(12, 40, 70, 40, "gelu", norm=None, more_inputs=(3,))
    kernel = case.kernel()
    whole = run(kernel, case)
    case.x[9, 3] = value
    found = run(kernel, case)
    assert np.isnan(found[9]).all() if np.isnan(value) else np.isfinite(found[9]).all()  # codes saturate
    np.testing.assert_array_equal(np.delete(found, 9, 0), np.delete(whole, 9, 0))
