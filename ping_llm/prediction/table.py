"""Measurements as columns of whole numbers: who pinged whom, when, and what came back."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ping_llm.data.rows import ProbeRows
from ping_llm.data.sources import read_measurements
from ping_llm.data.statistics import hash_addresses
from ping_llm.errors import DataError
from ping_llm.tokenizer import Measurements


def concatenate(parts: Sequence[Measurements]) -> Measurements:
    """Returns the measurements of `parts`, end to end."""
    names = [field.name for field in dataclasses.fields(Measurements)]
    return Measurements(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def take(measurements: Measurements, index: np.ndarray) -> Measurements:
    """Returns the measurements at `index`, numbers or booleans."""
    names = [field.name for field in dataclasses.fields(Measurements)]
    return Measurements(**{name: getattr(measurements, name)[index] for name in names})


def no_measurements() -> Measurements:
    """Returns an empty table."""
    addresses = np.zeros((0, 16), np.uint8)
    return Measurements(
        event_time=np.zeros(0, np.int64),
        has_time=np.zeros(0, bool),
        src_addr=addresses,
        dst_addr=addresses,
        ip_version=np.zeros(0, np.int8),
        rtt=np.zeros(0, np.float32),
    )


def read_split(data: Path, split: str) -> Measurements:
    """Returns all measurements of one split of a data set, sources one after the other."""
    parts = [no_measurements()]
    for rows in ProbeRows(data, split).batches:
        counts = np.diff(rows.offsets)
        parts.append(
            Measurements(
                event_time=rows.event_time,
                has_time=np.ones(len(rows.event_time), bool),
                src_addr=np.repeat(rows.src_addr, counts, axis=0),
                dst_addr=rows.dst_addr,
                ip_version=np.repeat(rows.ip_version, counts),
                rtt=rows.rtt,
            )
        )
    return concatenate(parts)


def read_files(inputs: Sequence[str]) -> Measurements:
    """Returns all measurements of Parquet, CSV or RIPE Atlas files.

    Raises:
        DataError: A file cannot be read, holds bad records, or there is no measurement at all.
    """
    rejected: list[int] = []
    parts = [no_measurements()]
    for batch in read_measurements(inputs, on_rejected=lambda bad: rejected.append(len(bad))):
        times, src, dst, version, rtt = batch.columns
        parts.append(
            Measurements(
                event_time=times.to_numpy(),
                has_time=np.ones(len(batch), bool),
                src_addr=_bytes16(src),
                dst_addr=_bytes16(dst),
                ip_version=version.to_numpy(),
                rtt=rtt.to_numpy(),
            )
        )
    shown = ", ".join(inputs)
    if rejected:
        raise DataError(
            f"{shown}: {sum(rejected)} records are bad; `ping-llm inspect-data` shows them, "
            "`ping-llm prepare-data` sorts them out"
        )
    if len(parts) == 1:
        raise DataError(f"{shown}: no measurements; give a file that has some")
    return concatenate(parts)


def _bytes16(column) -> np.ndarray:
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    return flat[column.offset * 16 : (column.offset + len(column)) * 16].reshape(-1, 16)


class Nodes:
    """The addresses of a table, numbered.

    Attributes:
        addresses: Address of each number [N, 16], uint8, in the order of their hashes.
    """

    def __init__(self, *columns: np.ndarray):
        """Numbers every address in `columns`, each [n, 16]."""
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


def split_nodes(data: Path, split: str) -> Nodes:
    """Returns the addresses of one split of a data set, without reading it all at once."""
    parts = [np.zeros((0, 16), np.uint8)]
    for rows in ProbeRows(data, split).batches:
        parts.append(Nodes(rows.src_addr, rows.dst_addr).addresses)
    return Nodes(*parts)


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

    measurements: Measurements
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


def training_table(measurements: Measurements) -> Training:
    """Returns the answered ones of `measurements` for fitting.

    Raises:
        DataError: None was answered.
    """
    answered = take(measurements, measurements.rtt >= 0)
    if not len(answered):
        raise DataError("no measurement to fit on was answered; give data with RTTs")
    nodes = Nodes(answered.src_addr, answered.dst_addr)
    return Training(
        measurements=answered,
        nodes=nodes,
        src=nodes.lookup(answered.src_addr),
        dst=nodes.lookup(answered.dst_addr),
        rtt=np.maximum(answered.rtt.astype(np.float64), MIN_RTT_MS),
    )
