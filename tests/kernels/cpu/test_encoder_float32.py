"""Linear layers, feed-forwards and norms in float32: at most twice as far from float64 as plain NumPy in float32."""
import numpy as np
import pytest
import reference_encoder_int8 as reference
from encoder_cases import ACTIVATIONS, CASES, make, numbers, run

from edgeattn import LayerNorm, RMSNorm
from edgeattn.kernels.cpu import encoder_float32, row_parts


def plain(case, dtype):
    """The formula in a precision."""
    x, residual = case.x.astype(dtype), 0 if case.residual is None else case.residual.astype(dtype)
    if case.w2 is not None:
        return reference.feed_forward(x, residual, case.w1, case.b1, case.w2, case.b2, case.activation, case.gate,
                                      case.norm, case.norm_first)
    y = reference.activation(case.activation, reference.linear(x, case.w1, case.b1)) + residual
    return reference.norm(*case.norm, y) if case.norm else y


def assert_accurate(found, in_float32, exact, what):
    """The rule of the FlashAttention tests; what float32 gives exactly may be off by a rounding."""
    allowed = 2 * np.abs(in_float32 - exact).max() + 1e-7 * np.abs(exact).max()
    assert np.abs(found - exact).max() <= allowed, what


@pytest.mark.parametrize("name", CASES)
def test_is_accurate(name):
    case = CASES[name]
    assert_accurate(run(case.kernel(), case), plain(case, np.float32), plain(case, np.float64), name)


@pytest.mark.parametrize("name", ["linear gelu", "feed-forward gelu", "gated silu", "feed-forward alone", "linear, one input"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_row_is_the_same_in_every_batch_and_on_every_number_of_threads(name, count, many_threads):
    case = CASES[name]
    kernel = case.kernel()
    many_threads(1)
    whole = run(kernel, case)
    many_threads(count)
    for rows in (*range(1, 13), 24, 25, len(case.x)):
        np.testing.assert_array_equal(run(kernel, case, slice(rows)), whole[:rows])
        np.testing.assert_array_equal(run(kernel, case, slice(len(case.x) - rows, None)), whole[len(case.x) - rows:])


@pytest.mark.parametrize("rows, block, count, wanted", [
    (64, 64, 2, (32, 2)), (65, 64, 2, (33, 2)), (128, 64, 2, (64, 2)), (129, 64, 2, (33, 4)), (256, 64, 2, (64, 4)),
    (256, 64, 3, (43, 6)), (5, 64, 4, (2, 3)), (0, 64, 2, (1, 1)), (700, 64, 1, (64, 11))])
def test_rows_are_shared_evenly(rows, block, count, wanted):
    assert row_parts.parts_of_rows.py_func(rows, block, count) == wanted


def test_many_rows_are_the_rows_one_by_one(many_threads):
    case = make(11, 24, 48, 24, "relu", rows=700)
    kernel = case.kernel()
    one_by_one = np.concatenate([run(kernel, case, slice(r, r + 1)) for r in range(700)])
    for count in (1, 2, 4):
        many_threads(count)
        np.testing.assert_array_equal(run(kernel, case), one_by_one)


@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_alone_has_the_bits_of_numpys(biased):
    rng = np.random.default_rng(15)
    for width in (*range(1, 20), 31, 32, 33, 63, 64, 100, 127, 128, 129, 136, 255, 256, 257, 384, 768, 1000, 1023, 1025, 4099):
        x = numbers(rng, 11, width) * np.float32(10) ** rng.integers(-3, 4, (11, 1)).astype(np.float32)
        x[0], x[1] = 0, -0.0
        weight, bias = numbers(rng, width), numbers(rng, width) if biased else None
        for norm in (LayerNorm(weight, bias), RMSNorm(weight)):
            np.testing.assert_array_equal(norm.packed(x).view(np.int32), norm.rows(x).view(np.int32))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 100, 384, 1000])
def test_norms_are_accurate(kind, width):
    rng = np.random.default_rng(width)
    norm = kind, numbers(rng, width), numbers(rng, width) if kind == "layer" else None, 1e-5
    for offset, with_residual in ((0, True), (100, False)):
        x, residual = numbers(rng, 40, width) + np.float32(offset), numbers(rng, 40, width) if with_residual else None
        out = np.empty_like(x)
        assert encoder_float32.Norm(norm)(x, residual, out) is out
        added = x if residual is None else x + residual
        exact = reference.norm(*norm, np.float64(x) + (0 if residual is None else np.float64(residual)))
        assert_accurate(out, reference.norm(*norm, added), exact, (kind, width, offset))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_are_accurate_everywhere(activation):
    x = np.concatenate((np.linspace(-12, 12, 40001), np.geomspace(1e-30, 1e4, 300), -np.geomspace(1e-30, 1e4, 300)))
    x = x.astype(np.float32)[:, None]
    out = encoder_float32.Linear(np.ones((1, 1), np.float32), None, activation=activation)(x, None, np.empty_like(x))
    exact = reference.activation(activation, np.float64(np.clip(x, -700, None)))
    with np.errstate(all="ignore"):
        in_float32 = reference.activation(activation, x)
    size = np.maximum(np.abs(exact), 0.17)  # as far as GELU goes below 0
    assert (np.abs(out - exact) / size).max() <= 2 * np.nanmax(np.abs(in_float32 - exact) / size)
    seen = np.abs(exact) > 1e-9
    assert (np.abs(out - exact)[seen] <= 3e-6 * np.abs(exact)[seen]).all()
    near = np.abs(x) < 1e-6
    assert (np.abs(out - exact)[near] <= 2e-7 * np.abs(exact)[near]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_spoils_its_row_and_no_other(activation):
    case = make(12, 40, 70, 40, activation)
    kernel = case.kernel()
    whole = run(kernel, case)
    case.x[9, 3] = np.nan
    found = run(kernel, case)
    assert np.isnan(found[9]).all()
    np.testing.assert_array_equal(np.delete(found, 9, 0), np.delete(whole, 9, 0))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_large_numbers_pass_activations(activation):
    x = np.array([3e38, 1e20, 1e5, -1e5, -1e20, -3e38], np.float32)[:, None]
    out = encoder_float32.Linear(np.ones((1, 1), np.float32), None, activation=activation)(x, None, np.empty_like(x))
    np.testing.assert_allclose(out[:3], x[:3], rtol=1e-7)
    np.testing.assert_allclose(out[3:], 0, atol=10)  # a number times 2**-126 at most


def test_the_output_may_be_an_input():
    case = CASES["feed-forward gelu"]
    kernel, want = case.kernel(), run(case.kernel(), case)
    for place in (case.x.copy(), case.residual.copy()):
        x, residual = (place, case.residual) if np.array_equal(place, case.x) else (case.x, place)
        np.testing.assert_array_equal(kernel(x, residual, place), want)
    x = case.x.copy()
    np.testing.assert_array_equal(kernel(x, x, np.empty_like(x)), kernel(x, x, x))


def test_no_rows_and_batches_of_any_shape():
    case = CASES["feed-forward gelu"]
    kernel, want = case.kernel(), run(case.kernel(), case)
    assert kernel(case.x[:0], case.residual[:0], np.empty((0, 70), np.float32)).shape == (0, 70)
    shape = 2, 3, 6, 70
    x, residual = case.x[:36].reshape(shape), case.residual[:36].reshape(shape)
    np.testing.assert_array_equal(kernel(x, residual, np.empty(shape, np.float32)).reshape(36, 70), want[:36])
