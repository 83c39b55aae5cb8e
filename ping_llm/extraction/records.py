"""Records of the input, JSON lines and Parquet, in work units planned without reading it all."""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ping_llm.errors import DataError
from ping_llm.outputs import digest_files
from ping_llm.storage import Location, StoredFile

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PARQUET_ENDINGS = (".parquet", ".pq")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TO_THE_END = -1
LONGEST_LINE = 1 << 25  # bytes, unpacked
ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """A part of one input file, the unit of work.

    Attributes:
        file: Which file.
        start: The first byte of JSON lines, row of Parquet, or window of measurements.
        stop: The one after the last, or `TO_THE_END`. A line belongs to where it begins.
    """

    file: int
    start: int
    stop: int


def find_files(path: str) -> list[StoredFile]:
    """Returns the files of an input that are not empty.

    Raises:
        StorageError: Nothing is there.
        DataError: Every file there is empty.
    """
    files = [file for file in Location.of(path).find() if file.size]
    if not files:
        raise DataError(f"{path}: every file there is empty")
    return files


def describe_files(files: list[StoredFile]) -> list[dict[str, Any]]:
    """Returns name, size and SHA-256 of each file, by which an input is known again.

    Raises:
        DataError: One cannot be read.
    """
    names = _short_names([file.location.url for file in files])
    return [
        {"name": name, "size": file.size, "sha256": file.sha256}
        for name, file in zip(names, digest_files(files), strict=True)
    ]


class Records:
    """The records of an input, by work unit.

    Attributes:
        files: Name, size and SHA-256 of each file.
        units: The work units, in input order.
    """

    def __init__(
        self,
        path: str,
        *,
        columns: tuple[str, ...],
        also: tuple[str, ...] = (),
        unit_bytes: int,
        limit: int | None,
    ):
        """Finds the files and plans the units.

        Args:
            path: A file, directory or glob, local or remote.
            columns: What a record is read for; a Parquet file must have one of them.
            also: What else is read of it, where it is there.
            unit_bytes: Size of a unit.
            limit: Number of records to take, the first ones; None: all.

        Raises:
            StorageError: Nothing is there, or it cannot be read.
            DataError: A file is of no known format, or has none of `columns`.
        """
        files = find_files(path)
        self._locations = [file.location for file in files]
        self._kinds = [_kind(file.location.url) for file in files]
        self._wanted, self._columns = columns, (*columns, *also)
        self.files = describe_files(files)
        self.units: list[WorkUnit] = []
        left = limit
        for index, file in enumerate(files):
            if left == 0:
                break
            if self._kinds[index][0] == "parquet":
                left = self._plan_parquet(index, unit_bytes, left)
            else:
                left = self._plan_json(index, file.size, unit_bytes, left)

    def _plan_json(self, index: int, size: int, unit_bytes: int, left: int | None) -> int | None:
        compression = self._kinds[index][1]
        stop = TO_THE_END if compression else size
        if left is not None:
            for offset, line in _lines(self._locations[index], compression, 0, TO_THE_END):
                left -= 1
                if left == 0:
                    stop = offset + len(line)
                    break
        if compression:  # has no middle to begin at
            self.units.append(WorkUnit(index, 0, stop))
        else:
            for start in range(0, stop, unit_bytes):
                self.units.append(WorkUnit(index, start, min(start + unit_bytes, stop)))
        return left

    def _plan_parquet(self, index: int, unit_bytes: int, left: int | None) -> int | None:
        with _open_parquet(self._locations[index]) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            names = file.schema_arrow.names
        if not set(self._wanted) & set(names):
            raise DataError(
                f"{self._locations[index]} has no column {' or '.join(self._wanted)}; its columns "
                f"are {', '.join(names)}; rename the one that is meant"
            )
        cuts, rows, gathered = [0], 0, 0
        for group in groups:
            # Groups are gathered up to the size of a unit; one that is larger is divided.
            pieces = -(-group.total_byte_size // unit_bytes)
            if pieces > 1 or gathered + group.total_byte_size > unit_bytes:
                cuts.append(rows)
                gathered = 0
            if pieces > 1:
                cuts += [rows + group.num_rows * i // pieces for i in range(1, pieces + 1)]
            else:
                gathered += group.total_byte_size
            rows += group.num_rows
        end = rows if left is None else min(rows, left)
        for start, stop in itertools.pairwise([*cuts, rows]):
            if start < min(stop, end):
                self.units.append(WorkUnit(index, start, min(stop, end)))
        return None if left is None else left - end

    def read(self, unit: WorkUnit) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (id, record) of a unit. The id is the record's own `id`, or its place.

        Raises:
            DataError: A record is not a JSON object, or holds half a character, or the file cannot
                be read.
        """
        location, name = self._locations[unit.file], self.files[unit.file]["name"]
        kind, compression = self._kinds[unit.file]
        if kind == "parquet":
            records, mark = _rows(location, unit.start, unit.stop, self._columns), "#"
        else:
            records, mark = _objects(location, compression, unit, self._columns), "@"
        for position, record in records:
            given = record.get("id")
            sample = f"{name}{mark}{position}" if given is None else str(given)
            yield whole_text(sample, f"{location}{mark}{position}: the sample's id"), record


def whole_text(text: str, what: str) -> str:
    """Returns `text`.

    Raises:
        DataError: It holds half a character, a lone surrogate, which UTF-8 cannot write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half a character, {text[error.start]} after "
            f"{text[max(error.start - 20, 0) : error.start]!r}; replace it, as by U+FFFD"
        ) from None
    return text


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # a surrogate, perhaps without its other half


def parse_json(data: bytes, where: str, keys: tuple[str, ...] | None = None) -> Any:
    """Returns what JSON says.

    Args:
        data: The JSON, in UTF-8.
        where: What to call it in an error.
        keys: Which values of an object are used; None: all.

    Raises:
        DataError: It is no JSON, or nested too deep, or what is used holds half a character.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"))
        if _HALF.search(data):
            used = content
            if keys is not None and isinstance(content, dict):
                used = {key: content[key] for key in keys if key in content}
            whole_text(json.dumps(used, ensure_ascii=False), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON in UTF-8: {error}") from None
    return content


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


def _open_text(location: Location, compression: str | None, start: int) -> BinaryIO:
    file = location.open_input()
    if compression:
        return io.BufferedReader(pa.CompressedInputStream(file, compression))  # pyright: ignore[reportArgumentType]
    file.seek(start)
    return io.BufferedReader(file, 1 << 20)  # pyright: ignore[reportArgumentType]


def _lines(
    location: Location, compression: str | None, start: int, stop: int
) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) of the lines, not blank, that begin in `start`..`stop`."""
    offset = max(start - 1, 0)
    try:
        with _open_text(location, compression, offset) as file:
            while start and (rest := file.readline(1 << 20)):  # of a line that begins before
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            while offset < stop or stop == TO_THE_END:
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{location}, byte {offset}: the line has over {LONGEST_LINE} bytes"
                    )
                if not line.isspace():
                    yield offset, line
                offset += len(line)
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(error).strip()
        raise DataError(f"{location} cannot be read after byte {offset}: {reason}") from None


def _objects(
    location: Location, compression: str | None, unit: WorkUnit, columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for offset, line in _lines(location, compression, unit.start, unit.stop):
        where = f"{location}, byte {offset}"
        record = parse_json(line, where, columns)
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {line[:40]!r}")
        yield offset, record


def _open_parquet(location: Location) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(location.open_input())
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).strip()
        raise DataError(f"{location} is not a readable Parquet file: {reason}") from None


def _rows(
    location: Location, start: int, stop: int, columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(location) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(groups))
        wanted = [
            i for i, end in enumerate(ends) if end > start and end - groups[i] < stop and groups[i]
        ]
        row = ends[wanted[0]] - groups[wanted[0]] if wanted else stop
        try:
            # Few rows, as a file of a few bytes may hold one long text many times.
            for batch in file.iter_batches(
                batch_size=ROWS_AT_ONCE, row_groups=wanted, columns=names
            ):
                low, high = max(start - row, 0), min(stop - row, len(batch))
                if low < high:
                    rows = batch.slice(low, high - low)
                    rows.validate(full=True)  # names what is not UTF-8
                    yield from enumerate(rows.to_pylist(), row + low)
                row += len(batch)
        except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
            reason = str(error).strip()
            raise DataError(f"{location} cannot be read after row {row}: {reason}") from None
