"""What can be known of any number of measurements in one pass and bounded memory.

Counts, RTT quantiles and times are exact or of stated resolution. What would need one entry for
each address, pair or record is exact up to a number of them, and beyond it holds for a fair sample.
"""

import numpy as np

from ping_llm import addresses
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import MeasurementTable

N_SPLITS = 3
# Float bits above this shift: a sign and 8 exponent bits, and 11 bits of mantissa.
RTT_SHIFT = 12
RTT_BINS = 1 << (31 - RTT_SHIFT)
RTT_RESOLUTION = 2.0**-12  # relative; the middle of a bin is at most this far from its values
TIME_BINS = 2048
CLOCK_JUMP_S = 366 * 86_400
IMPLAUSIBLE_RTT_MS = 60_000.0


class HashTable:
    """Sums for each 64-bit key, exact for up to `capacity` keys, then for a fair sample of keys.

    Keys are hashes, hence uniform, and those below a limit are a fair sample; the limit halves
    whenever the table is full. The keys with the largest sums stay in any case, for `top`.

    Attributes:
        keys: The keys held, ascending [k], uint64.
        sums: Their sums [k, width].
        labels: What each key stands for, [k, 16] uint8 (or [k, 0]).
    """

    N_HEAVY = 1024

    def __init__(self, width: int, *, capacity: int, label_bytes: int = 0, dtype: type = float):
        self.keys = np.zeros(0, np.uint64)
        self.sums = np.zeros((0, width), dtype)
        self.labels = np.zeros((0, label_bytes), np.uint8)
        self._capacity, self._level = capacity, 0
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_pending = 0

    @property
    def fraction(self) -> float:
        """The part of all keys that the table is sure to hold: 1.0 while it is exact."""
        return 2.0**-self._level

    def sampled(self) -> np.ndarray:
        """Returns which of `keys` belong to the fair sample [k], bool."""
        return self._below_limit(self.keys)

    def _below_limit(self, keys: np.ndarray) -> np.ndarray:
        return keys <= np.uint64((1 << (64 - self._level)) - 1)

    def distinct(self) -> int:
        """Returns how many keys there were; an estimate once `fraction` is below 1."""
        return round(np.count_nonzero(self.sampled()) / self.fraction)

    def top(self, n: int, column: int = 0) -> np.ndarray:
        """Returns where in `keys` the `n` keys with the largest sums stand, largest first."""
        return np.argsort(-self.sums[:, column].astype(float), kind="stable")[:n]

    def add(self, keys: np.ndarray, sums: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Adds `sums` [n, width] to the keys [n], which may repeat."""
        if labels is None:
            labels = np.zeros((len(keys), 0), np.uint8)
            if self._level:  # without labels nothing outside the sample is of use
                kept = self._below_limit(keys)
                keys, sums, labels = keys[kept], sums[kept], labels[kept]
        self._pending.append((keys, sums.astype(self.sums.dtype), labels))
        self._n_pending += len(keys)
        if self._n_pending > max(len(self.keys) // 4, 1 << 17):
            self.merge()

    def merge(self) -> None:
        """Brings the attributes up to date."""
        parts = [(self.keys, self.sums, self.labels), *self._pending]
        self._pending, self._n_pending = [], 0
        keys, sums, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = group_starts(keys)
        self.keys, self.labels = keys[starts], labels[order[starts]]
        self.sums = np.add.reduceat(sums[order], starts) if len(keys) else sums
        while np.count_nonzero(self.sampled()) > self._capacity:
            self._level += 1
        if self._level:
            kept = self.sampled()
            if self.labels.shape[1]:
                kept[self.top(self.N_HEAVY)] = True
            self.keys, self.sums, self.labels = self.keys[kept], self.sums[kept], self.labels[kept]


def group_starts(ordered: np.ndarray) -> np.ndarray:
    """Returns where each run of equal values starts."""
    if len(ordered) == 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


class TimeHistogram:
    """Counts over time in at most `TIME_BINS` bins of a power of two seconds.

    Attributes:
        width: Seconds of a bin.
        first: Start of the first bin, in bins since 1970.
        counts: Counts [bins, classes], int64.
    """

    def __init__(self, classes: int):
        self._shift, self.first = 0, 0
        self.counts = np.zeros((0, classes), np.int64)

    @property
    def width(self) -> int:
        """Seconds of a bin."""
        return 1 << self._shift

    def add(self, time: np.ndarray, kind: np.ndarray) -> None:
        """Counts measurements at `time` [n], of class `kind` [n] each."""
        if len(time) == 0:
            return
        low, high = int(time.min()), int(time.max())
        if len(self.counts):
            low = min(low, self.first << self._shift)
            high = max(high, ((self.first + len(self.counts)) << self._shift) - 1)
        shift = self._shift
        while (high >> shift) - (low >> shift) >= TIME_BINS:
            shift += 1
        n_classes = self.counts.shape[1]
        first = low >> shift
        counts = np.zeros(((high >> shift) - first + 1, n_classes), np.int64)
        old = (self.first + np.arange(len(self.counts))) >> (shift - self._shift)
        np.add.at(counts, old - first, self.counts)
        index = ((time >> shift) - first) * n_classes + kind
        counts += np.bincount(index, minlength=counts.size).reshape(counts.shape)
        self._shift, self.first, self.counts = shift, first, counts


def rtt_quantile(histogram: np.ndarray, q: float) -> float | None:
    """Returns the value in ms below which a part `q` of an RTT histogram lies; None if empty."""
    total = int(histogram.sum())
    if total == 0:
        return None
    rank = max(int(np.ceil(q * total)), 1)
    return float(rtt_of_bin(np.searchsorted(np.cumsum(histogram), rank)))


def rtt_of_bin(index: np.ndarray | np.intp) -> np.ndarray:
    """Returns the middle of bins of an RTT histogram, in ms; 0 for the first, which holds 0."""
    bits = (np.asarray(index, np.uint32) << RTT_SHIFT) + (1 << (RTT_SHIFT - 1))
    return np.where(np.asarray(index) == 0, 0.0, bits.view(np.float32).astype(float))


class Statistics:
    """Accumulates tables of measurements.

    Attributes:
        measurements: How many, by split [N_SPLITS].
        failed: How many failed, by family: IPv4, IPv6 [2].
        by_family: How many, by family [2].
        time_range: Earliest and latest time of each split; None where it is empty.
        rtt: Histogram of the RTTs that are numbers, by family [2, RTT_BINS].
        time: Counts over time; classes are IPv4 answered, IPv4 failed, IPv6 answered, IPv6 failed.
        sources: Sums by source: measurements, failed, total ms, measurements in each split.
        destinations: The same by destination.
        pairs: Measurements by unordered pair of addresses, in each split.
        known_ends: Measurements outside train of which both addresses occur in train.
        records: How often each record occurs, time and RTT included.
        problems: Counts of what should not be, by name.
    """

    def __init__(self, *, table_capacity: int = 1 << 20, record_capacity: int = 1 << 22):
        self.measurements = np.zeros(N_SPLITS, np.int64)
        self.failed, self.by_family = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self.time_range: list[tuple[int, int] | None] = [None] * N_SPLITS
        self.rtt = np.zeros((2, RTT_BINS), np.int64)
        self.time = TimeHistogram(4)
        width = 3 + N_SPLITS
        self.sources = HashTable(width, capacity=table_capacity, label_bytes=16)
        self.destinations = HashTable(width, capacity=table_capacity, label_bytes=16)
        self.pairs = HashTable(N_SPLITS, capacity=table_capacity, dtype=np.int64)
        self.records = HashTable(1, capacity=record_capacity, dtype=np.uint32)
        self.problems = dict.fromkeys(
            ("backwards", "jumps", "rtt_zero", "rtt_huge", "rtt_not_finite", "family", "self"), 0
        )
        self.known_ends = 0
        self._train: np.ndarray | None = None
        self._last: tuple[int, int, int] | None = None  # split, source hash, time

    def add(self, table: MeasurementTable, *, split: int = 0) -> None:
        """Adds measurements of one split, those of train (0) before others; else leave `split`."""
        n = len(table)
        if n == 0:
            return
        time, rtt = table.time, table.rtt
        failed, is_v6 = rtt < 0, table.family == 6
        self.measurements[split] += n
        self.by_family += np.bincount(is_v6, minlength=2)
        self.failed += np.bincount(is_v6[failed], minlength=2)
        low, high = int(time.min()), int(time.max())
        earlier = self.time_range[split] or (low, high)
        self.time_range[split] = (min(low, earlier[0]), max(high, earlier[1]))
        self.time.add(time, is_v6 * 2 + failed)
        self._add_rtts(rtt, failed, is_v6)

        answered = np.where(failed | ~np.isfinite(rtt), 0, rtt).astype(float)
        source, destination = hash_addresses(table.src), hash_addresses(table.dst)
        for sums_by_end, keys, ends in (
            (self.destinations, destination, table.dst),
            (self.sources, source, table.src),
        ):
            order = np.argsort(keys, kind="stable")
            starts = group_starts(keys[order])
            sums = np.zeros((len(starts), 3 + N_SPLITS))
            sums[:, 0] = sums[:, 3 + split] = np.diff(starts, append=n)
            sums[:, 1] = np.add.reduceat(failed[order].astype(float), starts)
            sums[:, 2] = np.add.reduceat(answered[order], starts)
            first = order[starts]
            sums_by_end.add(keys[first], sums, addresses.as_bytes(ends[first]))
        self._add_order(source[order], time[order], split)
        self._last = (split, int(source[-1]), int(time[-1]))

        if split:
            train = self._train_addresses()
            known = np.isin(source, train) & np.isin(destination, train)
            self.known_ends += int(np.count_nonzero(known))

        pair, repeats = np.unique(
            mix(np.minimum(source, destination), np.maximum(source, destination)),
            return_counts=True,
        )
        in_split = np.zeros((len(pair), N_SPLITS), np.int64)
        in_split[:, split] = repeats
        self.pairs.add(pair, in_split)
        bits = np.ascontiguousarray(rtt).view(np.uint32)
        self.records.add(mix(source, destination, time, bits), np.ones((n, 1)))

        families = [addresses.family(ends) for ends in (table.src, table.dst)]
        mixed = (families[0] != table.family) | (families[1] != table.family)
        self.problems["family"] += int(np.count_nonzero(mixed))
        self.problems["self"] += int(np.count_nonzero(source == destination))

    def finish(self) -> None:
        """Brings every table up to date, after the last chunk."""
        for table in (self.sources, self.destinations, self.pairs, self.records):
            table.merge()

    def _train_addresses(self) -> np.ndarray:
        """Returns the hashes of all addresses of train, which is added before other splits."""
        if self._train is None:
            found = []
            for table in (self.sources, self.destinations):
                table.merge()
                found.append(table.keys[table.sums[:, 3] > 0])
            self._train = np.unique(np.concatenate(found))
        return self._train

    def _add_rtts(self, rtt: np.ndarray, failed: np.ndarray, is_v6: np.ndarray) -> None:
        finite = np.isfinite(rtt)
        self.problems["rtt_not_finite"] += int(np.count_nonzero(~finite))
        self.problems["rtt_zero"] += int(np.count_nonzero(rtt == 0))
        self.problems["rtt_huge"] += int(np.count_nonzero(finite & (rtt > IMPLAUSIBLE_RTT_MS)))
        for family in (0, 1):
            chosen = rtt[finite & ~failed & (is_v6 == bool(family))]
            bins = np.abs(chosen).astype(np.float32).view(np.uint32) >> RTT_SHIFT
            self.rtt[family] += np.bincount(bins, minlength=RTT_BINS)

    def _add_order(self, source: np.ndarray, time: np.ndarray, split: int) -> None:
        """Counts steps back and leaps in the times of each source, in the order they came."""
        same = source[1:] == source[:-1]
        # In floats: a broken time may be anywhere in 64 bits.
        step = np.diff(time.astype(float))[same]
        if self._last is not None and self._last[0] == split:
            here = np.searchsorted(source, np.uint64(self._last[1]))
            if here < len(source) and int(source[here]) == self._last[1]:
                step = np.append(step, float(time[here]) - float(self._last[2]))
        self.problems["backwards"] += int(np.count_nonzero(step < 0))
        self.problems["jumps"] += int(np.count_nonzero(np.abs(step) > CLOCK_JUMP_S))
