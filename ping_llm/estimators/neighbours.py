"""Nearest neighbours: a host measures like the hosts that everyone measures alike."""

import numpy as np

from ping_llm.estimators.pairs import PredictPairs, Training, between_nodes, lookup

LANDMARKS = 256  # nodes of most pairs, by which the others are compared
NEIGHBOURS = 64  # of each node
PRIOR = 2.0  # landmarks that every two nodes differ at as random ones do
COMPARISONS = 20_000_000  # of two nodes, at most about
SAMPLED = 1000  # pairs of nodes, to know how random ones differ
NEAREST = 1e-6  # a distance that is not 0
SHARPNESS = 6.0  # how much more a nearer neighbour counts


@between_nodes
def fit_neighbours(train: Training) -> PredictPairs:
    """Returns predictions from pairs of neighbours that were measured.

    Two nodes are near each other if their log RTTs to the landmarks that both have measured differ
    little, in the mean. A pair (a, b) has the mean log RTT of the measured pairs (a, b') with b'
    near b and (a', b) with a' near a, weighted by nearness; NaN where there are none. A node is
    its own nearest neighbour, so a pair that was measured has its own median.
    """
    one, other, rtt = train.directed
    n = len(train.nodes)
    keys = one * n + other
    order = np.argsort(keys)
    keys, values = keys[order], np.log(rtt[order])
    near, distance = _neighbours(one, other, np.log(rtt), n)

    def predict_rtt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sums, weights = np.zeros(len(a)), np.zeros(len(a))
        for end, other_end in ((a, b), (b, a)):
            index = lookup(keys, end[:, None] * n + near[other_end])  # [q, NEIGHBOURS]
            weight = np.where(index >= 0, distance[other_end] ** -SHARPNESS, 0.0)
            sums += np.einsum("qk,qk->q", weight, values[index])
            weights += weight.sum(axis=1)
        return np.exp(np.divide(sums, weights, out=np.full(len(a), np.nan), where=weights > 0))

    return predict_rtt


def _neighbours(
    one: np.ndarray, other: np.ndarray, log_rtt: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the nodes nearest each node, itself among them; their distances), both [n, k]."""
    counts = np.bincount(one, minlength=n)
    landmarks = np.argsort(-counts, kind="stable")[:LANDMARKS]
    column = np.full(n, -1)  # of `profile`; -1 where a node is no landmark
    column[landmarks] = np.arange(len(landmarks))
    chosen = column[other] >= 0
    profile = np.zeros((n, len(landmarks)), np.float32)
    measured = np.zeros(profile.shape, np.float32)
    profile[one[chosen], column[other[chosen]]] = log_rtt[chosen]
    measured[one[chosen], column[other[chosen]]] = 1

    def differences(i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = measured[i] * measured[j]
        return (np.abs(profile[i] - profile[j]) * both).sum(axis=1), both.sum(axis=1)

    total, common = differences(*np.random.default_rng(0).integers(0, n, (2, SAMPLED)))
    typical = total.sum() / max(common.sum(), 1.0)
    # Of many nodes only those of most pairs are compared with each, or it would take n^2.
    compared = np.argsort(-counts, kind="stable")[: max(COMPARISONS // n, NEIGHBOURS)]
    kept = min(NEIGHBOURS, len(compared))
    near = np.repeat(np.arange(n)[:, None], kept, axis=1)
    distance = np.full((n, kept), NEAREST)
    for node in range(n):
        total, common = differences(np.array([node]), compared)
        apart = (total + PRIOR * typical) / (common + PRIOR)
        apart[compared == node] = np.inf
        nearest = np.argsort(apart)[: kept - 1]
        near[node, 1:] = compared[nearest]
        distance[node, 1:] = np.maximum(apart[nearest], NEAREST)
    return near, distance
