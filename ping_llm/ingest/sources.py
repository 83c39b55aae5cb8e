"""Reads measurements from Parquet, Arrow, CSV and RIPE Atlas files into one canonical form.

A file is cut into units that can be read apart from each other; a unit yields parts, each a chunk
of good measurements beside the records that had to be rejected, with a reason. Nothing is dropped
and nothing is repaired: a record is taken as it stands, or rejected.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import csv
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm import storage
from ping_llm.columns import (
    MISSING,
    OK,
    parse_addresses,
    parse_floats,
    parse_times,
)
from ping_llm.errors import DataError
from ping_llm.ingest.files import READ_ERRORS, InputFile, find_files, line_blocks, open_text
from ping_llm.ingest.records import Chunk, Column, Verdict, check, rejected_batch
from ping_llm.ingest.ripe import parse_ripe_lines
from ping_llm.measurements import MeasurementTable

COLUMNS = ("event_time", "src_addr", "dst_addr", "ip_version", "rtt")
UNIT_BYTES = 64 << 20  # of text; what one worker reads at a time
UNIT_ROWS = 1 << 20
BATCH_ROWS = 1 << 18
# RFC 4180, one line: plain fields, or quoted ones with quotes doubled.
_CSV_LINE = r'^(([^",\r\n]*|"([^"\r\n]|"")*"),)*([^",\r\n]*|"([^"\r\n]|"")*")\r?\n$'
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclasses.dataclass(frozen=True)
class Unit:
    """What of a file one worker reads: bytes of text, row groups or record batches.

    Attributes:
        file: The file.
        start: The first byte or group.
        stop: Behind the last one; None reads to the end.
        size: Bytes on disk it stands for.
    """

    file: InputFile
    start: int
    stop: int | None
    size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a unit.

    Attributes:
        chunk: The good ones.
        rejected: The others, of `REJECTED_SCHEMA`; lines count from the start of the unit.
        lines: How many lines or rows were read.
        done: Part of the unit read so far, 0 to 1.
    """

    chunk: Chunk
    rejected: pa.RecordBatch
    lines: int
    done: float


def read_measurements(
    inputs: Sequence[str], *, on_rejected: Callable[[pa.RecordBatch], None] | None = None
) -> Iterator[MeasurementTable]:
    """Yields the measurements of `inputs` in order, some at a time.

    Args:
        inputs: Files, directories and globs.
        on_rejected: Gets every rejected record, in batches of `REJECTED_SCHEMA`.

    Raises:
        DataError: A file is missing, empty, corrupt or of no known format.
    """
    for file in find_files(inputs):
        lines_before = 0
        for unit in cut_into_units(file):
            lines = 0
            for part in read_unit(unit):
                lines += part.lines
                if on_rejected is not None and len(part.rejected):
                    on_rejected(renumber(part.rejected, lines_before))
                if len(part.chunk):
                    yield part.chunk.to_table()
            lines_before += lines


def read_table(inputs: Sequence[str]) -> MeasurementTable:
    """Returns all measurements of `inputs`, in order.

    Raises:
        DataError: A file cannot be read, holds bad records, or there is no measurement at all.
    """
    rejected: list[int] = []
    parts = list(read_measurements(inputs, on_rejected=lambda bad: rejected.append(len(bad))))
    shown = ", ".join(inputs)
    if rejected:
        raise DataError(
            f"{shown}: {sum(rejected)} records are bad; `ping-llm inspect-data` shows them, "
            "`ping-llm prepare-data` sorts them out"
        )
    if not parts:
        raise DataError(f"{shown}: no measurements; give a file that has some")
    return MeasurementTable.concat(parts)


def renumber(rejected: pa.RecordBatch, lines_before: int) -> pa.RecordBatch:
    """Returns rejected records with `lines_before` added to their line numbers."""
    return rejected.set_column(1, "line", pc.add(rejected["line"], lines_before))


def cut_into_units(file: InputFile) -> list[Unit]:
    """Returns the units of one file, in order.

    Raises:
        DataError: The file is corrupt, or lacks a column.
    """
    with _named_errors(file):
        if file.format == "parquet":
            return _parquet_units(file)
        if file.format == "arrow" or file.compression:
            return [Unit(file, 0, None, file.size)]
        bounds = [*range(0, file.size, UNIT_BYTES), file.size]
        return [Unit(file, a, b, b - a) for a, b in itertools.pairwise(bounds)]


def read_unit(unit: Unit) -> Iterator[Part]:
    """Yields what a unit holds; the numbers of lines in `rejected` count from its start.

    Raises:
        DataError: The file cannot be read to the end of the unit.
    """
    readers = {"parquet": _read_parquet, "arrow": _read_arrow, "csv": _read_csv, "ripe": _read_ripe}
    with _named_errors(unit.file):
        lines = 0
        for part in readers[unit.file.format](unit):
            yield dataclasses.replace(part, rejected=renumber(part.rejected, lines))
            lines += part.lines


class _named_errors:  # noqa: N801
    """Turns what a reader raises about a broken file into a `DataError` that names it."""

    def __init__(self, file: InputFile):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, READ_ERRORS):
            what = f"{self._file.compression or ''} {self._file.format}".strip()
            why = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(
                f"{self._file.path} cannot be read as {what}: {why}; get an intact copy"
            ) from error


# Tables: Parquet and Arrow


def _parquet_units(file: InputFile) -> list[Unit]:
    import pyarrow.parquet as pq

    with storage.open_input(file.path) as source, pq.ParquetFile(source) as parquet:
        _check_schema(file, parquet.schema_arrow)
        metadata = parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        counts = [group.num_rows for group in groups]
        # Arrow aborts the process over a row group of too few columns.
        columns = {group.num_columns for group in groups} - {len(parquet.schema)}
        if columns or min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
            raise DataError(f"{file.path}: its row groups do not fit its footer; it is corrupt")
        units, start, rows = [], 0, 0
        for i, count in enumerate(counts):
            rows += count
            if rows >= UNIT_ROWS or i == len(groups) - 1:
                share = rows / max(metadata.num_rows, 1)
                units.append(Unit(file, start, i + 1, int(file.size * share)))
                start, rows = i + 1, 0
        return units


def _check_names(file: InputFile, names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(
            f"{file.path} has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, "
            f"found {', '.join(names)[:200] or 'none'}"
        )
    repeated = [name for name in COLUMNS if names.count(name) > 1]
    if repeated:
        raise DataError(f"{file.path} has column {repeated[0]} more than once")


def _check_schema(file: InputFile, schema: pa.Schema) -> None:
    _check_names(file, schema.names)
    types = {name: schema.field(name).type for name in COLUMNS}
    types = {k: t.value_type if pa.types.is_dictionary(t) else t for k, t in types.items()}
    expected = {
        "event_time": ("a timestamp", pa.types.is_timestamp),
        "src_addr": ("a string", _is_text),
        "dst_addr": ("a string", _is_text),
        "ip_version": ("an integer", pa.types.is_integer),
        "rtt": ("a number", lambda t: pa.types.is_floating(t) or pa.types.is_integer(t)),
    }
    for name, (what, fits) in expected.items():
        if not fits(types[name]):
            raise DataError(f"{file.path}: column {name} is {types[name]}; expected {what}")


def _is_text(type_: pa.DataType) -> bool:
    return (
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
    )


def _read_parquet(unit: Unit) -> Iterator[Part]:
    import pyarrow.parquet as pq

    with (
        storage.open_input(unit.file.path) as source,
        pq.ParquetFile(
            source, read_dictionary=["src_addr", "dst_addr"], page_checksum_verification=True
        ) as parquet,
    ):
        groups = list(range(unit.start, unit.stop or 0))
        rows = sum(parquet.metadata.row_group(i).num_rows for i in groups)
        done = 0
        for batch in parquet.iter_batches(
            BATCH_ROWS, row_groups=groups, columns=list(COLUMNS), use_threads=False
        ):
            done += len(batch)
            yield _table_part(unit, batch, done / rows)
        if done != rows:
            raise DataError(
                f"{unit.file.path} holds {done} rows where it says {rows}; it is corrupt"
            )


def _read_arrow(unit: Unit) -> Iterator[Part]:
    with storage.open_input(unit.file.path) as source, pa.ipc.open_file(source) as reader:
        _check_schema(unit.file, reader.schema)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate(full=True)
            for start in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS).select(list(COLUMNS))
                yield _table_part(unit, part, (i + 1) / reader.num_record_batches)


def _table_part(unit: Unit, batch: pa.RecordBatch, done: float) -> Part:
    verdict = Verdict(len(batch))
    chunk = check(
        verdict,
        src=parse_addresses(batch["src_addr"]),
        dst=parse_addresses(batch["dst_addr"]),
        time=_timestamps(batch["event_time"]),
        version=_numbers(batch["ip_version"], np.int64),
        rtt=_numbers(batch["rtt"], np.float64),
    )
    bad = np.flatnonzero(verdict.codes)
    rejected = rejected_batch(
        unit.file.path, bad + 1, verdict.codes[bad], _row_texts(batch.take(pa.array(bad)))
    )
    return Part(chunk, rejected, len(batch), done)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _missing(column: pa.Array) -> np.ndarray:
    null = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(null, MISSING, OK).astype(np.uint8)


def _timestamps(column: pa.Array) -> Column:
    column = _plain(column)
    ticks = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
    return Column(ticks // _PER_SECOND[column.type.unit], _missing(column))


def _numbers(column: pa.Array, dtype: type) -> Column:
    column = _plain(column)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(dtype)
    return Column(values, _missing(column))


def _row_texts(rows: pa.RecordBatch) -> list[str]:
    """Returns each row as JSON; text that is not UTF-8 with its odd bytes escaped."""
    columns = {}
    for name in COLUMNS:
        column = _plain(rows[name])
        if name == "event_time":
            columns[name] = column.cast(pa.int64()).to_pylist()
        elif _is_text(column.type):
            texts = column.cast(pa.large_binary()).to_pylist()
            columns[name] = [None if t is None else _decode(t) for t in texts]
        else:
            columns[name] = column.to_pylist()
    columns = [columns[name] for name in COLUMNS]
    rows_ = zip(*columns, strict=True)
    return [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows_]


# Text: CSV and RIPE Atlas


class _Lines:
    """The lines of one block, those that are not UTF-8 taken out."""

    def __init__(self, block: bytes):
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        self.raw = pa.Array.from_buffers(pa.binary(), len(ends), buffers)
        self.verdict = Verdict(len(ends))
        blank = np.diff(offsets) <= 2
        blank[blank] = [not self.raw[int(i)].as_py().strip() for i in np.flatnonzero(blank)]
        self.blank = blank
        texts = self.raw.view(pa.string())
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid:
            bad = np.array([not _is_utf8(line) for line in self.raw.to_pylist()])
            self.verdict.reject(bad, "not UTF-8 text")
        self.usable = np.flatnonzero((self.verdict.codes == 0) & ~blank)
        self.texts = texts if len(self.usable) == len(ends) else texts.take(pa.array(self.usable))

    def part(self, unit: Unit, chunk: Chunk, usable_codes: np.ndarray, done: float) -> Part:
        """Returns the part of these lines, given the verdict over the usable ones."""
        codes = self.verdict.codes
        codes[self.usable] = usable_codes
        bad = np.flatnonzero(codes)
        raw = self.raw.take(pa.array(bad)).to_pylist()
        records = [_decode(line.rstrip(b"\r\n")) for line in raw]
        rejected = rejected_batch(unit.file.path, bad + 1, codes[bad], records)
        return Part(chunk, rejected, len(codes), done)


def _decode(data: bytes) -> str:
    """Returns `data` as text, what is not UTF-8 escaped."""
    return data.decode("utf-8", "backslashreplace")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _blocks(unit: Unit) -> Iterator[tuple[bytes, float]]:
    """Yields (block of whole lines, part of the unit read so far)."""
    raw, text = open_text(unit.file)
    with text:
        for block in line_blocks(text, unit.file.path, unit.start, unit.stop):
            yield block, min((raw.tell() - unit.start) / unit.size, 1.0)


def _read_ripe(unit: Unit) -> Iterator[Part]:
    for block, done in _blocks(unit):
        lines = _Lines(block)
        chunk, verdict = parse_ripe_lines(lines.texts)
        yield lines.part(unit, chunk, verdict.codes, done)


def _read_csv(unit: Unit) -> Iterator[Part]:
    names = _csv_header(unit.file)
    header = unit.start == 0
    for block, done in _blocks(unit):
        if header:
            block = b"\n" + block.split(b"\n", 1)[1]  # keeps its line number, and is blank
            header = False
        lines = _Lines(block)
        verdict = Verdict(len(lines.usable))
        columns, rows = _csv_columns(lines.texts, names)
        malformed = np.ones(len(lines.usable), bool)
        malformed[rows] = False
        verdict.reject(malformed, "not a CSV row of the header's columns")
        inner = Verdict(len(rows))
        chunk = check(
            inner,
            src=parse_addresses(columns["src_addr"]),
            dst=parse_addresses(columns["dst_addr"]),
            time=Column(*parse_times(columns["event_time"])),
            version=Column(*parse_floats(columns["ip_version"])),
            rtt=Column(*parse_floats(columns["rtt"])),
        )
        verdict.codes[rows] = inner.codes
        yield lines.part(unit, chunk, verdict.codes, done)


def _csv_header(file: InputFile) -> list[str]:
    _, text = open_text(file)
    with text:
        line = text.readline(1 << 16)
    try:
        names = next(csv.reader([line.decode("utf-8-sig").strip()], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file.path}: its first line is no CSV header: {error}") from None
    _check_names(file, names)
    return names


def _csv_columns(lines: pa.Array, names: list[str]) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Returns `COLUMNS` as text [n], and which of `lines` the n rows are."""
    import pyarrow.csv as pc_csv

    rows = np.arange(len(lines))
    data = b"".join(lines.cast(pa.binary()).to_pylist())
    if b'"' in data or b"\r" in data:  # else a stray quote would join lines into one
        rows = np.flatnonzero(pc.match_substring_regex(lines, _CSV_LINE))
        data = b"".join(lines.take(pa.array(rows)).cast(pa.binary()).to_pylist())
    if not data:
        return {name: pa.array([], pa.string()) for name in COLUMNS}, rows
    malformed = []

    def note(row: pc_csv.InvalidRow) -> str:
        malformed.append(row.number - 1)
        return "skip"

    table = pc_csv.read_csv(
        pa.py_buffer(data),
        read_options=pc_csv.ReadOptions(
            column_names=names, use_threads=False, block_size=len(data) + 1
        ),
        parse_options=pc_csv.ParseOptions(invalid_row_handler=note),
        convert_options=pc_csv.ConvertOptions(
            include_columns=list(COLUMNS), column_types=dict.fromkeys(COLUMNS, pa.string())
        ),
    )
    rows = np.delete(rows, malformed)
    return {name: table[name].combine_chunks() for name in COLUMNS}, rows
