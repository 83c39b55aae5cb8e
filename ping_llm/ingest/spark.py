"""The Spark engine of `prepare_data`, for more than one machine can sort.

Spark reads, deals out by ranges of sources and sorts; the records are parsed, split and cut into
rows by the code of the local engine, so the files are the same byte for byte. Workers leave their
rows in the directory of the output, which all of them must see.
"""

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.columns import from_numpy, to_numpy
from ping_llm.data.rows import MEASURED, SPLITS, RowBatch, read_rows
from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.ingest import local
from ping_llm.ingest.files import InputFile, Unit
from ping_llm.ingest.records import NEEDED, READ
from ping_llm.ingest.settings import PrepareSettings
from ping_llm.ingest.sorting import MIRRORED
from ping_llm.ingest.sources import cut_into_units
from ping_llm.ingest.splits import time_cuts
from ping_llm.measurements import COLUMNS, MeasurementTable
from ping_llm.places import Places
from ping_llm.progress import progress

_TYPES = {"int64": "long", "void128": "binary", "int8": "byte", "float32": "float"}
_TYPES |= {"uint8": "byte"}
_ARROW_TYPES = {pa.binary(16): pa.binary(), pa.uint8(): pa.int8()}  # of what Spark has not
_READ = (
    ", ".join(f"{COLUMNS[n].arrow} {_TYPES[COLUMNS[n].dtype.name]}" for n in READ) + ", input int"
)
_ORDER = [COLUMNS[name].arrow for name in ("family", "src", *MEASURED)]


class SparkEngine(local.Engine):
    """The engine of a Spark session, which may be of many machines."""

    def run(self, files: Sequence[InputFile]) -> dict[str, Any]:
        """See `Engine.run`."""
        spill = self._spill
        spill.mkdir()
        units = cut_into_units(files)
        session, started = _session(self._workers, self._chosen.memory_bytes)
        from pyspark import StorageLevel
        from pyspark.errors import PySparkException
        from pyspark.sql import functions

        try:
            read = session.range(0, len(units), 1, len(units))
            read = read.mapInArrow(_reader(units, spill, self._chosen.both_ends), _READ)
            read = read.persist(StorageLevel.DISK_ONLY)
            ends = functions.min("event_time"), functions.max("event_time")
            spans = read.groupBy("input").agg(*ends).collect()
            lines, names = np.zeros(len(units), np.int64), set[str]()
            for i in range(len(units)):
                path = spill / f"unit-{i}.json"
                if not path.exists():
                    raise StorageError(
                        f"{self._directory} is not the same directory for all Spark workers; "
                        "choose an --output on storage that they share"
                    )
                note = json.loads(path.read_text())
                lines[i] = note["lines"]
                self.rejected.update(note["reasons"])
                names.update(note["columns"])
            local.write_rejected(self._directory, spill, units, lines)
            if not spans:
                raise local.no_measurement(files, self.rejected)
            times = np.zeros((files[-1].input_index + 1, 2), np.int64)
            for index, first, last in spans:
                if index < MIRRORED:
                    times[index] = first, last
            cuts = time_cuts(self._chosen, *times.T)
            parts = max(len(units), session.sparkContext.defaultParallelism)
            # A source goes to one partition, so that rows need not be joined across them.
            made = read.repartitionByRange(parts, "ip_version", "src_addr")
            made = made.sortWithinPartitions(*_ORDER)
            made = made.mapInArrow(
                _writer(spill, self._chosen, cuts, names, self._places), "part long, probes long"
            )
            probes = sorted(tuple(row) for row in made.collect())
            counts = self._join(spill, [part for part, _ in probes], names)
            counts["probes"] = sum(n for _, n in probes)
        except PySparkException as error:
            # What a worker says of a broken file stands in the text of a long trace.
            said = re.search(r"ping_llm\.errors\.DataError: (.+)", str(error))
            first_line = str(error).strip().partition("\n")[0]
            raise DataError(said[1] if said else f"Spark failed: {first_line}") from error
        finally:
            if started:
                session.stop()
        shutil.rmtree(spill)
        return counts

    def _join(self, spill: Path, parts: list[int], names: set[str]) -> dict[str, Any]:
        """Writes the rows of all partitions, in their order, and returns their counts."""
        writer = local.SplitWriter(self._directory, self._chosen, columns=names)
        for split in SPLITS:
            with progress(f"writing {split}", total=len(parts), unit="partitions") as shown:
                for part in parts:
                    for path in sorted(spill.glob(f"{split}.{part}-*.arrow")):
                        for rows in read_rows(path):
                            writer.append(rows.src[:0], {split: rows})
                        path.unlink()
                    shown.update(1)
        return writer.close()


def _session(workers: int, memory_limit: int) -> tuple[Any, bool]:
    """Returns a Spark session, and whether it was started here."""
    try:
        from pyspark import SparkConf
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError(
            "engine='spark' needs PySpark; install it with `pip install ping-llm[spark]`"
        ) from None
    active = SparkSession.getActiveSession()
    if active is not None:
        return active, False
    builder = SparkSession.builder.appName("ping-llm prepare-data")
    if not SparkConf().get("spark.master", ""):  # not under spark-submit: this machine alone
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.master(f"local[{workers}]").config("spark.ui.enabled", "false")
        builder = builder.config("spark.driver.host", "127.0.0.1")
        builder = builder.config("spark.driver.memory", f"{memory_limit // 2 // 2**20}m")
    return builder.getOrCreate(), True


def _reader(units: list[Unit], spill: Path, both_ends: bool) -> Callable:
    """Returns what reads the units of the numbers it is given, into batches of `_READ`."""

    def to_batch(measurements: MeasurementTable, index: int) -> pa.RecordBatch:
        arrays = [from_numpy(measurements.column(name)) for name in READ]  # unknown: NaN, no null
        arrays = [a.cast(_ARROW_TYPES.get(a.type, a.type)) for a in arrays]
        inputs = pa.array(np.full(len(measurements), index, np.int32))
        names = [*(COLUMNS[name].arrow for name in READ), "input"]
        return pa.RecordBatch.from_arrays([*arrays, inputs], names=names)

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for i in (number for batch in batches for number in batch.column(0).to_pylist()):
            reader = local.UnitReader(units[i], spill, i, both_ends=both_ends)
            for _, tables in reader.read():
                yield from itertools.starmap(to_batch, tables)
            note = {"lines": reader.lines, "reasons": reader.reasons}
            note |= {"columns": sorted(reader.columns)}
            (spill / f"unit-{i}.json").write_text(json.dumps(note))

    return read


def _writer(
    spill: Path,
    chosen: PrepareSettings,
    cuts: np.ndarray,
    names: set[str],
    places: Places | None,
) -> Callable:
    """Returns what writes one sorted partition as rows, and tells its number and its sources."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        part = context.partitionId() if context else 0
        writer = local.SplitWriter(spill, chosen, columns=names, suffix=f".{part}")
        for batch in batches:
            if len(batch):
                rows = _to_rows(batch, names)
                writer.append(*local.split_rows(*rows, chosen, cuts, places))
        counts = writer.close()
        yield pa.RecordBatch.from_pydict({"part": [part], "probes": [counts["probes"]]})

    return write


def _to_rows(batch: pa.RecordBatch, names: set[str]) -> tuple[RowBatch, np.ndarray]:
    """Returns a batch of `_READ`, which is in order, as one row a source, and input indices."""
    index = batch["input"].to_numpy().astype(np.uint32)
    columns = {
        name: to_numpy(batch[COLUMNS[name].arrow])
        for name in READ
        if name in names or name in NEEDED
    }
    columns = {name: v.astype(COLUMNS[name].dtype, copy=False) for name, v in columns.items()}
    src = columns["src"]
    first = np.append(True, src[1:] != src[:-1])
    measured = {name: columns[name] for name in MEASURED if name in names}
    return RowBatch.grouped(np.cumsum(first) - 1, src[first], measured), index
