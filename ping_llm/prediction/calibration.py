"""Self-calibration: what a model's levels mean on the network that it is asked about.

Some of the known pairs are left out and asked about. Where the actual RTTs fell in the answers says
how each level is to be read: if 70 % of them lie below the 60 % quantiles of the answers, those are
the 70 % quantiles from then on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ping_llm.data import history_grids
from ping_llm.estimators.pairs import pair_keys
from ping_llm.hashing import scramble
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.distribution import Distribution

SHARE, PAIRS = 10, 400  # one pair in ten is left out, up to so many
UNIFORM = 20  # levels added as if the model were calibrated
FEWEST = 20  # pairs

# Questions by number, their answers, and how many measurements each was drawn from.
Answers = Iterator[tuple[np.ndarray, Distribution, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """At which levels of a model's answers actual RTTs fell, by kind of grid.

    Attributes:
        levels: Ascending levels of "network" and "history" grids; a kind without enough is absent.
    """

    levels: Mapping[str, np.ndarray]

    def apply(self, answer: Distribution, kind: str) -> Distribution:
        """Returns answers to grids of one kind, their levels read as they have proved to be."""
        return answer.recalibrated(self.levels[kind]) if kind in self.levels else answer

    def counts(self) -> dict[str, int]:
        """Returns on how many measurements each kind was calibrated."""
        return {kind: len(levels) - UNIFORM for kind, levels in self.levels.items()}

    def to_json(self) -> dict[str, list[float]]:
        """Returns the levels for JSON."""
        return {kind: levels.tolist() for kind, levels in self.levels.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibration":
        """Returns what `to_json` returned."""
        return cls({kind: np.array(levels) for kind, levels in stored.items()})


UNCALIBRATED = Calibration({})


def calibrate(ask: Callable[..., Answers], known: MeasurementTable) -> Calibration:
    """Returns the calibration of a model on what is known of a network.

    Args:
        ask: `Answerer.answer`, uncalibrated.
        known: What is known of the network.
    """
    levels = {}
    pair = scramble(pair_keys(known))
    answered = known.rtt >= 0
    # Of a pair left out nothing is known: its answers come from the rest of the network.
    left_out = pair % np.uint64(SHARE) == 0
    rest = known.take(~left_out)
    if (rest.rtt >= 0).any():
        asked = _one_a_pair(known.take(left_out & answered))
        questions = dataclasses.replace(asked, time=np.full(len(asked), NO_TIME))
        levels["network"] = _levels(ask(questions, rest), asked)
    timed = known.take(answered & known.has_time)
    if len(timed):
        order = np.argsort(scramble(pair_keys(timed) + timed.time.astype(np.uint64)))
        asked = timed.take(np.sort(order[: 2 * PAIRS]))
        # Only those of a pair that was measured before: the others are about the network.
        pair, _, _ = history_grids.lookup(history_grids.PairSeries.of(known), asked)
        asked = asked.take(np.flatnonzero(pair >= 0)[:PAIRS])
        if len(asked):
            levels["history"] = _levels(ask(asked, known), asked)
    return Calibration({k: v for k, v in levels.items() if len(v) >= FEWEST + UNIFORM})


def _one_a_pair(table: MeasurementTable) -> MeasurementTable:
    """Returns one measurement of each of up to 400 pairs, whichever their keys choose."""
    order = np.argsort(
        scramble(pair_keys(table) ^ scramble(np.arange(len(table), dtype=np.uint64)))
    )
    _, first = np.unique(pair_keys(table)[order], return_index=True)
    return table.take(np.sort(order[first][:PAIRS]))


def _levels(answers: Answers, asked: MeasurementTable) -> np.ndarray:
    below = np.zeros(len(asked))
    for rows, distribution, _ in answers:
        below[rows] = distribution.below(asked.rtt[rows].astype(np.float64))
    uniform = (np.arange(UNIFORM) + 0.5) / UNIFORM
    return np.sort(np.concatenate([below, uniform]))
