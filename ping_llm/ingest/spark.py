"""The Spark engine of `prepare_data`, for more than one machine can sort.

Spark reads, deals out by ranges of sources and sorts; the records are parsed, split and cut into
rows by the code of the local engine, so the files are the same byte for byte. Workers hand their
rows over in the directory of the output, which all of them must see.
"""

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

from ping_llm.data.rows import SPLITS, RowBuilder, RowWriter, read_rows
from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.ingest.files import InputFile
from ping_llm.ingest.local import Engine, RejectedSpool, no_measurement, split_rows, write_rejected
from ping_llm.ingest.records import Chunk
from ping_llm.ingest.sorting import MIRRORED, Sorted
from ping_llm.ingest.sources import Unit, cut_into_units, read_unit
from ping_llm.ingest.splits import SplitRule
from ping_llm.progress import progress

_READ = "event_time long, src_addr binary, dst_addr binary, ip_version byte, rtt float, input int"
_ORDER = ("ip_version", "src_addr", "event_time", "dst_addr", "rtt")


class SparkEngine(Engine):
    """The engine of a Spark session, which may be of many machines."""

    def run(self, files: Sequence[InputFile], *, workers: int) -> None:
        """Reads `files` and writes all rows, and `rejected.parquet`, to the directory.

        Raises:
            ConfigError: PySpark is not installed.
            DataError: A file is broken, or there is no measurement in all of them.
        """
        spill = self._spill
        spill.mkdir()
        units = [unit for file in files for unit in cut_into_units(file)]
        session, ours = _session(workers, self._memory_limit)
        from pyspark import StorageLevel
        from pyspark.errors import PySparkException

        try:
            read = session.range(0, len(units), 1, len(units))
            read = read.mapInArrow(_reader(units, spill, self._both_ends), _READ)
            read = read.persist(StorageLevel.DISK_ONLY)
            spans = read.groupBy("input").agg({"event_time": "min"}).collect()
            last = dict(read.groupBy("input").agg({"event_time": "max"}).collect())
            lines = np.zeros(len(units), np.int64)
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
            write_rejected(self._directory, spill, units, lines)
            if not spans:
                raise no_measurement(files, self.rejected)
            cuts = np.zeros((max(file.input_index for file in files) + 1, 2), np.int64)
            for index, first in spans:
                if index < MIRRORED:
                    cuts[index] = self._rule.time_cuts(first, last[index])
            parts = max(len(units), session.sparkContext.defaultParallelism)
            # A source goes to one partition, so that rows need not be joined across them.
            made = read.repartitionByRange(parts, "ip_version", "src_addr")
            made = made.sortWithinPartitions(*_ORDER)
            made = made.mapInArrow(
                _writer(spill, self._rule, cuts, self._row_cap_bytes), "part long, probes long"
            )
            probes = sorted(tuple(row) for row in made.collect())
            self.probes = sum(n for _, n in probes)
            self._join(spill, [part for part, _ in probes])
        except PySparkException as error:
            # What a worker says of a broken file comes as text in a long trace.
            said = re.search(r"ping_llm\.errors\.DataError: (.+)", str(error))
            raise DataError(said[1] if said else f"Spark failed: {_first_line(error)}") from error
        finally:
            if ours:
                session.stop()
        shutil.rmtree(spill)

    def _join(self, spill: Path, parts: list[int]) -> None:
        """Writes the rows of all partitions, in their order, as the local engine does."""
        for split in SPLITS:
            writer = RowWriter(self._directory, split)
            with progress(f"writing {split}", total=len(parts), unit="partitions") as shown:
                for part in parts:
                    for path in sorted(spill.glob(f"{split}.{part}-*.arrow")):
                        for rows in read_rows(path):
                            writer.append(rows)
                            self.failed += int((rows.rtt < 0).sum())
                        path.unlink()
                    shown.update(1)
            writer.close()
            self.rows[split], self.measurements[split] = writer.rows, writer.measurements


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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

    def to_batch(chunk: Chunk, index: int) -> pa.RecordBatch:
        table = chunk.to_table().to_arrow()
        inputs = pa.array(np.full(len(table), index, np.int32))
        columns = [column.combine_chunks() for column in table.columns]
        # Spark has no binary of a fixed size.
        columns = [c.cast(pa.binary()) if c.type == pa.binary(16) else c for c in columns]
        return pa.RecordBatch.from_arrays([*columns, inputs], names=[*table.column_names, "input"])

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for i in (number for batch in batches for number in batch.column(0).to_pylist()):
            unit, lines = units[i], 0
            with RejectedSpool(spill / f"rejected-{i}.arrows") as spool:
                for part in read_unit(unit):
                    spool.add(part.rejected)
                    lines += part.lines
                    yield to_batch(part.chunk, unit.file.input_index)
                    if both_ends:
                        yield to_batch(part.chunk.mirrored(), unit.file.input_index | MIRRORED)
            note = {"lines": lines, "reasons": spool.reasons}
            (spill / f"unit-{i}.json").write_text(json.dumps(note))

    return read


def _writer(spill: Path, rule: SplitRule, cuts: np.ndarray, row_cap_bytes: int) -> Callable:
    """Returns what writes one sorted partition as rows, and tells its number and its sources."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        part = context.partitionId() if context else 0
        writers = {split: RowWriter(spill, f"{split}.{part}") for split in SPLITS}
        builders = {s: RowBuilder(w, row_cap_bytes=row_cap_bytes) for s, w in writers.items()}
        probes, last = 0, b""
        for batch in batches:
            if len(batch) == 0:
                continue
            ordered = _to_sorted(batch)
            found, rows_by_split = split_rows(ordered, rule, cuts)
            for split, rows in rows_by_split.items():
                builders[split].append(rows)
            if len(found):
                probes += len(found) - (found[0].tobytes() == last)
                last = found[-1].tobytes()
        for split, writer in writers.items():
            builders[split].close()
            writer.close()
        yield pa.RecordBatch.from_arrays(
            [pa.array([part]), pa.array([probes])], names=["part", "probes"]
        )

    return write


def _to_sorted(batch: pa.RecordBatch) -> Sorted:
    """Returns a batch of `_READ`, which is in order, with its sources taken together."""
    src, dst = (
        np.frombuffer(batch[name].cast(pa.binary(16)).buffers()[1], np.uint8).reshape(-1, 16)
        for name in ("src_addr", "dst_addr")
    )
    starts = np.flatnonzero(np.append(True, (src[1:] != src[:-1]).any(axis=1)))
    return Sorted(
        src_addr=src[starts],
        offsets=np.append(starts, len(src)),
        event_time=batch["event_time"].to_numpy().astype(np.uint32),
        dst_addr=dst,
        rtt=batch["rtt"].to_numpy(),
        input_index=batch["input"].to_numpy().astype(np.uint32),
    )
