"""The classical methods that the model is measured against, by name.

A static method is fitted once, on training measurements. An online method predicts each measurement
from those of the same pair before it. Where a method has nothing to say about a pair, the medians
speak for it: of the source, of the destination, of everything.
"""

from collections.abc import Callable

import numpy as np

from ping_llm import addresses
from ping_llm.estimators.coordinates import fit_vivaldi
from ping_llm.estimators.factorisation import PredictPairs, fit_biased_mf, fit_dmfsgd
from ping_llm.estimators.neighbours import fit_neighbours
from ping_llm.estimators.pairs import Training, grouped_median
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

ADDITIVE_SWEEPS = 30
MEDIAN_OF = 9
# Bits of a prefix that pairs share, by family; first whole addresses.
PREFIXES = {4: (32, 24, 16), 6: (128, 48, 32)}

# Predicts RTTs in ms [n] of the pairs of some measurements; NaN where it cannot.
Predict = Callable[[MeasurementTable], np.ndarray]


def _by_nodes(train: Training, predict: PredictPairs) -> Predict:
    """Returns `predict` for measurements: NaN where an address was not in training."""

    def predict_rtt(queries: MeasurementTable) -> np.ndarray:
        a, b = train.nodes.lookup(queries.src), train.nodes.lookup(queries.dst)
        known = (a >= 0) & (b >= 0)
        rtt = np.full(len(queries), np.nan)
        rtt[known] = predict(a[known], b[known])
        return rtt

    return predict_rtt


def _node_medians(train: Training) -> np.ndarray:
    one, _, rtt = train.directed
    return grouped_median(one, rtt)[1]  # every node is in some pair


def fit_global_median(train: Training) -> Predict:
    """Returns the median of all pairs."""
    median = np.median(train.pairs[2])
    return lambda queries: np.full(len(queries), median)


def fit_src_median(train: Training) -> Predict:
    """Returns the median of the pairs of the source."""
    medians = np.r_[_node_medians(train), np.nan]
    return lambda queries: medians[train.nodes.lookup(queries.src)]


def fit_dst_median(train: Training) -> Predict:
    """Returns the median of the pairs of the destination."""
    medians = np.r_[_node_medians(train), np.nan]
    return lambda queries: medians[train.nodes.lookup(queries.dst)]


def fit_additive(train: Training) -> Predict:
    """Returns the fit of log RTT = one number a node, summed over both ends, in absolute error."""
    one, other, rtt = train.directed
    y = np.log(rtt)
    part = np.zeros(len(train.nodes))
    center = np.median(y)
    for _ in range(ADDITIVE_SWEEPS):
        # Half a step, for both ends move at once.
        part += (grouped_median(one, y - center - part[other])[1] - part) / 2
        center = np.median(y - part[one] - part[other])
    return _by_nodes(train, lambda a, b: np.exp(center + part[a] + part[b]))


def _prefix_pair(measurements: MeasurementTable, level: int) -> np.ndarray:
    """Returns one key for each unordered pair of prefixes; level 0 is of whole addresses."""
    family = measurements.family
    bits = np.where(family == 4, PREFIXES[4][level], PREFIXES[6][level])
    a, b = (
        hash_addresses(addresses.prefix(ends, bits))
        for ends in (measurements.src, measurements.dst)
    )
    return mix(np.minimum(a, b), np.maximum(a, b), family)


def fit_prefix(train: Training) -> Predict:
    """Returns the median of the pair; of the pair of /24s where it is new; else of the /16s.

    For IPv6 these are /48 and /32.
    """
    tables = [
        grouped_median(_prefix_pair(train.measurements, level), train.rtt) for level in range(3)
    ]

    def predict_rtt(queries: MeasurementTable) -> np.ndarray:
        rtt = np.full(len(queries), np.nan)
        for level, (keys, medians) in enumerate(tables):
            wanted = _prefix_pair(queries, level)
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            rtt = np.where(np.isnan(rtt) & (keys[at] == wanted), medians[at], rtt)
        return rtt

    return predict_rtt


STATIC: dict[str, Callable[[Training], Predict]] = {
    "global_median": fit_global_median,
    "src_median": fit_src_median,
    "dst_median": fit_dst_median,
    "additive": fit_additive,
    "prefix": fit_prefix,
    "vivaldi": lambda train: _by_nodes(train, fit_vivaldi(train)),
    "dmfsgd": lambda train: _by_nodes(train, fit_dmfsgd(train)),
    "biased_mf": lambda train: _by_nodes(train, fit_biased_mf(train)),
    "neighbours": lambda train: _by_nodes(train, fit_neighbours(train)),
}


def fit(name: str, train: Training) -> Predict:
    """Returns the static method `name`, fitted; where it has no answer, the medians have one."""
    methods = [STATIC[name](train), fit_src_median(train), fit_dst_median(train)]

    def predict_rtt(queries: MeasurementTable) -> np.ndarray:
        rtt = methods[0](queries)
        for fallback in (*methods[1:], fit_global_median(train)):
            missing = np.isnan(rtt)
            if missing.any():
                rtt = np.where(missing, fallback(queries), rtt)
        return rtt

    return predict_rtt


def _earlier(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the last `MEDIAN_OF` RTTs of each query's pair before it [n, 9], NaN where fewer.

    The newest comes first. Failed measurements and those of the same second do not count.
    """
    answered = np.flatnonzero(history.rtt >= 0)
    src, dst = (
        hash_addresses(history.src[answered]),
        hash_addresses(history.dst[answered]),
    )
    pairs, pair = np.unique(mix(src, dst), return_inverse=True)
    time = history.time[answered]
    first = min(time.min(initial=2**62), queries.time.min(initial=2**62))
    span = max(time.max(initial=0), queries.time.max(initial=0)) - first + 1
    keys = pair * span + (time - first)
    order = np.argsort(keys, kind="stable")
    keys, rtt = keys[order], history.rtt[answered][order].astype(np.float64)

    wanted = mix(hash_addresses(queries.src), hash_addresses(queries.dst))
    number = np.searchsorted(pairs, wanted)
    known = number < len(pairs)
    known[known] = pairs[number[known]] == wanted[known]
    start = np.searchsorted(keys, number * span)
    stop = np.searchsorted(keys, number * span + (queries.time - first))
    at = stop[:, None] - 1 - np.arange(MEDIAN_OF)
    found = known[:, None] & (at >= start[:, None])
    return np.where(found, np.append(rtt, np.nan)[np.where(found, at, -1)], np.nan)


def last_value(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the RTT of each query's pair that came last before it; NaN where there is none."""
    return _earlier(history, queries)[:, 0]


def median9(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the median of up to 9 RTTs of each query's pair before it; NaN where none is."""
    values = np.sort(_earlier(history, queries), axis=1)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=1)
    rows = np.arange(len(values))
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    return (values[rows, low] + values[rows, np.minimum(high, MEDIAN_OF - 1)]) / 2


ONLINE: dict[str, Callable[[MeasurementTable, MeasurementTable], np.ndarray]] = {
    "last_value": last_value,
    "median9": median9,
}
