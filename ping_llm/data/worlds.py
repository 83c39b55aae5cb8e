"""Training worlds: parts of a network of which some pairs are known and others are asked.

A model that has answered about many worlds, dense and sparse, with ends that are hardly known,
answers about a network that it has never seen.
"""

import numpy as np

from ping_llm.estimators.world import MeasuredWorld, Pairs
from ping_llm.simulation.random_series import log_uniform

LARGEST, DENSE_FROM = 450, 230  # nodes
SMALLEST = 40
FEWEST_KNOWN, FEWEST_ASKED = 20, 8  # pairs
DENSE_FRACTION = 0.4  # of the worlds: large, and of most pairs known
ADDRESSED_FRACTION = 0.7  # of the worlds whose addresses may say something
TURNED_FRACTION = 0.15  # of the questions asked from either end, whichever knows more


def draw_world(
    pairs: Pairs, key: np.ndarray, address: np.ndarray | None, rng: np.random.Generator
) -> tuple[MeasuredWorld, Pairs] | None:
    """Returns (a random world of a network, the pairs that may be asked of it); None: too few.

    Args:
        pairs: What was measured in the network.
        key: Names of its nodes, as for `MeasuredWorld` [n].
        address: Their addresses [n]; None: they say nothing.
        rng: All that is random.
    """
    dense = rng.random() < DENSE_FRACTION
    nodes = _some_nodes(pairs, len(key), dense, rng)
    number = np.full(len(key), -1)
    number[nodes] = np.arange(len(nodes))
    pairs = pairs.renumbered(number)
    if rng.random() >= ADDRESSED_FRACTION:
        address = None
    known = _some_pairs(pairs, len(nodes), dense, rng)
    asked = pairs.take(~known)
    if np.count_nonzero(known) < FEWEST_KNOWN or len(asked.a) < FEWEST_ASKED:
        return None
    shown = _some_measurements(pairs.take(known), dense, rng)
    return MeasuredWorld(shown, key[nodes], None if address is None else address[nodes]), asked


def _some_nodes(pairs: Pairs, n: int, dense: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns some nodes: any of a network whose nodes know most others, else ends of pairs."""
    low, high = (DENSE_FROM, LARGEST) if dense else (SMALLEST, DENSE_FROM)
    size = int(np.exp(rng.uniform(*np.log([min(low, n), min(high, n)]))))
    if len(pairs.a) > 0.15 * n * n:
        return np.sort(rng.permutation(n)[:size])
    ends = np.stack([pairs.a, pairs.b], axis=1)[rng.permutation(len(pairs.a))].ravel()
    _, first = np.unique(ends, return_index=True)
    return np.sort(ends[np.sort(first)[:size]])


def _some_pairs(pairs: Pairs, n: int, dense: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns which pairs are known: a share of all, of popular nodes more, of some nodes few."""
    share = rng.uniform(0.8, 0.95) if dense or rng.random() < 0.35 else log_uniform(rng, 0.03, 0.9)
    if dense and rng.random() < 0.6:
        return rng.random(len(pairs.a)) < share
    uneven = rng.choice([0.0, 0.0, 0.5, 1.0])
    popular = np.exp(uneven * rng.standard_normal(n) - uneven**2 / 2)
    share = share * popular[pairs.a] * popular[pairs.b]
    known = rng.random(len(pairs.a)) < np.minimum(share, 0.97)
    # Nodes that are new have 0 to 24 pairs.
    new = rng.random(n) < rng.choice([0.0, 0.1, 0.25])
    left = np.where(new, np.exp(rng.random(n) * np.log(25)).astype(np.int64) - 1, len(pairs.a))
    for end in (pairs.a, pairs.b):
        order = np.flatnonzero(known)
        order = order[np.lexsort((rng.random(len(order)), end[order]))]
        starts = np.searchsorted(end[order], end[order])
        known[order] = np.arange(len(order)) - starts < left[end[order]]
    return known


def _some_measurements(pairs: Pairs, dense: bool, rng: np.random.Generator) -> Pairs:
    """Returns the pairs with up to k of their measurements each."""
    k = int(rng.choice([4, 8, 16] if dense else [1, 2, 4, 8, 16]))
    count = np.count_nonzero(~np.isnan(pairs.samples), axis=1)
    # Evenly spread over those there are, from a random one on.
    start = rng.random((len(count), 1))
    step = (np.arange(k) + start) / k
    index = np.minimum((step * count[:, None]).astype(np.int64), count[:, None] - 1)
    samples = np.take_along_axis(pairs.samples, index, axis=1)
    repeated = np.diff(index, axis=1, prepend=-1) == 0
    return Pairs(pairs.a, pairs.b, np.where(repeated, np.nan, samples).astype(np.float32))


def draw_questions(
    world: MeasuredWorld, asked: Pairs, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (a, b, log RTT measured, `FAILED` where it failed) of random questions [count]."""
    index = rng.integers(len(asked.a), size=count)
    a, b = asked.a[index], asked.b[index]
    first, second = world.oriented(a, b)
    either = rng.random(count) < TURNED_FRACTION
    turn = either & (rng.random(count) < 0.5)
    a, b = np.where(turn, second, first), np.where(turn, first, second)
    samples = asked.samples[index]
    there = np.count_nonzero(~np.isnan(samples), axis=1)
    column = (rng.random(count) * there).astype(np.int64)
    return a, b, samples[np.arange(count), column]
