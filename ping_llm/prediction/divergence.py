"""How far measured RTTs of a pair are from what was predicted, beside two halves of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance

from ping_llm.estimators.pairs import MIN_RTT_MS, runs
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.distribution import Distribution

MIN_MEASUREMENTS = 32  # of a pair, answered
MAX_MEASUREMENTS = 64
MAX_PAIRS = 16
BINS = 8

# Returns (questions, their distributions) until every one has had its turn.
Ask = Callable[[MeasurementTable], Any]


def divergence(pairs: list[MeasurementTable], ask: Ask) -> dict[str, Any] | None:
    """Returns how far measurements of a pair are from their predicted distribution.

    `kl` is the Kullback-Leibler divergence in nats of the measured shares of RTTs from the
    predicted ones, over up to `BINS` bins that hold equally many measurements. `wasserstein` is the
    Wasserstein distance of the log RTTs: about by which part RTTs would have to be moved. Each is
    the median over pairs of one half of the measurements, every second, from: `half`, the other
    half; `with_time`, the mean of the predictions at their times; `without_time`, the prediction at
    no time.

    Args:
        pairs: What `most_measured` returned.
        ask: What predicts them.

    Returns:
        None where there is no pair.
    """
    if not pairs:
        return None
    whole = MeasurementTable.concat(pairs)
    timed, plain = _asked(ask, whole), _asked(ask, _firsts(pairs))
    scores: dict[str, list[tuple[float, float]]] = {"half": [], "with_time": [], "without_time": []}
    start = 0
    for i, pair in enumerate(pairs):
        measured = np.maximum(pair.rtt.astype(np.float64), MIN_RTT_MS)
        edges = np.unique(np.quantile(measured, np.arange(1, BINS) / BINS))
        one, other = measured[::2], measured[1::2]
        uniform = np.ones(len(other))
        # Half a measurement more in each bin: an empty one is not impossible.
        scores["half"].append(_distances(one, other, uniform, edges, prior=0.5))
        for name, answers in (
            ("with_time", timed[start : start + len(pair)]),
            ("without_time", plain[i : i + 1]),
        ):
            values = np.concatenate([values for values, _ in answers])
            weights = np.concatenate([weights for _, weights in answers])
            scores[name].append(_distances(one, values, weights, edges, prior=0.0))
        start += len(pair)
    medians = {name: np.median(each, axis=0).tolist() for name, each in scores.items()}
    return {
        "pairs": len(pairs),
        "measurements": len(whole),
        **{
            which: {name: values[column] for name, values in medians.items()}
            for column, which in enumerate(("kl", "wasserstein"))
        },
    }


def most_measured(rows: MeasurementTable) -> list[MeasurementTable]:
    """Returns the answered measurements, in time order, of the pairs that have most.

    These are up to `MAX_PAIRS` of at least `MIN_MEASUREMENTS`, of which up to `MAX_MEASUREMENTS`,
    evenly spread, are returned.
    """
    answered = rows.take(rows.rtt >= 0)
    key = mix(hash_addresses(answered.src), hash_addresses(answered.dst))
    order = np.lexsort((answered.time, key))
    starts, counts = runs(key[order])
    found = []
    for i in np.argsort(-counts, kind="stable")[:MAX_PAIRS]:
        if counts[i] >= MIN_MEASUREMENTS:
            kept = np.unique(np.linspace(0, counts[i] - 1, MAX_MEASUREMENTS).astype(int))
            found.append(answered.take(order[starts[i] + kept]))
    return found


def _firsts(pairs: list[MeasurementTable]) -> MeasurementTable:
    """Returns one measurement of each pair, at no time."""
    table = MeasurementTable.concat([pair.slice(0, 1) for pair in pairs])
    return dataclasses.replace(table, time=np.full(len(table), NO_TIME))


def _asked(ask: Ask, questions: MeasurementTable) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (RTTs in ms [u], their probabilities [u]) of each question."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    answer: Distribution
    for rows, answer, _ in ask(questions):
        for i, row in enumerate(rows.tolist()):
            found[row] = answer.values_ms[i], answer.probabilities[i]
    return [found[i] for i in range(len(questions))]


def _distances(
    one: np.ndarray, values: np.ndarray, weights: np.ndarray, edges: np.ndarray, *, prior: float
) -> tuple[float, float]:
    """Returns (KL in nats, Wasserstein of the logs) of measured RTTs from weighted ones."""
    n = len(edges) + 1
    p = np.bincount(np.searchsorted(edges, one), minlength=n) / len(one)
    q = np.bincount(np.searchsorted(edges, values), weights, minlength=n) + prior
    q = np.maximum(q / q.sum(), 1e-9)
    kl = float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    logs = np.log(np.maximum(values, MIN_RTT_MS))
    return kl, float(wasserstein_distance(np.log(one), logs, None, weights))
