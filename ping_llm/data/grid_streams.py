"""Streams of training sequences that hold grids, as a pure function of stream and chunk number.

A chunk of a stream is one world and some questions about it: a part of the network of the train
rows, a simulated network, or moments of pairs over time.
"""

import dataclasses

import numpy as np

from ping_llm.data import cells, history_grids, network_grids, worlds
from ping_llm.data.network import Network
from ping_llm.data.rows import ProbeRows
from ping_llm.estimators.world import FAILED, Pairs, World
from ping_llm.hashing import mix
from ping_llm.measurements import MeasurementTable
from ping_llm.simulation.random_networks import random_network
from ping_llm.simulation.random_series import random_series

SEQUENCES_PER_CHUNK = 6  # a world costs more than the grids drawn from it
SIMULATED_FRACTION = 0.1  # of the worlds, and of the series
SIMULATED_SERIES = 8  # in a chunk of simulated series
SIMULATED_MEASUREMENTS = 16  # of each pair of a simulated network
SHARES_OF_SERIES = 0.25, 0.75  # of the chunks: of networks of many pairs a node, and of few
PAIRS_A_NODE = 3  # "many"
LONG_SERIES = 10  # measurements of a pair that make it worth asking over time
TRIES = 20  # worlds drawn until one has enough of everything
EVAL_SEED = 20_130_101


@dataclasses.dataclass(frozen=True)
class GridChunk:
    """Some sequences of grids, answers included.

    Attributes:
        tokens: Token ids of every grid [g, T], uint16.
        weights: How much each token's prediction counts [g, T], float32.
        per_sequence: Grids in a sequence.
    """

    tokens: np.ndarray
    weights: np.ndarray
    per_sequence: int

    def __len__(self) -> int:
        return len(self.tokens) // self.per_sequence

    def segments(self, sequence: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns (tokens, weights) of each grid of one sequence."""
        own = slice(sequence * self.per_sequence, (sequence + 1) * self.per_sequence)
        return list(self.tokens[own]), list(self.weights[own])


class GridStreams:
    """The chunks of all streams of a run."""

    def __init__(self, network: Network, *, length: int, seed: int):
        self._network, self._length, self._seed = network, length, seed
        self._moments = history_grids.moments(network.series, min_past=1)
        counts = np.array([len(network.pairs.a), len(network.nodes)])
        many = counts[0] >= PAIRS_A_NODE * counts[1]
        timed = len(self._moments) > 0 and network.series.mean_length() >= LONG_SERIES
        self._series_share = SHARES_OF_SERIES[0 if many else 1] if timed else 0.0

    def chunk(self, stream: int, number: int) -> GridChunk:
        """Returns one chunk of one stream."""
        rng = np.random.default_rng([self._seed, stream, number])
        if rng.random() < self._series_share:
            return self._of_series(rng)
        for _ in range(TRIES):
            drawn = self._draw_world(rng)
            if drawn is not None:
                return self._of_world(*drawn, rng)
        return self._of_world(*_simulated_world(rng), rng)

    def _draw_world(self, rng: np.random.Generator) -> tuple[World, Pairs] | None:
        if rng.random() < SIMULATED_FRACTION:
            return _simulated_world(rng)
        network = self._network
        return worlds.draw_world(network.pairs, network.key, network.nodes.addresses, rng)

    def _of_world(self, world: World, asked: Pairs, rng: np.random.Generator) -> GridChunk:
        per_sequence = self._length // (network_grids.GRID_TOKENS + cells.ANSWER_TOKENS)
        count = SEQUENCES_PER_CHUNK * per_sequence
        a, b, log_rtt = worlds.draw_questions(world, asked, count, rng)
        grids = network_grids.network_grids(world, a, b)
        return GridChunk(*cells.answered(grids, log_rtt), per_sequence)

    def _of_series(self, rng: np.random.Generator) -> GridChunk:
        per_sequence = self._length // (history_grids.HISTORY_TOKENS + cells.ANSWER_TOKENS)
        count = SEQUENCES_PER_CHUNK * per_sequence
        series, moments = self._network.series, self._moments
        if rng.random() < SIMULATED_FRACTION:
            drawn = [random_series(rng, 400) for _ in range(SIMULATED_SERIES)]
            series = history_grids.PairSeries.of_series(drawn)
            moments = history_grids.moments(series, min_past=1)
        position = moments[rng.integers(len(moments), size=count)]
        grids, log_rtt = history_grids.at_moments(series, position)
        return GridChunk(*cells.answered(grids, log_rtt), per_sequence)


def _simulated_world(rng: np.random.Generator) -> tuple[World, Pairs]:
    while True:
        network = random_network(rng)
        a, b = np.triu_indices(network.n, 1)
        pairs = Pairs(a, b, network.measure(a, b, SIMULATED_MEASUREMENTS, rng))
        key = mix(rng.integers(2**63, size=network.n).astype(np.uint64), np.arange(network.n))
        if (drawn := worlds.draw_world(pairs, key, network.addresses, rng)) is not None:
            return drawn


__all__ = ["EVAL_SEED", "FAILED", "MeasurementTable", "ProbeRows"]
