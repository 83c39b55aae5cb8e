"""CSV with a header (RFC 4180), one record a line."""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import csv
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile, Unit
from ping_llm.ingest.formats.lines import open_text, read_lines
from ping_llm.ingest.records import Part, Verdict, check_columns, names_to_read

# Plain fields, or quoted ones with quotes doubled.
_LINE = r'^(([^",\r\n]*|"([^"\r\n]|"")*"),)*([^",\r\n]*|"([^"\r\n]|"")*")\r?\n$'


def read_csv(unit: Unit) -> Iterator[Part]:
    """Yields the records in one unit of a file."""
    names = _header(unit.file)
    read = names_to_read(unit.file.location, names)
    for lines in read_lines(unit, header=True):
        arrays, rows = _columns(lines.texts, names, read)
        table, found = check_columns(arrays)
        verdict = Verdict(len(lines.texts))
        malformed = np.ones(len(lines.texts), bool)
        malformed[rows] = False
        verdict.reject(malformed, "not a CSV row of the header's columns")
        verdict.codes[rows] = found.codes
        yield lines.part(table, verdict)


def _header(file: InputFile) -> list[str]:
    _, text = open_text(file)
    with text:
        line = text.readline(1 << 16)
    try:
        return next(csv.reader([line.decode("utf-8-sig").strip()], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file.location}: its first line is no CSV header: {error}") from None


def _columns(
    lines: pa.Array, names: Sequence[str], read: Sequence[str]
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """Returns the columns `read`, of `names`, as text [n], and which of `lines` the n rows are."""
    import pyarrow.csv as pc_csv

    rows = np.arange(len(lines))
    data = b"".join(lines.cast(pa.binary()).to_pylist())
    if b'"' in data or b"\r" in data:  # else a stray quote would join lines into one
        rows = np.flatnonzero(pc.match_substring_regex(lines, _LINE))
        data = b"".join(lines.take(pa.array(rows)).cast(pa.binary()).to_pylist())
    if not data:
        return {name: pa.array([], pa.string()) for name in read}, rows
    malformed = []

    def note(row: pc_csv.InvalidRow) -> str:
        malformed.append(row.number - 1)
        return "skip"

    size = len(data) + 1  # one block
    read_options = pc_csv.ReadOptions(column_names=names, use_threads=False, block_size=size)
    as_text = dict.fromkeys(read, pa.string())
    convert_options = pc_csv.ConvertOptions(include_columns=list(read), column_types=as_text)
    parse_options = pc_csv.ParseOptions(invalid_row_handler=note)
    table = pc_csv.read_csv(pa.py_buffer(data), read_options, parse_options, convert_options)
    rows = np.delete(rows, malformed)
    return {name: table[name].combine_chunks() for name in read}, rows
