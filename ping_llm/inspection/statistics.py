"""Statistics of any number of measurements, in one pass and bounded memory.

Counts, RTT quantiles and times are exact or of a stated resolution. What needs one entry for each
address, pair or record is exact up to a number of them, and beyond it holds for a fair sample.
"""

import time

import numpy as np

from ping_llm import addresses
from ping_llm.hashing import hash_addresses, mix
from ping_llm.measurements import KINDS, MeasurementTable

N_SPLITS = 3
# Float bits above this shift: a sign and 8 exponent bits, and 11 bits of mantissa.
RTT_SHIFT = 12
RTT_BINS = 1 << (31 - RTT_SHIFT)
RTT_RESOLUTION = 2.0**-12  # relative; the middle of a bin is at most this far from its values
TIME_BINS = 2048
CLOCK_JUMP_S = 366 * 86_400
IMPLAUSIBLE_RTT_MS = 60_000.0
EARLIEST_PLAUSIBLE = 631_152_000  # 1990-01-01: a clock that was never set says 1970


class HashTable:
    """Sums for each 64-bit key, exact for up to `capacity` keys, then for a fair sample of keys.

    This is distinct sampling (Gibbons, 2001). Keys are hashes, hence uniform, and those up to a
    limit are a fair sample; the limit halves whenever more than `capacity` keys are below it. In a
    table with labels the keys with the largest sums stay in any case, for `top`.

    Attributes:
        keys: The keys held, ascending [k], uint64.
        sums: Their sums [k, width].
        labels: What each key stands for, [k, label_bytes] uint8.
    """

    # Example with keys of 4 bits, up to 15, and a capacity of 2, to which 3, 9, 3 and 14 are added,
    # 1 each. `merge` sorts them and sums each group: keys [3, 9, 14], sums [[2], [1], [1]]. Three
    # keys are too many, so `_halvings` becomes 1 and the limit 7: of the sample [3] remains, with
    # its exact sum 2. `fraction` is 1/2, so `distinct` estimates 1 / (1/2) = 2 keys. From now on 12
    # is dropped at once, 5 is kept. With labels, and N_HEAVY = 1, only the key with the largest sum
    # would stay whatever its hash.
    N_HEAVY = 1024

    def __init__(self, width: int, *, capacity: int, label_bytes: int = 0, dtype: type = float):
        self.keys = np.zeros(0, np.uint64)
        self.sums = np.zeros((0, width), dtype)
        self.labels = np.zeros((0, label_bytes), np.uint8)
        self._capacity, self._halvings = capacity, 0
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_pending = 0

    @property
    def fraction(self) -> float:
        """The fraction of all keys that is in the sample: 1.0 while the table is exact."""
        return 2.0**-self._halvings

    def sampled(self) -> np.ndarray:
        """Returns which of `keys` belong to the fair sample [k], bool."""
        return self._below_limit(self.keys)

    def _below_limit(self, keys: np.ndarray) -> np.ndarray:
        return keys <= np.uint64((1 << (64 - self._halvings)) - 1)

    def distinct(self) -> int:
        """Returns how many keys there were; an estimate once `fraction` is below 1."""
        return round(np.count_nonzero(self.sampled()) / self.fraction)

    def repeats(self) -> int:
        """Returns how many additions of 1 repeated a key; an estimate like `distinct`."""
        counts = self.sums[self.sampled(), 0]
        return round((int(counts.sum()) - len(counts)) / self.fraction)

    def top(self, n: int) -> np.ndarray:
        """Returns where in `keys` the `n` with the largest first sums stand, largest first."""
        return np.argsort(-self.sums[:, 0].astype(float), kind="stable")[:n]

    def add(self, keys: np.ndarray, sums: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Adds `sums` [n, width] to the keys [n], which may repeat."""
        if labels is None:
            if self._halvings:  # nothing outside the sample is of use
                kept = self._below_limit(keys)
                keys, sums = keys[kept], sums[kept]
            labels = np.zeros((len(keys), 0), np.uint8)
        self._pending.append((keys, sums.astype(self.sums.dtype), labels))
        self._n_pending += len(keys)
        if self._n_pending > max(len(self.keys) // 4, 1 << 17):
            self.merge()

    def merge(self) -> None:
        """Brings the attributes up to date."""
        parts = [(self.keys, self.sums, self.labels), *self._pending]
        self._pending, self._n_pending = [], 0
        keys, sums, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        order, starts = group(keys)
        self.keys, self.labels = keys[order[starts]], labels[order[starts]]
        self.sums = np.add.reduceat(sums[order], starts) if len(keys) else sums
        while np.count_nonzero(self.sampled()) > self._capacity:
            self._halvings += 1
        if self._halvings:
            kept = self.sampled()
            if self.labels.shape[1]:
                kept[self.top(self.N_HEAVY)] = True
            self.keys, self.sums, self.labels = self.keys[kept], self.sums[kept], self.labels[kept]


def group(keys: np.ndarray, *, stable: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the order that sorts `keys` [n], where each group of equal keys starts in it).

    For [7, 2, 7]: ([1, 0, 2], [0, 1]). A stable order takes NumPy 4 to 6 times as long.
    """
    order = np.argsort(keys, stable=stable)
    ordered = keys[order]
    return order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(keys)])


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
    """Returns quantile `q` of an RTT histogram in ms; None if it is empty."""
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
        first_time: Earliest time, by split [N_SPLITS]; means nothing where a split is empty.
        last_time: Latest time, like `first_time`.
        rtt: Histogram of the RTTs that are numbers, by family [2, RTT_BINS].
        time: Counts over time; classes are IPv4 answered, IPv4 failed, IPv6 answered, IPv6 failed.
        sources: Sums by source: measurements, failed, total ms, measurements in each split.
        destinations: The same by destination.
        pairs: Measurements by unordered pair of addresses, in each split.
        both_in_train: Measurements outside train of which both addresses occur in train.
        records: How often each record occurs, time and RTT included.
        problems: Counts of what should not be, by name.
    """

    def __init__(self, *, table_capacity: int = 1 << 20, record_capacity: int = 1 << 22):
        self.measurements = np.zeros(N_SPLITS, np.int64)
        self.first_time = np.full(N_SPLITS, np.iinfo(np.int64).max)
        self.last_time = np.full(N_SPLITS, np.iinfo(np.int64).min)
        self.rtt = np.zeros((2, RTT_BINS), np.int64)
        self.time = TimeHistogram(4)
        width = 3 + N_SPLITS
        self.sources = HashTable(width, capacity=table_capacity, label_bytes=16)
        self.destinations = HashTable(width, capacity=table_capacity, label_bytes=16)
        self.pairs = HashTable(N_SPLITS, capacity=table_capacity, dtype=np.int64)
        self.records = HashTable(1, capacity=record_capacity, dtype=np.uint32)
        names = "time backwards jumps rtt_zero rtt_huge rtt_not_finite family self"
        self.problems: dict[str, int] = dict.fromkeys(names.split(), 0)
        self._now = int(time.time())
        self.both_in_train = 0
        self.kinds = np.zeros(len(KINDS), np.int64)
        self._train: np.ndarray | None = None
        self._last: tuple[int, int, int] | None = None  # split, source hash, time

    def add(self, table: MeasurementTable, *, split: int = 0) -> None:
        """Adds measurements of one split, those of train (0) before others; else leave `split`."""
        n = len(table)
        if n == 0:
            return
        times, rtt = table.time, table.rtt
        failed, is_v6 = rtt < 0, table.family == 6
        self.measurements[split] += n
        self.first_time[split] = min(self.first_time[split], times.min())
        self.last_time[split] = max(self.last_time[split], times.max())
        self.time.add(times, is_v6 * 2 + failed)
        self._add_rtts(rtt, failed, is_v6)
        self.kinds += np.bincount(table.column("kind"), minlength=len(KINDS))

        answered_ms = np.where(failed | ~np.isfinite(rtt), 0, rtt).astype(float)
        source, destination = hash_addresses(table.src), hash_addresses(table.dst)
        by_source, by_destination = group(source, stable=True), group(destination)
        for sums_by_address, keys, of_table, (order, starts) in (
            (self.sources, source, table.src, by_source),
            (self.destinations, destination, table.dst, by_destination),
        ):
            sums = np.zeros((len(starts), 3 + N_SPLITS))
            sums[:, 0] = sums[:, 3 + split] = np.diff(starts, append=n)
            sums[:, 1] = np.add.reduceat(failed[order].astype(float), starts)
            sums[:, 2] = np.add.reduceat(answered_ms[order], starts)
            first = order[starts]
            sums_by_address.add(keys[first], sums, addresses.as_bytes(of_table[first]))
        self._add_order(source[by_source[0]], times[by_source[0]], split)
        self._last = (split, int(source[-1]), int(times[-1]))

        if split:
            train = self._train_addresses()
            in_train = np.isin(source, train) & np.isin(destination, train)
            self.both_in_train += int(np.count_nonzero(in_train))

        ends = np.minimum(source, destination), np.maximum(source, destination)
        pair, repeats = np.unique(mix(*ends), return_counts=True)
        in_split = np.zeros((len(pair), N_SPLITS), np.int64)
        in_split[:, split] = repeats
        self.pairs.add(pair, in_split)
        bits = np.ascontiguousarray(rtt).view(np.uint32)
        self.records.add(mix(source, destination, times, bits), np.ones((n, 1), np.uint32))

        self._count("time", (times < EARLIEST_PLAUSIBLE) | (times > self._now))
        src_family, dst_family = addresses.family(table.src), addresses.family(table.dst)
        self._count("family", (src_family != table.family) | (dst_family != table.family))
        self._count("self", source == destination)

    def finish(self) -> None:
        """Brings every table up to date, after the last measurements."""
        for table in (self.sources, self.destinations, self.pairs, self.records):
            table.merge()

    def _train_addresses(self) -> np.ndarray:
        """Returns the hashes of all addresses of train, which is added before other splits."""
        if self._train is None:
            self.finish()
            ends = (self.sources, self.destinations)
            keys = [table.keys[table.sums[:, 3] > 0] for table in ends]
            self._train = np.unique(np.concatenate(keys))
        return self._train

    def _count(self, problem: str, mask: np.ndarray) -> None:
        self.problems[problem] += int(np.count_nonzero(mask))

    def _add_rtts(self, rtt: np.ndarray, failed: np.ndarray, is_v6: np.ndarray) -> None:
        finite = np.isfinite(rtt)
        self._count("rtt_not_finite", ~finite)
        self._count("rtt_zero", rtt == 0)
        self._count("rtt_huge", finite & (rtt > IMPLAUSIBLE_RTT_MS))
        answered = finite & ~failed
        bins = np.abs(rtt[answered]).view(np.uint32) >> RTT_SHIFT
        bins += is_v6[answered] * np.uint32(RTT_BINS)
        self.rtt += np.bincount(bins, minlength=2 * RTT_BINS).reshape(2, RTT_BINS)

    def _add_order(self, source: np.ndarray, time: np.ndarray, split: int) -> None:
        """Counts steps back and leaps in the times of each source, which is sorted stably."""
        same = source[1:] == source[:-1]
        # In floats: a broken time may be anywhere in 64 bits.
        step = np.diff(time.astype(float))[same]
        if self._last is not None and self._last[0] == split:
            first = np.searchsorted(source, np.uint64(self._last[1]))
            if first < len(source) and int(source[first]) == self._last[1]:
                step = np.append(step, float(time[first]) - float(self._last[2]))
        self._count("backwards", step < 0)
        self._count("jumps", np.abs(step) > CLOCK_JUMP_S)
