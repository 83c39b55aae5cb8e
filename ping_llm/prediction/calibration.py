"""Self-calibration: what a model's levels mean on the network that it is asked about.

Some of the known pairs are left out and asked about. Where the actual RTTs fell in the answers says
how each level is to be read: if 70 % of them lie below the 60 % quantiles of the answers, those are
the 70 % quantiles from then on. And which of them failed says how much the model's log-odds of a
failure count beside those of `FailureOdds`, which know every node and day.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ping_llm.data import history_grids
from ping_llm.estimators.failures import FailureOdds
from ping_llm.estimators.pairs import pair_keys
from ping_llm.hashing import scramble
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.distribution import Distribution

SHARE, PAIRS = 10, 400  # one pair in ten is left out, up to so many
UNIFORM = 20  # levels added as if the model were calibrated
FEWEST = 20  # pairs
FAILURE_RIDGE, NEWTON_STEPS = 10.0, 20

# Questions by number, their answers, and how many measurements each was drawn from.
Answers = Iterator[tuple[np.ndarray, Distribution, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """At which levels of a model's answers actual RTTs fell, by kind of grid.

    Attributes:
        levels: Ascending levels of "network" and "history" grids; a kind without enough is absent.
        failures: Of the log-odds of a failure of a pair: the share that the model's have, that
            which those of `FailureOdds` have, and a constant; None: nothing known failed.
        failures_from: Measurements that those come from.
    """

    levels: Mapping[str, np.ndarray]
    failures: tuple[float, float, float] | None = None
    failures_from: int = 0

    def apply(
        self, answer: Distribution, kind: str, p_failed: np.ndarray | None = None
    ) -> Distribution:
        """Returns answers to grids of one kind, their levels read as they have proved to be.

        Args:
            answer: What the model says.
            kind: "network" or "history".
            p_failed: What `FailureOdds` say, for a network [n]; None: nothing known failed.
        """
        if kind in self.levels:
            answer = answer.recalibrated(self.levels[kind])
        if kind != "network" or p_failed is None or self.failures is None:
            return answer
        model, classical, constant = self.failures
        odds = model * _log_odds(answer.p_failed) + classical * _log_odds(p_failed) + constant
        return dataclasses.replace(answer, p_failed=1 / (1 + np.exp(-odds)))

    def counts(self) -> dict[str, int]:
        """Returns on how many measurements each kind was calibrated."""
        counts = {kind: len(levels) - UNIFORM for kind, levels in self.levels.items()}
        return counts | ({"failures": self.failures_from} if self.failures else {})

    def to_json(self) -> dict[str, Any]:
        """Returns the calibration for JSON."""
        levels = {kind: levels.tolist() for kind, levels in self.levels.items()}
        return {"levels": levels, "failures": self.failures, "failures_from": self.failures_from}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibration":
        """Returns what `to_json` returned; raises a `ValueError` or `KeyError` for other things."""
        levels = {kind: np.array(levels, float) for kind, levels in stored["levels"].items()}
        failures = stored["failures"]
        if failures is not None:
            model, classical, constant = failures
            failures = (float(model), float(classical), float(constant))
        return cls(levels, failures, int(stored["failures_from"]))


UNCALIBRATED = Calibration({})


def calibrate(ask: Callable[..., Answers], known: MeasurementTable) -> Calibration:
    """Returns the calibration of a model on what is known of a network.

    Args:
        ask: `Answerer.answer`, uncalibrated.
        known: What is known of the network.
    """
    levels, weights, failures_from = {}, None, 0
    pair = scramble(pair_keys(known))
    answered = known.rtt >= 0
    # Of a pair left out nothing is known: its answers come from the rest of the network.
    left_out = pair % np.uint64(SHARE) == 0
    rest = known.take(~left_out)
    if (rest.rtt >= 0).any():
        asked = _one_a_pair(known.take(left_out))
        below, p_failed = _ask(ask, asked, rest)
        levels["network"] = _levels(below[asked.rtt >= 0])
        failed = asked.rtt < 0
        if failed.any():
            odds = _log_odds(p_failed), _log_odds(FailureOdds(rest).probability(asked))
            weights, failures_from = _weights(*odds, failed), len(asked)
    timed = known.take(answered & known.has_time)
    if len(timed):
        order = np.argsort(scramble(pair_keys(timed) + timed.time.astype(np.uint64)))
        asked = timed.take(np.sort(order[: 2 * PAIRS]))
        # Only those of a pair that was measured before: the others are about the network.
        pair, _, _ = history_grids.lookup(history_grids.PairSeries.of(known), asked)
        asked = asked.take(np.flatnonzero(pair >= 0)[:PAIRS])
        if len(asked):
            levels["history"] = _levels(_ask(ask, asked, known)[0])
    enough = {kind: each for kind, each in levels.items() if len(each) >= FEWEST + UNIFORM}
    return Calibration(enough, weights, failures_from)


def _one_a_pair(table: MeasurementTable) -> MeasurementTable:
    """Returns one measurement of each of up to 400 pairs, whichever their keys choose."""
    order = np.argsort(
        scramble(pair_keys(table) ^ scramble(np.arange(len(table), dtype=np.uint64)))
    )
    _, first = np.unique(pair_keys(table)[order], return_index=True)
    return table.take(np.sort(order[first][:PAIRS]))


def _ask(
    ask: Callable[..., Answers], asked: MeasurementTable, known: MeasurementTable
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the level at which each RTT fell, the probability of a failure) [n] each."""
    below, p_failed = np.zeros((2, len(asked)))
    for rows, distribution, _ in ask(asked, known):
        below[rows] = distribution.below(asked.rtt[rows].astype(np.float64))
        p_failed[rows] = distribution.p_failed
    return below, p_failed


def _levels(below: np.ndarray) -> np.ndarray:
    uniform = (np.arange(UNIFORM) + 0.5) / UNIFORM
    return np.sort(np.concatenate([below, uniform]))


def _log_odds(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _weights(
    model: np.ndarray, classical: np.ndarray, failed: np.ndarray
) -> tuple[float, float, float]:
    """Returns the weights of two log-odds and a constant in a logistic regression of `failed`.

    By Newton's method, with a penalty on the distance from their mean: few failures leave it there.
    """
    features = np.stack([model, classical, np.ones(len(failed))], axis=1)
    start = np.array([0.5, 0.5, 0.0])
    weights = start.copy()
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        gradient = features.T @ (failed - p) - FAILURE_RIDGE * (weights - start)
        curvature = (features * (p * (1 - p))[:, None]).T @ features + FAILURE_RIDGE * np.eye(3)
        weights = weights + np.clip(np.linalg.solve(curvature, gradient), -0.5, 0.5)
    return (float(weights[0]), float(weights[1]), float(weights[2]))
