"""Reads measurements from files of any format into one canonical form.

A file is cut into units that can be read apart from each other; a unit yields parts, each a table
of good measurements beside the records that had to be rejected, with a reason. Nothing is dropped
and nothing is repaired: a record is taken as it stands, or rejected.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.errors import DataError
from ping_llm.ingest.files import READ_ERRORS, InputFile, Unit, find_files
from ping_llm.ingest.formats.csv import read_csv
from ping_llm.ingest.formats.parquet import cut_parquet, read_arrow, read_parquet
from ping_llm.ingest.formats.ripe import read_ripe
from ping_llm.ingest.records import Part
from ping_llm.measurements import MeasurementTable

UNIT_BYTES = 64 << 20  # of text; what one worker reads at a time
_READERS = {"parquet": read_parquet, "arrow": read_arrow, "csv": read_csv, "ripe": read_ripe}


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
        lines = 0
        for unit in cut_into_units(file):
            for part in read_unit(unit):
                if on_rejected is not None and len(part.rejected):
                    on_rejected(renumber(part.rejected, lines))
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


def cut_into_units(file: InputFile) -> list[Unit]:
    """Returns the units of one file, in order.

    Raises:
        DataError: The file is corrupt, or lacks a column.
    """
    with _named_errors(file):
        if file.format == "parquet":
            return cut_parquet(file)
        if file.format == "arrow" or file.compression:
            return [Unit(file, 0, None, file.size)]
        bounds = [*range(0, file.size, UNIT_BYTES), file.size]
        return [Unit(file, a, b, b - a) for a, b in itertools.pairwise(bounds)]


def read_unit(unit: Unit) -> Iterator[Part]:
    """Yields what a unit holds.

    Raises:
        DataError: The file cannot be read to the end of the unit.
    """
    with _named_errors(unit.file):
        yield from _READERS[unit.file.format](unit)


@contextlib.contextmanager
def _named_errors(file: InputFile) -> Iterator[None]:
    """Turns what a reader raises about a broken file into a `DataError` that names it."""
    try:
        yield
    except READ_ERRORS as error:
        what = f"{file.compression or ''} {file.format}".strip()
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{file.location} cannot be read as {what}: {why}; get an intact copy"
        ) from error
