"""CSV with a header (RFC 4180), one record a line."""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import csv
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.errors import DataError
from ping_llm.ingest.files import Reading
from ping_llm.ingest.formats.lines import Lines, Text, open_text
from ping_llm.ingest.records import Verdict, check_columns, names_to_read
from ping_llm.measurements import MeasurementTable

# Plain fields, or quoted ones with quotes doubled.
_LINE = r'^(([^",\r\n]*|"([^"\r\n]|"")*"),)*([^",\r\n]*|"([^"\r\n]|"")*")\r?\n$'


class CsvLines(Lines):
    """Lines of a CSV file, which may be its header."""

    def __init__(self, names: Sequence[str], reading: Reading, *of_lines: Any):
        super().__init__(*of_lines)
        self._names, self._reading = tuple(names), reading

    @property
    def kind(self) -> tuple[tuple[str, ...], Reading]:
        """The header, and how it is read."""
        return self._names, self._reading

    @staticmethod
    def check(group: "Sequence[CsvLines]") -> tuple[MeasurementTable, np.ndarray]:
        """See `RawRecords.check`."""
        names, reading = group[0].kind
        read = names_to_read(group[0].file, names)

        def parse(lines: pa.Array) -> tuple[MeasurementTable, Verdict]:
            arrays, rows = _columns(lines, names, read)
            table, found = check_columns(arrays, reading)
            verdict = Verdict(len(lines))
            malformed = np.ones(len(lines), bool)
            malformed[rows] = False
            verdict.reject(malformed, "not a CSV row of the header's columns")
            verdict.codes[rows] = found.codes
            return table, verdict

        return Lines.checked(group, parse)


def read_csv(text: Text) -> Iterator[CsvLines]:
    """Yields the records in a share of a file."""
    if text.start:
        with open_text(text.file)[1] as whole:
            header = whole.readline(1 << 16).removeprefix(b"\xef\xbb\xbf")
    else:
        if b"\n" not in text.head:
            text.head += text.stream.readline(1 << 16)
        header, _, text.head = text.head.partition(b"\n")
        text.head = b"\n" + text.head  # so that the others keep their numbers
    try:
        names = next(csv.reader([header.decode().strip()], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{text.name}: its first line is no CSV header: {error}") from None
    reading = text.file.reading
    names = reading.ours(names, text.name)
    names_to_read(text.name, names)
    return text.lines(text.line_blocks(), functools.partial(CsvLines, names, reading))


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
