"""What the estimators share: numbered nodes, medians by group, and the past of each question."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ping_llm.errors import DataError
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

MIN_RTT_MS = 0.001  # the token language's smallest step; keeps logarithms finite

# RTTs in ms [n] of the pairs of some measurements; NaN where there is no estimate.
Predict = Callable[[MeasurementTable], np.ndarray]
# The same between nodes by number, arrays [n] in and out.
PredictPairs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def lookup(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the index in the ascending `keys` of each of `wanted`; -1 where it is not there."""
    if not len(keys):
        return np.full(np.shape(wanted), -1)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, index, -1)


def pair_keys(measurements: MeasurementTable) -> np.ndarray:
    """Returns a 64-bit key of each unordered pair of addresses [n]."""
    src, dst = hash_addresses(measurements.src), hash_addresses(measurements.dst)
    return mix(np.minimum(src, dst), np.maximum(src, dst))


def without_repeats(measurements: MeasurementTable) -> MeasurementTable:
    """Returns measurements each once, in the order of their pairs and times.

    Rows prepared with both ends hold each twice, turned round. What has the same pair, time and RTT
    is one measurement; those without a time are all kept.
    """
    key = pair_keys(measurements)
    order = np.lexsort((measurements.rtt, measurements.time, key))
    columns = (key[order], measurements.time[order], measurements.rtt[order])
    same = np.all([each[1:] == each[:-1] for each in columns], axis=0)
    repeated = np.append(False, same)[: len(order)] & measurements.has_time[order]
    return measurements.take(order[~repeated])


def runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (where each run of equal values starts in a sorted array, its length)."""
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    return starts, np.diff(np.r_[starts, len(ordered)])


def grouped_median(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct keys, ascending; the median of each one's values)."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    starts, counts = runs(keys)
    low, high = starts + (counts - 1) // 2, starts + counts // 2
    return keys[starts], (values[low] + values[high]) / 2


def grouped_weighted_median(
    keys: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct keys, ascending; the median of each one's values by weight above 0).

    Half the weight is below it; where that is so between two values, it is their mean.
    """
    # Values 1 2 5 of weights 2 1 1: of 4, up to each value, 2 3 4; 2 is half, so (1 + 2) / 2.
    order = np.lexsort((values, keys))
    keys, values, weights = keys[order], values[order], weights[order]
    starts, counts = runs(keys)
    if not len(starts):
        return keys, values
    # Relative to the greatest, so that the sums of all groups are of one order.
    weights = weights / np.repeat(np.maximum.reduceat(weights, starts), counts)
    total = np.add.reduceat(weights, starts)
    before = np.cumsum(total) - total
    share = (np.cumsum(weights) - np.repeat(before, counts)) / np.repeat(total, counts)
    low = np.add.reduceat(share < 0.5 - 1e-9, starts, dtype=np.int64)
    high = np.add.reduceat(share < 0.5 + 1e-9, starts, dtype=np.int64)
    low, high = (starts + np.minimum(each, counts - 1) for each in (low, high))
    return keys[starts], (values[low] + values[high]) / 2


def earlier(
    key: np.ndarray, time: np.ndarray, asked_key: np.ndarray, asked_time: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (order, begin, stop): the past of question i is `order[begin[i]:stop[i]]`.

    These are the measurements of its key at earlier times, oldest first. `NO_TIME` is before all
    times: a measurement without a time counts as the oldest, a question without one has no past.

    Args:
        key: Key of each measurement [m].
        time: When each was made [m], int64.
        asked_key: Key of each question [n].
        asked_time: When each is asked [n], int64.
    """
    keys, group = np.unique(key, return_inverse=True)
    times, rank = np.unique(np.r_[time, asked_time], return_inverse=True)
    ranks = group * len(times) + rank[: len(time)]
    order = np.argsort(ranks, kind="stable")
    first = lookup(keys, asked_key) * len(times)  # below 0 where the key is new
    asked = first + rank[len(time) :]
    begin, stop = (np.searchsorted(ranks, each, sorter=order) for each in (first, asked))
    return order, begin, stop


class Nodes:
    """The addresses of a table, numbered.

    Attributes:
        addresses: Address of each number [N], `addresses.ADDRESS`, in the order of their hashes.
    """

    def __init__(self, *columns: np.ndarray):
        """Numbers every address in `columns`, each [n]."""
        addresses = np.concatenate(columns)
        self._hashes, first = np.unique(hash_addresses(addresses), return_index=True)
        self.addresses = addresses[first]

    def __len__(self) -> int:
        return len(self.addresses)

    def lookup(self, addresses: np.ndarray) -> np.ndarray:
        """Returns the number of each address [n], int64; -1 for those that are not here."""
        return lookup(self._hashes, hash_addresses(addresses))


@dataclasses.dataclass(frozen=True)
class Training:
    """What estimators are fitted on: answered measurements between numbered nodes.

    A round trip goes both ways, so a pair is unordered everywhere here: its median stands for
    either direction.

    Attributes:
        measurements: The measurements themselves, n of them.
        nodes: The addresses, numbered.
        src: Source node of each measurement [n], int64.
        dst: Destination node [n], int64.
        rtt: RTT in ms, at least `MIN_RTT_MS` [n], float64.
    """

    measurements: MeasurementTable
    nodes: Nodes
    src: np.ndarray
    dst: np.ndarray
    rtt: np.ndarray

    @classmethod
    def of(cls, measurements: MeasurementTable) -> "Training":
        """Returns the answered ones of `measurements`.

        Raises:
            DataError: None was answered.
        """
        answered = measurements.take(measurements.rtt >= 0)
        if not len(answered):
            raise DataError("no measurement to fit on was answered; give data with RTTs")
        nodes = Nodes(answered.src, answered.dst)
        src, dst = nodes.lookup(answered.src), nodes.lookup(answered.dst)
        rtt = np.maximum(answered.rtt.astype(np.float64), MIN_RTT_MS)
        return cls(answered, nodes, src, dst, rtt)

    @functools.cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (a, b, median RTT) of every unordered pair, a <= b."""
        low, high = np.minimum(self.src, self.dst), np.maximum(self.src, self.dst)
        keys, median = grouped_median(low * len(self.nodes) + high, self.rtt)
        return keys // len(self.nodes), keys % len(self.nodes), median

    @functools.cached_property
    def directed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `pairs` from both ends: (one end, the other end, median RTT)."""
        a, b, median = self.pairs
        both = a != b
        return np.r_[a, b[both]], np.r_[b, a[both]], np.r_[median, median[both]]


def between_nodes(fit: Callable[[Training], PredictPairs]) -> Callable[[Training], Predict]:
    """Returns `fit` for measurements: no estimate where an address was not in training."""

    @functools.wraps(fit)
    def fit_measurements(train: Training) -> Predict:
        predict = fit(train)

        def predict_rtt(queries: MeasurementTable) -> np.ndarray:
            a, b = train.nodes.lookup(queries.src), train.nodes.lookup(queries.dst)
            seen = (a >= 0) & (b >= 0)
            rtt = np.full(len(queries), np.nan)
            rtt[seen] = predict(a[seen], b[seen])
            return rtt

        return predict_rtt

    return fit_measurements
