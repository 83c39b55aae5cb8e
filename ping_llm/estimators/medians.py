"""Medians: of all pairs, of one end's pairs, of networks; and one number a node."""

import numpy as np

from ping_llm import addresses
from ping_llm.estimators.pairs import (
    Predict,
    PredictPairs,
    Training,
    between_nodes,
    grouped_median,
    lookup,
)
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

ADDITIVE_SWEEPS = 30
# Bits of a prefix that pairs share, by family; first whole addresses.
PREFIXES = {4: (32, 24, 16), 6: (128, 48, 32)}


def _node_medians(train: Training) -> np.ndarray:
    """Returns the median RTT of the pairs of each node, then NaN for other addresses [N + 1]."""
    one, _, rtt = train.directed
    return np.r_[grouped_median(one, rtt)[1], np.nan]  # every node is in some pair


def fit_global_median(train: Training) -> Predict:
    """Returns the median of all pairs."""
    median = np.median(train.pairs[2])
    return lambda queries: np.full(len(queries), median)


def fit_src_median(train: Training) -> Predict:
    """Returns the median of the pairs of the source."""
    medians = _node_medians(train)
    return lambda queries: medians[train.nodes.lookup(queries.src)]


def fit_dst_median(train: Training) -> Predict:
    """Returns the median of the pairs of the destination."""
    medians = _node_medians(train)
    return lambda queries: medians[train.nodes.lookup(queries.dst)]


def fill(rtt: np.ndarray, train: Training, queries: MeasurementTable) -> np.ndarray:
    """Returns `rtt` [n], NaN replaced by the median of the source, the destination, or all."""
    for fit in (fit_src_median, fit_dst_median, fit_global_median):
        missing = np.isnan(rtt)
        if missing.any():
            rtt = np.where(missing, fit(train)(queries), rtt)
    return rtt


@between_nodes
def fit_additive(train: Training) -> PredictPairs:
    """Returns the fit of log RTT = one number a node, summed over both ends, in absolute error."""
    one, other, rtt = train.directed
    y = np.log(rtt)
    effect = np.zeros(len(train.nodes))
    center = np.median(y)
    for _ in range(ADDITIVE_SWEEPS):
        # Half a step, for both ends move at once.
        effect += (grouped_median(one, y - center - effect[other])[1] - effect) / 2
        center = np.median(y - effect[one] - effect[other])
    return lambda a, b: np.exp(center + effect[a] + effect[b])


def _prefix_pair(measurements: MeasurementTable, level: int) -> np.ndarray:
    """Returns one key for each unordered pair of prefixes; level 0 is of whole addresses."""
    family = measurements.family
    bits = np.where(family == 4, PREFIXES[4][level], PREFIXES[6][level])
    ends = (measurements.src, measurements.dst)
    a, b = (hash_addresses(addresses.prefix(end, bits)) for end in ends)
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
            index = lookup(keys, _prefix_pair(queries, level))
            rtt = np.where(np.isnan(rtt), np.append(medians, np.nan)[index], rtt)
        return rtt

    return predict_rtt
