"""What is scored against what: the rows, and what every method knows.

The protocol is the split that the data were prepared with, or `raw` for files that were not:

- *pair*: test rows of pairs that training has not seen.
- *probe*: test rows of sources that training has not seen; a stated number of their own
  measurements, to other destinations than those scored, are given to every method.
- *asn*, *region*: likewise, and of autonomous systems or countries that it has not seen.
- *time*: test rows of later times; static methods know training rows, online ones all that came
  before.
- *raw*: all rows, against the training rows of the run.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ping_llm.data.rows import ProbeRows, is_dataset, read_metadata
from ping_llm.errors import DataError
from ping_llm.estimators.pairs import pair_keys
from ping_llm.hashing import hash_addresses, mix
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.divergence import most_measured
from ping_llm.prediction.metrics import others_median
from ping_llm.storage import Location

NEW_SOURCES = ("probe", "asn", "region")  # protocols whose sources are not in training
HISTORIES = (0, 1, 2, 4, 8, 16)
SEED = 0
_NOT_SCORED = 2**31


@dataclasses.dataclass(frozen=True)
class Condition:
    """What models and methods know before they predict the scored rows.

    Attributes:
        train: What the network is known by: static methods are fitted on it.
        history: For *time*: all measurements, of which online methods see those before; else None.
    """

    train: MeasurementTable
    history: MeasurementTable | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """What is evaluated.

    Attributes:
        protocol: "pair", "probe", "asn", "region", "time" or "raw".
        rows: The measurements that are scored [n].
        available: How many there were to choose `rows` from.
        pair_medians: Median RTT of the other measurements of each row's pair among those, which no
            prediction that is the same for all of them can beat; NaN where there are none [n].
        context: What methods know, in words.
        repeated: The measurements of each of the pairs among those that have most.
        conditions: Makers of the conditions, by how many measurements of a new source are known;
            for most protocols one, None. The last gives most.
    """

    protocol: str
    rows: MeasurementTable
    available: int
    pair_medians: np.ndarray
    context: str
    repeated: list[MeasurementTable]
    conditions: dict[int | None, Callable[[], Condition]]


def load_task(data: Location, *, known: MeasurementTable, max_rows: int | None) -> EvaluationTask:
    """Returns what is evaluated on `data`.

    Args:
        data: A directory of probe rows, or a file of measurements.
        known: What the run keeps of its train rows, for files.
        max_rows: Rows to score at most, drawn at random; None: all.

    Raises:
        DataError: The data have no rows to score.
    """
    prepared = is_dataset(data)
    protocol = read_metadata(data)["settings"]["split"] if prepared else "raw"
    rows = ProbeRows(data, "test").to_table() if prepared else read_table([str(data)])
    if prepared and not len(rows):
        raise DataError(f"{data} has no test rows; prepare the data with a larger --test-fraction")
    train = ProbeRows(data, "train").to_table() if prepared else known
    if not prepared and not len(known):
        raise DataError(
            f"{data} is no data set, so nothing is known to answer from; make one of it with "
            "`ping-llm prepare-data`, or give a run"
        )
    available = len(rows)
    if protocol in NEW_SOURCES:
        rows, pool, rank = _give_destinations(rows, train)
        available = len(rows) + len(pool)
    scored, medians = _some(rows, max_rows)
    conditions: dict[int | None, Callable[[], Condition]]
    if protocol in NEW_SOURCES:
        context = "all train rows, and some of the new source's, to other destinations"
        make = functools.partial(_new_sources, train, pool, rank)
        conditions = {history: functools.partial(make, history) for history in HISTORIES}
    elif protocol == "time":
        context = "`model`: the train rows; `model_online`: of each pair all that came before"
        history = MeasurementTable.concat([train, ProbeRows(data, "valid").to_table(), rows])
        conditions = {None: functools.partial(Condition, train, history)}
    else:
        context = "all train rows" if prepared else "what the run keeps of its train rows"
        conditions = {None: functools.partial(Condition, train)}
    repeated = most_measured(rows)
    return EvaluationTask(protocol, scored, available, medians, context, repeated, conditions)


def without_times(table: MeasurementTable) -> MeasurementTable:
    """Returns the same measurements at unknown times."""
    return dataclasses.replace(table, time=np.full(len(table), NO_TIME))


def _new_sources(
    train: MeasurementTable,
    pool: MeasurementTable,
    rank: np.ndarray,
    history: int,
) -> Condition:
    given = pool.take(rank < history)
    return Condition(MeasurementTable.concat([train, given]))


def _some(rows: MeasurementTable, max_rows: int | None) -> tuple[MeasurementTable, np.ndarray]:
    """Returns (at most `max_rows` of `rows`, their `EvaluationTask.pair_medians`)."""
    answered = np.flatnonzero(rows.rtt >= 0)
    medians = np.full(len(rows), np.nan)
    medians[answered] = others_median(pair_keys(rows.take(answered)), rows.rtt[answered])
    chosen = np.arange(len(rows))
    if max_rows is not None and len(rows) > max_rows:
        chosen = np.sort(np.random.default_rng(SEED).choice(len(rows), max_rows, replace=False))
    return rows.take(chosen), medians[chosen]


def _give_destinations(
    rows: MeasurementTable, train: MeasurementTable
) -> tuple[MeasurementTable, MeasurementTable, np.ndarray]:
    """Returns (rows to score, rows for contexts without their times, rank of each of these).

    The rows are of sources that training has not seen. Of each source up to 16 destinations, and at
    most half, are given away: one measurement to each has its rank in the context, from 0; other
    measurements to them are not scored (rank 2**31).
    """
    seen = np.unique(np.concatenate([hash_addresses(train.src), hash_addresses(train.dst)]))
    src, dst = hash_addresses(rows.src), hash_addresses(rows.dst)
    # Only destinations that training knows: one unknown at a time.
    new = ~np.isin(src, seen) & np.isin(dst, seen)
    if not new.any():
        raise DataError("no test row is from a source that training has not seen; hold out more")
    rows, src, dst = rows.take(new), src[new], dst[new]
    rng = np.random.default_rng(SEED)
    pairs, pair = np.unique(mix(src, dst), return_inverse=True)
    source_of_pair = np.zeros(len(pairs), np.uint64)
    source_of_pair[pair] = src
    _, source = np.unique(source_of_pair, return_inverse=True)
    order = np.lexsort((rng.random(len(pairs)), source))
    counts = np.bincount(source)
    rank = np.empty(len(pairs), np.int64)
    rank[order] = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
    given = rank < np.minimum(HISTORIES[-1], counts // 2)[source]
    rank_of_row = np.full(len(src), _NOT_SCORED)
    shuffled = rng.permutation(len(pair))
    _, first = np.unique(pair[shuffled], return_index=True)
    rank_of_row[shuffled[first]] = rank  # one row of each pair
    given = given[pair]
    return rows.take(~given), without_times(rows.take(given)), rank_of_row[given]
