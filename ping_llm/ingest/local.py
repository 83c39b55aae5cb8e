"""The local engine of `prepare_data`: threads that read and sort, one writer, bounded memory."""

import abc
import contextlib
import itertools
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.data.rows import MEASURED, SPLITS, RowBatch, RowBuilder, RowWriter
from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile, Unit
from ping_llm.ingest.records import REJECTED_SCHEMA, Part
from ping_llm.ingest.settings import PrepareSettings
from ping_llm.ingest.sorting import MIRRORED, Run, cut_into_ranges, read_range
from ping_llm.ingest.sources import cut_into_units, read_unit, renumber
from ping_llm.ingest.splits import TRAIN, by_addresses, by_time, keyed_hashes, time_cuts
from ping_llm.measurements import MeasurementTable
from ping_llm.places import Places
from ping_llm.progress import Progress, progress

_BASE_MEMORY = 300_000_000  # Python, NumPy, Arrow and DuckDB before any data
_BYTES_PER_MEASUREMENT = 200  # while its run or range is sorted


class Engine(abc.ABC):
    """Makes the rows of some files.

    Attributes:
        rejected: Rejected records by reason.
    """

    def __init__(self, directory: Path, chosen: PrepareSettings, workers: int):
        self._directory, self._chosen, self._workers = directory, chosen, workers
        self._spill = directory / "spill"
        self._places = None if chosen.prefixes is None else Places.read(chosen.prefixes)
        self.rejected: Counter[str] = Counter()

    @abc.abstractmethod
    def run(self, files: Sequence[InputFile]) -> dict[str, Any]:
        """Reads `files` and writes all rows, and `rejected.parquet`, to the directory.

        Returns:
            The counts of `PrepareResult` but for rejected records.

        Raises:
            ConfigError: The engine is not installed.
            DataError: A file is broken, or there is no measurement in all of them.
        """


class LocalEngine(Engine):
    """The engine of one machine: threads, runs on disk, ranges in memory."""

    def __init__(self, directory: Path, chosen: PrepareSettings, workers: int):
        super().__init__(directory, chosen, workers)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._run_numbers = itertools.count()
        self._runs: list[Run] = []

    def run(self, files: Sequence[InputFile]) -> dict[str, Any]:
        """See `Engine.run`."""
        self._spill.mkdir()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                counts = self._write(pool, self._read(files, pool))
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._spill)
        return counts

    def _share(self, parts: int) -> int:
        """Returns how many measurements each of `parts` threads may hold."""
        memory = (self._chosen.memory_bytes - _BASE_MEMORY) // 2
        return max(memory // parts // _BYTES_PER_MEASUREMENT, 1000)

    # Reading

    def _read(self, files: Sequence[InputFile], pool: ThreadPoolExecutor) -> np.ndarray:
        """Spills all measurements in runs; returns `time_cuts` of each input."""
        self._units = cut_into_units(files, apply=pool.map)
        self._lines = np.zeros(len(self._units), np.int64)
        self._first = np.full(files[-1].input_index + 1, 2**62)  # times of each input
        self._last = np.full_like(self._first, -1)
        self._left: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for i in [*range(len(self._units)), *[None] * self._workers]:
            self._left.put(i)
        total = sum(unit.size for unit in self._units)
        with progress("reading", total=total, unit="bytes") as shown:
            tasks = [pool.submit(self._read_units, shown) for _ in range(self._workers)]
            for task in tasks:
                task.result()
        write_rejected(self._directory, self._spill, self._units, self._lines)
        if not self._runs:
            raise no_measurement(files, self.rejected)
        return time_cuts(self._chosen, self._first, self._last)

    def _read_units(self, shown: Progress) -> None:
        """Spills unit after unit until none is left, and notes the lines and times of each."""
        tables: list[tuple[MeasurementTable, int]] = []
        try:
            for i in iter(self._left.get, None):
                unit, done = self._units[i], 0.0
                reader = UnitReader(unit, self._spill, i, both_ends=self._chosen.both_ends)
                for part, some in reader.read():
                    if self._stop.is_set():
                        return
                    tables += some
                    if sum(len(table) for table, _ in tables) >= self._share(self._workers):
                        self._spill_run(tables)
                    with self._lock:
                        if len(part.table):
                            index, times = unit.files[0].input_index, part.table.time
                            self._first[index] = min(self._first[index], times.min())
                            self._last[index] = max(self._last[index], times.max())
                        shown.update((part.done - done) * unit.size)
                    done = part.done
                self._lines[i] = reader.lines
                with self._lock:
                    shown.update((1 - done) * unit.size)
                    self.rejected += reader.reasons
            self._spill_run(tables)
        except BaseException:
            self._stop.set()
            raise

    def _spill_run(self, tables: list[tuple[MeasurementTable, int]]) -> None:
        if tables:
            run = Run(self._spill / f"run-{next(self._run_numbers)}", tables)
            tables.clear()
            with self._lock:
                self._runs.append(run)

    # Writing

    def _write(self, pool: ThreadPoolExecutor, cuts: np.ndarray) -> dict[str, Any]:
        total = sum(len(run) for run in self._runs)
        bounds = cut_into_ranges(self._runs, self._share(self._workers + 1))
        ranges = list(itertools.pairwise(bounds))

        def sort(bounds: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, RowBatch]]:
            rows = read_range(self._runs, *bounds)
            return split_rows(*rows, self._chosen, cuts, self._places)

        columns = {name for run in self._runs for name in run.columns}
        writer = SplitWriter(self._directory, self._chosen, columns=columns)
        in_order = _in_order(pool, sort, ranges, ahead=self._workers)
        with progress("sorting", total=total, unit="measurements") as shown:
            for (starts, stops), made in zip(ranges, in_order, strict=True):
                writer.append(*made)
                shown.update(int((stops - starts).sum()))
        return writer.close()


def no_measurement(files: Sequence[InputFile], rejected: Counter[str]) -> DataError:
    """Returns the error of files that hold nothing usable."""
    reasons = ", ".join(f"{n} x {reason}" for reason, n in rejected.most_common(3))
    return DataError(
        f"no measurement in {files[0].location}{' and the other files' * (len(files) > 1)}: "
        + (f"every record was rejected ({reasons})" if reasons else "there is no record")
    )


def write_rejected(directory: Path, spill: Path, units: Sequence[Unit], lines: np.ndarray) -> None:
    """Writes `rejected.parquet` from what the units spooled, given how many lines each has."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(
        directory / "rejected.parquet", REJECTED_SCHEMA, compression="zstd"
    ) as writer:
        before, file = 0, None
        for i, unit in enumerate(units):
            if unit.files[0] != file:
                before, file = 0, unit.files[0]
            path = _rejected_path(spill, i)
            if path.exists():
                with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
                    for batch in reader:
                        writer.write_batch(renumber(batch, before))
            before += int(lines[i])


def split_rows(
    rows: RowBatch,
    index: np.ndarray,
    chosen: PrepareSettings,
    cuts: np.ndarray,
    places: Places | None,
) -> tuple[np.ndarray, dict[str, RowBatch]]:
    """Returns (the sources, what of `rows` each split gets, one row a source however long).

    Only train gets mirrored measurements; the sources [S] are those of any split, in order.

    Args:
        rows: Measurements in order, one row a source.
        index: Input index of each measurement, with the bit `MIRRORED` [M].
        chosen: Says which split a measurement belongs to.
        cuts: `time_cuts` of each input [I, 2]; for *time* only.
        places: Who is where; for *asn* and *region* only.
    """
    if chosen.split == "time":
        split = by_time(rows.time, cuts[index & ~np.uint32(MIRRORED)])
    else:
        src = keyed_hashes(chosen, rows.src, places)[rows.row_of_each()]
        split = by_addresses(chosen, src, keyed_hashes(chosen, rows.dst, places))
    kept = (index < MIRRORED) | (split == TRAIN)
    members = {name: np.flatnonzero(kept & (split == code)) for code, name in enumerate(SPLITS)}
    by_split = {name: rows.take(which) for name, which in members.items() if len(which)}
    return rows.src[np.unique(rows.row_of_each()[kept])], by_split


def _in_order(pool: ThreadPoolExecutor, work, items: list, *, ahead: int) -> Iterator:
    """Yields `work` of each item in order; at most `ahead` are under way or waiting."""
    waiting: list[Future] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def _rejected_path(spill: Path, number: int) -> Path:
    return spill / f"rejected-{number}.arrows"


class UnitReader:
    """Reads a unit; what it rejects goes to a file in `spill`, made when there is something.

    Attributes:
        lines: How many lines or rows were read.
        reasons: Rejected records by reason.
        columns: Which of `MEASURED` its measurements have.
    """

    def __init__(self, unit: Unit, spill: Path, number: int, *, both_ends: bool):
        self._unit, self._both_ends = unit, both_ends
        self._path = _rejected_path(spill, number)
        self.lines, self.reasons, self.columns = 0, Counter[str](), set[str]()

    def read(self) -> Iterator[tuple[Part, list[tuple[MeasurementTable, int]]]]:
        """Yields each part, and its tables with their input indices, mirrored ones for both ends.

        Raises:
            DataError: The file cannot be read to the end of the unit.
        """
        index, writer = self._unit.files[0].input_index, None
        with contextlib.ExitStack() as stack:
            for part in read_unit(self._unit):
                if len(part.rejected):
                    if writer is None:
                        new = pa.ipc.new_stream(str(self._path), REJECTED_SCHEMA)
                        writer = stack.enter_context(new)
                    writer.write_batch(part.rejected)
                    for count in part.rejected["reason"].value_counts().to_pylist():
                        self.reasons[count["values"]] += count["counts"]
                self.lines += part.lines
                self.columns |= part.table.names & {*MEASURED}
                tables = [(part.table, index)]
                if self._both_ends:
                    tables.append((part.table.mirrored(), index | MIRRORED))
                yield part, [each for each in tables if len(each[0])]


class SplitWriter:
    """Writes rows that come in order, each to the files of its split, and counts them."""

    def __init__(
        self,
        directory: Path,
        chosen: PrepareSettings,
        *,
        columns: Collection[str],
        suffix: str = "",
    ):
        cap = chosen.row_cap_bytes
        self._writers = {
            split: RowWriter(directory, f"{split}{suffix}", columns=columns) for split in SPLITS
        }
        self._builders = {s: RowBuilder(w, row_cap_bytes=cap) for s, w in self._writers.items()}
        self._last_source, self._failed, self._probes = None, 0, 0

    def append(self, sources: np.ndarray, by_split: dict[str, RowBatch]) -> None:
        """Adds what `split_rows` returns."""
        for split, rows in by_split.items():
            self._builders[split].append(rows)
            self._failed += int((rows.rtt < 0).sum())
        if len(sources):
            self._probes += len(sources) - int(sources[0] == self._last_source)
            self._last_source = sources[-1]

    def close(self) -> dict[str, Any]:
        """Ends all files; returns the counts of `PrepareResult` but for rejected records."""
        for split, writer in self._writers.items():
            self._builders[split].close()
            writer.close()
        measurements = {split: writer.measurements for split, writer in self._writers.items()}
        return {
            "rows": {split: writer.rows for split, writer in self._writers.items()},
            "split_measurements": measurements,
            "measurements": sum(measurements.values()),
            "failed": self._failed,
            "probes": self._probes,
        }
