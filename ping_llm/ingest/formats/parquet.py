"""Tables: Parquet and Arrow files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.columns import is_text
from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile, Reading, Unit
from ping_llm.ingest.formats.lines import decode
from ping_llm.ingest.records import RawRecords, check_columns, names_to_read
from ping_llm.measurements import MeasurementTable

UNIT_ROWS = 1 << 20
BATCH_ROWS = 1 << 18


def cut_parquet(file: InputFile) -> list[Unit]:
    """Returns groups of row groups, each a unit."""
    import pyarrow.parquet as pq

    with file.location.open_input() as source, pq.ParquetFile(source) as parquet:
        _columns_to_read(file, parquet.schema_arrow)
        counts, units, start, rows = _counts(file, parquet), [], 0, 0
    for i, count in enumerate(counts):
        rows += count
        if rows >= UNIT_ROWS or i == len(counts) - 1:
            share = rows / max(sum(counts), 1)
            units.append(Unit((file,), start, i + 1, int(file.size * share)))
            start, rows = i + 1, 0
    return units


def _counts(file: InputFile, parquet: Any) -> list[int]:
    """Returns the rows of each group."""
    metadata = parquet.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    # Arrow aborts the process over a row group of too few columns.
    columns = {group.num_columns for group in groups} - {len(parquet.schema)}
    if columns or min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise DataError(f"{file.name}: its row groups do not fit its footer; it is corrupt")
    return counts


_EXPECTED = {
    "event_time": (
        "a timestamp or seconds since 1970",
        lambda t: pa.types.is_timestamp(t) or pa.types.is_floating(t) or pa.types.is_integer(t),
    ),
    "src_addr": ("a string", is_text),
    "dst_addr": ("a string", is_text),
    "ip_version": ("an integer", pa.types.is_integer),
    "rtt": ("a number", lambda t: pa.types.is_floating(t) or pa.types.is_integer(t)),
}


def _columns_to_read(file: InputFile, schema: pa.Schema) -> dict[str, str]:
    """Returns our name of each column that is read, by the file's."""
    ours = file.reading.ours(schema.names, file.name)
    read = names_to_read(file.name, ours)
    theirs = {name: schema.names[ours.index(name)] for name in read}
    for name, (what, fits) in _EXPECTED.items():
        if name not in theirs:
            continue
        kind = schema.field(theirs[name]).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not fits(kind) and not (name == "rtt" and file.reading.failed and is_text(kind)):
            raise DataError(f"{file.name}: column {theirs[name]} is {kind}; expected {what}")
    return {their: name for name, their in theirs.items()}


def _dictionaries(metadata: Any, addresses: Sequence[str]) -> list[str]:
    """Returns which columns of addresses Arrow can read as dictionaries: no delta-encoded ones."""
    delta = set()
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            if any("DELTA" in encoding for encoding in column.encodings):
                delta.add(column.path_in_schema)
    return [name for name in addresses if name not in delta]


class TableRows(RawRecords):
    """Some rows of a table, those columns that are read."""

    def __init__(
        self,
        file: InputFile,
        names: Mapping[str, str],
        batch: pa.RecordBatch,
        before: int,
        done: float,
    ):
        super().__init__(file.name, before, done, batch.nbytes)
        self._reading = file.reading
        columns = [_without_views(batch[their]) for their in names]
        self._batch = pa.RecordBatch.from_arrays(columns, [*names.values()])

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def kind(self) -> tuple[pa.Schema, Reading]:
        """The columns and their types, and how they are read."""
        return self._batch.schema, self._reading

    @staticmethod
    def check(group: "Sequence[TableRows]") -> tuple[MeasurementTable, np.ndarray]:
        """See `RawRecords.check`."""
        names, batches = group[0]._batch.schema.names, [rows._batch for rows in group]
        table = pa.Table.from_batches(batches)
        columns = [batches[0][n] if len(batches) == 1 else _joined(table[n]) for n in names]
        table, verdict = check_columns(dict(zip(names, columns, strict=True)), group[0]._reading)
        return table, verdict.codes

    def texts(self, which: np.ndarray) -> list[str]:
        """Returns the rows `which` as JSON."""
        return _row_texts(self._batch.take(pa.array(which)))


def _joined(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    joined = column.combine_chunks()
    return joined if isinstance(joined, pa.Array) else pa.concat_arrays(joined.chunks)


def read_parquet(file: InputFile, start: int, stop: int | None) -> Iterator[TableRows]:
    """Yields the rows of the groups [start, stop) of a Parquet file; None: all the rest."""
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"page_checksum_verification": True}
    with file.location.open_input() as source, pq.ParquetFile(source) as parquet:
        names = _columns_to_read(file, parquet.schema_arrow)
        counts = _counts(file, parquet)[start:stop]
        ends = [their for their, name in names.items() if name in ("src_addr", "dst_addr")]
        options["read_dictionary"] = _dictionaries(parquet.metadata, ends)
    with file.location.open_input() as source, pq.ParquetFile(source, **options) as parquet:
        groups, rows, done = range(start, start + len(counts)), sum(counts), 0
        for batch in parquet.iter_batches(BATCH_ROWS, list(groups), [*names], use_threads=False):
            yield TableRows(file, names, batch, done, (done + len(batch)) / rows)
            done += len(batch)
        if done != rows:
            raise DataError(f"{file.name} holds {done} rows where it says {rows}; it is corrupt")


def read_arrow(file: InputFile) -> Iterator[TableRows]:
    """Yields the rows of an Arrow file or stream.

    Raises:
        DataError: It is of Feather's first version, which is another format.
    """
    with file.location.open_input() as source:
        magic = source.read(6)
        source.seek(0)
        if magic.startswith(b"FEA1"):
            raise DataError(
                f"{file.name} is Feather version 1; write it again as version 2: "
                "pyarrow.feather.write_feather(pyarrow.feather.read_table(OLD), NEW)"
            )
        opened = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
        with opened(source) as reader:
            names, before = _columns_to_read(file, reader.schema), 0
            for batch in _batches(reader):
                batch.validate(full=True)
                for start in range(0, len(batch), BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    yield TableRows(file, names, part, before, source.tell() / file.size)
                    before += len(part)


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    """Yields the record batches of a file, or of a stream."""
    if isinstance(reader, pa.ipc.RecordBatchStreamReader):
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _without_views(column: pa.Array) -> pa.Array:
    """Returns a column whose strings are no views, which few functions of Arrow take."""
    if pa.types.is_dictionary(column.type):
        values = _without_views(column.dictionary)
        return pa.DictionaryArray.from_arrays(column.indices, values)
    return column.cast(pa.large_string()) if column.type == pa.string_view() else column


def _row_texts(rows: pa.RecordBatch) -> list[str]:
    """Returns each row as JSON; of text that is not UTF-8, the bytes that are wrong are escaped."""
    values: dict[str, list] = {}
    for name in names_to_read("", rows.schema.names):
        column = rows[name]
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.int64())
        if is_text(column.type):
            texts = column.cast(pa.large_binary()).to_pylist()
            values[name] = [None if text is None else decode(text) for text in texts]
        else:
            values[name] = column.to_pylist()
    in_rows = zip(*values.values(), strict=True)
    return [json.dumps(dict(zip(values, row, strict=True))) for row in in_rows]
