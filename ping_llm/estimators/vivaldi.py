"""Network coordinates: Vivaldi with height vectors."""

import numpy as np

from ping_llm.estimators.pairs import PredictPairs, Training, between_nodes, runs

DIMENSIONS = 5
ROUNDS = 4000
C_C = C_E = 0.25
MIN_HEIGHT_MS = 0.01


@between_nodes
def fit_vivaldi(train: Training) -> PredictPairs:
    """Returns the distances of a Vivaldi embedding (Dabek, Cox, Kaashoek and Morris, 2004).

    Each round every node meets a new random one of its training pairs, and moves along the spring
    between them; all nodes move at once.
    """
    one, other, rtt = train.directed
    order = np.argsort(one, kind="stable")
    other, rtt = other[order], rtt[order]
    starts, counts = runs(one[order])  # every node is in some pair, so these are by node
    n, rng = len(train.nodes), np.random.default_rng(0)
    position = rng.normal(0, 1e-3, (n, DIMENSIONS))
    height, error = np.full(n, 0.1), np.ones(n)
    for _ in range(ROUNDS):
        drawn = starts + (rng.random(n) * counts).astype(np.int64)
        peer, measured = other[drawn], rtt[drawn]
        apart = position - position[peer]
        length = np.sqrt(np.einsum("nd,nd->n", apart, apart))
        heights = height + height[peer]
        weight = error / (error + error[peer])
        surprise = np.abs(length + heights - measured) / measured
        error = np.maximum(surprise * C_E * weight + error * (1 - C_E * weight), 1e-6)
        force = C_C * weight * (measured - length - heights)
        position = position + (force / np.maximum(length, 1e-9))[:, None] * apart
        height = height + force * heights / np.maximum(length + heights, 1e-9)
        height = np.maximum(height, MIN_HEIGHT_MS)

    def predict_rtt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        apart = position[a] - position[b]
        return np.sqrt(np.einsum("nd,nd->n", apart, apart)) + height[a] + height[b]

    return predict_rtt
