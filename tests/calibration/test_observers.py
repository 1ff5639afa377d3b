"""Statistics merge exactly; observers do on histograms what brute force does on the values themselves."""
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.observers import BINS, Statistics, minmax, mse, percentile

ALL_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def seen(*batches):
    statistics = Statistics()
    for batch in batches:
        statistics.update(np.asarray(batch, np.float32))
    return statistics


def assert_same(a, b):
    assert (a.minimum, a.maximum, a.exponent) == (b.minimum, b.maximum, b.exponent)
    np.testing.assert_array_equal(a.histogram, b.histogram)


@settings(max_examples=150, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(0, 6), elements=ALL_FLOATS), min_size=1, max_size=5), st.randoms())
def test_merging_is_the_union_in_any_order(batches, random):
    union = seen(np.concatenate(batches))
    assert_same(seen(*batches), union)
    parts = [seen(batch) for batch in batches]
    assert_same(functools.reduce(Statistics.merge, parts), union)
    random.shuffle(parts)
    assert_same(functools.reduce(lambda a, b: b.merge(a), parts), union)


def test_merging_changes_neither_side():
    a, b = seen([1e-5, 2e-5]), seen([300.0])
    a.merge(b)
    assert_same(a, seen([1e-5, 2e-5]))
    assert_same(b, seen([300.0]))


def test_zeros_do_not_widen_the_histogram():
    # they have no exponent of their own: with one, tiny values merged with zeros would share one bin
    assert_same(seen([0.0, 1e-20]), seen([0.0]).merge(seen([1e-20])))
    assert np.count_nonzero(seen([0.0]).merge(seen([1e-20, 0.6e-20])).histogram) == 3


@pytest.mark.parametrize("values", [
    [1.0], [-1.0], [2.0**20] * 5, [1e30, -3e30], [3.4e38, -3.4e38], [1e-30], [1e-45, -1e-45], [2.0**-126],
    [0.0], [-0.0, 0.0], [0.999999, 1.0, -1.0], [65504.0, 6e-8],
])
def test_every_value_lies_in_its_bin(values):
    s = seen(values)
    values = np.sort(np.asarray(values, np.float32).astype(np.float64))
    assert s.count == len(values)
    assert (s.minimum, s.maximum) == (values[0], values[-1])
    edges = s.edges()
    assert len(edges) == BINS + 1
    for lower, upper, count in zip(edges[:-1], edges[1:], s.histogram, strict=True):
        assert count == np.count_nonzero((values >= lower) & (values < upper))


@pytest.mark.parametrize("values", [[3.0] * 9, [-3.0], [0.0, 0.0], [1e30], [1e-45], [-2e-30, 5e-31]])
@pytest.mark.parametrize("observer", [minmax, percentile])
def test_ranges_hold_constants_and_zero(observer, values):
    values = np.asarray(values, np.float32)
    expected = (min(0.0, float(values.min())), max(0.0, float(values.max())))
    assert observer(seen(values)) == expected
    reach = max(-expected[0], expected[1])
    assert observer(seen(values), True) == (-reach, reach)


@pytest.mark.parametrize("values", [[3.0] * 9, [-7e-20] * 3, [0.0], [1e30, 1e30]])
def test_mse_keeps_a_constant(values):
    values = np.asarray(values, np.float32)
    low, high = mse(seen(values))
    assert low <= 0 <= high
    # clipping by less than the rounding of a full range may pay, by more never
    step = float(np.abs(values).max()) / 255
    assert max(-low, high) == pytest.approx(float(np.abs(values).max()), abs=10 * step)


DISTRIBUTIONS = {
    "normal": lambda r: r.standard_normal(20000), "laplace": lambda r: r.laplace(size=20000) * 40,
    "shifted": lambda r: r.standard_normal(20000) + 30, "positive": lambda r: r.exponential(size=20000) * 1e-12,
    "outlier": lambda r: np.append(r.standard_normal(20000), [90.0]), "few": lambda r: r.standard_normal(5),
    "huge": lambda r: r.standard_normal(20000) * 1e30, "two": lambda r: r.choice([-1.0, 5.0], 20000),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("tail", [1e-4, 0.01, 0.2])
def test_percentile_equals_brute_force_to_a_bin(name, tail):
    values = DISTRIBUTIONS[name](np.random.default_rng(1)).astype(np.float32).astype(np.float64)
    s = seen(values)
    low, high = percentile(s, tail=tail)
    ordered = np.sort(values)
    cut = int(np.floor(tail * len(values)))
    width = 2 * 2.0**s.exponent / BINS
    assert low == pytest.approx(min(0.0, ordered[cut]), abs=width * 1.001)
    assert high == pytest.approx(max(0.0, ordered[-1 - cut]), abs=width * 1.001)


def quantization_error(values, low, high, symmetric):
    """Mean squared error of int8 codes over [low, high], on the values themselves."""
    steps, bottom = (254, -127) if symmetric else (255, -128)
    scale = (high - low) / steps
    zero = 0 if symmetric else np.rint(-128 - low / scale)
    codes = np.clip(np.rint(values / scale) + zero, bottom, 127)
    return np.mean((values - scale * (codes - zero)) ** 2)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name not in ("few", "two")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_equals_brute_force_nearly(name, symmetric):
    values = DISTRIBUTIONS[name](np.random.default_rng(2))[-5000:].astype(np.float32).astype(np.float64)
    s = seen(values)
    full = minmax(s, symmetric)
    tries = np.linspace(0.02, 1, 40)
    best = min(quantization_error(values, full[0] * f, full[1] * g, symmetric)
               for f in tries for g in ([f] if symmetric else tries))
    assert quantization_error(values, *mse(s, symmetric), symmetric) <= 1.1 * best


def test_mse_gives_up_an_outlier():
    rng = np.random.default_rng(3)
    # the cut c minimises (60 - c)**2 / n + ((c + 5) / 255)**2 / 12: the more values, the less one of them counts
    assert mse(seen(np.append(rng.standard_normal(100_000), [60.0])))[1] == pytest.approx(52, abs=2)
    assert mse(seen(np.append(rng.standard_normal(2_000_000), [60.0])))[1] == pytest.approx(16, abs=2)
