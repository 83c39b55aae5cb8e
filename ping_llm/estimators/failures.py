"""How often measurements fail, by what failed before at either end."""

import numpy as np

from ping_llm.estimators.pairs import Nodes
from ping_llm.measurements import MeasurementTable

PRIOR = 10  # measurements of the overall rate that every address begins with


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
