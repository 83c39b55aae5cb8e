"""Probe rows on disk: one source address and its measurements, in time order, a row.

A data set is a directory of Arrow IPC files, `train-00000-of-00004.arrow` and the like, beside
`dataset.json`. The JSON file is written last, so its presence means the data set is complete.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm import storage
from ping_llm.columns import from_fixed_binary, to_fixed_binary
from ping_llm.errors import DataError
from ping_llm.measurements import MeasurementTable

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")
BYTES_PER_MEASUREMENT = 28  # 8 time, 16 destination, 4 RTT
BYTES_PER_ROW = 29  # 16 source, 1 family, 3 x 4 offsets
BATCH_BYTES = 1_000_000
ROW_SCHEMA = pa.schema(
    [
        ("src_addr", pa.binary(16)),
        ("ip_version", pa.int8()),
        ("event_time", pa.list_(pa.int64())),
        ("dst_addr", pa.list_(pa.binary(16))),
        ("rtt", pa.list_(pa.float32())),
    ]
)


@dataclasses.dataclass(frozen=True)
class FlatRows:
    """Some probe rows with their measurements end to end; views, not copies, where from disk.

    Attributes:
        src_addr: Source address of each row [R], `addresses.ADDRESS`.
        ip_version: 4 or 6 [R], int8.
        offsets: Row r holds measurements `offsets[r]:offsets[r + 1]` of the rest [R + 1], int64.
        event_time: Seconds since 1970 UTC, ascending within a row [M], int64.
        dst_addr: Destination addresses [M], `addresses.ADDRESS`.
        rtt: Round-trip times in ms, below 0 where the measurement failed [M], float32.
    """

    src_addr: np.ndarray
    ip_version: np.ndarray
    offsets: np.ndarray
    event_time: np.ndarray
    dst_addr: np.ndarray
    rtt: np.ndarray

    def __len__(self) -> int:
        return len(self.src_addr)

    def to_table(self) -> MeasurementTable:
        """Returns the measurements, sources one after the other."""
        counts = np.diff(self.offsets)
        return MeasurementTable(
            time=self.event_time,
            src=np.repeat(self.src_addr, counts),
            dst=self.dst_addr,
            family=np.repeat(self.ip_version, counts),
            rtt=self.rtt,
        )


def to_record_batch(rows: FlatRows) -> pa.RecordBatch:
    """Returns `rows` as one Arrow record batch of `ROW_SCHEMA`."""
    offsets = pa.array(rows.offsets.astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, values)
        for values in (
            pa.array(rows.event_time, pa.int64()),
            to_fixed_binary(rows.dst_addr),
            pa.array(rows.rtt, pa.float32()),
        )
    ]
    columns = [to_fixed_binary(rows.src_addr), pa.array(rows.ip_version, pa.int8()), *lists]
    return pa.RecordBatch.from_arrays(columns, schema=ROW_SCHEMA)


def from_record_batch(batch: pa.RecordBatch) -> FlatRows:
    """Returns the rows of a record batch of `ROW_SCHEMA` as NumPy views.

    `offsets` start at 0 and every flat array is cut to the batch, also for a sliced batch.
    """
    src, version, times, dsts, rtts = batch.columns
    offsets = times.offsets.to_numpy().astype(np.int64)
    return FlatRows(
        src_addr=from_fixed_binary(src),
        ip_version=version.to_numpy(),
        offsets=offsets - offsets[0],
        event_time=times.flatten().to_numpy(),
        dst_addr=from_fixed_binary(dsts.flatten()),
        rtt=rtts.flatten().to_numpy(),
    )


def is_dataset(directory: str | Path) -> bool:
    """Returns whether `directory`, local or remote, is a complete directory of probe rows."""
    return storage.exists(storage.join(directory, "dataset.json"))


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Returns the content of `dataset.json` in `directory`, local or remote.

    Raises:
        DataError: The file is absent, not JSON, or of a schema version this code does not read.
    """
    if not is_dataset(directory):
        raise DataError(
            f"{directory} is not a complete data set: it has no dataset.json; "
            "make one with `ping-llm prepare-data`"
        )
    path = storage.join(directory, "dataset.json")
    try:
        with storage.open_input(path) as file:
            metadata = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; prepare the data again") from None
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} has schema_version {version!r}; expected {SCHEMA_VERSION}")
    rows = metadata.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(rows.get(s), int) for s in SPLITS):
        raise DataError(f"{path} does not count the rows of each split; prepare the data again")
    return metadata


class ProbeRows:
    """The rows of one split of a data set, memory-mapped.

    Attributes:
        metadata: The content of `dataset.json`.
        batches: The rows, one `FlatRows` a record batch, in order.
        batch_index: Which of `batches` a row is in [R], int32.
        row_in_batch: Which row of that batch it is [R], int32.
        ip_version: 4 or 6 of each row [R], int8.
        n_measurements: Measurements of each row [R], int64.
    """

    def __init__(self, directory: str | Path, split: str):
        directory = storage.local_directory(directory, identity="dataset.json")
        self.metadata = read_metadata(directory)
        self.batches: list[FlatRows] = []
        for path in split_files(directory, split):
            self.batches.extend(read_rows(path))
        rows = [len(batch) for batch in self.batches]
        expected = self.metadata["rows"][split]
        if sum(rows) != expected:
            raise DataError(
                f"{directory}: the {split} files hold {sum(rows)} rows, dataset.json says "
                f"{expected}; prepare the data again"
            )
        self.batch_index = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        parts = [np.arange(n, dtype=np.int32) for n in rows]
        self.row_in_batch = np.concatenate([np.zeros(0, np.int32), *parts])
        versions = [batch.ip_version for batch in self.batches]
        self.ip_version = np.concatenate([np.zeros(0, np.int8), *versions])
        counts = [np.diff(batch.offsets) for batch in self.batches]
        self.n_measurements = np.concatenate([np.zeros(0, np.int64), *counts])

    def __len__(self) -> int:
        return len(self.batch_index)

    def to_table(self) -> MeasurementTable:
        """Returns all measurements, sources one after the other."""
        return MeasurementTable.concat([batch.to_table() for batch in self.batches])


def split_files(directory: Path, split: str) -> list[Path]:
    """Returns the files of one split, in order.

    Raises:
        DataError: A file that the names promise is missing.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    files = sorted(Path(directory).glob(f"{split}-*-of-*.arrow"))
    totals = {re.fullmatch(rf"{split}-\d+-of-(\d+)\.arrow", f.name) for f in files}
    counts = {int(match[1]) for match in totals if match}
    if counts and counts != {len(files)}:
        raise DataError(
            f"{directory} has {len(files)} {split} files, their names say {sorted(counts)}; "
            "prepare the data again"
        )
    return files


def read_rows(path: Path) -> list[FlatRows]:
    """Returns the rows of one file, memory-mapped, one `FlatRows` a record batch.

    Raises:
        DataError: It is no intact Arrow file of probe rows.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            if reader.schema != ROW_SCHEMA:
                found = ", ".join(f"{field.name} {field.type}" for field in reader.schema)
                raise DataError(f"{path} does not hold probe rows, but columns {found}")
            return [_checked(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable Arrow file: {error}; prepare the data again"
        ) from None


def _checked(batch: pa.RecordBatch) -> FlatRows:
    """Returns the rows of a batch whose file may be damaged: Arrow aborts on impossible offsets."""
    batch.validate(full=True)  # looks at offsets only, not at every value
    if any(column.null_count for column in batch.columns):
        raise pa.ArrowInvalid("a value is missing")
    times, dsts, rtts = (column.offsets for column in batch.columns[2:])
    if not times.equals(dsts) or not times.equals(rtts):
        raise pa.ArrowInvalid("the lists of a row differ in length")
    return from_record_batch(batch)


class RowWriter:
    """Writes one split's rows into numbered Arrow files of bounded size.

    Where files and record batches end depends on the rows alone, so the same rows make the same
    files, whoever writes them and in however many calls.
    """

    def __init__(self, directory: Path, split: str, *, file_bytes: int = 256_000_000):
        self._directory, self._split, self._file_bytes = Path(directory), split, file_bytes
        self._parts: list[Path] = []
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._written = 0  # bytes in the current file
        self._pending: list[FlatRows] = []
        self._pending_bytes = 0
        self.rows = self.measurements = 0

    def append(self, rows: FlatRows) -> None:
        """Adds some rows. A record batch ends with the first row that brings it to 1 MB."""
        self.rows += len(rows)
        self.measurements += len(rows.event_time)
        ends = np.cumsum(np.diff(rows.offsets) * BYTES_PER_MEASUREMENT + BYTES_PER_ROW)
        start, before = 0, 0
        while start < len(rows):
            needed = before + BATCH_BYTES - self._pending_bytes
            stop = int(np.searchsorted(ends, needed)) + 1
            full = stop <= len(rows)
            stop = min(stop, len(rows))
            self._pending.append(slice_rows(rows, start, stop))
            self._pending_bytes += int(ends[stop - 1]) - before
            start, before = stop, int(ends[stop - 1])
            if full:
                self._write_batch()

    def _write_batch(self) -> None:
        if self._written >= self._file_bytes:
            self._end_file()
        if self._writer is None:
            path = self._directory / f"{self._split}-part-{len(self._parts):05d}.arrow"
            self._parts.append(path)
            self._writer = pa.ipc.new_file(str(path), ROW_SCHEMA)
            self._written = 0
        self._writer.write_batch(to_record_batch(concat_rows(self._pending)))
        self._written += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> list[Path]:
        """Ends the last file, gives all files their final names and returns them."""
        if self._pending:
            self._write_batch()
        self._end_file()
        total = len(self._parts)
        names = [f"{self._split}-{i:05d}-of-{total:05d}.arrow" for i in range(total)]
        return [p.rename(p.with_name(name)) for p, name in zip(self._parts, names, strict=True)]


class RowBuilder:
    """Cuts measurements that come sorted by source and time into rows of bounded size."""

    def __init__(self, writer: RowWriter, *, row_cap_bytes: int):
        self._writer = writer
        self._cap = max(row_cap_bytes // BYTES_PER_MEASUREMENT, 1)
        self._open: FlatRows | None = None  # the last source's row, which may go on

    def append(self, sources: FlatRows) -> None:
        """Adds measurements, one row a source however long; the first may go on the last one."""
        if len(sources) == 0:
            return
        if self._open is not None:
            if self._open.src_addr[0] == sources.src_addr[0]:
                sources = _join_first(self._open, sources)
            else:
                self._writer.append(self._open)
        rows = self._cut(sources)
        self._writer.append(slice_rows(rows, 0, len(rows) - 1))
        # A copy: the last row alone would keep the whole array it is a view of.
        self._open = concat_rows([slice_rows(rows, len(rows) - 1, len(rows))])

    def close(self) -> None:
        """Hands the last row to the writer."""
        if self._open is not None:
            self._writer.append(self._open)
            self._open = None

    def _cut(self, sources: FlatRows) -> FlatRows:
        counts = np.diff(sources.offsets)
        parts = -(-counts // self._cap)
        source_of_part = np.repeat(np.arange(len(counts)), parts)
        nth = np.arange(len(source_of_part)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = sources.offsets[source_of_part] + nth * self._cap
        return dataclasses.replace(
            sources,
            src_addr=sources.src_addr[source_of_part],
            ip_version=sources.ip_version[source_of_part],
            offsets=np.append(starts, sources.offsets[-1]),
        )


def slice_rows(rows: FlatRows, start: int, stop: int) -> FlatRows:
    """Returns rows [start, stop) as views."""
    first, last = int(rows.offsets[start]), int(rows.offsets[stop])
    return FlatRows(
        src_addr=rows.src_addr[start:stop],
        ip_version=rows.ip_version[start:stop],
        offsets=rows.offsets[start : stop + 1] - first,
        event_time=rows.event_time[first:last],
        dst_addr=rows.dst_addr[first:last],
        rtt=rows.rtt[first:last],
    )


def concat_rows(pieces: list[FlatRows]) -> FlatRows:
    """Returns the rows of `pieces` end to end, as a copy."""
    counts = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return FlatRows(
        src_addr=np.concatenate([piece.src_addr for piece in pieces]),
        ip_version=np.concatenate([piece.ip_version for piece in pieces]),
        offsets=np.append(0, np.cumsum(counts)),
        event_time=np.concatenate([piece.event_time for piece in pieces]),
        dst_addr=np.concatenate([piece.dst_addr for piece in pieces]),
        rtt=np.concatenate([piece.rtt for piece in pieces]),
    )


def _join_first(head: FlatRows, rows: FlatRows) -> FlatRows:
    """Returns `rows` with the measurements of the one row `head` put before its first row's."""
    joined = concat_rows([head, rows])
    return dataclasses.replace(
        joined,
        src_addr=joined.src_addr[1:],
        ip_version=joined.ip_version[1:],
        offsets=np.delete(joined.offsets, 1),
    )
