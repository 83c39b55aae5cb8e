"""What activations are like: norms and attention sinks, of a unit and of a whole store."""

from typing import Any

import numpy as np

SINK_RATIO = 10.0  # a token whose norm is above so many medians is counted as a sink


def unit_statistics(norms: np.ndarray, positions: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
    """Returns what a unit's activations at one site are like.

    Args:
        norms: L2 norm of each token's activation [n].
        positions: Position of each token [n].
        mean: Mean activation [D].
    """
    if not len(norms):
        return {"tokens": 0}
    first = positions == 0
    median = float(np.median(norms))
    sinks = norms > SINK_RATIO * median
    return {
        "tokens": len(norms),
        "norm_mean": float(norms.mean(dtype=np.float64)),
        "norm_median": median,
        "norm_max": float(norms.max()),
        "norm_of_mean": float(np.linalg.norm(mean)),
        "first_tokens": int(first.sum()),
        # Where only last tokens are stored there may be no first one; it then weighs nothing.
        "first_token_norm_mean": float(norms[first].sum(dtype=np.float64)) / max(first.sum(), 1),
        "sink_tokens": int(sinks.sum()),
        "sink_tokens_at_first": int((sinks & first).sum()),
    }


def combine(units: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the statistics of units as those of their union; None where there is no token."""
    units = [unit for unit in units if unit["tokens"]]
    if not units:
        return {}

    def mean(name: str, weight: str) -> float | None:
        weights = sum(unit[weight] for unit in units)
        return sum(unit[name] * unit[weight] for unit in units) / weights if weights else None

    return {
        "norm_mean": mean("norm_mean", "tokens"),
        "norm_max": max(unit["norm_max"] for unit in units),
        "first_token_norm_mean": mean("first_token_norm_mean", "first_tokens"),
        "sink_tokens": sum(unit["sink_tokens"] for unit in units),
        "sink_tokens_at_first": sum(unit["sink_tokens_at_first"] for unit in units),
    }
