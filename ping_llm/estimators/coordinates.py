"""Network coordinates with heights that are fitted to the logarithms of RTTs."""

import numpy as np

from ping_llm.estimators.pairs import PredictPairs, Training, between_nodes, runs
from ping_llm.hashing import hash_addresses, mix

DIMENSIONS = 3
STARTS = 3
STEPS = 200
PAIRS_CHOSEN = 24  # by each node, at random; with those that others choose it has at most about 48
HUBER_DELTA = 0.3
RIDGE = 0.01
SPREAD = 0.35  # standard deviation of the first positions; the median RTT is 1
LOG_HEIGHT = -2.3  # the first, and where the ridge pulls
LEARNING_RATE = 0.08
BETA_1, BETA_2, EPSILON = 0.9, 0.98, 1e-4


@between_nodes
def fit_coordinates(train: Training) -> PredictPairs:
    """Returns distances plus heights in 3 dimensions, the mean of the logarithms of 3 fits."""
    a, b, rtt = train.pairs
    log_rtt = embed(a, b, np.log(rtt), hash_addresses(train.nodes.addresses))
    return lambda a, b: np.exp(log_rtt(a, b))


def embed(a: np.ndarray, b: np.ndarray, log_rtt: np.ndarray, key: np.ndarray) -> PredictPairs:
    """Returns the same as log RTTs, fitted to those of pairs (a, b) of n nodes.

    Random numbers depend on the nodes' `key` [n], so that how they are numbered does not matter.
    """
    y, n = log_rtt, len(key)
    chosen = _choose(a, b, mix(np.minimum(key[a], key[b]), np.maximum(key[a], key[b])))
    a, b, center = a[chosen], b[chosen], np.median(y[chosen] if len(chosen) else y)
    # Descent blows up what rounding leaves of a factor that all RTTs are multiplied by.
    y = np.round(y[chosen] - center, 2)
    fits = []
    for start in range(STARTS):
        uniform = [
            mix(key, np.array([start * DIMENSIONS + axis])) / 2.0**64 for axis in range(DIMENSIONS)
        ]
        state = np.full((DIMENSIONS + 1, n), LOG_HEIGHT)  # positions, and the log of heights
        state[:-1] = SPREAD * np.sqrt(12) * (np.array(uniform) - 0.5)
        fits.append(_adam(state, a, b, y))

    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        logs = [np.log(_distances(state, a, b)[2]) for state in fits]
        return center + np.mean(logs, axis=0)

    return between


def _choose(a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns the pairs that one of their ends chooses: of its own, those of the smallest keys."""
    proper = np.flatnonzero(a != b)
    ends = np.r_[a[proper], b[proper]]
    order = np.lexsort((np.tile(key[proper], 2), ends))
    starts, counts = runs(ends[order])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return proper[(rank < PAIRS_CHOSEN).reshape(2, -1).any(axis=0)]


def _distances(
    state: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (differences of positions [3, m], their lengths [m], lengths and heights [m])."""
    apart = state[:-1, a] - state[:-1, b]
    length = np.sqrt(np.einsum("dm,dm->m", apart, apart) + 1e-5)
    height = np.exp(state[-1])
    return apart, length, length + height[a] + height[b]


def _adam(state: np.ndarray, a: np.ndarray, b: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns `state` [4, n] after gradient steps on the Huber loss of the log of distances."""
    # Two nodes 0.4 apart with heights of 0.1 say log(0.6) = -0.51. If y is -0.31, the surprise is
    # -0.2 (at most 0.3 counts), its pull -0.2 / 0.6 = -0.33: both move away from each other along
    # the line between them, and both heights grow by 0.1 of it.
    n = state.shape[1]
    counts = np.maximum(np.bincount(a, minlength=n) + np.bincount(b, minlength=n), 1)
    center = np.array([0.0] * DIMENSIONS + [LOG_HEIGHT])[:, None]
    mean, square = np.zeros_like(state), np.zeros_like(state)
    for step in range(1, STEPS + 1):
        apart, length, distance = _distances(state, a, b)
        pull = np.clip(np.log(distance) - y, -HUBER_DELTA, HUBER_DELTA) / distance
        gradient = RIDGE * (state - center)
        for axis in range(DIMENSIONS):
            force = pull / length * apart[axis]
            gradient[axis] += np.bincount(a, force, n) - np.bincount(b, force, n)
        ends = np.bincount(a, pull, n) + np.bincount(b, pull, n)
        gradient[-1] += ends * np.exp(state[-1])
        gradient /= counts
        mean = BETA_1 * mean + (1 - BETA_1) * gradient
        square = BETA_2 * square + (1 - BETA_2) * gradient**2
        rate = LEARNING_RATE * min(1, 2 * (1 - step / (STEPS + 1)))
        scale = np.sqrt(square / (1 - BETA_2**step)) + EPSILON
        state = state - rate * mean / (1 - BETA_1**step) / scale
    return state
