"""A network of up to some thousand nodes as matrices: what was measured, and who is like whom.

Everything here comes from the measurements that the world was made of. Log RTTs are natural
logarithms of ms; a round trip goes both ways, so all matrices are symmetric.
"""

import dataclasses

import numpy as np

from ping_llm.estimators.coordinates import embed
from ping_llm.estimators.pairs import MIN_RTT_MS, Nodes, runs, without_repeats
from ping_llm.estimators.wmedian import (
    PREFIX_PRIOR,
    REFERENCES,
    UNKNOWN_DIFFERENCE,
    expected_difference,
    prefix_class,
    shrunk_difference,
    usual_by_prefix,
    with_prefix,
)
from ping_llm.hashing import mix
from ping_llm.measurements import MeasurementTable

MEASUREMENTS_KEPT = 16  # of each pair
FAILED = np.inf  # stands for the log RTT of a failed measurement

FACTORS = 8
FACTOR_PENALTIES = (0.3, 2.0, 12.0)
FACTOR_SWEEPS = 6
BIAS_PENALTY = 0.5
HELD_OUT = 0.1

SHARPNESS = 4.0  # how much more a more alike node counts
USUAL_DIFFERENCE = 0.03  # of weight 1
NEIGHBOURS = 64  # of most weight, in a weighted median
FAILURE_RIDGE, FAILURE_SWEEPS = 0.3, 40


def log_rtt_of(rtt: np.ndarray) -> np.ndarray:
    """Returns the log of RTTs in ms, `FAILED` where they are below 0, float32."""
    return np.where(rtt < 0, FAILED, np.log(np.maximum(rtt, MIN_RTT_MS))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What was measured between numbered nodes, by unordered pair, each pair once.

    Attributes:
        a: One node of each pair [p], below b.
        b: The other node [p].
        samples: Log RTTs of up to k measurements of the pair, in time order; `FAILED` where one
            failed, NaN where there are fewer [p, k], float32.
    """

    a: np.ndarray
    b: np.ndarray
    samples: np.ndarray

    def take(self, index: np.ndarray) -> "Pairs":
        """Returns the pairs at `index`, a mask or numbers."""
        return Pairs(self.a[index], self.b[index], self.samples[index])

    def renumbered(self, number: np.ndarray) -> "Pairs":
        """Returns the pairs whose ends have a `number` [n] from 0 on, by that number."""
        a, b = number[self.a], number[self.b]
        kept = (a >= 0) & (b >= 0)
        a, b = a[kept], b[kept]
        return Pairs(np.minimum(a, b), np.maximum(a, b), self.samples[kept])

    @classmethod
    def of(cls, measurements: MeasurementTable, nodes: Nodes) -> "Pairs":
        """Returns the pairs of different nodes among measurements, with up to 16 of each.

        Of more than 16 those are kept that divide the pair's measurements, in time order, evenly.
        """
        measurements = without_repeats(measurements)
        src, dst = nodes.lookup(measurements.src), nodes.lookup(measurements.dst)
        key = np.minimum(src, dst) * len(nodes) + np.maximum(src, dst)
        order = np.lexsort((measurements.time, key))
        order = order[src[order] != dst[order]]
        starts, counts = runs(key[order])
        width = min(int(counts.max(initial=1)), MEASUREMENTS_KEPT)
        column = np.arange(width)
        spread = ((column + 0.5) * counts[:, None] / width).astype(np.int64)
        few = counts[:, None] <= width
        index = starts[:, None] + np.where(few, np.minimum(column, counts[:, None] - 1), spread)
        log_rtt = log_rtt_of(measurements.rtt[order])
        samples = log_rtt[index] if len(index) else np.zeros((0, 1))
        samples = np.where(few & (column >= counts[:, None]), np.nan, samples)
        first = key[order][starts]
        return cls(first // len(nodes), first % len(nodes), samples.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the measurements of each pair say, NaN where too few were answered, float32 [p] each.

    Attributes:
        median: Median log RTT.
        spread: Mean distance from the median.
        low: How far the 10 % quantile lies below the median, of 4 measurements or more.
        high: How far the 90 % quantile lies above it.
        answered: How many were answered.
        failed: How many failed.
    """

    median: np.ndarray
    spread: np.ndarray
    low: np.ndarray
    high: np.ndarray
    answered: np.ndarray
    failed: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> "Summary":
        """Returns the summaries of samples as `Pairs` has them [p, k]."""
        failed = np.count_nonzero(np.isposinf(samples), axis=1)
        answered = np.count_nonzero(np.isfinite(samples), axis=1)
        ordered = np.sort(np.where(np.isfinite(samples), samples, np.inf), axis=1)
        rows, last = np.arange(len(samples)), samples.shape[1] - 1

        def at(index: np.ndarray) -> np.ndarray:
            return ordered[rows, np.clip(index, 0, last)]

        few, some = answered < 4, answered > 0
        low, high = np.maximum(answered - 1, 0) // 2, answered // 2
        with np.errstate(invalid="ignore"):
            median = np.where(some, (at(low) + at(high)) / 2, np.nan)
            apart = np.abs(np.where(np.isfinite(samples), samples - median[:, None], 0.0))
            tails = [at(np.rint(q * (answered - 1)).astype(np.int64)) for q in (0.1, 0.9)]
            below, above = median - tails[0], tails[1] - median
        spread = apart.sum(axis=1) / np.maximum(answered - 1, 1)
        below, above = (np.where(few, np.nan, each) for each in (below, above))
        columns = (median, np.where(some, spread, np.nan), below, above, answered, failed)
        return cls(*(column.astype(np.float32) for column in columns))


class MeasuredWorld:
    """Some nodes and what was measured between them.

    Attributes:
        n: Number of nodes.
        log_rtt: Median log RTT of each pair, NaN where none was answered [n, n], float32.
        spread, low, high: As `Summary` has them [n, n].
        answered, failed: How many measurements of each pair were, of those kept [n, n].
        degree: Partners of each node with an answer [n].
        failures: Share of failures of each node, and of how many measurements [2, n].
        failure_logit: Log-odds of a failure, a number a node of each pair [n, n].
        estimate: Log RTT that coordinates and factors say of each pair [n, n].
        difference: How differently two nodes measure, in log RTT; infinite for one itself [n, n].
        common: How many partners they have in common [n, n].
    """

    def __init__(self, pairs: Pairs, key: np.ndarray, address: np.ndarray | None = None):
        """Makes a world of pairs between nodes 0 to n - 1.

        Args:
            pairs: What was measured.
            key: A number that names each node, from which random numbers are drawn [n], uint64.
            address: The address of each node [n]; None: they say nothing.
        """
        n = self.n = len(key)
        summary = Summary.of(pairs.samples)

        def matrix(values: np.ndarray, missing: float) -> np.ndarray:
            square = np.full((n, n), missing, np.float32)
            square[pairs.a, pairs.b] = square[pairs.b, pairs.a] = values
            return square

        self.log_rtt, self.spread = (matrix(x, np.nan) for x in (summary.median, summary.spread))
        self.low, self.high = matrix(summary.low, np.nan), matrix(summary.high, np.nan)
        self.answered, self.failed = matrix(summary.answered, 0), matrix(summary.failed, 0)
        some = summary.answered > 0
        answered = pairs.a[some], pairs.b[some], summary.median[some].astype(np.float64)
        known = np.isfinite(self.log_rtt)
        self.degree = np.count_nonzero(known, axis=1)
        self._failures(pairs, summary)
        self.estimate = self._estimate(*answered, known, key)
        self._compare(known, key, address)
        if address is not None or not self.degree.all():
            self._place_unmeasured(address)

    def _failures(self, pairs: Pairs, summary: Summary) -> None:
        """Sets the failures of nodes, and their additive logistic by Newton steps."""
        n, ends = self.n, np.r_[pairs.a, pairs.b]
        tried = summary.answered + summary.failed
        failed, counts = np.tile(summary.failed, 2), np.tile(tried, 2)
        by_node = np.bincount(ends, failed, n), np.bincount(ends, counts, n)
        self.failures = np.array([by_node[0] / np.maximum(by_node[1], 1), by_node[1]], np.float32)
        rate = (summary.failed.sum() + 0.5) / (tried.sum() + 1)
        center, value = np.log(rate / (1 - rate)), np.zeros(n)
        if summary.failed.any():
            for _ in range(FAILURE_SWEEPS):
                logit = np.clip(center + value[pairs.a] + value[pairs.b], -30, 30)
                p = np.tile(1 / (1 + np.exp(-logit)), 2)
                gradient = np.bincount(ends, failed - counts * p, n) - FAILURE_RIDGE * value
                curvature = np.bincount(ends, counts * p * (1 - p), n) + FAILURE_RIDGE
                # Both ends of a pair move at once, so each goes half the way.
                value += np.clip(gradient / curvature / 2, -1, 1)
        self.failure_logit = (center + value[:, None] + value).astype(np.float32)

    def _estimate(
        self, a: np.ndarray, b: np.ndarray, y: np.ndarray, known: np.ndarray, key: np.ndarray
    ) -> np.ndarray:
        """Returns coordinates plus factors of what they leave open [n, n]."""
        if not len(y):
            return np.zeros((self.n, self.n), np.float32)
        one, other = (each.ravel() for each in np.indices((self.n, self.n)))
        fitted = embed(a, b, y, key)(one, other).reshape(self.n, self.n).astype(np.float32)
        residual = np.where(known, self.log_rtt - fitted, 0).astype(np.float32)
        return fitted + _residual_factors(residual, known, key)

    def _compare(self, known: np.ndarray, key: np.ndarray, address: np.ndarray | None) -> None:
        """Sets how differently nodes measure: the mean over common partners, and a prior."""
        n = self.n
        filled = np.where(known, self.log_rtt, 0).astype(np.float32)
        seen = known.astype(np.float32)
        common, total = seen @ seen.T, np.zeros((n, n), np.float32)
        for i in range(n):
            partners = np.flatnonzero(known[i])
            apart = np.abs(filled[i, partners] - filled[:, partners])
            total[i] = np.einsum("np,np->n", apart, seen[:, partners])
        np.fill_diagonal(total, 0)
        np.fill_diagonal(common, 0)
        typical = total.sum() / common.sum() if common.sum() > PREFIX_PRIOR else UNKNOWN_DIFFERENCE
        # Not nodes without a measurement, which may be anything that someone asks about.
        measured = np.flatnonzero(self.degree)
        references = self.estimate[:, measured[np.argsort(key[measured])[:REFERENCES]]]
        if not len(measured):
            references = np.zeros((n, 1))
        apart = np.array([np.abs(row - references).mean(axis=1) for row in references])
        degrees = self.degree[:, None], self.degree
        expected, usual = expected_difference(apart, *degrees, typical), typical
        if address is not None:
            band = np.array([prefix_class(np.broadcast_to(each, n), address) for each in address])
            usual = usual_by_prefix(total, common, typical, band)[band]
            expected = with_prefix(expected, usual, band)
        difference = shrunk_difference(total, common, expected, usual, *degrees)
        self.difference = difference.astype(np.float32)
        np.fill_diagonal(self.difference, np.inf)
        self.common = common
        weight = np.maximum(self.difference, 1e-6) / USUAL_DIFFERENCE
        self._weight = (weight**-SHARPNESS).astype(np.float32)

    def _place_unmeasured(self, address: np.ndarray | None) -> None:
        """Sets the estimates of nodes without an answer: those of the nodes they are most like."""
        measured = np.flatnonzero(self.degree)
        if not len(measured):
            return
        medians = np.nanmedian(self.log_rtt[measured], axis=1)
        for node in np.flatnonzero(self.degree == 0):
            row = np.full(self.n, np.median(medians), np.float32)
            row[measured] = medians
            if address is not None:
                band = prefix_class(
                    np.broadcast_to(address[node], len(measured)), address[measured]
                )
                if band.max() >= 2:
                    nearest = measured[band == band.max()]
                    row = self.estimate[nearest].mean(axis=0)
            self.estimate[node], self.estimate[:, node] = row, row

    def likes(self, fixed: np.ndarray, moved: np.ndarray, count: int) -> np.ndarray:
        """Returns the nodes most like `moved` that `fixed` has a measurement to [q, count].

        The most alike comes last; -1 where there are fewer.
        """
        difference = np.where(np.isfinite(self.log_rtt[fixed]), self.difference[moved], np.inf)
        kept = min(count, self.n)
        nearest = np.argpartition(difference, kept - 1, axis=1)[:, :kept]
        apart = np.take_along_axis(difference, nearest, axis=1)
        order = np.argsort(apart, axis=1, kind="stable")[:, ::-1]
        nearest = np.take_along_axis(nearest, order, axis=1)
        nearest[~np.isfinite(np.take_along_axis(apart, order, axis=1))] = -1
        return np.pad(nearest, ((0, 0), (count - kept, 0)), constant_values=-1)

    def _neighbours(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns (source side, node, weight) of the pairs that differ from (a, b) in one end."""
        rows = np.arange(len(a))
        weights = np.concatenate([self._weight[b], self._weight[a]], axis=1)
        known = np.concatenate([np.isfinite(self.log_rtt[a]), np.isfinite(self.log_rtt[b])], axis=1)
        weights = np.where(known, weights, 0)
        weights[rows, b] = weights[rows, self.n + a] = 0  # the pair itself
        kept = min(NEIGHBOURS, weights.shape[1])
        column = np.argpartition(-weights, kept - 1, axis=1)[:, :kept]
        weights = np.take_along_axis(weights, column, axis=1)
        from_a = column < self.n
        end = np.where(from_a, a[:, None], b[:, None])
        return end, np.where(from_a, column, column - self.n), weights

    def weighted_median(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns (log RTT, noise below it, noise above it) of pairs from their neighbours [q].

        That is the median of the pairs (a, b') and (a', b) by how alike b and b', or a and a',
        measure, NaN where there is none; and the mean of their `low` and `high`. The pair itself
        does not count.
        """
        end, node, weights = self._neighbours(a, b)
        values = np.where(weights > 0, self.log_rtt[end, node], 0)
        order = np.argsort(values, axis=1)
        ordered = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
        total = ordered[:, -1]
        middle = np.count_nonzero(ordered < total[:, None] / 2, axis=1)
        chosen = order[np.arange(len(a)), np.minimum(middle, order.shape[1] - 1)]
        median = np.where(total > 0, values[np.arange(len(a)), chosen], np.nan)
        noise = []
        for matrix in (self.low, self.high):
            deviation = matrix[end, node]
            weight = np.where(np.isfinite(deviation), weights, 0)
            sums = np.einsum("qk,qk->q", weight, np.nan_to_num(deviation))
            total = weight.sum(axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                noise.append(np.where(total > 0, sums / total, np.nan))
        return median, *noise

    def evidence(self, a: int, b: int, count: int) -> list[tuple[bool, int, float, float]]:
        """Returns the pairs that count most in the weighted median of (a, b), most first.

        Of each: whether it is of a and a node like b, else of b and a node like a; that node; its
        log RTT; and its share of all weights.
        """
        end, node, weights = (each[0] for each in self._neighbours(np.array([a]), np.array([b])))
        order = np.argsort(-weights)[:count]
        order = order[weights[order] > 0]
        shares = weights / max(weights.sum(), 1e-30)
        return [
            (of_a, other, float(self.log_rtt[a if of_a else b, other]), float(shares[i]))
            for i, of_a, other in zip(order, (end == a)[order], node[order].tolist(), strict=True)
        ]

    def oriented(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs, turned so that the first end has measured what is like the second."""
        turned = self._nearest(b, a) < self._nearest(a, b)
        return np.where(turned, b, a), np.where(turned, a, b)

    def _nearest(self, fixed: np.ndarray, moved: np.ndarray) -> np.ndarray:
        known = np.isfinite(self.log_rtt[fixed])
        return np.where(known, self.difference[moved], np.inf).min(axis=1)


def _residual_factors(residual: np.ndarray, known: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns a symmetric low-rank fit, biases included, of what `known` shows [n, n].

    The penalty is the one that says most of a tenth of the pairs that are held out.
    """
    pairs = np.argwhere(np.triu(known, 1))
    if len(pairs) <= 60:
        return np.zeros_like(residual)
    low, high = (pick(key[pairs[:, 0]], key[pairs[:, 1]]) for pick in (np.minimum, np.maximum))
    one, other = pairs[mix(low, high) < HELD_OUT * 2.0**64].T
    kept = known.copy()
    kept[one, other] = kept[other, one] = False
    errors = {}
    for penalty in FACTOR_PENALTIES:
        fit = _alternate(np.where(kept, residual, 0), kept, key, penalty, FACTOR_SWEEPS // 2)
        errors[penalty] = np.abs(fit[one, other] - residual[one, other]).sum()
    best = min(errors, key=errors.__getitem__)
    return _alternate(residual, known, key, best, FACTOR_SWEEPS)


def _alternate(
    residual: np.ndarray, known: np.ndarray, key: np.ndarray, penalty: float, sweeps: int
) -> np.ndarray:
    """Returns biases and factors by alternating ridge regression, made symmetric [n, n]."""
    n, seen = len(residual), known.astype(np.float32)
    count = seen.sum(axis=1)
    mean = residual.sum() / max(count.sum(), 1)
    target = (residual - mean) * seen
    bias = np.zeros(n, np.float32)
    for _ in range(8):
        bias = 0.5 * bias + 0.5 * (target - seen * bias).sum(axis=1) / (count + 1)
    one, other = np.zeros((2, n, FACTORS + 1), np.float32)
    for factor in range(FACTORS):
        other[:, factor] = mix(key, np.array([factor])) / 2.0**64 - 0.5
    other[:, -1] = bias
    ridge = np.diag([penalty] * FACTORS + [BIAS_PENALTY]).astype(np.float32)
    for _ in range(2 * sweeps):
        features = np.c_[other[:, :-1], np.ones(n, np.float32)]
        squares = np.einsum("ni,nj->nij", features, features).reshape(n, -1)
        normal = (seen @ squares).reshape(n, FACTORS + 1, FACTORS + 1) + ridge
        wanted = (target - seen * other[:, -1]) @ features
        solved = np.linalg.solve(normal, wanted[:, :, None])[:, :, 0]
        one, other = other, solved.astype(np.float32)
    product = one[:, :-1] @ other[:, :-1].T
    biases = (one[:, -1] + other[:, -1]) / 2
    return mean + biases[:, None] + biases + (product + product.T) / 2
