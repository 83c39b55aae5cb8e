"""What an evaluation says of predictions: errors, calibration, failures, order, breakdowns."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm.estimators.pairs import MIN_RTT_MS, pair_keys, runs
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable
from ping_llm.places import UNKNOWN, Places
from ping_llm.prediction import metrics
from ping_llm.prediction.baselines import ONLINE, predict_failures

BANDS_MS = (10, 50, 100, 200)
HISTORY_STEPS = (1, 5, 17, 65)
HOURS = 6
DISTANCES_KM = (100, 1000, 5000)
MAX_PLACES = 10  # autonomous systems or countries, those of most rows

# RTTs in ms [n] by method.
Predicted = Mapping[str, np.ndarray]


def actual_rtt(rows: MeasurementTable) -> np.ndarray:
    """Returns the RTTs that errors are relative to, in ms [n]; means nothing where it failed."""
    return np.maximum(rows.rtt.astype(np.float64), MIN_RTT_MS)


def errors(rows: MeasurementTable, predicted: Predicted) -> dict[str, dict[str, Any]]:
    """Returns kind, point metrics and their intervals by method."""
    answered = rows.rtt >= 0
    actual = actual_rtt(rows)[answered]
    values = {name: each[answered] for name, each in predicted.items()}
    intervals = metrics.intervals(values, actual, pair_keys(rows)[answered])
    return {
        name: {
            "kind": "online" if name in (*ONLINE, "model_online") else "static",
            **metrics.point_metrics(each, actual),
            "intervals": intervals[name],
        }
        for name, each in values.items()
    }


def calibration(
    rows: MeasurementTable, quantiles: np.ndarray, below: np.ndarray, crps: np.ndarray
) -> dict[str, Any]:
    """Returns `metrics.calibration` of the answered rows."""
    answered = rows.rtt >= 0
    actual = actual_rtt(rows)[answered]
    return metrics.calibration(below[answered], quantiles[answered], crps[answered], actual)


def failures(rows: MeasurementTable, train: MeasurementTable, models: Predicted) -> dict[str, Any]:
    """Returns AUC and Brier score of the P(failed) of models and of classical methods."""
    failed = rows.rtt < 0
    scores: dict[str, Any] = {"n_failed": int(failed.sum()), "n": len(rows)}
    for name, each in {**models, **predict_failures(rows, train)}.items():
        scores[name] = {"auc": metrics.auc(each, failed), "brier": metrics.brier(each, failed)}
    return scores


def noise_floor(
    rows: MeasurementTable, pair_medians: np.ndarray, median: np.ndarray
) -> dict[str, Any]:
    """Returns the errors of `pair_medians`, and those of `median` on the same rows over them."""
    several = (rows.rtt >= 0) & ~np.isnan(pair_medians)
    if not several.any():
        return {"n": 0}
    actual = actual_rtt(rows)[several]
    floor = metrics.point_metrics(pair_medians[several], actual)
    model = metrics.point_metrics(median[several], actual)
    ratio = {name: model[name] / floor[name] if floor[name] else None for name in model}
    return {"n": int(several.sum()), **floor, "ratio": ratio}


def rankings(rows: MeasurementTable, predicted: Predicted) -> dict[str, dict[str, float] | None]:
    """Returns how each method ranks the destinations of each source, by medians of their rows."""
    answered = np.flatnonzero(rows.rtt >= 0)
    source = np.unique(hash_addresses(rows.src[answered]), return_inverse=True)[1]
    target = np.unique(hash_addresses(rows.dst[answered]), return_inverse=True)[1]
    key = source * (target.max(initial=0) + 1) + target

    def by_pair(values: np.ndarray) -> np.ndarray:
        order = np.lexsort((values, key))
        starts, counts = runs(key[order])
        return values[order][starts + (counts - 1) // 2]

    actual = by_pair(actual_rtt(rows)[answered])
    sources = by_pair(source)
    return {
        name: metrics.ranking(by_pair(values[answered]), actual, sources)
        for name, values in predicted.items()
    }


def breakdowns(
    rows: MeasurementTable, history: np.ndarray, predicted: Predicted, places: Places | None = None
) -> dict[str, dict[str, Any]]:
    """Returns point metrics by groups of measurements.

    These are by family, actual RTT, `history` [n] behind the answer, and hour; where there are
    traceroutes, by kind; and as far as places are known by AS and country of the source, and
    distance.
    """
    actual, answered = actual_rtt(rows), rows.rtt >= 0
    band = np.searchsorted(BANDS_MS, actual, side="right")
    step = np.searchsorted(HISTORY_STEPS, history, side="right")
    hours = [f"{hour}-{hour + HOURS}" for hour in range(0, 24, HOURS)]
    groupings = {
        "family": (rows.family == 6, ["IPv4", "IPv6"]),
        "rtt_band": (band, _ranges(BANDS_MS, " ms")),
        "history": (step, _ranges(HISTORY_STEPS, "")),
        "hour_utc": (rows.time // 3600 % 24 // HOURS, hours),
        **({} if places is None else _by_place(rows, places)),
    }
    if (kinds := rows.column("kind")).any():
        groupings["kind"] = kinds, ["pings", "routers on the way", "ends of traceroutes"]
    result: dict[str, dict[str, Any]] = {name: {} for name in groupings}
    for name, (group, labels) in groupings.items():
        for i, label in enumerate(labels):
            chosen = answered & (group == i)
            if chosen.any():
                methods = {
                    method: metrics.point_metrics(values[chosen], actual[chosen])
                    for method, values in predicted.items()
                }
                result[name][label] = {"n": int(chosen.sum()), "methods": methods}
    return result


def _by_place(rows: MeasurementTable, places: Places) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Returns (group of each row, names of the groups) by what `places` tells."""
    found: dict[str, tuple[np.ndarray, list[str]]] = {}
    for what in places.told():
        labels = places.labels(rows.src, what)
        names, counts = np.unique(labels[labels != UNKNOWN], return_counts=True)
        largest = names[np.argsort(-counts, kind="stable")][:MAX_PLACES].tolist()
        index = {name: i for i, name in enumerate(largest)}
        group = np.array([index.get(label, len(largest)) for label in labels.tolist()])
        group[labels == UNKNOWN] = len(largest) + 1
        found[what] = (group, [*largest, "others", "not known"])
    distance = places.distance_km(rows.src, rows.dst)
    if not np.isnan(distance).all():
        band = np.searchsorted(DISTANCES_KM, distance, side="right")
        group = np.where(np.isnan(distance), len(DISTANCES_KM) + 1, band)
        found["distance"] = (group, [*_ranges(DISTANCES_KM, " km"), "not known"])
    return found


def _ranges(steps: tuple[int, ...], unit: str) -> list[str]:
    middle = [f"{a}-{b}{unit}" for a, b in itertools.pairwise(steps)]
    return [f"under {steps[0]}{unit}", *middle, f"from {steps[-1]}{unit}"]
