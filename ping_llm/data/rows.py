"""Probe rows on disk: one source address and its measurements, in time order, a row.

A data set is a directory of Arrow IPC files, `train-00000-of-00004.arrow` and the like, beside
`dataset.json`. The JSON file is written last, so its presence means the data set is complete.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm import addresses, outputs
from ping_llm.columns import from_numpy, to_numpy
from ping_llm.errors import DataError
from ping_llm.measurements import COLUMNS, MeasurementTable
from ping_llm.packing import ragged
from ping_llm.storage import Location, StoredFile

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")
METADATA = "dataset.json"
COSTS = ("seconds", "peak_rss_bytes")  # the keys of `METADATA` that say nothing of the content
FINGERPRINT_DIGITS = 16
VERIFIED_BYTES = 32_000_000  # of a split, which are hashed each time they are opened, in 0.1 s
BYTES_PER_ROW = 29  # 16 source, 1 family, 3 x 4 offsets
BATCH_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Some probe rows with their measurements end to end; views, not copies, where from disk.

    The columns are those of `MeasurementTable`, the source and its family once a row.

    Attributes:
        src: Source of each row [R].
        family: 4 or 6 [R].
        offsets: Row r holds measurements `offsets[r]:offsets[r + 1]` of the rest [R + 1], int64.
        time: Ascending within a row [M].
        dst: Destinations [M].
        rtt: Round-trip times in ms, below 0 where the measurement failed [M].
        kind: Index into `measurements.KINDS` [M]; None: all are pings.
        loss: Fraction of the packets that were lost, NaN where unknown [M]; None: unknown.
        spread: Largest minus smallest RTT in ms, NaN where unknown [M]; None: unknown.
    """

    src: np.ndarray
    family: np.ndarray
    offsets: np.ndarray
    time: np.ndarray
    dst: np.ndarray
    rtt: np.ndarray
    kind: np.ndarray | None = None
    loss: np.ndarray | None = None
    spread: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.src)

    @property
    def measured(self) -> dict[str, np.ndarray]:
        """The columns with a value for each measurement that are there, by name."""
        return {name: v for name in MEASURED if (v := getattr(self, name)) is not None}

    def with_columns(self, names: Collection[str]) -> "RowBatch":
        """Returns the rows with all these columns; one that they lack is of unknown values."""
        return dataclasses.replace(
            self,
            **{
                name: np.full(len(self.time), COLUMNS[name].missing, COLUMNS[name].dtype)
                for name in {*names} - {*self.measured}
            },
        )

    @classmethod
    def grouped(
        cls, source: np.ndarray, sources: np.ndarray, measured: Mapping[str, np.ndarray]
    ) -> "RowBatch":
        """Returns measurements as one row a source, however long.

        Args:
            source: Which of `sources` each is of [M]; those of one stand together.
            sources: Addresses.
            measured: Their columns, as the property `measured`.
        """
        starts = np.flatnonzero(np.append(True, source[1:] != source[:-1])[: len(source)])
        src = sources[source[starts]]
        offsets = np.append(starts, len(source))
        return cls(src=src, family=addresses.family(src), offsets=offsets, **measured)

    @classmethod
    def concat(cls, pieces: Sequence["RowBatch"]) -> "RowBatch":
        """Returns the rows of `pieces` end to end, as a copy."""
        counts = np.concatenate([np.diff(piece.offsets) for piece in pieces])
        present = {name for piece in pieces for name in piece.measured}
        pieces = [piece.with_columns(present) for piece in pieces]
        names = ("src", "family", *present)
        columns = {name: np.concatenate([getattr(p, name) for p in pieces]) for name in names}
        return cls(offsets=np.append(0, np.cumsum(counts)), **columns)

    def slice(self, start: int, stop: int) -> "RowBatch":
        """Returns rows [start, stop) as views."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return RowBatch(
            src=self.src[start:stop],
            family=self.family[start:stop],
            offsets=self.offsets[start : stop + 1] - first,
            **{name: values[first:last] for name, values in self.measured.items()},
        )

    def row_of_each(self) -> np.ndarray:
        """Returns which row each measurement is in [M], int64."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, index: np.ndarray) -> "RowBatch":
        """Returns the measurements at `index`, ascending; one row a source that has any."""
        measured = {name: values[index] for name, values in self.measured.items()}
        return RowBatch.grouped(self.row_of_each()[index], self.src, measured)

    def regroup(self, index: np.ndarray, offsets: np.ndarray) -> "RowBatch":
        """Returns the same measurements in other rows: of sources `src[index]`, at `offsets`."""
        family = self.family[index]
        return dataclasses.replace(self, src=self.src[index], family=family, offsets=offsets)

    def to_table(self) -> MeasurementTable:
        """Returns the measurements, sources one after the other."""
        counts = np.diff(self.offsets)
        src, family = np.repeat(self.src, counts), np.repeat(self.family, counts)
        return MeasurementTable(src=src, family=family, **self.measured)

    def to_arrow(self) -> pa.RecordBatch:
        """Returns one record batch of `row_schema` of its columns."""
        offsets = pa.array(self.offsets.astype(np.int32))
        lists = [
            pa.ListArray.from_arrays(offsets, from_numpy(values))
            for values in self.measured.values()
        ]
        sources = [from_numpy(self.src), from_numpy(self.family)]
        return pa.RecordBatch.from_arrays([*sources, *lists], schema=row_schema(self.measured))

    @classmethod
    def from_arrow(cls, batch: pa.RecordBatch) -> "RowBatch":
        """Returns the rows of a record batch of a `row_schema` as views.

        `offsets` start at 0 and every flat array is cut to the batch, even if that is a slice.
        """
        src, family, *lists = batch.columns
        names = columns_of(batch.schema)
        offsets = lists[0].offsets.to_numpy().astype(np.int64)
        return cls(
            src=to_numpy(src),
            family=to_numpy(family),
            offsets=offsets - offsets[0],
            **{name: to_numpy(each.flatten()) for name, each in zip(names, lists, strict=True)},
        )


MEASURED = tuple(f.name for f in dataclasses.fields(RowBatch) if f.name in COLUMNS)[2:]
ALWAYS = tuple(name for name in MEASURED if COLUMNS[name].missing is None or name == "time")
BYTES_PER_MEASUREMENT = sum(COLUMNS[name].dtype.itemsize for name in ALWAYS)


def row_schema(measured: Collection[str] = ALWAYS) -> pa.Schema:
    """Returns the schema of rows with the columns `ALWAYS` and others of `MEASURED`."""
    lists = [COLUMNS[name] for name in MEASURED if name in measured]
    return pa.schema(
        [(COLUMNS[name].arrow, COLUMNS[name].arrow_type()) for name in ("src", "family")]
        + [(column.arrow, pa.list_(column.arrow_type())) for column in lists]
    )


def columns_of(schema: pa.Schema) -> list[str]:
    """Returns which of `MEASURED` rows of a schema have."""
    return [name for name in MEASURED if COLUMNS[name].arrow in schema.names]


def is_dataset(directory: str | Path | Location) -> bool:
    """Returns whether `directory` is a complete directory of probe rows."""
    return (Location.of(directory) / METADATA).is_file()


def read_metadata(directory: str | Path | Location) -> dict[str, Any]:
    """Returns the content of `dataset.json` in `directory`.

    Raises:
        DataError: The file is absent, not JSON, or of a schema version this code does not read.
    """
    if not is_dataset(directory):
        raise DataError(
            f"{directory} is not a complete data set: it has no dataset.json; "
            "make one with `ping-llm prepare-data`"
        )
    path = Location.of(directory) / METADATA
    try:
        metadata = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; prepare the data again") from None
    stated = str(metadata.get("fingerprint")) if isinstance(metadata, dict) else ""
    others = {key: v for key, v in metadata.items() if key != "fingerprint"} if stated else {}
    if len(stated) == FINGERPRINT_DIGITS and stated != fingerprint(others):
        raise DataError(f"{path} is damaged: it is not what was written; prepare the data again")
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} has schema_version {version!r}; expected {SCHEMA_VERSION}")
    rows = metadata.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(rows.get(s), int) for s in SPLITS):
        raise DataError(f"{path} does not count the rows of each split; prepare the data again")
    return metadata


def fingerprint(metadata: Mapping[str, Any]) -> str:
    """Returns the name of the content that `metadata`, of `dataset.json`, describes."""
    stored = str(metadata.get("fingerprint"))
    if len(stored) == FINGERPRINT_DIGITS:
        return stored
    # What earlier versions wrote there is hashed too: runs know their data by this.
    content = {key: value for key, value in metadata.items() if key not in COSTS}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def data_fingerprint(data: str | Path | Location) -> str:
    """Returns the name of the content of a data set, the same however often it is prepared."""
    return fingerprint(read_metadata(data))


class ProbeRows:
    """The rows of one split of a data set, memory-mapped.

    Attributes:
        metadata: The content of `dataset.json`.
        batches: The rows, one `RowBatch` a record batch, in order.
        batch_index: Which of `batches` a row is in [R], int32.
        row_in_batch: Which row of that batch it is [R], int32.
        family: 4 or 6 of each row [R], int8.
        n_measurements: Measurements of each row [R], int64.
    """

    def __init__(self, data: str | Path | Location, split: str):
        directory = Location.of(data).local_copy(identity=METADATA)
        self.metadata = read_metadata(directory)
        files = split_files(directory, split)
        if sum(path.stat().st_size for path in files) <= VERIFIED_BYTES:
            verify_files(directory, self.metadata, files)
        self.batches = [batch for path in files for batch in read_rows(path)]
        rows = [len(batch) for batch in self.batches]
        expected = self.metadata["rows"][split]
        if sum(rows) != expected:
            raise DataError(
                f"{directory}: the {split} files hold {sum(rows)} rows, dataset.json says "
                f"{expected}; prepare the data again"
            )
        self.batch_index, self.row_in_batch = (
            x.astype(np.int32) for x in ragged(np.array(rows, int))
        )
        families = [batch.family for batch in self.batches]
        self.family = np.concatenate([np.zeros(0, np.int8), *families])
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
    files = sorted(directory.glob(f"{split}-*-of-*.arrow"))
    totals = {re.fullmatch(rf"{split}-\d+-of-(\d+)\.arrow", f.name) for f in files}
    counts = {int(match[1]) for match in totals if match}
    if counts and counts != {len(files)}:
        raise DataError(
            f"{directory} has {len(files)} {split} files, their names say {sorted(counts)}; "
            "prepare the data again"
        )
    return files


def verify_files(
    directory: Path, metadata: Mapping[str, Any], files: Sequence[Path] | None = None
) -> None:
    """Compares files of a data set, or all, with the checksums in its `metadata`.

    Raises:
        DataError: One is not as it was written, or is not there.
    """
    checksums = metadata.get("sha256", {})
    paths = [directory / name for name in checksums] if files is None else files
    found = outputs.digest_files(
        [StoredFile(Location.of(path), path.stat().st_size) for path in paths if path.is_file()],
        shown=files is None,
    )
    sound = {file.name for file in found if file.sha256 == checksums.get(file.name, file.sha256)}
    for path in paths:
        if path.name not in sound:
            raise DataError(
                f"{path} is damaged: it is not what was written; prepare the data again, or get "
                "an intact copy"
            )


def read_rows(path: Path) -> list[RowBatch]:
    """Returns the rows of one file, memory-mapped, one `RowBatch` a record batch.

    Raises:
        DataError: It is no intact Arrow file of probe rows.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            if reader.schema != row_schema({*ALWAYS, *columns_of(reader.schema)}):
                found = ", ".join(f"{field.name} {field.type}" for field in reader.schema)
                raise DataError(f"{path} does not hold probe rows, but columns {found}")
            return [checked(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable Arrow file: {error}; prepare the data again"
        ) from None


def checked(batch: pa.RecordBatch) -> RowBatch:
    """Returns the rows of a batch whose file may be damaged: Arrow aborts on impossible offsets."""
    batch.validate(full=True)  # looks at offsets only, not at every value
    if any(column.null_count for column in batch.columns):
        raise pa.ArrowInvalid("a value is missing")
    first, *others = (column.offsets for column in batch.columns[2:])
    if not all(first.equals(offsets) for offsets in others):
        raise pa.ArrowInvalid("the lists of a row differ in length")
    return RowBatch.from_arrow(batch)


class RowWriter:
    """Writes one split's rows into numbered Arrow files of bounded size.

    Where files and record batches end depends on the rows alone, so the same rows make the same
    files, whoever writes them and in however many calls.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        columns: Collection[str] = (),
        file_bytes: int = 256_000_000,
    ):
        """Begins a split.

        Args:
            directory: Where its files go.
            split: Its name.
            columns: Which columns its rows have beside those that all have.
            file_bytes: Size after which a file ends.
        """
        self._directory, self._split, self._file_bytes = directory, split, file_bytes
        self._columns = columns
        self._parts: list[Path] = []
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._written = 0  # bytes in the current file
        self._pending: list[RowBatch] = []
        self._pending_bytes = 0
        self.rows = self.measurements = 0

    def append(self, rows: RowBatch) -> None:
        """Adds some rows. A record batch ends with the first row that brings it to 1 MB."""
        self.rows += len(rows)
        self.measurements += len(rows.time)
        sizes = np.diff(rows.offsets) * BYTES_PER_MEASUREMENT + BYTES_PER_ROW
        ends = np.append(0, np.cumsum(sizes))
        start = 0
        while start < len(rows):
            needed = ends[start] + BATCH_BYTES - self._pending_bytes
            full = int(np.searchsorted(ends, needed))
            stop = min(full, len(rows))
            self._pending.append(rows.slice(start, stop))
            self._pending_bytes += int(ends[stop] - ends[start])
            start = stop
            if full <= len(rows):
                self._write_batch()

    def _write_batch(self) -> None:
        if self._written >= self._file_bytes:
            self._end_file()
        if self._writer is None:
            path = self._directory / f"{self._split}-part-{len(self._parts):05d}.arrow"
            self._parts.append(path)
            self._writer = pa.ipc.new_file(str(path), row_schema({*ALWAYS, *self._columns}))
            self._written = 0
        rows = RowBatch.concat(self._pending).with_columns(self._columns)
        self._writer.write_batch(rows.to_arrow())
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
        return outputs.number_files(self._parts, self._split)


class RowBuilder:
    """Cuts measurements that come sorted by source and time into rows of bounded size."""

    def __init__(self, writer: RowWriter, *, row_cap_bytes: int):
        self._writer = writer
        self._cap = max(row_cap_bytes // BYTES_PER_MEASUREMENT, 1)
        self._open: RowBatch | None = None  # the last source's row, which may go on

    def append(self, sources: RowBatch) -> None:
        """Adds measurements, one row a source however long; the first may go on the last one."""
        if len(sources) == 0:
            return
        if self._open is not None:
            sources = RowBatch.concat([self._open, sources])
            if sources.src[0] == sources.src[1]:
                sources = sources.regroup(np.arange(1, len(sources)), np.delete(sources.offsets, 1))
        source, nth = ragged(-(-np.diff(sources.offsets) // self._cap))
        starts = sources.offsets[source] + nth * self._cap
        rows = sources.regroup(source, np.append(starts, sources.offsets[-1]))
        self._writer.append(rows.slice(0, len(rows) - 1))
        # A copy: the last row alone would keep the whole array it is a view of.
        self._open = RowBatch.concat([rows.slice(len(rows) - 1, len(rows))])

    def close(self) -> None:
        """Writes the last row."""
        if self._open is not None:
            self._writer.append(self._open)
            self._open = None
