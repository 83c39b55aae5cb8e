import numpy as np
import pytest

from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.distribution import Distribution
from ping_llm.prediction.divergence import (
    MAX_MEASUREMENTS,
    MIN_MEASUREMENTS,
    divergence,
    most_measured,
)

LEVELS = (np.arange(400) + 0.5) / 400


def rows(n, seed=0, pairs=4):
    """Returns n answered measurements of each pair: log RTTs uniform on [log 10, log 20]."""
    rng = np.random.default_rng(seed)
    total = n * pairs
    return MeasurementTable.from_arrow(
        {
            "src_addr": ["10.0.0.1"] * total,
            "dst_addr": [f"10.0.1.{i % pairs}" for i in range(total)],
            "event_time": list(range(total)),
            "rtt": 10 * 2 ** rng.random(total),
        }
    )


def ask(factor, by_time=False):
    """Returns what predicts `factor` times the true distribution; or by time, its lower half."""

    def answers(questions):
        values = np.tile(factor * 10 * 2**LEVELS, (len(questions), 1))
        if by_time:
            values[questions.has_time, 200:] = values[questions.has_time, :200]
        for start in range(0, len(questions), 7):
            index = np.arange(start, min(start + 7, len(questions)))
            p = np.full((len(index), 400), 1 / 400)
            yield index, Distribution(np.sort(values[index]), p, np.zeros(len(index))), index

    return answers


def test_the_true_distribution_is_nearer_than_another_half_of_the_measurements():
    found = divergence(most_measured(rows(60)), ask(1.0))
    assert found["pairs"] == 4
    for which in ("kl", "wasserstein"):
        each = found[which]
        assert each["with_time"] == pytest.approx(each["without_time"], rel=1e-6)
        assert 0 <= each["with_time"] < 1.2 * each["half"]


def test_rtts_of_twice_the_size_are_the_log_of_two_away():
    found = divergence(most_measured(rows(200)), ask(2.0))
    assert found["wasserstein"]["with_time"] == pytest.approx(np.log(2), abs=0.05)
    assert found["wasserstein"]["half"] < 0.1
    assert found["kl"]["with_time"] > 5 * found["kl"]["half"]
    assert found["measurements"] == 4 * MAX_MEASUREMENTS


def test_predictions_at_times_and_at_none_are_told_apart():
    found = divergence(most_measured(rows(60)), ask(1.0, by_time=True))
    assert found["wasserstein"]["with_time"] > 0.1 > found["wasserstein"]["without_time"]


def test_pairs_of_few_measurements_are_not_compared():
    assert divergence(most_measured(rows(MIN_MEASUREMENTS - 1)), ask(1.0)) is None
