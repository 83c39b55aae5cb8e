"""Nearest neighbours by a weighted median, where little is measured as well."""

import numpy as np

from ping_llm import addresses
from ping_llm.estimators.coordinates import embed
from ping_llm.estimators.pairs import Nodes, Predict, Training, grouped_weighted_median
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable

LANDMARKS = 256  # nodes of most pairs, by which others are compared
REFERENCES = 64  # nodes to which coordinates say how alike two others measure
STAND_INS = 1024  # of a node's pairs, those with the nodes of most pairs
SHARPNESS = 4.0  # how much more a nearer neighbour counts
NEAREST = 1e-6  # a distance that is not 0
SAMPLED = 20_000  # pairs of nodes, to know how much random ones differ
UNKNOWN_DIFFERENCE = 0.5  # in log RTT, where none of them has a landmark in common
PRIOR_WEIGHT, USUAL_WEIGHT = 2.0, 0.03  # common partners that an expectation counts as
UNSURE = 0.3  # of the usual difference, what estimates leave open of a node without partners
# Of 32 bits; those of IPv6 count half. Sharing fewer than 16 says nothing.
PREFIX_BITS = (12, 16, 20, 24, 28)
PREFIX_DIFFERENCE = np.array([1, 0.9, 0.7, 0.5, 0.3, 0.2])  # of the usual one, until measured
PREFIX_PRIOR = 20  # common landmarks that say so
BLOCK = 1_000_000  # candidates at a time
ROWS = 20_000  # profiles compared at a time


class _Likeness:
    """How differently two nodes measure: the mean difference of log RTT to common landmarks.

    Coordinates and the longest common prefix say what to expect where there are few of them. Node
    -1 stands for an address that was not measured.
    """

    def __init__(self, train: Training):
        one, other, rtt = train.directed
        n, key = len(train.nodes), hash_addresses(train.nodes.addresses)
        self.addresses = train.nodes.addresses
        self.degree = np.append(np.bincount(one, minlength=n), 0)
        landmarks = np.lexsort((key, -self.degree[:-1]))[:LANDMARKS]
        column = np.full(n, -1)
        column[landmarks] = np.arange(len(landmarks))
        chosen = column[other] >= 0
        self.profile = np.full((n + 1, len(landmarks)), np.nan, np.float32)
        self.profile[one[chosen], column[other[chosen]]] = np.log(rtt[chosen])
        a, b, median = train.pairs
        log_rtt, order = embed(a, b, np.log(median), key), np.argsort(key)
        self.expected = np.full((n + 1, min(n, REFERENCES)), np.nan, np.float32)
        for i, reference in enumerate(order[:REFERENCES]):
            self.expected[:-1, i] = log_rtt(np.arange(n), np.full(n, reference))
        total, common = self._compare(*order[np.random.default_rng(0).integers(0, n, (2, SAMPLED))])
        enough = common.sum() > PREFIX_PRIOR
        self.typical = total.sum() / common.sum() if enough else UNKNOWN_DIFFERENCE
        self.by_prefix = self._by_prefix()

    def _by_prefix(self) -> np.ndarray:
        """Returns the usual difference of nodes by class of their common prefix [6]."""
        order = np.lexsort(addresses.words(self.addresses)[::-1])
        steps = [step for step in 2 ** np.arange(8) if step < len(order)]
        one = np.concatenate([order[:0], *(order[:-step] for step in steps)])
        other = np.concatenate([order[:0], *(order[step:] for step in steps)])
        band = prefix_class(self.addresses[one], self.addresses[other])
        return usual_by_prefix(*self._compare(one, other), self.typical, band)

    def _compare(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (sum of the differences, number of common landmarks) of pairs of nodes [n]."""
        total, common = np.zeros(len(one)), np.zeros(len(one))
        for i in range(0, len(one), ROWS):
            rows = slice(i, i + ROWS)
            apart = np.abs(self.profile[one[rows]] - self.profile[other[rows]])
            total[rows] = np.nansum(apart, axis=1)
            common[rows] = np.count_nonzero(~np.isnan(apart), axis=1)
        return total, common

    def distances(self, one: np.ndarray, address: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Returns how differently nodes `one`, of these addresses, and `other` measure [n]."""
        total, common = self._compare(one, other)
        apart = np.empty(len(one))
        for i in range(0, len(one), ROWS):
            rows = slice(i, i + ROWS)
            apart[rows] = np.abs(self.expected[one[rows]] - self.expected[other[rows]]).mean(axis=1)
        degrees = self.degree[one], self.degree[other]
        expected = expected_difference(apart, *degrees, self.typical)
        band = prefix_class(address, self.addresses[other])
        usual = self.by_prefix[band]
        expected = with_prefix(expected, usual, band)
        difference = shrunk_difference(total, common, expected, usual, *degrees)
        return np.where(one == other, NEAREST, np.maximum(difference, NEAREST))


def expected_difference(
    apart: np.ndarray, degree_a: np.ndarray, degree_b: np.ndarray, typical: float
) -> np.ndarray:
    """Returns how differently nodes are expected to measure where they have no partner in common.

    Args:
        apart: How far estimates of both nodes' log RTTs lie from each other; NaN: there are none.
        degree_a: How many partners the first node of each pair has.
        degree_b: How many the second has; few leave more open.
        typical: How differently random nodes measure.
    """
    unsure = UNSURE * typical * (1 / np.sqrt(1 + degree_a) + 1 / np.sqrt(1 + degree_b))
    measured = np.minimum(degree_a, degree_b) > 0
    return np.fmin(1.2 * typical, np.where(measured, apart + unsure, np.nan))


def usual_by_prefix(
    total: np.ndarray, common: np.ndarray, typical: float, band: np.ndarray
) -> np.ndarray:
    """Returns the usual difference of nodes by class of their common prefix [6].

    Args:
        total: Sum of the differences of log RTT of two nodes to common partners.
        common: How many partners are common.
        typical: How differently random nodes measure.
        band: The `prefix_class` of the two.
    """
    classes = len(PREFIX_DIFFERENCE)
    sums, counts = (np.bincount(band.ravel(), each.ravel(), classes) for each in (total, common))
    prior = PREFIX_PRIOR * typical * PREFIX_DIFFERENCE
    return np.minimum.accumulate((sums + prior) / (counts + PREFIX_PRIOR))


def with_prefix(expected: np.ndarray, usual: np.ndarray, band: np.ndarray) -> np.ndarray:
    """Returns expected differences, smaller where addresses share so long a prefix that it says so.

    Args:
        expected: What estimates lead one to expect.
        usual: How differently nodes of such prefixes measure.
        band: The `prefix_class` of each two nodes.
    """
    nearer = np.where(band >= 2, np.minimum(expected, usual), expected)
    return nearer + 1e-5 * (len(PREFIX_BITS) - band)  # of nodes as near, that of the longer prefix


# Two nodes of 8 partners each differ by 0.3 in all over 5 common ones. Estimates lead one to expect
# 0.12; three eighths of what they were made from are not to common partners, so that counts as
# 2 * 3/8 = 0.75 of a partner. Nodes usually differ by 0.5, which counts as 0.03 of one:
# (0.3 + 0.75 * 0.12 + 0.03 * 0.5) / (5 + 0.75 + 0.03) = 0.07. All partners of a new node are common
# with a node that measured everything, and then the estimates say nothing more.
def shrunk_difference(
    total: np.ndarray,
    common: np.ndarray,
    expected: np.ndarray,
    usual: np.ndarray | float,
    degree_a: np.ndarray,
    degree_b: np.ndarray,
) -> np.ndarray:
    """Returns how differently nodes measure: what common partners show, shrunk to what is expected.

    Args:
        total: Sum of the differences of log RTT to common partners.
        common: How many partners are common.
        expected: Difference that estimates and prefixes lead one to expect.
        usual: How differently nodes of such prefixes measure.
        degree_a: How many partners the first node of each pair has.
        degree_b: How many the second has.
    """
    fewer = np.maximum(np.minimum(degree_a, degree_b), 1)
    weight = PRIOR_WEIGHT * np.maximum(1 - common / fewer, 0)
    sums = total + weight * expected + USUAL_WEIGHT * usual
    return sums / (common + weight + USUAL_WEIGHT)


def prefix_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how many of `PREFIX_BITS` addresses share [n]."""
    bits = addresses.common_prefix_length(a, b)
    bits = np.where(addresses.family(a) == 4, bits, bits // 2)
    return np.searchsorted(PREFIX_BITS, bits, side="right")


def fit_wmedian(train: Training) -> Predict:
    """Returns medians of measured pairs that differ from the asked one in one end.

    Pair (a, b) has the median log RTT of the measured pairs (a, b') and (a', b), each weighted by
    how alike b and b', or a and a', measure. One of the ends may be an address that was not
    measured: its prefix then says whom it is like. NaN where neither was.
    """
    likeness, n = _Likeness(train), len(train.nodes)
    one, other, rtt = train.directed
    key = hash_addresses(train.nodes.addresses)
    order = np.lexsort((key[other], -likeness.degree[other], one))
    counts = np.bincount(one, minlength=n)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = order[rank < STAND_INS]
    other, value = other[order], np.log(rtt[order])
    counts = np.append(np.minimum(counts, STAND_INS), 0)  # 0 of node -1
    starts = np.cumsum(counts) - counts

    def predict_pairs(a: np.ndarray, b: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the log RTTs of pairs of `ends`, by number [n]."""
        node, parts = train.nodes.lookup(ends), []
        for fixed, moved in ((a, b), (b, a)):
            size = counts[node[fixed]]
            pair = np.repeat(np.arange(len(a)), size)
            entry = np.arange(len(pair)) + np.repeat(
                starts[node[fixed]] - np.cumsum(size) + size, size
            )
            parts.append((pair, entry, moved[pair]))
        pair, entry, moved = (np.concatenate(part) for part in zip(*parts, strict=True))
        # Pairs of one destination ask for the same distances.
        asked, index = np.unique(moved * n + other[entry], return_inverse=True)
        end, stand_in = asked // n, asked % n
        weight = likeness.distances(node[end], ends[end], stand_in) ** -SHARPNESS
        log_rtt = np.full(len(a), np.nan)
        answered, medians = grouped_weighted_median(pair, value[entry], weight[index])
        log_rtt[answered] = medians
        return log_rtt

    def predict_rtt(queries: MeasurementTable) -> np.ndarray:
        ends = Nodes(queries.src, queries.dst)
        src, dst = ends.lookup(queries.src), ends.lookup(queries.dst)
        asked, index = np.unique(
            np.minimum(src, dst) * len(ends) + np.maximum(src, dst), return_inverse=True
        )
        a, b = asked // len(ends), asked % len(ends)
        known = train.nodes.lookup(ends.addresses)
        block = np.cumsum(counts[known[a]] + counts[known[b]]) // BLOCK
        rtt = np.full(len(asked), np.nan)
        for chosen in np.split(np.arange(len(asked)), np.flatnonzero(np.diff(block)) + 1):
            rtt[chosen] = np.exp(predict_pairs(a[chosen], b[chosen], ends.addresses))
        return rtt[index]

    return predict_rtt
