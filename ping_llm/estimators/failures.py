"""How often measurements fail, by what failed before at either end."""

import numpy as np

from ping_llm.estimators.pairs import Nodes, lookup
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

PRIOR = 10  # measurements of the overall rate that every address begins with
RIDGE = 0.3  # of the square of each effect on the log-odds
SWEEPS = 60
DAY = 86_400


def failure_rates(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the mean of the smoothed failure rates of each query's source and destination [n]."""
    failed = (history.rtt < 0).astype(float)
    overall, rates = failed.mean(), np.zeros(len(queries))
    for end in ("src", "dst"):
        nodes = Nodes(getattr(history, end))
        number = nodes.lookup(getattr(history, end))
        counts, sums = np.bincount(number), np.bincount(number, failed)
        smoothed = np.append((sums + PRIOR * overall) / (counts + PRIOR), overall)
        rates += smoothed[nodes.lookup(getattr(queries, end))] / 2
    return rates


def logistic(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the probability of failure, its log-odds a number a source plus one a destination."""
    return FailureOdds(history, by_day=False).probability(queries)


def logistic_by_day(history: MeasurementTable, queries: MeasurementTable) -> np.ndarray:
    """Returns the same with a number for each destination on each day (UTC) as well."""
    return FailureOdds(history).probability(queries)


def _effects(table: MeasurementTable, by_day: bool) -> list[np.ndarray]:
    """Returns keys of the effects that each measurement has."""
    source, destination = hash_addresses(table.src), hash_addresses(table.dst)
    keys = [source, destination]
    return [*keys, mix(destination, table.time // DAY)] if by_day else keys


class FailureOdds:
    """Log-odds of failures: a number a source, one a destination, one a destination and day."""

    def __init__(self, history: MeasurementTable, *, by_day: bool = True):
        """Fits them by Newton steps on one kind of effect at a time."""
        # A source of 10 measurements failed 6 times where 0.4 each were expected: its number
        # changes by (6 - 4) / (10 x 0.4 x 0.6 + 0.3) = 0.74, if it was 0.
        effects = _effects(history, by_day)
        _, first, cell = np.unique(mix(*effects), return_index=True, return_inverse=True)
        counts, failed = np.bincount(cell), np.bincount(cell, history.rtt < 0)
        self._by_day = by_day
        self._keys, groups = zip(
            *(np.unique(effect[first], return_inverse=True) for effect in effects), strict=True
        )
        self._values = [np.zeros(len(key)) for key in self._keys]
        rate = (failed.sum() + 0.5) / (counts.sum() + 1)
        logit = np.full(len(counts), np.log(rate / (1 - rate)))
        self._center = logit[0] if len(logit) else 0.0
        for _ in range(SWEEPS if failed.any() else 0):
            for value, group in zip(self._values, groups, strict=True):
                p = 1 / (1 + np.exp(-logit))
                gradient = np.bincount(group, failed - counts * p) - RIDGE * value
                step = gradient / (np.bincount(group, counts * p * (1 - p)) + RIDGE)
                step = np.clip(step, -1, 1)
                value += step
                logit += step[group]
            p = 1 / (1 + np.exp(-logit))
            step = np.sum(failed - counts * p) / (np.sum(counts * p * (1 - p)) + RIDGE)
            self._center += np.clip(step, -1, 1)
            logit += np.clip(step, -1, 1)

    def probability(self, queries: MeasurementTable) -> np.ndarray:
        """Returns the probability that each query fails [n]; effects not seen count as none."""
        logit = np.full(len(queries), self._center)
        effects = _effects(queries, self._by_day)
        for key, value, effect in zip(self._keys, self._values, effects, strict=True):
            logit += np.append(value, 0)[lookup(key, effect)]
        return 1 / (1 + np.exp(-logit))
