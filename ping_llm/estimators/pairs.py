"""What the classical methods are fitted on: RTTs between numbered nodes."""

import dataclasses
import functools

import numpy as np

from ping_llm.errors import DataError
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable


class Nodes:
    """The addresses of a table, numbered.

    Attributes:
        addresses: Address of each number [N], `addresses.ADDRESS`, in the order of their hashes.
    """

    def __init__(self, *columns: np.ndarray):
        """Numbers every address in `columns`, each [n]."""
        addresses = np.concatenate(columns)
        self._hashes, first = np.unique(hash_addresses(addresses), return_index=True)
        self.addresses = addresses[first]

    def __len__(self) -> int:
        return len(self.addresses)

    def lookup(self, addresses: np.ndarray) -> np.ndarray:
        """Returns the number of each address [n], int64; -1 for those that are not here."""
        hashes = hash_addresses(addresses)
        at = np.searchsorted(self._hashes, hashes)
        at[at == len(self)] = 0
        known = self._hashes[at] == hashes if len(self) else np.zeros(len(at), bool)
        return np.where(known, at, -1)


def group_starts(ordered: np.ndarray) -> np.ndarray:
    """Returns where each run of equal values starts in a sorted array."""
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])


def grouped_median(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct keys, ascending; the median of each one's values)."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    starts = group_starts(keys)
    counts = np.diff(np.r_[starts, len(keys)])
    low, high = starts + (counts - 1) // 2, starts + counts // 2
    return keys[starts], (values[low] + values[high]) / 2


@dataclasses.dataclass(frozen=True)
class Training:
    """What the classical methods are fitted on: answered measurements between numbered nodes.

    A round trip goes both ways, so a pair is unordered everywhere here: its median stands for
    either direction.

    Attributes:
        measurements: The measurements themselves, n of them.
        nodes: The addresses, numbered.
        src: Source node of each measurement [n], int64.
        dst: Destination node [n], int64.
        rtt: RTT in ms, at least `MIN_RTT_MS` [n], float64.
    """

    measurements: MeasurementTable
    nodes: Nodes
    src: np.ndarray
    dst: np.ndarray
    rtt: np.ndarray

    @functools.cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (a, b, median RTT) of every unordered pair, a <= b."""
        low, high = np.minimum(self.src, self.dst), np.maximum(self.src, self.dst)
        keys, median = grouped_median(low * len(self.nodes) + high, self.rtt)
        return keys // len(self.nodes), keys % len(self.nodes), median

    @functools.cached_property
    def directed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `pairs` from both ends: (one end, the other end, median RTT)."""
        a, b, median = self.pairs
        both = a != b
        return np.r_[a, b[both]], np.r_[b, a[both]], np.r_[median, median[both]]


MIN_RTT_MS = 0.001  # the token language's smallest step; keeps logarithms finite


def training_table(measurements: MeasurementTable) -> Training:
    """Returns the answered ones of `measurements` for fitting.

    Raises:
        DataError: None was answered.
    """
    answered = measurements.take(measurements.rtt >= 0)
    if not len(answered):
        raise DataError("no measurement to fit on was answered; give data with RTTs")
    nodes = Nodes(answered.src, answered.dst)
    return Training(
        measurements=answered,
        nodes=nodes,
        src=nodes.lookup(answered.src),
        dst=nodes.lookup(answered.dst),
        rtt=np.maximum(answered.rtt.astype(np.float64), MIN_RTT_MS),
    )
