import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.prediction.distribution import VALUE_OF_CODE, VALUES_MS, Distribution
from ping_llm.tokenizer import decode_rtt, encode_rtt

ALL_CODES = np.arange(2**16)


def of_values(rtts, weights):
    codes = encode_rtt(np.array(rtts)).astype(int)
    n = len(codes)
    return Distribution.of_codes(np.zeros(n, int), codes, np.array(weights, float), np.array([0.1]))


def test_every_code_has_its_value():
    np.testing.assert_array_equal(VALUES_MS[VALUE_OF_CODE], decode_rtt(ALL_CODES))
    assert np.all(np.diff(VALUES_MS) > 0)


def test_probabilities_of_all_codes_sum_to_one_whatever_the_codes():
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(3), 2**16)
    weights = rng.random(3 * 2**16)
    found = Distribution.of_codes(rows, np.tile(ALL_CODES, 3), weights, np.zeros(3))
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-12)


def test_codes_of_one_value_add_up():
    # 2 ms is 2000 * 2**0 us, and 1000 * 2**1, and 500 * 2**2.
    codes = np.array([2000, 1 << 11 | 1000, 2 << 11 | 500, 3000 >> 1 | 1 << 11])
    found = Distribution.of_codes(np.zeros(4, int), codes, np.array([1, 1, 1, 1.0]), np.zeros(1))
    np.testing.assert_allclose(found.probabilities[0, found.values_ms == 2.0], 0.75)


def test_a_mixture_is_the_mean_of_what_is_said_of_each_and_failures_weigh_less():
    def said(rtts, failed):
        n = len(rtts)
        codes = encode_rtt(np.array(rtts, float)).astype(int)
        return Distribution.of_codes(np.arange(n), codes, np.ones(n), np.array(failed))

    first, second = said([10, 20, 30], [0.0, 0.5, 0.2]), said([400, 20], [0.5, 0.1])
    third = said([8], [0.4])
    parts = [(np.arange(3), first), (np.array([1, 0]), second), (np.array([2]), third)]
    found = Distribution.mixture(3, parts)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(found.p_failed, [0.05, 0.5, 0.3])
    mean = found.probabilities @ found.values_ms
    expected = [(10 + 0.9 * 20) / 1.9, (0.5 * 20 + 0.5 * 400) / 1.0, (0.8 * 30 + 0.6 * 8) / 1.4]
    np.testing.assert_allclose(mean, expected, rtol=1e-3)


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=20))
def test_quantiles_and_mean_are_those_of_a_sample(microseconds):
    rtts = decode_rtt(encode_rtt(np.array(microseconds) / 1000))
    found = of_values(rtts, np.ones(len(rtts)))
    levels = np.array([0.0513, 0.2531, 0.4987, 0.7511, 0.9523])  # between the steps
    expected = np.quantile(rtts, levels, method="inverted_cdf")
    np.testing.assert_allclose(found.quantiles(levels)[0], expected)
    np.testing.assert_allclose(found.mean()[0], rtts.mean())


def test_a_trace_of_probability_on_the_largest_codes_does_not_carry_the_mean_away():
    rtts, weights = np.array([10.0, 20.0, 2.0**40 / 1000]), np.array([0.5, 0.499, 0.001])
    rtts = decode_rtt(encode_rtt(rtts))
    np.testing.assert_allclose(of_values(rtts, weights).mean(), 15.0, rtol=1e-3)


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=8), st.integers(1, 60_000))
def test_crps_is_that_of_the_energy_form(microseconds, actual):
    """CRPS = E|X - y| - E|X - X'| / 2 (Gneiting and Raftery, 2007)."""
    rtts = decode_rtt(encode_rtt(np.array(microseconds) / 1000))
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
