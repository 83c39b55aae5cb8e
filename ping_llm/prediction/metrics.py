"""How good predictions are: errors with intervals, calibration, failures, order."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm.estimators.pairs import runs

RESAMPLES = 200
COVERAGES = (0.5, 0.8, 0.95)
PINBALL_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
RELIABILITY_LEVELS = tuple(i / 20 for i in range(1, 20))

# The quantiles of the absolute errors in ms and of the relative errors; None stands for the mean.
_LEVELS = {
    "abs": {"median_abs_ms": 0.5, "mae_ms": None},
    "rel": {"median_rel": 0.5, "p90_rel": 0.9},
}


def errors(predicted: np.ndarray, actual: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the absolute errors, and those relative to the actual RTT."""
    absolute = np.abs(predicted - actual)
    return {"abs": absolute, "rel": absolute / actual}


def point_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Returns median and mean absolute error, median and 90th percentile relative error."""
    return {
        name: float(values.mean() if level is None else np.quantile(values, level))
        for kind, values in errors(predicted, actual).items()
        for name, level in _LEVELS[kind].items()
    }


def intervals(
    predictions: Mapping[str, np.ndarray], actual: np.ndarray, pair: np.ndarray, *, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Returns 95 % intervals of `point_metrics` of each method, by bootstrap over pairs.

    The rows of a pair come and go together, for their errors do. All methods see the same samples.

    Args:
        predictions: By method [n].
        actual: RTTs in ms [n].
        pair: Which pair each row is of [n].
        seed: Of the samples.
    """
    pairs, pair = np.unique(pair, return_inverse=True)
    rng = np.random.default_rng(seed)
    ordered = {}
    for method, predicted in predictions.items():
        for kind, values in errors(predicted, actual).items():
            order = np.argsort(values)
            ordered[method, kind] = values[order], pair[order]
    samples = {method: collections.defaultdict(list) for method in predictions}
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(pairs), len(pairs)), minlength=len(pairs))
        for (method, kind), (values, of_pair) in ordered.items():
            weights = times[of_pair]
            below = np.cumsum(weights)
            for name, level in _LEVELS[kind].items():
                if level is None:
                    sample = values @ weights / below[-1]
                else:
                    rank = np.searchsorted(below, level * below[-1])
                    sample = values[min(rank, len(values) - 1)]
                samples[method][name].append(sample)
    return {
        method: {name: np.quantile(each, [0.025, 0.975]).tolist() for name, each in named.items()}
        for method, named in samples.items()
    }


def calibration(
    below: np.ndarray, quantiles: np.ndarray, crps: np.ndarray, actual: np.ndarray
) -> dict[str, Any]:
    """Returns how well distributions fit what happened.

    Args:
        below: Probability that each distribution puts below the actual RTT [n].
        quantiles: Quantiles at `PINBALL_LEVELS` [n, 5].
        crps: Continuous ranked probability scores in ms [n].
        actual: RTTs in ms [n].
    """
    inside = {level: np.abs(below - 0.5) <= level / 2 for level in COVERAGES}
    over = actual[:, None] - quantiles
    levels = np.array(PINBALL_LEVELS)
    pinball = np.maximum(levels * over, (levels - 1) * over).mean(axis=0)
    return {
        "coverage": {f"{level * 100:.0f}": float(inside[level].mean()) for level in COVERAGES},
        "reliability": [[level, float((below <= level).mean())] for level in RELIABILITY_LEVELS],
        "pinball_ms": {f"{100 * p:.0f}": float(x) for p, x in zip(levels, pinball, strict=True)},
        "crps_ms": float(crps.mean()),
    }


def auc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Returns the probability that a positive scores above a negative, ties counting half.

    None where there are no positives or no negatives.
    """
    n_positive, n = int(positive.sum()), len(positive)
    if n_positive in (0, n):
        return None
    _, number, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]  # from 1, ties share their mean
    above = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * (n - n_positive)))


def brier(probability: np.ndarray, positive: np.ndarray) -> float:
    """Returns the mean squared difference between probabilities and what happened."""
    return float(np.mean((probability - positive) ** 2))


def ranking(
    predicted: np.ndarray, actual: np.ndarray, source: np.ndarray, *, at_least: int = 5
) -> dict[str, float] | None:
    """Returns how well predictions put the destinations of each source in order.

    None where no source has `at_least` destinations.

    Args:
        predicted: RTT of each (source, destination) [n].
        actual: What it is [n].
        source: Which source [n]; destinations of one are side by side.
        at_least: Destinations that a source must have to count.

    Returns:
        `top1_regret_ms`: by how much the destination predicted nearest is farther than the nearest,
        mean over sources; `top1_regret_rel`: median of that over the nearest; `recall_at_1`,
        `recall_at_5`: fraction of the k nearest that are among the k predicted nearest; `sources`.
    """
    starts = np.flatnonzero(np.diff(source, prepend=np.nan))
    regrets, relative, recalls = [], [], {1: [], 5: []}
    for group in np.split(np.arange(len(source)), starts[1:]):
        if len(group) < at_least:
            continue
        real, guess = actual[group], predicted[group]
        regret = real[np.argmin(guess)] - real.min()
        regrets.append(regret)
        relative.append(regret / real.min())
        by_real, by_guess = np.argsort(real, kind="stable"), np.argsort(guess, kind="stable")
        for k, recall in recalls.items():
            recall.append(len(np.intersect1d(by_real[:k], by_guess[:k])) / k)
    if not regrets:
        return None
    return {
        "top1_regret_ms": float(np.mean(regrets)),
        "top1_regret_rel": float(np.median(relative)),
        "recall_at_1": float(np.mean(recalls[1])),
        "recall_at_5": float(np.mean(recalls[5])),
        "sources": len(regrets),
    }


def others_median(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns for each value the median of the other values of its group; NaN where alone [n]."""
    order = np.lexsort((values, group))
    ordered, of_group = values[order], group[order]
    starts, counts = runs(of_group)
    count, start = np.repeat(counts, counts), np.repeat(starts, counts)
    rank = np.arange(len(order)) - start
    # Among the count - 1 others, ranks low and high are in the middle; those from `rank` on are one
    # further on.
    low, high = (count - 2) // 2, (count - 1) // 2
    low, high = low + (low >= rank), high + (high >= rank)
    last = np.maximum(count - 1, 0)
    median = (ordered[start + np.clip(low, 0, last)] + ordered[start + np.clip(high, 0, last)]) / 2
    result = np.empty(len(values))
    result[order] = np.where(count > 1, median, np.nan)
    return result
