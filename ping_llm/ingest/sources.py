"""Reads measurements from files of any format into one canonical form.

A file is cut into units that can be read apart from each other; a unit yields parts, each a table
of good measurements beside the records that had to be rejected, with a reason. Nothing is dropped
and nothing is repaired: a record is taken as it stands, or rejected.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import contextlib
import itertools
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.errors import DataError
from ping_llm.ingest.fetch import fetched
from ping_llm.ingest.files import READ_ERRORS, InputFile, Reading, Unit, format_of
from ping_llm.ingest.formats.csv import read_csv
from ping_llm.ingest.formats.json_text import is_json_text
from ping_llm.ingest.formats.lines import Text, decompressed, open_text
from ping_llm.ingest.formats.parquet import cut_parquet, read_arrow, read_parquet
from ping_llm.ingest.formats.ripe import read_ripe
from ping_llm.ingest.records import Part, RawRecords, check_records
from ping_llm.measurements import MeasurementTable

UNIT_BYTES = 64 << 20  # of text; what one worker reads at a time
SMALL_BYTES, JOINED = 256 << 10, 256  # files of at most this size are read so many at a time
_TEXTS: dict[str, Callable[[Text], Iterator[RawRecords]]] = {"csv": read_csv, "ripe": read_ripe}


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
    with fetched(inputs, Reading()) as files:
        yield from _measurements(files, on_rejected)


def _measurements(
    files: Sequence[InputFile], on_rejected: Callable[[pa.RecordBatch], None] | None
) -> Iterator[MeasurementTable]:
    before, lines, file = 0, 0, None
    for unit in cut_into_units(files):
        before, file = (before + lines if unit.files[0] == file else 0), unit.files[0]
        lines = 0
        for part in read_unit(unit):
            if on_rejected is not None and len(part.rejected):
                on_rejected(renumber(part.rejected, before))
            lines += part.lines
            if len(part.table):
                yield part.table


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


def cut_into_units(files: Iterable[InputFile], *, apply: Callable = map) -> list[Unit]:
    """Returns the units of some files, in order; small files of one kind are one unit.

    Args:
        files: The files.
        apply: Calls what looks into each file; a pool's does so at the same time.

    Raises:
        DataError: A file is corrupt, or lacks a column.
    """
    units: list[Unit] = []
    for unit in itertools.chain.from_iterable(apply(_cut, files)):
        if units and _belong_together(units[-1], unit):
            files = (*units[-1].files, *unit.files)
            units[-1] = Unit(files, 0, None, units[-1].size + unit.size)
        else:
            units.append(unit)
    return units


def _belong_together(unit: Unit, other: Unit) -> bool:
    first, next_ = unit.files[0], other.files[0]
    return (
        first.size <= SMALL_BYTES >= next_.size
        and (first.format, first.input_index) == (next_.format, next_.input_index)
        and len(unit.files) < JOINED
        and unit.size < UNIT_BYTES
    )


def _cut(file: InputFile) -> list[Unit]:
    """Returns the units of one file."""
    whole = [Unit((file,), 0, None, file.size)]
    if file.size <= SMALL_BYTES or file.compression or file.format in ("arrow", "tar"):
        return whole
    with _named_errors(file):
        if file.format == "parquet":
            return cut_parquet(file)
        if file.size <= UNIT_BYTES:
            return whole
        if file.format == "ripe":
            with file.location.open_input() as opened:
                if is_json_text(opened.read(1 << 16)):  # is read from its start
                    return whole
        bounds = [*range(0, file.size, UNIT_BYTES), file.size]
        return [Unit((file,), a, b, b - a) for a, b in itertools.pairwise(bounds)]


def read_unit(unit: Unit) -> Iterator[Part]:
    """Yields what a unit holds.

    Raises:
        DataError: A file cannot be read to the end of the unit.
    """

    def records() -> Iterator[RawRecords]:
        for number, file in enumerate(unit.files):
            with _named_errors(file):
                for each in _read(file, unit.start, unit.stop):
                    each.done = (number + each.done) / len(unit.files)
                    yield each

    with _named_errors(unit.files[0]):
        yield from check_records(records())


def _read(file: InputFile, start: int, stop: int | None) -> Iterator[RawRecords]:
    """Yields the records of a share of a file."""
    if file.format == "parquet":
        yield from read_parquet(file, start, stop)
    elif file.format == "arrow":
        yield from read_arrow(file)
    else:
        raw, stream = open_text(file)
        with stream:
            if file.format == "tar":
                yield from _read_archive(file, stream, raw.tell)
            else:
                text = Text(file, file.name, stream, raw.tell, start, stop)
                yield from _TEXTS[file.format](text)


def _read_archive(
    file: InputFile, stream: BinaryIO, read: Callable[[], int]
) -> Iterator[RawRecords]:
    """Yields the records of the files in a tar archive whose endings are known, as in a directory.

    Raises:
        DataError: There is none, or one is no text.
    """
    found = False
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name, format_, compression = f"{file.name}/{member.name}", *format_of(member.name)
            if format_ is None or not member.isfile() or re.search(r"(^|/)[._]", member.name):
                continue
            if format_ not in _TEXTS:
                raise DataError(f"{name} is no text; unpack the archive, and give its files")
            found, content = True, archive.extractfile(member)
            assert content is not None  # of a regular file
            text = Text(file, name, decompressed(content, compression), read)
            yield from _TEXTS[format_](text)
    if not found:
        raise DataError(f"{file.name} holds no file of a known ending")


@contextlib.contextmanager
def _named_errors(file: InputFile) -> Iterator[None]:
    """Turns what a reader raises about a broken file into a `DataError` that names it."""
    try:
        yield
    except READ_ERRORS as error:
        what = f"{file.compression or ''} {file.format}".strip()
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{file.name} cannot be read as {what}: {why}; get an intact copy"
        ) from error
