"""What a run knows of a network: its train measurements, as pairs, as series, and as worlds.

It is kept with the run as probe rows, thinned: a run answers without its data set.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ping_llm.data.history_grids import PairSeries
from ping_llm.data.rows import ALWAYS, RowBatch, checked, row_schema
from ping_llm.errors import CheckpointError
from ping_llm.estimators.failures import FailureOdds
from ping_llm.estimators.pairs import Nodes, pair_keys, runs
from ping_llm.estimators.world import MEASUREMENTS_KEPT, MeasuredWorld, Pairs
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable
from ping_llm.storage import Location

_CHECKSUM = b"checksum"  # of its content, among its metadata
KNOWN = "known.arrow"  # in a run directory: what the run answers from
NEWEST_KEPT = 160  # measurements of each pair: as far back as a history grid looks
WORLD_NODES = 2500  # matrices of so many nodes take 25 MB each
PARTNERS = 500  # of an end, in a world around some questions
FEWEST_PAIRS = 20  # of a part that is a network of its own
LANDMARKS = 250  # nodes of most pairs that are in each world


@dataclasses.dataclass(frozen=True)
class Network:
    """Measurements between numbered nodes.

    Attributes:
        measurements: The measurements.
        nodes: Their addresses, numbered, and any others that may be asked about.
    """

    measurements: MeasurementTable
    nodes: Nodes

    @classmethod
    def of(cls, measurements: MeasurementTable, *asked: np.ndarray) -> "Network":
        """Returns the network of some measurements, with further addresses that are asked about."""
        return cls(measurements, Nodes(measurements.src, measurements.dst, *asked))

    @functools.cached_property
    def pairs(self) -> Pairs:
        """What was measured, by unordered pair."""
        return Pairs.of(self.measurements, self.nodes)

    @functools.cached_property
    def key(self) -> np.ndarray:
        """What names each node [n], uint64."""
        return hash_addresses(self.nodes.addresses)

    @functools.cached_property
    def series(self) -> PairSeries:
        """What was measured, by pair over time."""
        return PairSeries.of(self.measurements)

    @functools.cached_property
    def failures(self) -> FailureOdds:
        """How often measurements fail, by source, destination and day."""
        return FailureOdds(self.measurements)

    @functools.cached_property
    def _whole(self) -> MeasuredWorld:
        return MeasuredWorld(self.pairs, self.key, self.nodes.addresses)

    def parts(self) -> list["Network"]:
        """Returns its connected parts, such as the networks of several files, as networks.

        Those of fewer than 20 pairs are one part together; if there are no more pairs, they are
        left out.
        """
        pairs, n = self.pairs, len(self.nodes)
        edges = coo_array((np.ones(len(pairs.a)), (pairs.a, pairs.b)), shape=(n, n))
        count, label = connected_components(edges, directed=False)
        sizes = np.bincount(label[pairs.a], minlength=count)
        label[sizes[label] < FEWEST_PAIRS] = count  # one part together
        sizes = np.bincount(label[pairs.a], minlength=count + 1)
        large = np.flatnonzero(sizes >= FEWEST_PAIRS)
        if len(large) < 2:
            return [self]
        of_row = label[self.nodes.lookup(self.measurements.src)]
        return [Network.of(self.measurements.take(of_row == part)) for part in large]

    def worlds(
        self, questions: MeasurementTable
    ) -> Iterator[tuple[np.ndarray, MeasuredWorld, np.ndarray, np.ndarray]]:
        """Yields (questions, the world around them, their two ends in it) until all had their turn.

        A network of up to `WORLD_NODES` nodes is one world. Of a larger one, a world holds the ends
        of some questions, what these were measured to, and the nodes of most pairs.
        """
        a, b = self.nodes.lookup(questions.src), self.nodes.lookup(questions.dst)
        if len(self.nodes) <= WORLD_NODES:
            yield np.arange(len(a)), self._whole, a, b
            return
        order = np.lexsort((b, a))
        while len(order):
            chosen = self._around(a[order], b[order])
            number = np.full(len(self.nodes), -1)
            number[chosen] = np.arange(len(chosen))
            rows = order[(number[a[order]] >= 0) & (number[b[order]] >= 0)]
            pairs = self.pairs.renumbered(number)
            world = MeasuredWorld(pairs, self.key[chosen], self.nodes.addresses[chosen])
            yield rows, world, number[a[rows]], number[b[rows]]
            order = order[~np.isin(order, rows)]

    @functools.cached_property
    def _partners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (partners of all nodes, those of most pairs first; where each begins; degree)."""
        one, other = np.r_[self.pairs.a, self.pairs.b], np.r_[self.pairs.b, self.pairs.a]
        degree = np.bincount(one, minlength=len(self.nodes))
        order = np.lexsort((-degree[other], one))
        return other[order], np.cumsum(degree) - degree, degree

    def _around(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the nodes of a world that holds as many of the first questions as it can."""
        partners, starts, degree = self._partners
        nodes = set(np.argsort(-degree, kind="stable")[:LANDMARKS].tolist())
        for ends in zip(a.tolist(), b.tolist(), strict=True):
            around = set(ends)
            for end in ends:
                stop = starts[end] + min(int(degree[end]), PARTNERS)
                around.update(partners[starts[end] : stop].tolist())
            if len(nodes | around) > WORLD_NODES:
                break
            nodes |= around
        return np.array(sorted(nodes))


def thinned(measurements: MeasurementTable) -> MeasurementTable:
    """Returns what a run keeps: of each pair the newest 160, and 16 spread over those before."""
    key = pair_keys(measurements)
    order = np.lexsort((measurements.time, key))
    starts, counts = runs(key[order])
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    left = np.repeat(counts, counts) - rank
    older = np.repeat(np.maximum(counts - NEWEST_KEPT, 0), counts)
    # Rank r of c older ones is kept where r * 16 / c passes a whole number.
    step = MEASUREMENTS_KEPT / np.maximum(older, 1)
    spread = np.floor((rank + 1) * step) > np.floor(rank * step)
    kept = (left <= NEWEST_KEPT) | (spread | (older <= MEASUREMENTS_KEPT))
    return measurements.take(np.sort(order[kept]))


def write_known(path: Path, measurements: MeasurementTable) -> None:
    """Writes measurements as one file of probe rows."""
    order = np.lexsort((measurements.time, hash_addresses(measurements.src)))
    table = measurements.take(order)
    starts = np.flatnonzero(table.src[1:] != table.src[:-1]) + 1
    source = np.zeros(len(table), np.int64)
    source[starts] = 1
    sources = table.src[np.append(0, starts)] if len(table) else table.src
    measured = {name: getattr(table, name) for name in ALWAYS}
    rows = RowBatch.grouped(np.cumsum(source), sources, measured)
    batch = rows.to_arrow()
    checksum = {_CHECKSUM: _digest([rows])}
    with pa.ipc.new_file(str(path), row_schema().with_metadata(checksum)) as writer:
        writer.write_batch(batch)


def read_known(run: Location) -> MeasurementTable:
    """Returns what the run in a directory keeps of its train rows.

    Raises:
        CheckpointError: It keeps nothing, or the file is damaged.
    """
    file = run / KNOWN
    if not file.is_file():
        raise CheckpointError(f"{run} lacks {KNOWN}, what it knows of its network; train it again")
    try:
        batches = _read_batches(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); train the run again") from None
    return MeasurementTable.concat([batch.to_table() for batch in batches])


def _read_batches(file: Location) -> list[RowBatch]:
    with file.open_input() as source, pa.ipc.open_file(source) as reader:
        if reader.schema != row_schema():
            raise pa.ArrowInvalid("it holds other columns than probe rows have")
        batches = [checked(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        checksum = (reader.schema.metadata or {}).get(_CHECKSUM)
        if checksum not in (None, _digest(batches)):
            raise pa.ArrowInvalid("its checksum is another")
        return batches


def _digest(batches: list[RowBatch]) -> bytes:
    """Returns the SHA-256 of what batches of rows hold, in hexadecimal."""
    sha256 = hashlib.sha256()
    for batch in batches:
        for values in vars(batch).values():
            if values is not None:  # a column that older runs do not know of
                sha256.update(np.ascontiguousarray(values).tobytes())
    return sha256.hexdigest().encode()
