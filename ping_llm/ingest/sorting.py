"""An out-of-core sort of measurements by (family, source, time, destination, RTT).

Measurements are spilled in sorted runs. Keys sampled from every run then cut the whole into ranges
that fit in memory; a range is one slice of each run, and is sorted for good when it is read. So
the work is two quick sorts a measurement, and the order that comes out depends on the measurements
alone: not on how they were dealt out to runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ping_llm import addresses, columns
from ping_llm.data.rows import MEASURED, RowBatch
from ping_llm.measurements import COLUMNS, MeasurementTable

SAMPLE_EVERY = 1024
MIRRORED = 1 << 30  # a bit of an input index: the measurement is seen from its destination
_KEY = ("time", "dst")
_DTYPES = {name: COLUMNS[name].dtype for name in ("src", *MEASURED)}
_DTYPES |= {"offsets": np.dtype(np.int64), "index": np.dtype(np.uint32)}


def rank_addresses(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct addresses in order [S], which of them each of `values` is [n])."""
    encoded = columns.from_numpy(values).dictionary_encode()
    distinct = columns.to_numpy(encoded.dictionary)
    order = np.lexsort(addresses.words(distinct)[::-1])
    ranks = np.empty(len(order), np.uint32)
    ranks[order] = np.arange(len(order), dtype=np.uint32)
    return distinct[order], ranks[encoded.indices.to_numpy()]


# Example: sources [192.0.2.1, 192.0.2.9], and three measurements of rank [1, 0, 1] at seconds
# [60, 99, 60] with RTTs [7.5, 3.0, -1]. Their keys, rank << 32 | second, sort to order [1, 0, 2].
# The last two have equal keys: as [3.0 of .1, 7.5 of .9, -1 of .9] they are not in order yet. Where
# both are to one destination the failed one goes first, so the order is [1, 2, 0], and the rows are
# those of .1 with RTT [3.0] and of .9 with [-1, 7.5].
def _sort(
    sources: np.ndarray, rank: np.ndarray, measured: Mapping[str, np.ndarray], index: np.ndarray
) -> tuple[RowBatch, np.ndarray]:
    """Returns measurements in order as one row a source, and `index` in their order.

    Args:
        sources: The distinct sources, in order.
        rank: Which of them each measurement is of [n].
        measured: The columns, as `RowBatch.measured`.
        index: Of the inputs they come from [n].
    """
    key = rank.astype(np.uint64) << np.uint64(32) | measured["time"].astype(np.uint64)
    order = np.argsort(key)
    key = key[order]
    same = key[1:] == key[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if len(tied):
        some = order[tied]
        high, low = addresses.words(measured["dst"][some])
        last = [measured[n][some] for n in reversed(MEASURED) if n in measured and n not in _KEY]
        order[tied] = some[np.lexsort((*last, low, high, key[tied]))]
    source = (key >> np.uint64(32)).astype(np.int64)
    in_order = {name: values[order] for name, values in measured.items()}
    return RowBatch.grouped(source, sources, in_order), index[order]


class Run:
    """A sorted run on disk, a file a column.

    Attributes:
        columns: Which of `MEASURED` it has.
        samples: The keys of every `SAMPLE_EVERY`-th measurement [K, 6], uint64.
    """

    def __init__(self, directory: Path, tables: Sequence[tuple[MeasurementTable, int]]):
        """Sorts and writes `tables`, each with its input index, to a new directory."""
        table = MeasurementTable.concat([table for table, _ in tables])
        index = np.repeat([i for _, i in tables], [len(t) for t, _ in tables]).astype(np.uint32)
        present = {name: getattr(table, name) for name in MEASURED}
        measured = {name: values for name, values in present.items() if values is not None}
        rows, index = _sort(*rank_addresses(table.src), measured, index)
        self._directory, self._n = directory, len(index)
        sampled = np.arange(0, len(index), SAMPLE_EVERY)
        sources = rows.src[np.searchsorted(rows.offsets, sampled, "right") - 1]
        time, dst, rtt = (values[sampled] for values in (rows.time, rows.dst, rows.rtt))
        before = (*addresses.words(sources), time.astype(np.uint64))
        key = (*before, *addresses.words(dst), _rtt_word(rtt))
        self.samples = np.stack(key, axis=1)
        directory.mkdir()
        self.columns = tuple(rows.measured)
        written = {"src": rows.src, "offsets": rows.offsets, "index": index, **rows.measured}
        for name, values in written.items():
            values.tofile(directory / name)

    def __len__(self) -> int:
        return self._n

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        dtype, count = _DTYPES[name], -1 if stop is None else stop - start
        return np.fromfile(self._directory / name, dtype, count, offset=start * dtype.itemsize)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns for each key [K, 6] how many measurements of the run stand before it."""
        src, offsets = self._read("src"), self._read("offsets")
        high, low = addresses.words(src)
        before = []
        for key in keys:
            sources = _narrow(low, key[1], *_narrow(high, key[0], 0, len(high)))
            start, stop = (int(offsets[i]) for i in sources)
            time = self._read("time", start, stop).astype(np.uint64)
            start, stop = (start + i for i in _narrow(time, key[2], 0, len(time)))
            dst_high, dst_low = addresses.words(self._read("dst", start, stop))
            rtt = _rtt_word(self._read("rtt", start, stop))
            inner = _narrow(dst_low, key[4], *_narrow(dst_high, key[3], 0, len(rtt)))
            before.append(start + _narrow(rtt, key[5], *inner)[0])
        return np.array(before, np.int64)

    def read(self, start: int, stop: int) -> tuple[RowBatch, np.ndarray]:
        """Returns measurements [start, stop) of the run, and their input indices."""
        src, offsets = self._read("src"), self._read("offsets")
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        rows = RowBatch(
            src=src[first:last],
            family=addresses.family(src[first:last]),
            offsets=np.clip(offsets[first : last + 1], start, stop) - start,
            **{name: self._read(name, start, stop) for name in self.columns},
        )
        return rows, self._read("index", start, stop)


def _rtt_word(rtt: np.ndarray) -> np.ndarray:
    """Returns uint64 in the order of `rtt`, which is -1 or not negative."""
    bits = np.abs(rtt).astype(np.float32).view(np.uint32).astype(np.uint64)
    return np.where(rtt < 0, np.uint64(0), bits + np.uint64(1))


def _narrow(ordered: np.ndarray, value: np.generic, start: int, stop: int) -> tuple[int, int]:
    """Returns the part of [start, stop) where `ordered` equals `value`."""
    part = ordered[start:stop]
    left = int(np.searchsorted(part, value, "left"))
    return start + left, start + int(np.searchsorted(part, value, "right"))


def cut_into_ranges(runs: Sequence[Run], rows: int) -> list[np.ndarray]:
    """Returns the bounds of each range [R + 1 arrays over runs]: about `rows` measurements each.

    Range r is measurements `bounds[r][i]:bounds[r + 1][i]` of each run i; none is empty.
    """
    total = sum(len(run) for run in runs)
    samples = np.concatenate([run.samples for run in runs])
    samples = samples[np.lexsort(samples.T[::-1])]
    count = -(-total // rows)
    step = -(-len(samples) // count)
    cuts = np.array([run.find(samples[step::step]) for run in runs]).T
    sizes = np.array([len(run) for run in runs])
    return list(np.unique(np.vstack([np.zeros_like(sizes), cuts, sizes]), axis=0))


def read_range(
    runs: Sequence[Run], starts: np.ndarray, stops: np.ndarray
) -> tuple[RowBatch, np.ndarray]:
    """Returns one range of `runs`, which is not empty, in order, with input indices."""
    bounds = zip(runs, starts.tolist(), stops.tolist(), strict=True)
    slices = [run.read(start, stop) for run, start, stop in bounds if start < stop]
    rows = RowBatch.concat([rows for rows, _ in slices])
    index = np.concatenate([index for _, index in slices])
    sources, rank = rank_addresses(rows.src)
    return _sort(sources, np.repeat(rank, np.diff(rows.offsets)), rows.measured, index)
