"""Tables: Parquet and Arrow files."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.columns import is_text
from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile, Unit
from ping_llm.ingest.formats.lines import decode
from ping_llm.ingest.records import Part, check_columns, names_to_read, rejected_batch

UNIT_ROWS = 1 << 20
BATCH_ROWS = 1 << 18


def cut_parquet(file: InputFile) -> list[Unit]:
    """Returns groups of row groups, each a unit."""
    import pyarrow.parquet as pq

    with file.location.open_input() as source, pq.ParquetFile(source) as parquet:
        _columns_to_read(file, parquet.schema_arrow)
        metadata = parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        counts = [group.num_rows for group in groups]
        # Arrow aborts the process over a row group of too few columns.
        columns = {group.num_columns for group in groups} - {len(parquet.schema)}
        if columns or min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
            raise DataError(f"{file.location}: its row groups do not fit its footer; it is corrupt")
        units, start, rows = [], 0, 0
        for i, count in enumerate(counts):
            rows += count
            if rows >= UNIT_ROWS or i == len(groups) - 1:
                share = rows / max(metadata.num_rows, 1)
                units.append(Unit(file, start, i + 1, int(file.size * share)))
                start, rows = i + 1, 0
        return units


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


def _columns_to_read(file: InputFile, schema: pa.Schema) -> list[str]:
    names = names_to_read(file.location, schema.names)
    for name, (what, fits) in _EXPECTED.items():
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not fits(kind):
            raise DataError(f"{file.location}: column {name} is {kind}; expected {what}")
    return names


def _dictionaries(metadata: Any) -> list[str]:
    """Returns the address columns that Arrow can read as dictionaries: not delta-encoded ones."""
    delta = set()
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            if any("DELTA" in encoding for encoding in column.encodings):
                delta.add(column.path_in_schema)
    return [name for name in ("src_addr", "dst_addr") if name not in delta]


def read_parquet(unit: Unit) -> Iterator[Part]:
    """Yields the records in one unit of a Parquet file."""
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"page_checksum_verification": True}
    with unit.file.location.open_input() as source, pq.ParquetFile(source) as parquet:
        options["read_dictionary"] = _dictionaries(parquet.metadata)
    with unit.file.location.open_input() as source, pq.ParquetFile(source, **options) as parquet:
        names = _columns_to_read(unit.file, parquet.schema_arrow)
        groups = list(range(unit.start, unit.stop or 0))
        rows = sum(parquet.metadata.row_group(i).num_rows for i in groups)
        done = 0
        for batch in parquet.iter_batches(BATCH_ROWS, groups, names, use_threads=False):
            done += len(batch)
            yield _part(unit, batch, done / rows)
        if done != rows:
            raise DataError(
                f"{unit.file.location} holds {done} rows where it says {rows}; it is corrupt"
            )


def read_arrow(unit: Unit) -> Iterator[Part]:
    """Yields the records of an Arrow file."""
    with unit.file.location.open_input() as source, pa.ipc.open_file(source) as reader:
        names = _columns_to_read(unit.file, reader.schema)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate(full=True)
            for start in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS).select(names)
                yield _part(unit, part, (i + 1) / reader.num_record_batches)


def _part(unit: Unit, batch: pa.RecordBatch, done: float) -> Part:
    batch = pa.RecordBatch.from_arrays(list(map(_without_views, batch.columns)), batch.schema.names)
    table, verdict = check_columns(dict(zip(batch.schema.names, batch.columns, strict=True)))
    bad = np.flatnonzero(verdict.codes)
    records = _row_texts(batch.take(pa.array(bad)))
    rejected = rejected_batch(unit.file.location, bad + 1, verdict.codes[bad], records)
    return Part(table, rejected, len(batch), done)


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
