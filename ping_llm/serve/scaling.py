"""A map of a network in two dimensions, from round-trip times."""

import numpy as np


def classical_scaling(landmarks: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Returns coordinates of points whose distances come close to those given, in their unit.

    Classical multidimensional scaling (Torgerson, 1952) places the landmarks; the others are placed
    by their distances to them (de Silva and Tenenbaum, 2004). Where the distances are those of
    points in a plane, it finds these, turned or mirrored.

    Args:
        landmarks: Distances between l landmarks, symmetric [l, l].
        others: Distances of n further points from the landmarks [n, l]; None: there are none.

    Returns:
        Coordinates of the landmarks, then of the others [l + n, 2].
    """
    squared = landmarks**2
    mean = squared.mean(axis=0)
    centred = -(squared - mean - mean[:, None] + mean.mean()) / 2
    values, vectors = np.linalg.eigh(centred)
    # What is not above 0 has no extent in that direction: all lie on a line, or on a point.
    count = min(2, len(values))
    size = np.sqrt(np.maximum(values[::-1][:count], 0))
    vectors = vectors[:, ::-1][:, :count]
    there = size > 1e-6 * size.max(initial=0)  # below it is rounding
    inverse = np.divide(vectors, size, out=np.zeros_like(vectors), where=there)
    every = squared if others is None else np.concatenate([squared, others**2])
    placed = -(every - mean) @ inverse / 2
    return np.pad(placed, ((0, 0), (0, 2 - count)))
