"""Which grid shows what is known about each question."""

from collections.abc import Iterator

import numpy as np

from ping_llm.data.cells import Grids
from ping_llm.data.history_grids import PairSeries, history_grids, lookup
from ping_llm.data.network import Network
from ping_llm.data.network_grids import network_grids
from ping_llm.errors import DataError
from ping_llm.measurements import MeasurementTable

AT_ONCE = 512  # questions whose grids are made at once


def question_grids(
    questions: MeasurementTable,
    known: MeasurementTable,
    history: MeasurementTable | None = None,
    network: Network | None = None,
) -> Iterator[tuple[np.ndarray, str, Grids]]:
    """Yields (questions, kind, their grids) until all have had their turn.

    A pair that was measured before the question is shown over time, another one among the sources
    and destinations that are most like its own.

    Args:
        questions: What is asked; without a time, all that is known of a pair came before.
        known: What the network is known by.
        history: Measurements of pairs before the questions; None: `known`.
        network: That of `known`, where it is at hand; else it is made.

    Raises:
        DataError: No measurement that was answered is known.
    """
    if not (known.rtt >= 0).any():
        raise DataError("no answered measurement is known to answer from; give a history")
    network = network or Network.of(known, questions.src, questions.dst)
    series = network.series if history is None or history is known else PairSeries.of(history)
    pair, stop, time = lookup(series, questions)
    for rows in _blocks(np.flatnonzero(pair >= 0)):
        yield rows, "history", history_grids(series, pair[rows], stop[rows], time[rows])
    others = np.flatnonzero(pair < 0)
    if not all((network.nodes.lookup(end) >= 0).all() for end in (questions.src, questions.dst)):
        network = Network.of(known, questions.src, questions.dst)
    for rows, world, a, b in network.worlds(questions.take(others)):
        a, b = world.oriented(a, b)
        for block in _blocks(np.arange(len(rows))):
            yield others[rows[block]], "network", network_grids(world, a[block], b[block])


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
