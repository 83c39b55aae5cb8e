"""Streams of training sequences that hold grids, as a pure function of stream and chunk number.

Chunk c of any stream asks about the same few worlds, each of which is made once: a part of the
network of the train rows, a simulated network, or pairs over time.
"""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
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

WORLDS_PER_CHUNK = 4  # at least, so that a batch is of several
STREAMS_PER_WORLD = 8  # at most
SEQUENCES_PER_CHUNK = 12  # of each stream: a world costs as much as a thousand grids drawn from it
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

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Returns `count` random questions, as `grids` takes them."""
        return worlds.draw_questions(self.world, self.asked, count, rng)

    def grids(self, a: np.ndarray, b: np.ndarray, log_rtt: np.ndarray) -> tuple[Grids, np.ndarray]:
        """Returns (the grids of questions, the answers)."""
        return network_grids.network_grids(self.world, a, b), log_rtt


@dataclasses.dataclass(frozen=True)
class _Series:
    """Pairs over time, and the moments that may be asked of them."""

    series: history_grids.PairSeries
    moments: np.ndarray
    grid_tokens: ClassVar[int] = history_grids.HISTORY_TOKENS

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Returns `count` random questions, as `grids` takes them."""
        position = self.moments[rng.integers(len(self.moments), size=count)]
        return position, _forgotten(position, self.series, rng)

    def grids(self, position: np.ndarray, forgotten: np.ndarray) -> tuple[Grids, np.ndarray]:
        """Returns (the grids of questions, the answers)."""
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


class _Part:
    """A network that worlds are drawn from, and how often its pairs are asked over time."""

    def __init__(self, network: Network):
        self.network = network
        self.series = _Series(network.series, history_grids.moments(network.series))
        many = len(network.pairs.a) >= PAIRS_A_NODE * len(network.nodes)
        timed = len(self.series.moments) > 0 and network.series.mean_length() >= LONG_SERIES
        self.series_share = SHARES_OF_SERIES[0 if many else 1] if timed else 0.0

    def world(self, rng: np.random.Generator) -> _Static | None:
        """Returns a random world of it; None: it has too few pairs."""
        pairs, key, addresses = self.network.pairs, self.network.key, self.network.nodes.addresses
        for _ in range(TRIES):
            if (drawn := worlds.draw_world(pairs, key, addresses, rng)) is not None:
                return _Static(*drawn)
        return None


class GridStreams:
    """The chunks of all streams of a run.

    Worlds are drawn from the connected parts of a network, more often from those of more
    measurements: by the cube root of their number.
    """

    def __init__(
        self, network: Network, *, streams: int, length: int, seed: int, simulated_fraction: float
    ):
        self._length, self._seed, self._simulated_fraction = length, seed, simulated_fraction
        self._worlds_per_chunk = max(WORLDS_PER_CHUNK, -(-streams // STREAMS_PER_WORLD))
        self._parts = [_Part(part) for part in network.parts()]
        weights = np.cbrt([len(part.network.measurements) for part in self._parts])
        self._weights = weights / weights.sum()
        self._world = functools.lru_cache(2 * self._worlds_per_chunk)(self._make_world)

    def chunks(self, streams: Sequence[int], number: int) -> dict[int, GridChunk]:
        """Returns chunk `number` of some streams, each as it would be alone."""
        drawn: dict[int, list[tuple[np.ndarray, ...]]] = collections.defaultdict(list)
        for stream in streams:
            rng = np.random.default_rng([self._seed, stream, number])
            for i in range(SEQUENCES_PER_CHUNK):
                which = number * self._worlds_per_chunk + (stream + i) % self._worlds_per_chunk
                world = self._world(which)
                count = self._length // (world.grid_tokens + cells.ANSWER_TOKENS)
                drawn[which].append(world.draw(count, rng))
        # The grids of a world all at once: two by two they would take three times as long.
        sequences: dict[int, list[tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(list)
        made = {which: self._made(which, of) for which, of in drawn.items()}
        for stream in streams:
            for i in range(SEQUENCES_PER_CHUNK):
                which = number * self._worlds_per_chunk + (stream + i) % self._worlds_per_chunk
                sequences[stream].append(next(made[which]))
        return {stream: GridChunk(of) for stream, of in sequences.items()}

    def _made(
        self, which: int, drawn: list[tuple[np.ndarray, ...]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens, weights) of the grids of each of some draws from one world."""
        columns = (np.concatenate(each) for each in zip(*drawn, strict=True))
        tokens, weights = cells.answered(*self._world(which).grids(*columns))
        ends = np.cumsum([len(each[0]) for each in drawn])
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            yield tokens[start:stop], weights[start:stop]

    def _make_world(self, number: int) -> _Static | _Series:
        rng = np.random.default_rng([self._seed, number])
        part = self._parts[rng.choice(len(self._parts), p=self._weights)]
        over_time = rng.random() < part.series_share
        simulated = rng.random() < self._simulated_fraction
        if over_time:
            return _simulated_series(rng) if simulated else part.series
        own = None if simulated else part.world(rng)
        return own or _Static(*_simulated_world(rng))


class GridChunks(contextlib.AbstractContextManager):
    """The chunks of some streams that go forward together, made for all of them at once.

    Other processes make them, some ahead, for devices that outrun this one; without any, this one.
    """

    def __init__(self, data: str | Path, numbers: Sequence[int], workers: int, **settings: Any):
        """Opens the train rows of a data set, or starts processes that do.

        Args:
            data: The data set.
            numbers: Which streams will be asked for.
            workers: How many processes.
            settings: Those of `GridStreams`.
        """
        self._numbers = list(numbers)
        self._chunks: dict[int, Callable[[], dict[int, GridChunk]]] = {}
        self._pool = None
        if workers:
            context = multiprocessing.get_context("spawn")
            start = {"initializer": _start_worker, "initargs": (data, settings)}
            self._pool = ProcessPoolExecutor(workers, context, **start)
            self._ahead = workers
        else:
            self._grids, self._ahead = _open_streams(data, settings), 0

    def chunk(self, stream: int, number: int) -> GridChunk:
        """Returns one chunk of one stream."""
        for each in range(number, number + self._ahead + 1):
            if each not in self._chunks:
                self._chunks[each] = self._begin(each)
        self._chunks.pop(number - 1, None)  # all streams have gone on
        return self._chunks[number]()[stream]

    def _begin(self, number: int) -> Callable[[], dict[int, GridChunk]]:
        if self._pool is not None:
            return self._pool.submit(_make_chunks, self._numbers, number).result
        made = self._grids.chunks(self._numbers, number)
        return lambda: made

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_of_this_worker: list[GridStreams] = []


def _open_streams(data: str | Path, settings: dict[str, Any]) -> GridStreams:
    return GridStreams(Network.of(ProbeRows(data, "train").to_table()), **settings)


def _start_worker(data: str | Path, settings: dict[str, Any]) -> None:
    _of_this_worker.append(_open_streams(data, settings))


def _make_chunks(streams: list[int], number: int) -> dict[int, GridChunk]:
    (grids,) = _of_this_worker
    return grids.chunks(streams, number)


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
