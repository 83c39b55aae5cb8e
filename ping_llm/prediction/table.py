"""Measurements as columns of whole numbers: who pinged whom, when, and what came back."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ping_llm.data.rows import ProbeRows
from ping_llm.errors import DataError
from ping_llm.estimators.pairs import Nodes
from ping_llm.ingest.sources import read_measurements
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


def split_nodes(data: Path, split: str) -> Nodes:
    """Returns the addresses of one split of a data set, without reading it all at once."""
    parts = [np.zeros((0, 16), np.uint8)]
    for rows in ProbeRows(data, split).batches:
        parts.append(Nodes(rows.src_addr, rows.dst_addr).addresses)
    return Nodes(*parts)
