"""From questions to answers: which grid shows what is known about each, and what a model says."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from ping_llm.answers import reading
from ping_llm.answers.calibration import Calibration
from ping_llm.answers.distribution import Distribution
from ping_llm.data import history_grids, network_grids
from ping_llm.data.cells import Grids
from ping_llm.data.network import Network
from ping_llm.errors import DataError
from ping_llm.measurements import MeasurementTable

AT_ONCE = 512  # questions whose grids are made at once

# Questions by number, their answers, and how many measurements each was drawn from.
Answers = Iterator[tuple[np.ndarray, Distribution, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A decoder that answers questions from what is known of a network.

    Attributes:
        graphdef: The decoder's static part.
        params: Its parameters.
        calibration: How its levels are read; None: as they are.
    """

    graphdef: Any
    params: Any
    calibration: Calibration | None = None

    def answer(
        self,
        questions: MeasurementTable,
        known: MeasurementTable,
        history: MeasurementTable | None = None,
    ) -> Answers:
        """Yields answers until every question has had its turn.

        A pair that was measured before the question is answered from its own measurements, another
        one from those of the sources and destinations that are most like its own.

        Args:
            questions: What to predict; without a time, all that is known of a pair came before.
            known: What the network is known by.
            history: Measurements of pairs before the questions; None: `known`.

        Raises:
            DataError: Nothing is known.
        """
        if not (known.rtt >= 0).any():
            raise DataError("no answered measurement is known to answer from; give a history")
        network = Network.of(known, questions.src, questions.dst)
        series = network.series if history is None else history_grids.PairSeries.of(history)
        pair, stop, time = history_grids.lookup(series, questions)
        for rows in _blocks(np.flatnonzero(pair >= 0)):
            grids = history_grids.history_grids(series, pair[rows], stop[rows], time[rows])
            shown = np.minimum(stop[rows], history_grids.LONGEST)
            for some, answer in self._read(grids, "history"):
                yield rows[some], answer, shown[some]
        others = np.flatnonzero(pair < 0)
        for rows, world, a, b in network.worlds(questions.take(others)):
            a, b = world.oriented(a, b)
            for block in _blocks(np.arange(len(rows))):
                ends = a[block], b[block]
                grids = network_grids.network_grids(world, *ends)
                shown = network_grids.measurements_shown(world, *ends)
                for some, answer in self._read(grids, "network"):
                    yield others[rows[block[some]]], answer, shown[some]

    def _read(self, grids: Grids, kind: str) -> Iterator[tuple[np.ndarray, Distribution]]:
        for rows, answer in reading.distributions(self.graphdef, self.params, grids):
            yield rows, self.calibration.apply(answer, kind) if self.calibration else answer


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
