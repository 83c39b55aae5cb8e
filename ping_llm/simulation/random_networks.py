"""Random networks of many kinds, to train on: what is like what, and how measurements vary.

Each has base RTTs between its nodes (distances on a globe, shortest paths between clusters, or low
rank), noise of one or two levels, the clock's resolution, and nodes and pairs that fail.
"""

import dataclasses

import numpy as np

from ping_llm.simulation.random_series import log_uniform

FEWEST, MOST = 40, 230  # nodes
KINDS = {"globe": 0.55, "graph": 0.3, "factors": 0.15}
EARTH_KM = 6371.0
MS_PER_KM = 0.01  # there and back in fibre
RESOLUTIONS_MS = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclasses.dataclass(frozen=True)
class RandomNetwork:
    """A network that can be measured.

    Attributes:
        level: Log of the usual RTT in ms of each pair [n, n].
        noise: Standard deviation of the log RTT of each pair [n, n].
        second_share: Share of the measurements of each pair at a second level [n, n].
        second_level: How far that lies from the first [n, n].
        failing: Probability of a failure of each pair [n, n].
        one_sided: Whether noise only adds.
        spikes: Share of single slow measurements.
        resolution_ms: Of the clock.
    """

    level: np.ndarray
    noise: np.ndarray
    second_share: np.ndarray
    second_level: np.ndarray
    failing: np.ndarray
    one_sided: bool
    spikes: float
    resolution_ms: float

    @property
    def n(self) -> int:
        """Number of nodes."""
        return len(self.level)

    def measure(self, a: np.ndarray, b: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
        """Returns log RTTs of `k` measurements of pairs, infinite for failures [p, k], float32."""
        shape = len(a), k
        deviation = rng.standard_normal(shape)
        deviation = (np.abs(deviation) if self.one_sided else deviation) * self.noise[a, b][:, None]
        deviation += (rng.random(shape) < self.spikes) * rng.exponential(0.7, shape)
        second = rng.random(shape) < self.second_share[a, b][:, None]
        deviation += second * self.second_level[a, b][:, None]
        rtt = np.exp(np.clip(self.level[a, b][:, None] + deviation, -6, 13))
        step = self.resolution_ms
        log_rtt = np.log(np.maximum(np.round(rtt / step) * step, max(step, 0.02)))
        failed = rng.random(shape) < self.failing[a, b][:, None]
        return np.where(failed, np.inf, log_rtt).astype(np.float32)


def random_network(rng: np.random.Generator) -> RandomNetwork:
    """Returns a random network of 40 to 230 nodes."""
    n = int(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST))))
    clusters = _Clusters(n, rng)
    kind = rng.choice([*KINDS], p=[*KINDS.values()])
    base = {"globe": clusters.globe, "graph": clusters.graph, "factors": clusters.factors}[kind]()
    level = np.log(np.maximum(base, 0.05)) + rng.normal(0, 0.7)
    level += _symmetric(rng.normal(0, log_uniform(rng, 0.002, 0.15), (n, n)))
    detours = rng.random((n, n)) < rng.uniform(0, 0.06)
    level += _symmetric(detours * rng.exponential(0.5, (n, n)))
    noise = log_uniform(rng, 8e-4, 0.3) * np.exp(
        _symmetric(rng.normal(0, rng.uniform(0, 0.8), (n, n)))
    )
    share, second = _second_level(n, rng)
    return RandomNetwork(
        level,
        noise,
        share,
        second,
        _failing(n, rng),
        one_sided=rng.random() < 0.5,
        spikes=rng.choice([0, 0, 0.02, 0.1]),
        resolution_ms=rng.choice(RESOLUTIONS_MS, p=[0.35, 0.2, 0.2, 0.15, 0.1]),
    )


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    upper = np.triu(matrix, 1)
    return upper + upper.T


class _Clusters:
    """Nodes in clusters, such as cities or networks, and how far these are from each other."""

    def __init__(self, n: int, rng: np.random.Generator):
        self._rng, self._n = rng, n
        count = int(log_uniform(rng, 3, 70))
        self._of_node = rng.choice(
            count, n, p=rng.dirichlet(np.full(count, rng.choice([0.3, 1, 5])))
        )
        self._count = count
        span = rng.choice([180.0, 60.0, 15.0])  # degrees: a globe, a continent, a country
        self._longitude = rng.uniform(-span, span, count)
        self._latitude = rng.uniform(-span / 3, span / 3, count)
        mean_access = log_uniform(rng, 0.1, 12)
        self._access = mean_access * np.exp(rng.normal(0, rng.uniform(0.2, 1.2), n))  # ms

    def globe(self) -> np.ndarray:
        """Returns RTTs by distance, longer between some clusters than others [n, n]."""
        rng, cluster = self._rng, self._of_node
        jitter = log_uniform(rng, 0.02, 3)
        degrees = [
            where[cluster] + jitter * rng.standard_normal(self._n)
            for where in (self._latitude, self._longitude)
        ]
        detour = np.maximum(0.1, rng.normal(0.4, rng.uniform(0.05, 0.5), (self._count,) * 2))
        detour = np.exp(np.triu(detour) + np.triu(detour, 1).T)
        part = cluster * 4 + rng.integers(0, rng.choice([1, 2, 4]), self._n)
        parts = int(part.max()) + 1
        of_parts = np.exp(_symmetric(rng.normal(0, rng.uniform(0, 0.15), (parts, parts))))
        km = _distances_km(*degrees)
        path = km * MS_PER_KM * detour[np.ix_(cluster, cluster)] * of_parts[np.ix_(part, part)]
        return path + self._access[:, None] + self._access

    def graph(self) -> np.ndarray:
        """Returns RTTs along shortest paths between clusters that have few links [n, n]."""
        rng, count = self._rng, self._count
        length = _distances_km(self._latitude, self._longitude) * MS_PER_KM * 1.1
        length = (length + rng.uniform(0.2, 3)) * np.exp(
            _symmetric(rng.normal(0, 0.2, (count, count)))
        )
        linked = _symmetric(rng.random((count, count)) < rng.uniform(0.02, 0.3)) > 0
        nearest = np.argsort(length, axis=1)[:, 1:4]
        rows = np.arange(count)[:, None]
        linked[rows, nearest] = linked[nearest, rows] = True
        linked[0, :] = linked[:, 0] = True  # one reaches all
        path = np.where(linked, length, np.inf)
        np.fill_diagonal(path, 0)
        for via in range(count):  # Floyd and Warshall
            path = np.minimum(path, path[:, via : via + 1] + path[via])
        between = path[np.ix_(self._of_node, self._of_node)]
        return between + self._access[:, None] + self._access

    def factors(self) -> np.ndarray:
        """Returns RTTs whose logs are biases plus products of few factors [n, n]."""
        rng, cluster = self._rng, self._of_node
        rank = int(rng.integers(1, 6))
        of_cluster = rng.standard_normal((self._count, rank)) * rng.uniform(0.1, 0.5)
        factor = of_cluster[cluster] + 0.1 * rng.random() * rng.standard_normal((self._n, rank))
        bias = rng.normal(0, rng.uniform(0.1, 0.6), self._count)[cluster]
        bias = bias + rng.normal(0, 0.1, self._n)
        return np.exp(np.clip(3.5 + bias[:, None] + bias + factor @ factor.T, -3, 8))


def _distances_km(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Returns great-circle distances between points in degrees [n, n]."""
    up, around = np.radians(latitude), np.radians(longitude)
    point = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], axis=1)
    return np.arccos(np.clip(point @ point.T, -1, 1)) * EARTH_KM


def _second_level(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns (share of measurements at a second level, how far that is) of each pair [n, n]."""
    if rng.random() >= 0.6:
        return np.zeros((n, n)), np.zeros((n, n))
    level = _symmetric(rng.normal(rng.uniform(-1.2, 2), rng.uniform(0.05, 0.9), (n, n)))
    share = rng.uniform(0.05, 0.6) * np.exp(_symmetric(rng.normal(0, rng.uniform(0, 0.7), (n, n))))
    pairs = _symmetric(rng.random((n, n))) < rng.choice([0.2, 0.6, 1.0])
    nodes = rng.random(n) < rng.choice([0.3, 1.0])
    return np.clip(share, 0, 0.9) * pairs * (nodes[:, None] | nodes), level


def _failing(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the probability that each pair fails: either node does, or the pair [n, n]."""
    node = (rng.random(n) < rng.choice([0, 0, 0.1, 0.3])) * rng.beta(0.5, 0.7, n)
    node = node * (rng.random() < 0.6)
    either = 1 - (1 - node[:, None]) * (1 - node)
    broken = _symmetric(rng.random((n, n)) < rng.choice([0, 0, 0.03])) > 0
    return np.where(broken, 0.9, either)
