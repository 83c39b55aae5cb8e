"""What is strange in a stream of measurements, as events.

Each measurement has a surprise: minus the logarithm of the probability of something as far out, an
RTT in the tails of its distribution or a failure, given what was known before it. If the model is
right, this is exponential with mean 1. Surprises add up by source and by destination, less
`EXPECTED` each time (CUSUM; Page, 1954), so that a few odd measurements in a row count as much as a
single impossible one. Where a sum exceeds the threshold, there is an alarm, and the sum starts
anew. The threshold lets so many alarms pass on what is known as were asked for.
"""

import collections
import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ping_llm import addresses, settings
from ping_llm.errors import DataError
from ping_llm.estimators.pairs import Nodes
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.predictor import Predictor
from ping_llm.prediction.settings import DetectSettings
from ping_llm.progress import progress

DAY = 86_400
EXPECTED = 2.0  # nats: twice what a measurement has on average, so that sums fall where all is well
MOST_SURPRISE = 15.0  # of one measurement; what is beyond it says nothing more
TRAIN_MEASUREMENTS = 6000  # the newest that are known, which the threshold is set on
ODD = 3.0  # nats from which a measurement is told as part of an event
GAP = 2  # usual intervals between measurements of a node, after which an event is over
BLOCK = 2048  # measurements scored between two looks at the progress


@dataclasses.dataclass(frozen=True)
class Event:
    """Strange measurements that have an end in common and follow each other.

    Attributes:
        start: Time of the first, ISO 8601.
        end: Time of the last.
        sources: Where they were made.
        destinations: What was measured.
        measurements: How many are strange.
        failed: Which share of these failed.
        slower: Median ratio of the RTTs of the others to the expected ones, below 1 for faster;
            None: all failed.
        surprise: Sum of their surprises in nats.
    """

    start: str
    end: str
    sources: list[str]
    destinations: list[str]
    measurements: int
    failed: float
    slower: float | None
    surprise: float


@dataclasses.dataclass(frozen=True)
class DetectResult:
    """What was strange.

    Attributes:
        measurements: Measurements that were looked at.
        source_days: Days between the first and the last measurement of each source, in all.
        threshold: Sum of surprises, in nats, above which there is an alarm.
        alarms: How many there were.
        events: The alarms by what they have in common, in time order.
    """

    measurements: int
    source_days: float
    threshold: float
    alarms: int
    events: list[Event]


@dataclasses.dataclass(frozen=True)
class _Scored:
    """Measurements in time order.

    Attributes:
        table: The measurements.
        surprise: Of each, in nats, at most `MOST_SURPRISE` [n].
        expected: The median RTT that was predicted, in ms [n].
        ends: Numbers of source and destination [n, 2].
    """

    table: MeasurementTable
    surprise: np.ndarray
    expected: np.ndarray
    ends: np.ndarray


@settings.takes(DetectSettings)
def detect(chosen: DetectSettings) -> DetectResult:
    """Returns the events in measurements.

    Raises:
        DataError: A file cannot be read.
        StorageError: A file is absent.
        CheckpointError: `run` is no run.
    """
    measured = read_table([chosen.input])
    predictor = Predictor.pretrained() if chosen.run is None else Predictor.load(chosen.run)
    if chosen.history is not None:
        known = MeasurementTable.concat([predictor.known, read_table([chosen.history])])
        predictor = predictor.knowing(known)
    return find_events(predictor, measured, false_alarms=chosen.false_alarms)


def find_events(
    predictor: Predictor, measured: MeasurementTable, *, false_alarms: float = 1.0
) -> DetectResult:
    """Returns the events in measurements at known times.

    Args:
        predictor: Knows the network from before, with times.
        measured: What to look through.
        false_alarms: Alarms a day and source that may come where nothing happens.

    Raises:
        DataError: Some of it has no time, or nothing that the predictor knows has one.
    """
    if not measured.has_time.all():
        raise DataError("some measurements have no time, so that nothing came before them")
    known = predictor.known.take(predictor.known.has_time)
    if not len(known):
        raise DataError("nothing is known at known times to set a threshold on; give a history")
    train = known.take(np.argsort(known.time, kind="stable")[-TRAIN_MEASUREMENTS:])
    measured = measured.take(np.argsort(measured.time, kind="stable"))
    train = _score(predictor, train, predictor.known, "learn what is usual")
    past = MeasurementTable.concat([predictor.known, measured])
    scored = _score(predictor, measured, past, "look for what is not")
    days = _source_days(scored)
    share = min(false_alarms * days / len(measured), 1.0)
    threshold = _threshold(train, share * len(train.surprise))
    alarms = _alarms(scored, threshold)
    events = [_event(scored, rows) for rows in _grouped(scored, alarms)]
    return DetectResult(len(measured), round(days, 3), round(threshold, 3), len(alarms), events)


def _score(
    predictor: Predictor, table: MeasurementTable, past: MeasurementTable, text: str
) -> _Scored:
    surprise, expected = np.zeros((2, len(table)))
    with progress(text, total=len(table), unit="measurements") as shown:
        for start in range(0, len(table), BLOCK):
            block = table.slice(start, start + BLOCK)
            for rows, answer, _ in predictor.answers(block, history=past):
                rtt, p_failed = block.rtt[rows].astype(float), answer.p_failed
                below = np.clip(answer.below(rtt), 0, 1)
                tail = (1 - p_failed) * 2 * np.minimum(below, 1 - below)
                p = np.where(rtt < 0, p_failed, tail)
                floor = math.exp(-MOST_SURPRISE)
                surprise[start + rows] = -np.log(np.clip(p, floor, 1))
                expected[start + rows] = answer.quantiles(np.array([0.5]))[:, 0]
            shown.update(len(block))
    nodes = Nodes(table.src, table.dst)
    ends = np.stack([nodes.lookup(table.src), nodes.lookup(table.dst)], axis=1)
    return _Scored(table, surprise, expected, ends)


def _source_days(scored: _Scored) -> float:
    order = np.lexsort((scored.table.time, scored.ends[:, 0]))
    time, source = scored.table.time[order], scored.ends[order, 0]
    same = source[1:] == source[:-1]
    return float(np.diff(time)[same].sum()) / DAY


# Of 2.5, 1, 5 nats of one source, the sums are 0.5, 0 and 3: at a threshold of 2.9 the third one is
# an alarm, and the next sum begins at 0.
def _alarms(scored: _Scored, threshold: float) -> list[int]:
    """Returns which measurements are alarms."""
    # A node as source and as destination has two sums.
    sums: dict[tuple[int, int], float] = collections.defaultdict(float)
    alarms = []
    for i, (ends, surprise) in enumerate(zip(scored.ends.tolist(), scored.surprise, strict=True)):
        keys = [(0, ends[0]), (1, ends[1])]
        for key in keys:
            sums[key] = max(0.0, sums[key] + surprise - EXPECTED)
        if max(sums[key] for key in keys) > threshold:
            alarms.append(i)
            sums.update(dict.fromkeys(keys, 0.0))
    return alarms


def _threshold(train: _Scored, allowed: float) -> float:
    """Returns the lowest threshold at which there are `allowed` alarms at most.

    Below one, it is that of one, and what an exponential tail adds to it.
    """
    low, high = 0.0, MOST_SURPRISE * len(train.surprise)
    while high - low > 1e-3:
        middle = (low + high) / 2
        if len(_alarms(train, middle)) <= max(allowed, 1.0):
            high = middle
        else:
            low = middle
    return high + max(0.0, -math.log(max(allowed, 1e-9)))


def _grouped(scored: _Scored, alarms: Sequence[int]) -> list[list[int]]:
    """Returns the strange measurements of each event, in the order in which events begin.

    Each counts for the end that more surprise comes from at its time; what is of one end, without a
    pause, is an event. The failures that follow a strange one of the same pair belong to it too:
    the model, which has seen the first ones, expects them.
    """
    is_alarm = np.zeros(len(scored.surprise), bool)
    is_alarm[list(alarms)] = True
    is_odd = is_alarm | (scored.surprise > ODD)
    failing: dict[tuple[int, int], bool] = {}
    failed = (scored.table.rtt < 0).tolist()
    for i, pair in enumerate(map(tuple, scored.ends.tolist())):
        failing[pair] = failed[i] and bool(is_odd[i] or failing.get(pair))
        is_odd[i] |= failing[pair]
    odd = np.flatnonzero(is_odd)
    time, pause = scored.table.time, GAP * _intervals(scored)
    around = np.zeros((len(scored.surprise), 2))
    for node in np.unique(scored.ends[odd]):
        of = scored.ends[odd] == node  # [odd, 2]
        rows = odd[of.any(axis=1)]
        total = np.append(0, np.cumsum(scored.surprise[rows]))
        first = np.searchsorted(time[rows], time[rows] - pause[node])
        stop = np.searchsorted(time[rows], time[rows] + pause[node], side="right")
        side = np.argmax(of[of.any(axis=1)], axis=1)
        around[rows, side] = total[stop] - total[first]
    centre = scored.ends[odd, np.argmax(around[odd], axis=1)]
    events = []
    for node in np.unique(centre):
        rows = odd[centre == node]
        events += np.split(rows, np.flatnonzero(np.diff(time[rows]) > pause[node]) + 1)
    events = [rows.tolist() for rows in events if is_alarm[rows].any()]
    return sorted(events, key=lambda rows: rows[0])


def _intervals(scored: _Scored) -> np.ndarray:
    """Returns the seconds between the measurements of each node that nine in ten keep [nodes]."""
    node = scored.ends.T.ravel()
    time = np.tile(scored.table.time, 2)
    order = np.lexsort((time, node))
    node, time = node[order], time[order]
    gaps, of = np.diff(time), node[1:]
    same = node[1:] == node[:-1]
    found = np.zeros(node.max(initial=0) + 1)
    for each in np.unique(of[same]):
        found[each] = np.quantile(gaps[same & (of == each)], 0.9)
    return found


def _event(scored: _Scored, rows: list[int]) -> Event:
    table = scored.table.take(np.array(rows))
    failed = table.rtt < 0
    ratio = table.rtt[~failed] / scored.expected[rows][~failed]
    return Event(
        start=_iso(table.time[0]),
        end=_iso(table.time[-1]),
        sources=addresses.to_text(np.unique(table.src)),
        destinations=addresses.to_text(np.unique(table.dst)),
        measurements=len(rows),
        failed=round(float(failed.mean()), 3),
        slower=round(float(np.median(ratio)), 3) if len(ratio) else None,
        surprise=round(float(scored.surprise[rows].sum()), 2),
    )


def _iso(time: Any) -> str:
    return datetime.datetime.fromtimestamp(int(time), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
