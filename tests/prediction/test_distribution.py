import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.prediction.distribution import Distribution


def of_values(rtts, weights):
    order, weights = np.argsort(rtts), np.array(weights, float)
    values = np.array(rtts, float)[order][None]
    return Distribution(values, (weights / weights.sum())[order][None], np.array([0.1]))


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=20))
def test_quantiles_and_mean_are_those_of_a_sample(microseconds):
    rtts = np.array(microseconds) / 1000
    found = of_values(rtts, np.ones(len(rtts)))
    levels = np.array([0.0513, 0.2531, 0.4987, 0.7511, 0.9523])  # between the steps
    expected = np.quantile(rtts, levels, method="inverted_cdf")
    np.testing.assert_allclose(found.quantiles(levels)[0], expected)
    np.testing.assert_allclose(found.mean()[0], rtts.mean())


def test_a_trace_of_probability_on_the_largest_codes_does_not_carry_the_mean_away():
    rtts, weights = np.array([10.0, 20.0, 2.0**40 / 1000]), np.array([0.5, 0.499, 0.001])
    np.testing.assert_allclose(of_values(rtts, weights).mean(), 15.0, rtol=1e-3)


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=8), st.integers(1, 60_000))
def test_crps_is_that_of_the_energy_form(microseconds, actual):
    """CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, 2007)."""
    rtts = np.array(microseconds) / 1000
    y = actual / 1000
    expected = np.abs(rtts - y).mean() - np.abs(rtts[:, None] - rtts).mean() / 2
    found = of_values(rtts, np.ones(len(rtts))).crps(np.array([y]))[0]
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_probability_below_a_value_counts_half_of_the_value_itself():
    found = of_values([10.0, 20.0, 30.0], [1, 2, 1])
    assert found.below(np.array([20.0]))[0] == pytest.approx(0.5)
    assert found.below(np.array([5.0]))[0] == 0
    assert found.below(np.array([25.0]))[0] == pytest.approx(0.75)
    assert found.below(np.array([99.0]))[0] == pytest.approx(1)


def test_the_mode_is_the_middle_of_the_shortest_interval_that_holds_enough():
    near, far = np.linspace(10, 11, 40), np.linspace(20, 40, 60)  # 40 % close together
    found = of_values(np.r_[near, far], np.ones(100))
    assert 10 <= found.mode()[0] <= 11
    assert of_values([7.0], [1.0]).mode()[0] == 7.0
    lower = of_values(np.r_[near / 10, far / 10], np.ones(100))
    assert lower.mode()[0] == pytest.approx(found.mode()[0] / 10)


def test_the_probability_within_a_share_is_that_of_the_values_there():
    found = of_values([100.0, 101.0, 103.0], [1, 2, 1])
    assert found.within(np.array([100.0]), 0.02)[0] == pytest.approx(0.75)
    assert found.within(np.array([500.0]), 0.02)[0] == 0
