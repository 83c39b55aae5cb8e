"""The local engine of `prepare_data`: threads that read and sort, one writer, bounded memory."""

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm import addresses
from ping_llm.data.rows import SPLITS, FlatRows, RowBuilder, RowWriter
from ping_llm.errors import DataError
from ping_llm.hashing import keyed_hash_addresses
from ping_llm.ingest.files import InputFile
from ping_llm.ingest.records import REJECTED_SCHEMA, Chunk
from ping_llm.ingest.sorting import MIRRORED, Run, Sorted, cut_into_ranges, read_range
from ping_llm.ingest.sources import Unit, cut_into_units, read_unit, renumber
from ping_llm.ingest.splits import TRAIN, SplitRule
from ping_llm.progress import Progress, progress

_BASE_MEMORY = 300_000_000  # Python, NumPy, Arrow and DuckDB before any data
_BYTES_PER_MEASUREMENT = 200  # while its run or range is sorted


class Engine:
    """Makes the rows of some files; what it made is counted in its attributes.

    Attributes:
        rows: Rows of each split.
        measurements: Measurements of each split.
        failed: Failed measurements.
        probes: Distinct sources.
        rejected: Rejected records by reason.
    """

    def __init__(
        self,
        directory: Path,
        rule: SplitRule,
        *,
        row_cap_bytes: int,
        memory_limit: int,
        both_ends: bool,
    ):
        self._directory, self._rule, self._row_cap_bytes = directory, rule, row_cap_bytes
        self._memory_limit, self._both_ends = memory_limit, both_ends
        self._spill = directory / "spill"
        self.rows: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.measurements: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.failed = self.probes = 0
        self.rejected: Counter[str] = Counter()


class LocalEngine(Engine):
    """The engine of one machine: threads, runs on disk, ranges in memory."""

    def __init__(self, directory: Path, rule: SplitRule, **settings: Any):
        super().__init__(directory, rule, **settings)
        self._memory = self._memory_limit - _BASE_MEMORY
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._run_numbers = itertools.count()
        self._runs: list[Run] = []
        self._cuts = np.zeros((0, 2), np.int64)

    def run(self, files: Sequence[InputFile], *, workers: int) -> None:
        """Reads `files` and writes all rows, and `rejected.parquet`, to the directory.

        Raises:
            DataError: A file is broken, or there is no measurement in all of them.
        """
        self._spill.mkdir()
        with ThreadPoolExecutor(workers) as pool:
            try:
                self._read(files, pool, workers)
                self._write(pool, workers)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        for path in self._spill.iterdir():
            path.unlink()
        self._spill.rmdir()

    # Reading

    def _read(self, files: Sequence[InputFile], pool: ThreadPoolExecutor, workers: int) -> None:
        units = [unit for units in pool.map(cut_into_units, files) for unit in units]
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(units)):
            left.put(i)
        lines = np.zeros(len(units), np.int64)
        spans = np.tile(np.array([[2**62, -1]]), (len(units), 1))
        run_rows = max(self._memory // 2 // workers // _BYTES_PER_MEASUREMENT, 1000)
        with progress("reading", total=sum(unit.size for unit in units), unit="bytes") as shown:
            tasks = [
                pool.submit(self._read_units, units, left, lines, spans, run_rows, shown)
                for _ in range(workers)
            ]
            for task in tasks:
                task.result()
        write_rejected(self._directory, self._spill, units, lines)
        if not self._runs:
            raise no_measurement(files, self.rejected)
        count = max(file.input_index for file in files) + 1
        self._cuts = np.zeros((count, 2), np.int64)
        for index in range(count):
            mine = [i for i, unit in enumerate(units) if unit.file.input_index == index]
            first, last = spans[mine, 0].min(), spans[mine, 1].max()
            self._cuts[index] = self._rule.time_cuts(int(first), int(last)) if last >= 0 else 0

    def _read_units(
        self,
        units: list[Unit],
        left: "queue.SimpleQueue[int]",
        lines: np.ndarray,
        spans: np.ndarray,
        run_rows: int,
        shown: Progress,
    ) -> None:
        """Spills unit after unit until none is left; fills in `lines` and `spans` of each."""
        chunks: list[tuple[Chunk, int]] = []
        try:
            while (i := _next(left)) is not None:
                unit, done = units[i], 0.0
                with RejectedSpool(self._spill / f"rejected-{i}.arrows") as spool:
                    for part in read_unit(unit):
                        if self._stop.is_set():
                            return
                        spool.add(part.rejected)
                        lines[i] += part.lines
                        if len(part.chunk):
                            times = part.chunk.event_time
                            spans[i] = min(spans[i, 0], times.min()), max(spans[i, 1], times.max())
                            index = unit.file.input_index
                            chunks.append((part.chunk, index))
                            if self._both_ends:
                                chunks.append((part.chunk.mirrored(), index | MIRRORED))
                        if sum(len(chunk) for chunk, _ in chunks) >= run_rows:
                            self._spill_run(chunks)
                        with self._lock:
                            shown.update((part.done - done) * unit.size)
                        done = part.done
                with self._lock:
                    shown.update((1 - done) * unit.size)
                    self.rejected += spool.reasons
            self._spill_run(chunks)
        except BaseException:
            self._stop.set()
            raise

    def _spill_run(self, chunks: list[tuple[Chunk, int]]) -> None:
        if chunks:
            run = Run(self._spill / f"run-{next(self._run_numbers)}", chunks)
            chunks.clear()
            with self._lock:
                self._runs.append(run)

    # Writing

    def _write(self, pool: ThreadPoolExecutor, workers: int) -> None:
        total = sum(len(run) for run in self._runs)
        rows = max(self._memory // 2 // (workers + 1) // _BYTES_PER_MEASUREMENT, 1000)
        bounds = cut_into_ranges(self._runs, rows)
        writers = {split: RowWriter(self._directory, split) for split in SPLITS}
        builders = {
            split: RowBuilder(writer, row_cap_bytes=self._row_cap_bytes)
            for split, writer in writers.items()
        }
        ranges = list(itertools.pairwise(bounds))
        last_source = None
        with progress("sorting", total=total, unit="measurements") as shown:
            for n, found, flat in _in_order(pool, self._sort_range, ranges, ahead=workers):
                for split, rows_of_split in flat.items():
                    builders[split].append(rows_of_split)
                    self.failed += int((rows_of_split.rtt < 0).sum())
                if len(found):
                    self.probes += len(found) - (found[0].tobytes() == last_source)
                    last_source = found[-1].tobytes()
                shown.update(n)
        for split, writer in writers.items():
            builders[split].close()
            writer.close()
            self.rows[split], self.measurements[split] = writer.rows, writer.measurements

    def _sort_range(
        self, bounds: tuple[np.ndarray, np.ndarray]
    ) -> tuple[int, np.ndarray, dict[str, FlatRows]]:
        """Returns (the size of one range, and `split_rows` of it)."""
        part = read_range(self._runs, *bounds)
        if part is None:
            return 0, np.zeros((0, 16), np.uint8), {}
        return len(part), *split_rows(part, self._rule, self._cuts)


def no_measurement(files: Sequence[InputFile], rejected: Counter[str]) -> DataError:
    """Returns the error of files that hold nothing usable."""
    reasons = ", ".join(f"{n} x {reason}" for reason, n in rejected.most_common(3))
    return DataError(
        f"no measurement in {files[0].path}{' and the other files' * (len(files) > 1)}: "
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
            if unit.file != file:
                before, file = 0, unit.file
            for batch in _read_spool(spill / f"rejected-{i}.arrows"):
                writer.write_batch(renumber(batch, before))
            before += int(lines[i])


def split_rows(
    part: Sorted, rule: SplitRule, cuts: np.ndarray
) -> tuple[np.ndarray, dict[str, FlatRows]]:
    """Returns (the sources, what of `part` each split gets, one row a source however long).

    Only train gets mirrored measurements; the sources [S, 16] are those of any split, in order.

    Args:
        part: Measurements in order.
        rule: Says which split a measurement belongs to.
        cuts: `SplitRule.time_cuts` of each input [I, 2]; for *time* only.
    """
    source = np.repeat(np.arange(len(part.src_addr)), np.diff(part.offsets))
    if rule.split == "time":
        split = rule.by_time(part.event_time, cuts[part.input_index & ~np.uint32(MIRRORED)])
    else:
        src = keyed_hash_addresses(part.src_addr, rule.seed)[source]
        split = rule.by_addresses(src, keyed_hash_addresses(part.dst_addr, rule.seed))
    kept = (part.input_index < MIRRORED) | (split == TRAIN)
    chosen = {name: np.flatnonzero(kept & (split == code)) for code, name in enumerate(SPLITS)}
    rows = {name: _take(part, which, source[which]) for name, which in chosen.items() if len(which)}
    return part.src_addr[np.unique(source[kept])], rows


def _take(part: Sorted, which: np.ndarray, source: np.ndarray) -> FlatRows:
    """Returns measurements `which` of `part`, one row a source."""
    starts = np.flatnonzero(np.append(True, source[1:] != source[:-1]))
    src_addr = addresses.from_bytes(part.src_addr)[source[starts]]
    return FlatRows(
        src_addr=src_addr,
        ip_version=addresses.family(src_addr),
        offsets=np.append(starts, len(which)),
        event_time=part.event_time[which].astype(np.int64),
        dst_addr=addresses.from_bytes(part.dst_addr)[which],
        rtt=part.rtt[which],
    )


def _next(left: "queue.SimpleQueue[int]") -> int | None:
    try:
        return left.get_nowait()
    except queue.Empty:
        return None


def _in_order(pool: ThreadPoolExecutor, work, items: list, *, ahead: int) -> Iterator:
    """Yields `work` of each item in order; at most `ahead` are under way or waiting."""
    waiting: list[Future] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


class RejectedSpool:
    """A file for what one unit rejects, made when there is something."""

    def __init__(self, path: Path):
        self._path, self._writer = path, None
        self.reasons: Counter[str] = Counter()

    def __enter__(self) -> "RejectedSpool":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, rejected: pa.RecordBatch) -> None:
        """Writes rejected records, and counts their reasons."""
        if len(rejected) == 0:
            return
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self._path), REJECTED_SCHEMA)
        self._writer.write_batch(rejected)
        for count in rejected["reason"].value_counts().to_pylist():
            self.reasons[count["values"]] += count["counts"]


def _read_spool(path: Path) -> Iterator[pa.RecordBatch]:
    if path.exists():
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
