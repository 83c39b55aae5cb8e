"""Network coordinates: Vivaldi with height vectors."""

import numpy as np

from ping_llm.estimators.factorisation import PredictPairs
from ping_llm.estimators.pairs import Training, group_starts

DIMENSIONS = 5
ROUNDS = 4000
C_C = C_E = 0.25
MIN_HEIGHT_MS = 0.01


def fit_vivaldi(train: Training) -> PredictPairs:
    """Returns the distances of a Vivaldi embedding (Dabek, Cox, Kaashoek and Morris, 2004).

    Each round every node meets one of its training pairs, drawn anew, and moves along the spring
    between them; all nodes move at once.
    """
    one, other, rtt = train.directed
    order = np.argsort(one, kind="stable")
    other, rtt = other[order], rtt[order]
    starts = group_starts(one[order])
    counts = np.diff(np.r_[starts, len(order)])  # every node is in some pair, so starts are by node
    n, rng = len(train.nodes), np.random.default_rng(0)
    place = rng.normal(0, 1e-3, (n, DIMENSIONS))
    height, error = np.full(n, 0.1), np.ones(n)
    for _ in range(ROUNDS):
        met = starts + (rng.random(n) * counts).astype(np.int64)
        peer, measured = other[met], rtt[met]
        apart = place - place[peer]
        length = np.sqrt(np.einsum("nd,nd->n", apart, apart))
        heights = height + height[peer]
        weight = error / (error + error[peer])
        surprise = np.abs(length + heights - measured) / measured
        error = np.maximum(surprise * C_E * weight + error * (1 - C_E * weight), 1e-6)
        force = C_C * weight * (measured - length - heights)
        place = place + (force / np.maximum(length, 1e-9))[:, None] * apart
        height = height + force * heights / np.maximum(length + heights, 1e-9)
        height = np.maximum(height, MIN_HEIGHT_MS)

    def predict_rtt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        apart = place[a] - place[b]
        return np.sqrt(np.einsum("nd,nd->n", apart, apart)) + height[a] + height[b]

    return predict_rtt
