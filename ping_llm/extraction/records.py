"""Records of the input, JSON lines and Parquet, in work units planned without reading it all."""

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm import storage
from ping_llm.errors import DataError

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PARQUET_ENDINGS = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TO_THE_END = -1
_PIECES, _PIECE_BYTES = 16, 16384


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of one input file, the unit of work.

    Attributes:
        file: Which file.
        start: The first byte of JSON lines, row of Parquet, or window of measurements.
        stop: The one after the last, or `TO_THE_END`. A line belongs to where it begins.
    """

    file: int
    start: int
    stop: int


def fingerprint(url: str, size: int) -> str:
    """Returns a hash of a file's size and of pieces of its content spread over all of it."""
    found = hashlib.sha256(str(size).encode())
    with storage.open_input(url) as file:
        for piece in range(_PIECES):
            file.seek(max(size - _PIECE_BYTES, 0) * piece // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()[:32]


def describe_files(files: list[storage.StoredFile]) -> list[dict[str, Any]]:
    """Returns name, size and fingerprint of each file, by which an input is known again."""
    names = _short_names([file.url for file in files])
    return [
        {"name": name, "size": file.size, "fingerprint": fingerprint(file.url, file.size)}
        for name, file in zip(names, files, strict=True)
    ]


class Records:
    """The records of an input, by work unit.

    Attributes:
        files: Name, size and fingerprint of each file.
        units: The work units, in input order.
    """

    def __init__(self, path: str, *, columns: tuple[str, ...], unit_bytes: int, limit: int | None):
        """Finds the files and plans the units.

        Args:
            path: A file, directory or glob, local or remote.
            columns: The columns of Parquet to read, those that are there.
            unit_bytes: Size of a unit.
            limit: Number of records to take, the first ones; None: all.

        Raises:
            StorageError: Nothing is there, or it cannot be read.
            DataError: A file is of no known format.
        """
        found = [file for file in storage.find(path) if file.size]
        if not found:
            raise DataError(f"{path}: every file there is empty")
        self._urls = [file.url for file in found]
        self._kinds = [_kind(url) for url in self._urls]
        self._columns = columns
        self.files = describe_files(found)
        self._names = [file["name"] for file in self.files]
        self.units: list[Unit] = []
        left = limit
        for index, file in enumerate(found):
            if left == 0:
                break
            plan = self._plan_parquet if self._kinds[index][0] == "parquet" else self._plan_json
            left = plan(index, file.size, unit_bytes, left)

    def _plan_json(self, index: int, size: int, unit_bytes: int, left: int | None) -> int | None:
        compression = self._kinds[index][1]
        stop = TO_THE_END if compression else size
        if left is not None:
            for offset, line in _lines(self._urls[index], compression, 0, TO_THE_END):
                left -= 1
                if left == 0:
                    stop = offset + len(line)
                    break
        if compression:  # has no middle to begin at
            self.units.append(Unit(index, 0, stop))
        else:
            for start in range(0, stop, unit_bytes):
                self.units.append(Unit(index, start, min(start + unit_bytes, stop)))
        return left

    def _plan_parquet(self, index: int, size: int, unit_bytes: int, left: int | None) -> int | None:
        del size
        with _open_parquet(self._urls[index]) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        cuts, at, gathered = [0], 0, 0
        for group in groups:
            # Groups are gathered up to the size of a unit; one that is larger is divided.
            pieces = -(-group.total_byte_size // unit_bytes)
            if pieces > 1 or gathered + group.total_byte_size > unit_bytes:
                cuts.append(at)
                gathered = 0
            if pieces > 1:
                cuts += [at + group.num_rows * i // pieces for i in range(1, pieces + 1)]
            else:
                gathered += group.total_byte_size
            at += group.num_rows
        end = at if left is None else min(at, left)
        for start, stop in itertools.pairwise([*cuts, at]):
            if start < min(stop, end):
                self.units.append(Unit(index, start, min(stop, end)))
        return None if left is None else left - end

    def read(self, unit: Unit) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (id, record) of a unit. The id is the record's own `id`, or its place.

        Raises:
            DataError: A record is not a JSON object, or the file cannot be read.
        """
        url, name = self._urls[unit.file], self._names[unit.file]
        kind, compression = self._kinds[unit.file]
        if kind == "parquet":
            places = _rows(url, unit.start, unit.stop, self._columns)
            mark = "#"
        else:
            places = _objects(url, compression, unit)
            mark = "@"
        for at, record in places:
            given = record.get("id")
            yield (f"{name}{mark}{at}" if given is None else str(given)), record


def _kind(url: str) -> tuple[str, str | None]:
    """Returns (format, compression) by the file's name."""
    name = url.lower()
    compression = next((COMPRESSIONS[end] for end in COMPRESSIONS if name.endswith(end)), None)
    if name.endswith(PARQUET_ENDINGS):
        return "parquet", None
    stem = name.rpartition(".")[0] if compression else name
    if not stem.endswith(JSON_ENDINGS):
        known = ", ".join((*JSON_ENDINGS, *PARQUET_ENDINGS))
        raise DataError(
            f"{url}: its ending names no known format; expected one of {known}, JSON also with "
            f"{', '.join(COMPRESSIONS)}"
        )
    return "json", compression


def _short_names(urls: list[str]) -> list[str]:
    """Returns what the names of files do not share."""
    folder = urls[0].rpartition("/")[0] + "/"
    while not all(url.startswith(folder) for url in urls):
        folder = folder.rstrip("/").rpartition("/")[0] + "/"
    return [url.removeprefix(folder) for url in urls]


def _open_text(url: str, compression: str | None, start: int) -> BinaryIO:
    file = storage.open_input(url)
    if compression:
        return io.BufferedReader(pa.CompressedInputStream(file, compression))  # pyright: ignore[reportArgumentType]
    file.seek(start)
    return io.BufferedReader(file, 1 << 20)  # pyright: ignore[reportArgumentType]


def _lines(url: str, compression: str | None, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) of the lines, not blank, that begin in `start`..`stop`."""
    at = max(start - 1, 0)
    try:
        with _open_text(url, compression, at) as file:
            if start:
                at += len(file.readline())  # the rest of a line that begins before, or its end
            while at < stop or stop == TO_THE_END:
                line = file.readline()
                if not line:
                    return
                if not line.isspace():
                    yield at, line
                at += len(line)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{url} cannot be read after byte {at}: {error}") from None


def _objects(url: str, compression: str | None, unit: Unit) -> Iterator[tuple[int, dict[str, Any]]]:
    for offset, line in _lines(url, compression, unit.start, unit.stop):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{url}, byte {offset}: no JSON on this line: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{url}, byte {offset}: expected a JSON object, got {line[:40]!r}")
        yield offset, record


def _open_parquet(url: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(url))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{url} is not a readable Parquet file: {error}") from None


def _rows(
    url: str, start: int, stop: int, columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(url) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        wanted = [
            i for i, end in enumerate(ends) if end > start and end - counts[i] < stop and counts[i]
        ]
        at = ends[wanted[0]] - counts[wanted[0]] if wanted else stop
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=wanted, columns=names):
                low, high = max(start - at, 0), min(stop - at, len(batch))
                if low < high:
                    yield from enumerate(batch.slice(low, high - low).to_pylist(), at + low)
                at += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{url} cannot be read after row {at}: {error}") from None
