"""Linear layers and feed-forwards of dynamic int8: equal to the rule in NumPy, bit for bit, everywhere."""
import numpy as np
import pytest
import reference_encoder_int8 as reference
from each_instruction_set import RUNNABLE, answers_of
from encoder_cases import CASES, make, run
from njit import COMPILER

from edgeattn.kernels.cpu import encoder_dynamic


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Instruction set -> what encoder_cases.py computes under it."""
    return answers_of("encoder_cases.py", tmp_path_factory.mktemp("answers"))


def exact(case):
    """The rule, in NumPy."""
    w1, w2, gate = case.weights()
    if w2 is None:
        return reference.exact_linear_layer(case.x, case.residual, w1, case.b1, case.activation, case.norm)
    return reference.exact_feed_forward(case.x, case.residual, w1, case.b1, w2, case.b2, case.activation, gate,
                                        case.norm, case.norm_first)


def test_the_processes_used_what_they_were_told_to_use(answers):
    assert [str(found["instruction_set"]) for found in answers.values()] == RUNNABLE
    assert RUNNABLE[-1] == "generic" or COMPILER


@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_gives_the_bits_of_the_rule(answers, name):
    want = exact(CASES[name])
    for instruction_set, found in answers.items():
        np.testing.assert_array_equal(found[name], want, err_msg=instruction_set)


@pytest.mark.parametrize("name", ["linear gelu", "feed-forward gelu", "gated silu", "feed-forward alone",
                                  "feed-forward, apart", "gated, apart"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads(name, count, many_threads):
    case = CASES[name]
    kernel, want = case.kernel(encoder_dynamic), exact(case)
    many_threads(count)
    for rows in (*range(1, 10), 24, 25, len(case.x)):
        np.testing.assert_array_equal(run(kernel, case, slice(rows)), want[:rows])
        np.testing.assert_array_equal(run(kernel, case, slice(len(case.x) - rows, None)), want[len(case.x) - rows:])


def test_many_rows_are_the_rows_one_by_one(many_threads):
    case = make(11, 24, 48, 24, "relu", rows=700)
    kernel, want = case.kernel(encoder_dynamic), exact(case)
    for count in (1, 2, 4):
        many_threads(count)
        np.testing.assert_array_equal(run(kernel, case), want)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, 3e-38, 3e38, -3e38])
def test_rows_of_extreme_numbers_follow_the_rule(value):
    case = make(13, 40, 70, 40, "relu", norm=None, residual=False)
    case.x[3:7] = value
    case.x[5, ::2] *= -1
    with np.errstate(all="ignore"):
        want = exact(case)
    found = run(case.kernel(encoder_dynamic), case)
    finite = np.isfinite(want).all(1)
    np.testing.assert_array_equal(found[finite], want[finite])
    assert not np.isfinite(found[~finite]).all(1).any()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(value):
    case = make(12, 40, 70, 40, "gelu")
    kernel = case.kernel(encoder_dynamic)
    whole = run(kernel, case)
    case.x[9, 3] = value
    found = run(kernel, case)
    assert np.isnan(found[9]).all()
    np.testing.assert_array_equal(np.delete(found, 9, 0), np.delete(whole, 9, 0))


def _error(case, **quantization):
    exactly = reference.feed_forward(np.float64(case.x), 0, case.w1, case.b1, case.w2, case.b2, case.activation, case.gate,
                                     case.norm, case.norm_first)
    found = run(case._replace(**quantization).kernel(encoder_dynamic), case)
    return np.linalg.norm(found - exactly) / np.linalg.norm(exactly)


def test_what_is_kept_apart_and_second_channels_win_accuracy_back():
    case = make(14, 64, 512, 64, "gelu", norm=None, residual=False)
    case.w1[:, 64 // 3] /= 20  # of the large input
    case.w2[:, 100] *= 20  # of a hidden feature that counts more than others
    errors = [_error(case, **options) for options in (
        {}, {"columns": ((64 // 3,), ())}, {"columns": ((64 // 3,), (100,))},
        {"columns": ((64 // 3,), (100,)), "split": 4})]
    assert errors[0] < 0.05
    assert (np.divide(errors[1:], errors[:-1]) < (0.75, 0.5, 0.85)).all()


def test_quantize_linear_says_what_it_cannot_do():
    weight = np.ones((3, 9), np.float32)
    with pytest.raises(ValueError, match="columns must be at most 4 inputs, got 5"):
        encoder_dynamic.quantize_linear(weight, columns=range(5))
    fine = encoder_dynamic.quantize_linear(np.diag([1, 1, 1, 100.0]).astype(np.float32), split=4)
    assert fine.residual_outputs.tolist() == [3]
    assert np.float64(fine.codes[3, 3]) * fine.scale[3] + np.float64(fine.codes[4, 3]) * fine.scale[4] == pytest.approx(100)
    square = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="w1 and gate must have one byte a weight"):
        encoder_dynamic.FeedForward(fine, None, square, None)
    with pytest.raises(ValueError, match="the same columns apart"):
        encoder_dynamic.FeedForward(encoder_dynamic.quantize_linear(square, columns=(1,)), None, square, None,
                                    gate=(square, None))
