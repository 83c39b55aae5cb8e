"""The classical methods that a model is compared with, by name: functions of `ping_llm.estimators`.

A static method is fitted once: `fit(training)` returns `predict(queries)`. An online method sees
what was measured before each query: `predict(history, queries)`. How often measurements fail is
predicted by methods of their own, with all training measurements as the history.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ping_llm.estimators.pairs import Training
    from ping_llm.measurements import MeasurementTable

STATIC = {
    "global_median": "medians.fit_global_median",
    "src_median": "medians.fit_src_median",
    "dst_median": "medians.fit_dst_median",
    "additive": "medians.fit_additive",
    "prefix": "medians.fit_prefix",
    "vivaldi": "vivaldi.fit_vivaldi",
    "coordinates": "coordinates.fit_coordinates",
    "dmfsgd": "factorisation.fit_dmfsgd",
    "biased_mf": "factorisation.fit_biased_mf",
    "neighbours": "neighbours.fit_neighbours",
    "wmedian": "wmedian.fit_wmedian",
}
ONLINE = {
    "last_value": "online.last_value",
    "median3": "online.median3",
    "median9": "online.median9",
    "ema": "online.ema",
}
FAILURES = {
    "failure_rate": "failures.failure_rates",
    "logistic": "failures.logistic",
    "logistic_by_day": "failures.logistic_by_day",
}


def _function(path: str) -> Callable:
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"ping_llm.estimators.{module}"), name)


def predict(
    name: str,
    queries: "MeasurementTable",
    train: "Training",
    history: "MeasurementTable | None" = None,
) -> "np.ndarray":
    """Returns the RTTs in ms that a method predicts [n].

    Where it has no estimate, the median of the source, the destination, or all pairs stands in.

    Args:
        name: One of `STATIC` or `ONLINE`.
        queries: What to predict [n].
        train: What static methods, and the medians, are fitted on.
        history: All measurements, of which online methods see those before each query.
    """
    from ping_llm.estimators.medians import fill

    method = _function({**STATIC, **ONLINE}[name])
    rtt = method(train)(queries) if name in STATIC else method(history, queries)
    return fill(rtt, train, queries)


def predict_failures(
    queries: "MeasurementTable", train: "MeasurementTable"
) -> "dict[str, np.ndarray]":
    """Returns the probabilities that each query fails [n], by method of `FAILURES`."""
    return {name: _function(path)(train, queries) for name, path in FAILURES.items()}
