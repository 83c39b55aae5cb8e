"""An out-of-core sort of measurements by (family, source, time, destination, RTT).

Measurements are spilled in sorted runs. Keys sampled from every run then cut the whole into ranges
that fit in memory; a range is one slice of each run, and is sorted for good when it is read. So
the work is two quick sorts a measurement, and the order that comes out depends on the measurements
alone: not on how they were dealt out to runs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ping_llm.ingest.records import Chunk

SAMPLE_EVERY = 1024
MIRRORED = 1 << 30  # a bit of `input_index`
_DTYPES = {
    "event_time": np.dtype(np.uint32),
    "dst_addr": np.dtype((np.void, 16)),
    "rtt": np.dtype(np.float32),
    "input_index": np.dtype(np.uint32),
}
SPILLED_BYTES = sum(dtype.itemsize for dtype in _DTYPES.values())  # a measurement, on disk


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Measurements in order, grouped by source.

    Attributes:
        src_addr: The sources [S, 16], uint8.
        offsets: Source s has measurements `offsets[s]:offsets[s + 1]` [S + 1], int64.
        event_time: Seconds since 1970 UTC [n], uint32.
        dst_addr: Destinations [n, 16], uint8.
        rtt: Milliseconds, -1 = failed [n], float32.
        input_index: Which INPUT argument each came from, and `MIRRORED` if it is seen from its
            destination [n], uint32.
    """

    src_addr: np.ndarray
    offsets: np.ndarray
    event_time: np.ndarray
    dst_addr: np.ndarray
    rtt: np.ndarray
    input_index: np.ndarray

    def __len__(self) -> int:
        return len(self.event_time)


def order_words(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two uint64 [n] that order addresses [n, 16] by family, then by bytes."""
    words = np.ascontiguousarray(addresses).view(">u8").astype(np.uint64)
    high, low = words[:, 0], words[:, 1]
    # IPv4, mapped to ::ffff:0:0/96, goes first; what of ::/64 stands before it moves behind it.
    below = (high == 0) & (low < 0x1_0000_0000_0000)
    ipv4 = below & (low >= 0xFFFF_0000_0000)
    moved = np.where(ipv4, low & np.uint64(0xFFFF_FFFF), low + np.uint64(0x1_0000_0000))
    return high, np.where(below, moved, low)


def _unify(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the distinct addresses of `tables` in order, and the rank of each table's."""
    values = np.concatenate(tables)
    high, low = order_words(values)
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    new = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(order)]
    ranks = np.empty(len(order), np.uint32)
    ranks[order] = np.cumsum(new) - 1
    bounds = np.cumsum([len(table) for table in tables])[:-1]
    return values[order[new]], np.split(ranks, bounds)


def _sort(
    src_addr: np.ndarray,
    rank: np.ndarray,
    event_time: np.ndarray,
    dst_addr: np.ndarray,
    rtt: np.ndarray,
    input_index: np.ndarray,
) -> Sorted:
    """Returns the measurements in order; `rank` says which of the ordered `src_addr` is theirs."""
    key = rank.astype(np.uint64) << np.uint64(32) | event_time
    order = np.argsort(key)
    key = key[order]
    same = key[1:] == key[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if len(tied):
        rows = order[tied]
        high, low = order_words(dst_addr[rows])
        order[tied] = rows[np.lexsort((rtt[rows], low, high, key[tied]))]
    ranks = (key >> np.uint64(32)).astype(np.int64)
    starts = np.flatnonzero(np.append(True, ranks[1:] != ranks[:-1]))[: len(ranks)]
    return Sorted(
        src_addr=src_addr[ranks[starts]],
        offsets=np.append(starts, len(ranks)),
        event_time=event_time[order],
        dst_addr=dst_addr[order],
        rtt=rtt[order],
        input_index=input_index[order],
    )


class Run:
    """A sorted run on disk.

    Attributes:
        samples: The keys of every `SAMPLE_EVERY`-th measurement [K, 6], uint64.
    """

    def __init__(self, path: Path, chunks: Sequence[tuple[Chunk, int]]):
        """Sorts and writes `chunks`, each with the index of its INPUT argument."""
        src_addr, ranks = _unify([chunk.src_values for chunk, _ in chunks])
        rank = np.concatenate(
            [r[chunk.src_codes] for (chunk, _), r in zip(chunks, ranks, strict=True)]
        )
        parts = [np.full(len(chunk), index, np.uint32) for chunk, index in chunks]
        run = _sort(
            src_addr,
            rank,
            np.concatenate([chunk.event_time for chunk, _ in chunks]).astype(np.uint32),
            np.concatenate([chunk.dst_values[chunk.dst_codes] for chunk, _ in chunks]),
            np.concatenate([chunk.rtt for chunk, _ in chunks]),
            np.concatenate(parts),
        )
        self._path, self._n = path, len(run)
        self._n_sources = len(run.src_addr)
        at = np.arange(0, len(run), SAMPLE_EVERY)
        sources = run.src_addr[np.searchsorted(run.offsets, at, "right") - 1]
        self.samples = np.stack(
            [
                *order_words(sources),
                run.event_time[at].astype(np.uint64),
                *order_words(run.dst_addr[at]),
                _rtt_word(run.rtt[at]),
            ],
            axis=1,
        )
        with path.open("wb") as file:
            for name in _DTYPES:
                getattr(run, name).tofile(file)
            run.src_addr.tofile(file)
            run.offsets.astype(np.int64).tofile(file)

    def __len__(self) -> int:
        return self._n

    def _column(self, name: str, start: int, stop: int) -> np.ndarray:
        where = 0
        for other, dtype in _DTYPES.items():
            if other == name:
                where += start * dtype.itemsize
                return np.fromfile(self._path, dtype, stop - start, offset=where)
            where += dtype.itemsize * self._n
        raise KeyError(name)

    def _sources(self) -> tuple[np.ndarray, np.ndarray]:
        where = SPILLED_BYTES * self._n
        src_addr = np.fromfile(self._path, np.uint8, 16 * self._n_sources, offset=where)
        offsets = np.fromfile(self._path, np.int64, offset=where + len(src_addr))
        return src_addr.reshape(-1, 16), offsets

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns for each key [K, 6] how many measurements of the run stand before it."""
        src_addr, offsets = self._sources()
        high, low = order_words(src_addr)
        found = []
        for key in keys:
            sources = _narrow(low, key[1], *_narrow(high, key[0], 0, len(high)))
            start, stop = (int(offsets[i]) for i in sources)
            time = self._column("event_time", start, stop).astype(np.uint64)
            start, stop = (start + i for i in _narrow(time, key[2], 0, len(time)))
            dst_high, dst_low = order_words(_bytes(self._column("dst_addr", start, stop)))
            rtt = _rtt_word(self._column("rtt", start, stop))
            inner = _narrow(dst_low, key[4], *_narrow(dst_high, key[3], 0, len(rtt)))
            found.append(start + _narrow(rtt, key[5], *inner)[0])
        return np.array(found, np.int64)

    def read(self, start: int, stop: int) -> Sorted:
        """Returns measurements [start, stop) of the run."""
        src_addr, offsets = self._sources()
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        columns = {name: self._column(name, start, stop) for name in _DTYPES}
        columns["dst_addr"] = _bytes(columns["dst_addr"])
        return Sorted(
            src_addr=src_addr[first:last],
            offsets=np.clip(offsets[first : last + 1], start, stop) - start,
            **columns,
        )


def _bytes(addresses: np.ndarray) -> np.ndarray:
    """Returns void16 [n] as uint8 [n, 16]."""
    return np.ascontiguousarray(addresses).view(np.uint8).reshape(-1, 16)


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

    Range r is measurements `bounds[r][i]:bounds[r + 1][i]` of each run i.
    """
    total = sum(len(run) for run in runs)
    samples = np.concatenate([run.samples for run in runs])
    samples = samples[np.lexsort(samples.T[::-1])]
    count = -(-total // rows)
    step = -(-len(samples) // count)
    found = [run.find(samples[step::step]) for run in runs]
    sizes = np.array([len(run) for run in runs])
    return [np.zeros(len(runs), np.int64), *np.array(found).T, sizes]


def read_range(runs: Sequence[Run], starts: np.ndarray, stops: np.ndarray) -> Sorted | None:
    """Returns one range of `runs` in order, or None where it is empty."""
    parts = [
        run.read(int(a), int(b)) for run, a, b in zip(runs, starts, stops, strict=True) if a < b
    ]
    if not parts:
        return None
    src_addr, ranks = _unify([part.src_addr for part in parts])
    rank = np.concatenate(
        [np.repeat(r, np.diff(part.offsets)) for part, r in zip(parts, ranks, strict=True)]
    )
    names = ("event_time", "dst_addr", "rtt", "input_index")
    return _sort(
        src_addr, rank, *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
    )
