import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import metrics
from ping_llm.prediction.scores import breakdowns

NUMBERS = st.lists(st.integers(0, 6), min_size=2, max_size=30)


@given(NUMBERS, st.data())
def test_auc_is_the_chance_that_a_positive_scores_above_a_negative(scores, data):
    score = np.array(scores, float)
    flags = st.lists(st.booleans(), min_size=len(score), max_size=len(score))
    positive = np.array(data.draw(flags))
    found = metrics.auc(score, positive)
    if positive.all() or not positive.any():
        assert found is None
    else:
        apart = score[positive][:, None] - score[~positive]
        assert found == pytest.approx((apart > 0).mean() + (apart == 0).mean() / 2)


@given(NUMBERS, st.data())
def test_the_median_of_the_others_is_what_deleting_one_leaves(values, data):
    x = np.array(values, float)
    sizes = st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x))
    group = np.array(data.draw(sizes))
    found = metrics.others_median(group, x)
    for i in range(len(x)):
        others = x[(group == group[i]) & (np.arange(len(x)) != i)]
        if len(others):
            assert found[i] == pytest.approx(np.median(others))
        else:
            assert np.isnan(found[i])


def test_the_bootstrap_interval_of_independent_pairs_is_that_of_theory():
    """The standard error of a mean of n independent values is their deviation over sqrt(n)."""
    rng = np.random.default_rng(0)
    actual = np.full(2000, 100.0)
    predicted = actual + rng.normal(0, 10, 2000)
    found = metrics.intervals({"m": predicted}, actual, np.arange(2000))["m"]["mae_ms"]
    absolute = np.abs(predicted - actual)
    width = 2 * 1.96 * absolute.std() / np.sqrt(2000)
    assert found[1] - found[0] == pytest.approx(width, rel=0.25)
    assert found[0] < absolute.mean() < found[1]


def test_rows_of_one_pair_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    of_pair = rng.normal(0, 10, 200)
    once, tenfold = np.arange(200), np.repeat(np.arange(200), 10)
    for name in ("median_rel", "mae_ms", "p90_rel"):
        few, many = (
            metrics.intervals({"m": 100 + of_pair[pair]}, np.full(len(pair), 100.0), pair)["m"][
                name
            ]
            for pair in (once, tenfold)
        )
        assert many[1] - many[0] == pytest.approx(few[1] - few[0], rel=0.05)


def test_point_metrics_are_those_of_the_errors():
    found = metrics.point_metrics(np.array([11.0, 18.0, 30.0]), np.array([10.0, 20.0, 40.0]))
    assert found["median_abs_ms"] == 2
    assert found["mae_ms"] == pytest.approx(13 / 3)
    assert found["median_rel"] == pytest.approx(0.1)
    assert found["p90_rel"] == pytest.approx(0.22)


def test_a_calibrated_forecast_covers_as_it_says():
    below = (np.arange(1000) + 0.5) / 1000
    zeros = np.zeros((1000, 5))
    found = metrics.calibration(below, zeros, np.ones(1000), np.ones(1000))
    assert found["coverage"] == {"50": 0.5, "80": 0.8, "95": 0.95}
    np.testing.assert_allclose(
        [a for a, b in found["reliability"]], [b for a, b in found["reliability"]]
    )
    assert found["crps_ms"] == 1


def test_ranking_counts_regret_and_recall():
    actual = np.array([10.0, 20, 30, 40, 50, 5, 6])
    predicted = np.array([22.0, 21, 30, 40, 50, 1, 2])
    found = metrics.ranking(predicted, actual, np.array([0, 0, 0, 0, 0, 1, 1]))
    assert found == {
        "top1_regret_ms": 10.0,
        "top1_regret_rel": 1.0,
        "recall_at_1": 0.0,
        "recall_at_5": 1.0,
        "sources": 1,
    }
    assert metrics.ranking(predicted[5:], actual[5:], np.array([1, 1])) is None


def test_traceroutes_are_scored_apart_from_pings():
    n = 6
    address = addresses.parse(["192.0.2.1"] * n)[0]
    rows = MeasurementTable(
        time=np.arange(n),
        src=address,
        dst=address,
        family=np.full(n, 4, np.int8),
        rtt=np.array([10, 10, 10, 10, -1, 10], np.float32),
        kind=np.array([0, 1, 1, 2, 2, 0], np.uint8),
    )
    predicted = {"exact": np.full(n, 10.0)}
    by = breakdowns(rows, np.zeros(n, int), predicted)
    assert {name: each["n"] for name, each in by["kind"].items()} == {
        "pings": 2,
        "routers on the way": 2,
        "ends of traceroutes": 1,  # answered
    }
    without = dataclasses.replace(rows, kind=None)
    assert "kind" not in breakdowns(without, np.zeros(n, int), predicted)
