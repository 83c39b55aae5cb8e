"""Estimates of a measurement from those of the same pair before it."""

import numpy as np

from ping_llm.estimators.pairs import earlier
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

MEDIAN_OF = 9


def _newest(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the last `MEDIAN_OF` RTTs of each query's pair before it [n, 9], NaN where fewer.

    The newest comes first. Failed measurements and those of the same second do not count.
    """
    history = history.take(history.rtt >= 0)
    key, asked = (mix(hash_addresses(t.src), hash_addresses(t.dst)) for t in (history, queries))
    order, begin, stop = earlier(key, history.time, asked, queries.time)
    index = stop[:, None] - 1 - np.arange(MEDIAN_OF)
    rtt = np.append(history.rtt[order].astype(np.float64), np.nan)
    return rtt[np.where(index >= begin[:, None], index, -1)]


def last_value(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the RTT of each query's pair that came last before it; NaN where there is none."""
    return _newest(history, queries)[:, 0]


def median9(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the median of up to 9 RTTs of each query's pair before it; NaN where none is."""
    values = np.sort(_newest(history, queries), axis=1)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=1)
    rows = np.arange(len(values))
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    return (values[rows, low] + values[rows, np.minimum(high, MEDIAN_OF - 1)]) / 2
