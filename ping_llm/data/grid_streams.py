"""Streams of training sequences that hold grids, as a pure function of stream and chunk number.

Chunk c of any stream asks about the same few worlds, each of which is made once: a part of the
network of the train rows, a simulated network, or pairs over time.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ping_llm.data import cells, history_grids, network_grids, worlds
from ping_llm.data.cells import Grids
from ping_llm.data.network import Network
from ping_llm.data.questions import question_grids
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import ConfigError
from ping_llm.estimators.pairs import pair_keys
from ping_llm.estimators.world import MeasuredWorld, Pairs, log_rtt_of
from ping_llm.hashing import mix
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.simulation.random_networks import random_network
from ping_llm.simulation.random_series import random_series

WORLDS_PER_CHUNK = 4  # so that a batch is of several
SEQUENCES_PER_CHUNK = 12  # of each stream: a world costs as much as a thousand grids drawn from it
WORLDS_KEPT = 8
SIMULATED_FRACTION = 0.1  # of the worlds, and of the series
SIMULATED_SERIES, SERIES_LENGTH = 20, 1000
SIMULATED_MEASUREMENTS = 16  # of each pair of a simulated network
SHARES_OF_SERIES = 0.25, 0.75  # of the chunks: of networks of many pairs a node, and of few
PAIRS_A_NODE = 3  # "many"
LONG_SERIES = 10  # measurements of a pair that make it worth asking over time
FORGETFUL_FRACTION = 0.25  # of the questions over time, so that short pasts are learnt
EVAL_SEED = 20_130_101
TRIES = 20  # worlds drawn until one has enough of everything
# Of either kind, answered.
LONGEST_GRID = max(network_grids.GRID_TOKENS, history_grids.HISTORY_TOKENS) + cells.ANSWER_TOKENS

# The tokens of each segment of a sequence; how much predicting each token counts, None: 1.
Segments = tuple[list[np.ndarray], list[np.ndarray] | None]


@dataclasses.dataclass(frozen=True)
class GridChunk:
    """Some sequences of grids, answers included.

    Attributes:
        sequences: (Tokens, how much predicting each counts) of the grids of each sequence, both
            [g, T].
    """

    sequences: list[tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(self.sequences)

    def segments(self, sequence: int) -> Segments:
        """Returns the grids of one sequence."""
        tokens, weights = self.sequences[sequence]
        return list(tokens), list(weights)


@dataclasses.dataclass(frozen=True)
class _Static:
    """A world, and the pairs that may be asked of it."""

    world: MeasuredWorld
    asked: Pairs
    grid_tokens: ClassVar[int] = network_grids.GRID_TOKENS

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Grids, np.ndarray]:
        a, b, log_rtt = worlds.draw_questions(self.world, self.asked, count, rng)
        return network_grids.network_grids(self.world, a, b), log_rtt


@dataclasses.dataclass(frozen=True)
class _Series:
    """Pairs over time, and the moments that may be asked of them."""

    series: history_grids.PairSeries
    moments: np.ndarray
    grid_tokens: ClassVar[int] = history_grids.HISTORY_TOKENS

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Grids, np.ndarray]:
        position = self.moments[rng.integers(len(self.moments), size=count)]
        forgotten = _forgotten(position, self.series, rng)
        return history_grids.at_moments(self.series, position, forgotten)


def check_length(length: int) -> None:
    """Checks that sequences of `length` tokens hold any one grid.

    Raises:
        ConfigError: They do not.
    """
    if length < LONGEST_GRID:
        raise ConfigError(
            f"seq_len={length - 1} is too short for a grid; set it to {LONGEST_GRID - 1} or more, "
            "or grid_fraction to 0"
        )


class GridStreams:
    """The chunks of all streams of a run."""

    def __init__(self, network: Network, *, length: int, seed: int):
        self._network, self._length, self._seed = network, length, seed
        self._own = _Series(network.series, history_grids.moments(network.series))
        many = len(network.pairs.a) >= PAIRS_A_NODE * len(network.nodes)
        timed = len(self._own.moments) > 0 and network.series.mean_length() >= LONG_SERIES
        self._series_share = SHARES_OF_SERIES[0 if many else 1] if timed else 0.0
        self._world = functools.lru_cache(WORLDS_KEPT)(self._make_world)

    def chunk(self, stream: int, number: int) -> GridChunk:
        """Returns one chunk of one stream."""
        rng, sequences = np.random.default_rng([self._seed, stream, number]), []
        for i in range(SEQUENCES_PER_CHUNK):
            world = self._world(number * WORLDS_PER_CHUNK + (stream + i) % WORLDS_PER_CHUNK)
            count = self._length // (world.grid_tokens + cells.ANSWER_TOKENS)
            sequences.append(cells.answered(*world.draw(count, rng)))
        return GridChunk(sequences)

    def _make_world(self, number: int) -> _Static | _Series:
        rng, network = np.random.default_rng([self._seed, number]), self._network
        over_time, simulated = rng.random() < self._series_share, rng.random() < SIMULATED_FRACTION
        if over_time:
            return _simulated_series(rng) if simulated else self._own
        for _ in range(0 if simulated else TRIES):
            addresses = network.nodes.addresses
            if (drawn := worlds.draw_world(network.pairs, network.key, addresses, rng)) is not None:
                return _Static(*drawn)
        return _Static(*_simulated_world(rng))


def _simulated_series(rng: np.random.Generator) -> _Series:
    drawn = [random_series(rng, SERIES_LENGTH) for _ in range(SIMULATED_SERIES)]
    series = history_grids.PairSeries.of_series(drawn)
    return _Series(series, history_grids.moments(series))


def _simulated_world(rng: np.random.Generator) -> tuple[MeasuredWorld, Pairs]:
    while True:
        network = random_network(rng)
        a, b = np.triu_indices(network.n, 1)
        pairs = Pairs(a, b, network.measure(a, b, SIMULATED_MEASUREMENTS, rng))
        key = mix(rng.integers(2**63, size=network.n).astype(np.uint64), np.arange(network.n))
        if (drawn := worlds.draw_world(pairs, key, None, rng)) is not None:
            return drawn


def _forgotten(
    position: np.ndarray, series: history_grids.PairSeries, rng: np.random.Generator
) -> np.ndarray:
    """Returns how many measurements before `position` are not shown: of a quarter, all but few."""
    pair = np.searchsorted(series.start, position, side="right") - 1
    past = position - series.start[pair]
    left = np.exp(rng.uniform(0, np.log(history_grids.LONGEST), len(past))).astype(np.int64)
    few = rng.random(len(past)) < FORGETFUL_FRACTION
    forgotten = np.where(few, np.maximum(past - left, 0), 0)
    # Something that was answered must be left to tell the answer against.
    end = series.first_at(pair, series.time[position], answered=False)
    told = series.answered[end] > series.answered[np.minimum(series.start[pair] + forgotten, end)]
    return np.where(told, forgotten, 0)


def eval_sequences(rows: ProbeRows, data: str | Path, *, length: int, count: int) -> list[Segments]:
    """Returns `count` fixed sequences of grids about measurements of a split.

    What is known are the train rows; and of data split by time what came before each question, of
    data split by probe half of the new sources' pairs.

    Args:
        rows: The split.
        data: The data set.
        length: Tokens of a sequence.
        count: How many sequences.
    """
    rng, asked = np.random.default_rng(EVAL_SEED), rows.to_table()
    known, history = ProbeRows(data, "train").to_table(), None
    split = rows.metadata.get("split")
    if split == "time":
        history = MeasurementTable.concat([known, asked])
    elif split == "probe":
        given = pair_keys(asked) % np.uint64(2) == 0
        known = MeasurementTable.concat([known, asked.take(given)])
        asked = asked.take(~given)
    each = length // LONGEST_GRID
    if not count or not len(asked):
        return []
    asked = asked.take(rng.integers(len(asked), size=count * each))
    if split != "time":
        asked = dataclasses.replace(asked, time=np.full(len(asked), NO_TIME))
    tokens: list[Any] = [None] * len(asked)
    weights = tokens.copy()
    log_rtt = log_rtt_of(asked.rtt)
    for index, _, grids in question_grids(asked, known, history):
        for i, *segment in zip(index, *cells.answered(grids, log_rtt[index]), strict=True):
            tokens[i], weights[i] = segment
    return [(tokens[i : i + each], weights[i : i + each]) for i in range(0, len(tokens), each)]
