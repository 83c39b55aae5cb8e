"""Estimates of a measurement from those of the same pair before it."""

import numpy as np

from ping_llm.estimators.pairs import MIN_RTT_MS, earlier
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

EMA_WEIGHT = 0.3  # of the newest measurement; each one before has 0.7 of the next
EMA_OF = 32  # measurements; those before have 1e-5 of the weight


def _newest(history: MeasurementTable, queries: MeasurementTable, count: int) -> np.ndarray:
    """Returns the last `count` RTTs of each query's pair before it [n, count], NaN where fewer.

    The newest comes first. Failed measurements and those of the same second do not count.
    """
    history = history.take(history.rtt >= 0)
    key, asked = (mix(hash_addresses(t.src), hash_addresses(t.dst)) for t in (history, queries))
    order, begin, stop = earlier(key, history.time, asked, queries.time)
    index = stop[:, None] - 1 - np.arange(count)
    rtt = np.append(history.rtt[order].astype(np.float64), np.nan)
    return rtt[np.where(index >= begin[:, None], index, -1)]


def _median(history: MeasurementTable, queries: MeasurementTable, of: int) -> np.ndarray:
    values = np.sort(_newest(history, queries, of), axis=1)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=1)
    rows = np.arange(len(values))
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    return (values[rows, low] + values[rows, np.minimum(high, of - 1)]) / 2


def last_value(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the RTT of each query's pair that came last before it; NaN where there is none."""
    return _newest(history, queries, 1)[:, 0]


def median3(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the median of up to 3 RTTs of each query's pair before it; NaN where none is."""
    return _median(history, queries, 3)


def median9(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the median of up to 9 RTTs of each query's pair before it; NaN where none is."""
    return _median(history, queries, 9)


def ema(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the exponential moving average of the log of each query's pair's RTTs before it.

    It has weight 0.3 for the newest and goes back 32 measurements; NaN where there is none.
    """
    logs = np.log(np.maximum(_newest(history, queries, EMA_OF), MIN_RTT_MS))
    weights = np.where(np.isnan(logs), 0, (1 - EMA_WEIGHT) ** np.arange(EMA_OF))
    # The oldest starts the average, so what all before it would weigh falls to it.
    count = np.count_nonzero(weights, axis=1)
    some = np.flatnonzero(count)
    weights[some, count[some] - 1] /= EMA_WEIGHT
    sums = np.einsum("nk,nk->n", np.nan_to_num(logs), weights)
    mean = np.full(len(logs), np.nan)
    mean[some] = sums[some] / weights[some].sum(axis=1)
    return np.exp(mean)
