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

import numpy as np

from ping_llm.data.rows import ProbeRows, is_dataset, read_metadata
from ping_llm.errors import ConfigError, DataError
from ping_llm.estimators.pairs import lookup, pair_keys
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
from ping_llm.storage import Location

HISTORIES = (0, 1, 2, 4, 8, 16)
SEED = 0
_NOT_SCORED = 2**31


@dataclasses.dataclass(frozen=True)
class Condition:
    """What models and methods are given before they predict the scored rows.

    Attributes:
        train: What static methods are fitted on.
        prompts: What the model is asked, (questions, contexts); its answers to them are averaged.
        online: For *time*: the contexts where it may see all that came before; else None.
        history: For *time*: all measurements, for online methods; else None.
    """

    train: MeasurementTable
    prompts: tuple[tuple[MeasurementTable, Contexts], ...]
    online: Contexts | None = None
    history: MeasurementTable | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """What is evaluated.

    Attributes:
        protocol: "pair", "probe", "time" or "raw".
        rows: The measurements that are scored [n].
        available: How many there were to choose `rows` from.
        pair_medians: Median RTT of the other measurements of each row's pair among those, which no
            prediction that is the same for all of them can beat; NaN where there are none [n].
        context: How the model's contexts are made, in words.
        conditions: Makers of the conditions, by their number of context measurements; for most
            protocols one, None. The last gives most.
    """

    protocol: str
    rows: MeasurementTable
    available: int
    pair_medians: np.ndarray
    context: str
    conditions: dict[int | None, Callable[[], Condition]]


def load_task(
    data: Location,
    *,
    trained_on: Location,
    max_rows: int | None,
    max_tokens: int,
    n_contexts: int = 1,
) -> EvaluationTask:
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
    prepared = is_dataset(data)
    source = data if prepared else trained_on
    if not is_dataset(source):
        raise DataError(
            f"{trained_on}, which the run was trained on, is gone; put it back to score "
            f"{data}, which is no prepared data set"
        )
    settings = read_metadata(source)["settings"]
    protocol = settings["split"] if prepared else "raw"
    if protocol not in ("pair", "raw") and n_contexts > 1:
        raise ConfigError(
            f"contexts={n_contexts}: {data} was prepared with --split {protocol}, where a question "
            "has one context; take 1"
        )
    rows = ProbeRows(data, "test").to_table() if prepared else read_table([str(data)])
    if prepared and not len(rows):
        raise DataError(f"{data} has no test rows; prepare the data with a larger --test-fraction")
    train = ProbeRows(source, "train").to_table()
    available = len(rows)
    if protocol == "probe":
        rows, pool, rank = _give_destinations(rows, train)
        available = len(rows) + len(pool)
    scored, medians = _some(rows, max_rows)
    if protocol == "probe":
        context, conditions = _new_sources(scored, train, pool, rank, max_tokens)
    elif protocol == "time":
        history = MeasurementTable.concat([train, ProbeRows(data, "valid").to_table(), rows])
        context, conditions = _later_times(scored, train, history, max_tokens)
    else:
        turns = settings["both_ends"]
        context, conditions = _seen_sources(scored, train, n_contexts, turns, max_tokens)
    return EvaluationTask(protocol, scored, available, medians, context, conditions)


def _some(rows: MeasurementTable, max_rows: int | None) -> tuple[MeasurementTable, np.ndarray]:
    """Returns (at most `max_rows` of `rows`, their `EvaluationTask.pair_medians`)."""
    answered = np.flatnonzero(rows.rtt >= 0)
    medians = np.full(len(rows), np.nan)
    medians[answered] = others_median(pair_keys(rows.take(answered)), rows.rtt[answered])
    chosen = np.arange(len(rows))
    if max_rows is not None and len(rows) > max_rows:
        chosen = np.sort(np.random.default_rng(SEED).choice(len(rows), max_rows, replace=False))
    return rows.take(chosen), medians[chosen]


# What each protocol gives: `EvaluationTask.context` and `EvaluationTask.conditions`.
_Conditions = tuple[str, dict[int | None, Callable[[], Condition]]]


def _seen_sources(
    scored: MeasurementTable, train: MeasurementTable, draws: int, turns: bool, max_tokens: int
) -> _Conditions:
    questions = without_times(scored)
    reverse = dataclasses.replace(questions, src=questions.dst, dst=questions.src)

    def condition() -> Condition:
        prompts = []
        for i in range(draws):
            asked = reverse if turns and i % 2 else questions
            drawn = random_of_source(train, asked, max_tokens=max_tokens, seed=SEED + i)
            prompts.append((asked, drawn))
        return Condition(train, tuple(prompts))

    context = "training measurements of the source, drawn at random, without times"
    if draws > 1:
        context += f"; mean over {draws} draws"
        context += ", every second for the pair turned round" if turns else ""
    return context, {None: condition}


def _later_times(
    scored: MeasurementTable, train: MeasurementTable, history: MeasurementTable, max_tokens: int
) -> _Conditions:
    def condition() -> Condition:
        tables = (train, history)
        past, online = (newest_before(each, scored, max_tokens=max_tokens) for each in tables)
        return Condition(train, ((scored, past),), online, history)

    context = (
        "the newest measurements of the source before the question, with times: `model` of the "
        "training rows, `model_online` of all rows"
    )
    return context, {None: condition}


def _new_sources(
    scored: MeasurementTable,
    train: MeasurementTable,
    pool: MeasurementTable,
    rank: np.ndarray,
    max_tokens: int,
) -> _Conditions:
    questions = without_times(scored)
    sources, group = np.unique(hash_addresses(pool.src), return_inverse=True)
    of_query = lookup(sources, hash_addresses(scored.src))

    def condition(history: int) -> Condition:
        if history == 0:
            return Condition(train, ((questions, no_contexts(len(scored))),))
        kept = rank < history
        contexts = from_groups(pool.take(kept), group[kept], of_query)
        fitted_on = MeasurementTable.concat([train, pool.take(kept)])
        return Condition(fitted_on, ((questions, trim(contexts, max_tokens=max_tokens)),))

    context = "measurements of the new source to other destinations, which all methods are given"
    return context, {history: functools.partial(condition, history) for history in HISTORIES}


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
