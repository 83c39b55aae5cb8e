"""What is scored against what: the rows, what methods are fitted on, what the model reads first.

The protocol is the split that the data were prepared with, or `raw` for files that were not:

- *pair*: test rows of pairs that training has not seen; the model reads training rows of the
  source.
- *probe*: test rows of sources that training has not seen; a stated number of their own
  measurements, to other destinations than those scored, are given to every method.
- *time*: test rows of later times; static methods know training rows, online ones all that came
  before.
- *raw*: all rows, against the training rows of the run.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data.rows import ProbeRows, is_dataset, read_metadata
from ping_llm.errors import ConfigError, DataError
from ping_llm.hashing import hash_addresses, mix
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.contexts import (
    Contexts,
    from_groups,
    newest_before,
    no_contexts,
    random_of_source,
    trim,
    without_times,
)
from ping_llm.prediction.metrics import others_median

HISTORIES = (0, 1, 2, 4, 8, 16)
SEED = 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to ask for the scored rows.

    Attributes:
        train: What static methods are fitted on.
        contexts: What the model reads before each row.
        also: More ways to ask about the rows, (questions, contexts), to average the answers.
        online: For *time*: what it reads where it may see all that came before; else None.
        everything: For *time*: all measurements, for online methods; else None.
    """

    train: MeasurementTable
    contexts: Contexts
    also: tuple[tuple[MeasurementTable, Contexts], ...] = ()
    online: Contexts | None = None
    everything: MeasurementTable | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What is evaluated.

    Attributes:
        protocol: "pair", "probe", "time" or "raw".
        rows: The measurements that are scored [n].
        questions: The same as the model is asked about them: without times but for *time* [n].
        total: How many there were to choose `rows` from.
        others: Median RTT of the other measurements of each row's pair among those, which no
            prediction that is the same for all of them can beat; NaN where there are none [n].
        described: How the model's contexts are made, in words.
        trials: The trials by their number of context measurements; for most protocols one, None.
    """

    protocol: str
    rows: MeasurementTable
    questions: MeasurementTable
    total: int
    others: np.ndarray
    described: str
    trials: dict[int | None, Callable[[], Trial]]


def load_task(
    data: Path, *, trained_on: Path, max_rows: int | None, max_tokens: int, n_contexts: int = 1
) -> Task:
    """Returns what is evaluated on `data`.

    Args:
        data: A directory of probe rows, or a file of measurements.
        trained_on: The data set of the run.
        max_rows: Rows to score at most, drawn at random; None: all.
        max_tokens: The longest context.
        n_contexts: How many contexts of each row the model's answer is the mean over.

    Raises:
        ConfigError: Several contexts are asked for where contexts are not drawn.
        DataError: The data have no rows to score, or training rows are needed and gone.
    """
    if not is_dataset(data):
        if not is_dataset(trained_on):
            raise DataError(
                f"{trained_on}, which the run was trained on, is gone; put it back to score "
                f"{data}, which is no prepared data set"
            )
        rows, train = read_table([str(data)]), ProbeRows(trained_on, "train").to_table()
        both_ends = read_metadata(trained_on)["settings"]["both_ends"]
        return _known_sources("raw", rows, train, max_rows, max_tokens, n_contexts, both_ends)
    settings = read_metadata(data)["settings"]
    protocol = settings["split"]
    if protocol != "pair" and n_contexts > 1:
        raise ConfigError(
            f"contexts={n_contexts}: {data} was prepared with --split {protocol}, where a question "
            "has one context; take 1"
        )
    rows, train = (ProbeRows(data, split).to_table() for split in ("test", "train"))
    if not len(rows):
        raise DataError(f"{data} has no test rows; prepare the data with a larger --test-fraction")
    if protocol == "probe":
        return _new_sources(rows, train, max_rows, max_tokens)
    if protocol == "time":
        everything = MeasurementTable.concat([train, ProbeRows(data, "valid").to_table(), rows])
        return _later_times(rows, train, everything, max_rows, max_tokens)
    both_ends = settings["both_ends"]
    return _known_sources(protocol, rows, train, max_rows, max_tokens, n_contexts, both_ends)


def pair_keys(measurements: MeasurementTable) -> np.ndarray:
    """Returns a 64-bit key of each unordered pair of addresses [n]."""
    src, dst = hash_addresses(measurements.src), hash_addresses(measurements.dst)
    return mix(np.minimum(src, dst), np.maximum(src, dst))


def _some(rows: MeasurementTable, max_rows: int | None) -> tuple[MeasurementTable, np.ndarray]:
    """Returns (at most `max_rows` of `rows`, `Task.others` of them)."""
    answered = np.flatnonzero(rows.rtt >= 0)
    others = np.full(len(rows), np.nan)
    others[answered] = others_median(pair_keys(rows.take(answered)), rows.rtt[answered])
    chosen = np.arange(len(rows))
    if max_rows is not None and len(rows) > max_rows:
        chosen = np.random.default_rng(SEED).choice(len(rows), max_rows, replace=False)
    chosen = np.sort(chosen)
    return rows.take(chosen), others[chosen]


def _reversed(rows: MeasurementTable) -> MeasurementTable:
    return dataclasses.replace(rows, src=rows.dst, dst=rows.src)


def _known_sources(
    protocol: str,
    rows: MeasurementTable,
    train: MeasurementTable,
    max_rows: int | None,
    max_tokens: int,
    n_contexts: int,
    both_ends: bool,
) -> Task:
    chosen, others = _some(rows, max_rows)
    questions = without_times(chosen)

    def trial() -> Trial:
        ways = []
        for i in range(n_contexts):
            queries = _reversed(questions) if both_ends and i % 2 else questions
            drawn = random_of_source(train, queries, max_tokens=max_tokens, seed=SEED + i)
            ways.append((queries, drawn))
        return Trial(train, ways[0][1], also=tuple(ways[1:]))

    described = "training measurements of the source, drawn at random, without times"
    if n_contexts > 1:
        described += f"; mean over {n_contexts} draws"
        described += ", every second for the pair turned round" if both_ends else ""
    return Task(protocol, chosen, questions, len(rows), others, described, {None: trial})


def _later_times(
    rows: MeasurementTable,
    train: MeasurementTable,
    everything: MeasurementTable,
    max_rows: int | None,
    max_tokens: int,
) -> Task:
    chosen, others = _some(rows, max_rows)

    def trial() -> Trial:
        return Trial(
            train,
            newest_before(train, chosen, max_tokens=max_tokens),
            online=newest_before(everything, chosen, max_tokens=max_tokens),
            everything=everything,
        )

    described = "the newest measurements of the source before the question, with times: `model` of "
    described += "the training rows, `model_online` of all rows"
    return Task("time", chosen, chosen, len(rows), others, described, {None: trial})


def _new_sources(
    rows: MeasurementTable, train: MeasurementTable, max_rows: int | None, max_tokens: int
) -> Task:
    seen = np.unique(np.concatenate([hash_addresses(train.src), hash_addresses(train.dst)]))
    src, dst = hash_addresses(rows.src), hash_addresses(rows.dst)
    # Only destinations that training knows: one unknown at a time.
    new = ~np.isin(src, seen) & np.isin(dst, seen)
    if not new.any():
        raise DataError("no test row is from a source that training has not seen; hold out more")
    rows, src, dst = rows.take(new), src[new], dst[new]
    place, given = _give_destinations(src, dst)
    scored, others = _some(rows.take(~given), max_rows)
    first = np.flatnonzero(given)
    pool = without_times(rows.take(first))
    sources, group = np.unique(hash_addresses(pool.src), return_inverse=True)
    wanted = hash_addresses(scored.src)
    of_query = np.minimum(np.searchsorted(sources, wanted), max(len(sources) - 1, 0))
    of_query = np.where(sources[of_query] == wanted, of_query, -1)

    def trial(history: int) -> Trial:
        if history == 0:
            return Trial(train, no_contexts(len(scored)))
        kept = place[first] < history
        contexts = from_groups(pool.take(kept), group[kept], of_query)
        return Trial(
            MeasurementTable.concat([train, pool.take(kept)]), trim(contexts, max_tokens=max_tokens)
        )

    trials: dict[int | None, Callable[[], Trial]] = {}
    for history in HISTORIES:
        trials[history] = functools.partial(trial, history)
    described = "measurements of the new source to other destinations, which all methods are given"
    return Task("probe", scored, without_times(scored), len(rows), others, described, trials)


def _give_destinations(src: np.ndarray, dst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (place in its source's context, whether it is for contexts only) of each row.

    Of each source up to 16 destinations, and at most half, are given away: one measurement to each
    is its place in the context, from 0; other measurements to them are not scored (place 2**31).
    """
    rng = np.random.default_rng(SEED)
    pairs, pair = np.unique(mix(src, dst), return_inverse=True)
    source_of_pair = np.zeros(len(pairs), np.uint64)
    source_of_pair[pair] = src
    _, source = np.unique(source_of_pair, return_inverse=True)
    order = np.lexsort((rng.random(len(pairs)), source))
    counts = np.bincount(source)
    rank = np.empty(len(pairs), np.int64)
    rank[order] = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
    limit = np.minimum(HISTORIES[-1], counts // 2)[source]
    given = rank < limit
    place = np.full(len(src), 2**31)
    shuffled = rng.permutation(len(pair))
    _, first = np.unique(pair[shuffled], return_index=True)
    one_each = shuffled[first]  # by pair
    place[one_each] = rank
    return place, given[pair]


def describe(task: Task) -> dict[str, Any]:
    """Returns what was evaluated, fit for JSON."""
    return {
        "protocol": task.protocol,
        "n": int(np.count_nonzero(task.rows.rtt >= 0)),
        "n_failed": int(np.count_nonzero(task.rows.rtt < 0)),
        "rows_available": task.total,
        "pairs": len(np.unique(pair_keys(task.rows))),
        "context": task.described,
    }
