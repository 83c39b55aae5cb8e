"""Grids of one pair over time: what was known of it at four moments, the question's the last.

Rows are the moments 61, 25 and 9 measurements ago, with what was measured then, and that of the
question. A row is

    age noise failures failing  (estimate) x 13  (estimate estimate) x 3  answer answer answer

with bytes of how long ago the pair last answered, how much it varies from one measurement to the
next, the share that failed of late and how many failed at the end; then estimates of the log RTT,
as differences to the median of the last three, which is also what the answer differs from. Only
what came before a moment is known at it.
"""

import dataclasses
import functools

import numpy as np

from ping_llm.data.cells import (
    ANSWER_TOKENS,
    NOTHING,
    OVER_TIME,
    Grids,
    answer_tokens,
    high_byte,
    level,
    low_byte,
)
from ping_llm.estimators.pairs import lookup as find
from ping_llm.estimators.pairs import pair_keys, runs, without_repeats
from ping_llm.estimators.world import log_rtt_of
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.tokenizer import BYTE_0, GRID

KIND = BYTE_0 + 2
MOMENTS = (61, 25, 9, 0)  # measurements before the question's
WINDOW = 99  # answered measurements that estimates are made of
LONGEST = MOMENTS[0] + WINDOW
FAILURE_WINDOW = 25
NOISE_WINDOW = 49
LAGS = ((3600, 1), (86_400, 2))  # an hour and a day ago, and how many either side are looked at
SHORT, LONG = 13, 3  # estimates of one byte, of two
ROW_TOKENS = 4 + SHORT + 2 * LONG + ANSWER_TOKENS
HEADER_TOKENS = 3
HISTORY_TOKENS = HEADER_TOKENS + len(MOMENTS) * ROW_TOKENS - ANSWER_TOKENS


@dataclasses.dataclass(frozen=True)
class PairSeries:
    """Measurements by unordered pair, in time order.

    Attributes:
        key: Key of each pair, ascending [p].
        start: Pair i has measurements `start[i]:start[i + 1]` [p + 1].
        time: When, in s; `NO_TIME` where that is not known, which comes first [m].
        log_rtt: Log RTT in ms, infinite where it failed [m], float32.
        answered: How many were answered before each measurement, over all pairs [m + 1].
        answer: Which ones those are [a].
    """

    key: np.ndarray
    start: np.ndarray
    time: np.ndarray
    log_rtt: np.ndarray
    answered: np.ndarray
    answer: np.ndarray

    @classmethod
    def of(cls, measurements: MeasurementTable) -> "PairSeries":
        """Returns the series of all pairs of a table, either direction in one."""
        measurements = without_repeats(measurements)
        key = pair_keys(measurements)
        starts, _ = runs(key)
        return cls._made(key[starts], starts, measurements.time, log_rtt_of(measurements.rtt))

    @classmethod
    def of_series(cls, series: list[tuple[np.ndarray, np.ndarray]]) -> "PairSeries":
        """Returns series of (times, RTTs in ms) as if each were of a pair."""
        lengths = np.array([len(time) for time, _ in series])
        time, rtt = (np.concatenate(each) for each in zip(*series, strict=True))
        starts = np.cumsum(lengths) - lengths
        return cls._made(np.arange(len(series)), starts, time.astype(np.int64), log_rtt_of(rtt))

    @classmethod
    def _made(cls, key, starts, time, log_rtt) -> "PairSeries":
        known = np.isfinite(log_rtt)
        answered = np.append(0, np.cumsum(known))
        start = np.append(starts, len(time))
        return cls(key, start, time, log_rtt, answered, np.flatnonzero(known))

    def mean_length(self) -> float:
        """Returns how many measurements a pair has, as a measurement sees it."""
        counts = np.diff(self.start).astype(float)
        return float((counts**2).sum() / max(counts.sum(), 1))

    @functools.cached_property
    def _bounds(self) -> tuple[int, int]:
        """Returns the first and the last known time; of none, one second."""
        known = self.time[self.time != NO_TIME]
        return (int(known.min()), int(known.max())) if len(known) else (0, 0)

    def _ranked(self, pair: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Returns numbers that order measurements by pair and time, unknown times first."""
        oldest, newest = self._bounds
        known = np.clip(time, oldest, newest + 1) - oldest + 1
        return pair * (newest - oldest + 3) + np.where(time == NO_TIME, 0, known)

    @functools.cached_property
    def _ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ranks of all measurements, and of the answered ones."""
        owner = np.repeat(np.arange(len(self.key)), np.diff(self.start))
        ranks = self._ranked(owner, self.time)
        return ranks, ranks[self.answer]

    def first_at(self, pair: np.ndarray, time: np.ndarray, *, answered: bool) -> np.ndarray:
        """Returns the first measurement of each pair at `time` or later [q], or where it would be.

        Args:
            pair: Which pairs [q].
            time: When [q].
            answered: Whether only answered ones count; the result is then an index in `answer`.
        """
        return np.searchsorted(self._ranks[answered], self._ranked(pair, time))


def lookup(
    series: PairSeries, questions: MeasurementTable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (pair, stop, time) of questions, as `history_grids` takes them [q] each.

    What is known of a pair is what came at strictly earlier times; all of it, where the question
    has no time. Pair is -1 where none of that was answered.
    """
    pair = find(series.key, pair_keys(questions))
    there = np.maximum(pair, 0)
    if not len(series.key):
        return pair, pair, questions.time
    end = series.start[there + 1]
    stop = np.where(questions.has_time, series.first_at(there, questions.time, answered=False), end)
    answered = series.answered[stop] > series.answered[series.start[there]]
    return np.where(answered, pair, -1), stop - series.start[there], questions.time


def moments(series: PairSeries) -> np.ndarray:
    """Returns the measurements at a known time that an earlier one of their pair answered [k]."""
    position = np.arange(len(series.time))
    pair, stop = _before(series, position)
    told = series.answered[stop] > series.answered[series.start[pair]]
    return np.flatnonzero(told & (series.time != NO_TIME))


def _before(series: PairSeries, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the pair of each measurement, the first of it that is not strictly earlier) [q]."""
    pair = np.searchsorted(series.start, position, side="right") - 1
    return pair, series.first_at(pair, series.time[position], answered=False)


def at_moments(
    series: PairSeries, position: np.ndarray, forgotten: np.ndarray | None = None
) -> tuple[Grids, np.ndarray]:
    """Returns (grids that ask for measurements at `position` [q], their log RTTs [q]).

    Args:
        series: The series.
        position: Which measurements.
        forgotten: How many of the oldest measurements are not known [q]; None: 0.
    """
    pair, end = _before(series, position)
    grids = history_grids(series, pair, end - series.start[pair], series.time[position], forgotten)
    return grids, series.log_rtt[position]


def history_grids(
    series: PairSeries,
    pair: np.ndarray,
    stop: np.ndarray,
    time: np.ndarray,
    forgotten: np.ndarray | None = None,
) -> Grids:
    """Returns the grids of questions about pairs over time [q].

    Args:
        series: What was measured.
        pair: Which pair of `series`.
        stop: How many of its measurements are known, from the oldest on.
        time: When it is asked; `NO_TIME`: not known.
        forgotten: How many of those are not known after all; None: 0.
    """
    first = series.start[pair] + (0 if forgotten is None else forgotten)
    end = series.start[pair] + stop
    tokens = np.full((len(pair), HEADER_TOKENS + len(MOMENTS) * ROW_TOKENS), NOTHING)
    weights = np.zeros(tokens.shape, np.float32)
    tokens[:, 0], tokens[:, 1] = GRID, KIND
    tokens[:, 2] = level((end - first).astype(float), 1.0, 8)
    reference = np.full(len(pair), np.nan)
    for i, ago in enumerate(MOMENTS):
        at = end - ago
        here = at >= first + (ago > 0)
        asked = np.minimum(np.maximum(at, first), len(series.time) - 1)
        when = time if ago == 0 else series.time[asked]
        span = slice(HEADER_TOKENS + i * ROW_TOKENS, HEADER_TOKENS + (i + 1) * ROW_TOKENS)
        row, weight = tokens[:, span], weights[:, span]
        before, reference = reference, np.full(len(pair), np.nan)
        known = np.flatnonzero(here)
        cells, reference[known] = _row(
            series, pair[known], first[known], at[known], when[known], before[known]
        )
        row[known, :-ANSWER_TOKENS] = cells
        if ago:
            told = known[np.isfinite(reference[known])]
            answer = answer_tokens(series.log_rtt[at[told]] - reference[told], OVER_TIME)
            row[told, -ANSWER_TOKENS:], weight[told, -ANSWER_TOKENS:] = answer
    tokens, weights = tokens[:, :-ANSWER_TOKENS], weights[:, :-ANSWER_TOKENS]
    shown = np.minimum(end - first, LONGEST)
    return Grids(tokens.astype(np.uint16), weights, reference, OVER_TIME, shown)


def _row(
    series: PairSeries,
    pair: np.ndarray,
    first: np.ndarray,
    at: np.ndarray,
    when: np.ndarray,
    before: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the tokens of a row without its answer [q, ...], its reference [q]).

    Args:
        series: What was measured.
        pair: Which pair.
        first: Its first measurement that is known.
        at: The first that is not known any more.
        when: The time of the moment.
        before: The reference of the row above; NaN: none.
    """
    if not len(pair):
        return np.zeros((0, ROW_TOKENS - ANSWER_TOKENS), np.int64), np.zeros(0)
    low, high = series.answered[first], series.answered[at]
    count = high - low
    index = high[:, None] - 1 - np.arange(WINDOW)  # the newest first
    there = index >= low[:, None]
    which = series.answer[np.maximum(index, 0)] if len(series.answer) else index * 0
    newest = np.where(there, series.log_rtt[which], np.nan).astype(np.float64)

    def median(of: int, fewest: int) -> np.ndarray:
        return np.where(count >= fewest, _median(newest[:, :of]), np.nan)

    reference = median(3, 1)
    hundred = np.sort(newest, axis=1)  # NaN last
    tails = []
    for share in (0.1, 0.9):
        rank = np.rint(share * (np.minimum(count, WINDOW) - 1)).astype(np.int64)
        value = hundred[np.arange(len(pair)), np.maximum(rank, 0)]
        tails.append(np.where(count >= 20, value, np.nan))
    lagged = [_lagged(series, pair, low, high, when, *lag) for lag in LAGS]
    short = [*newest[:, 2:8].T, median(25, 13), median(99, 50), *tails, *lagged, before]
    steps = _median(np.abs(np.diff(newest[:, : NOISE_WINDOW + 1], axis=1)))
    noise = np.where(count >= 5, steps, np.nan)
    timed = (series.time[which[:, 0]] != NO_TIME) & (when != NO_TIME) & (count > 0)
    age = np.where(timed, (when - series.time[which[:, 0]]).astype(float), np.nan)
    back = at[:, None] - 1 - np.arange(FAILURE_WINDOW)
    known = back >= first[:, None]
    failed = known & np.isposinf(series.log_rtt[np.maximum(back, 0)])
    share = failed.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    in_a_row = np.cumprod(failed, axis=1).sum(axis=1)
    tokens = np.full((len(pair), ROW_TOKENS - ANSWER_TOKENS), NOTHING)
    tokens[:, 0] = level(age, 1.0, 8)
    tokens[:, 1] = level(noise, 1e-5, 8)
    tokens[:, 2] = NOTHING + 1 + np.rint(64 * share)
    tokens[:, 3] = NOTHING + 1 + in_a_row
    for i, estimate in enumerate(short):
        tokens[:, 4 + i] = _cell(estimate - reference)[0]
    for i, estimate in enumerate((newest[:, 0], newest[:, 1], median(9, 5))):
        tokens[:, 4 + SHORT + 2 * i : 6 + SHORT + 2 * i] = np.stack(
            _cell(estimate - reference), axis=1
        )
    tokens[count == 0, 4:] = NOTHING
    return tokens, reference


def _median(values: np.ndarray) -> np.ndarray:
    """Returns the median of each row without its NaNs, NaN where there is nothing else [q]."""
    ordered = np.sort(values, axis=1)
    count = np.count_nonzero(~np.isnan(values), axis=1)
    rows = np.arange(len(values))
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, values.shape[1] - 1)
    return (ordered[rows, low] + ordered[rows, high]) / 2


def _lagged(series, pair, low, high, when, lag: int, either_side: int) -> np.ndarray:
    """Returns the median log RTT around `lag` seconds before, NaN where none is near [q]."""
    result = np.full(len(pair), np.nan)
    some = np.flatnonzero(when != NO_TIME)
    if not len(series.answer) or not len(some):
        return result
    wanted = when[some] - lag
    at = series.first_at(pair[some], wanted, answered=True)
    inside = (at - either_side >= low[some]) & (at + either_side < high[some])
    at = np.where(inside, at, either_side)
    off = np.abs(series.time[series.answer[np.minimum(at, len(series.answer) - 1)]] - wanted)
    around = at[:, None] + np.arange(-either_side, either_side + 1)
    values = series.log_rtt[series.answer[np.minimum(around, len(series.answer) - 1)]]
    result[some] = np.where(inside & (off < lag / 4), np.median(values, axis=1), np.nan)
    return result


def _cell(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    told = np.isfinite(difference)
    code = OVER_TIME.encode(np.where(told, difference, 0))
    high, low = high_byte(code), low_byte(code)
    return np.where(told, high, NOTHING), np.where(told, low, NOTHING)
