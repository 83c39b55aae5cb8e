"""64-bit hashes of whole columns, for what must depend on values alone and on nothing else."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scramble(x: np.ndarray) -> np.ndarray:
    """Returns uint64 `x` scrambled: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*columns: np.ndarray) -> np.ndarray:
    """Returns one hash for each element of the integer columns [n] or [1]; their order matters."""
    key = np.zeros(np.shape(columns[0]), np.uint64)
    for column in columns:
        key = scramble((key + _GOLDEN) ^ scramble(column.astype(np.uint64) + _GOLDEN))
    return key
