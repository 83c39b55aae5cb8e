"""Windows: which measurements of which probe make one training context, and in what form.

Sampling is vectorised over many windows at once. Every random number is a function of (seed, epoch,
row, k, what it is for), computed by SplitMix64 from a counter, so a window does not depend on what
else is drawn, in which order, or by which process.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm import addresses, tokenizer
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import ConfigError
from ping_llm.hashing import GOLDEN, scramble, uniform
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.packing import ragged

MEASUREMENTS_PER_WINDOW = 30
MAX_WINDOWS = 16

FULL, PARTIAL, NONE = range(3)
FULL_TO_PARTIAL = 4 / 7  # of the windows that show times, the part that shows all of them
UNTIMED_FRACTION = (0.1, 0.9)

# What a random number is for: the scalars of a window, then one stream per purpose.
_SIZE, _OFFSET, _MODE, _FRACTION, _COIN, _RESULT_LAST = range(6)
_SELECT, _SLOT, _FIELDS = range(101, 104)

_PERMUTATIONS = np.array(list(itertools.permutations(range(4))), np.uint8)


def draw(key: np.ndarray, index: np.ndarray | int) -> np.ndarray:
    """Returns random bits `index` of the stream `key`, uint64: output `index` of SplitMix64."""
    index = np.atleast_1d(np.asarray(index, np.uint64))  # arrays wrap around without a warning
    return scramble(key + (index + np.uint64(1)) * GOLDEN)


def _uniform(key: np.ndarray, index: np.ndarray | int) -> np.ndarray:
    """Returns random number `index` of the stream `key`, uniform on [0, 1)."""
    return uniform(draw(key, index))


def make_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """Returns one uint64 key for each element of the integer arrays `parts`, all [n] alike."""
    key = np.full(np.shape(parts[0]), seed % 2**64, np.uint64)
    for part in parts:
        key = draw(scramble(key), part)
    return key


def permuted(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Returns where `index` [n] in 0..size - 1 goes under the permutation that `key` [n] names.

    A Feistel network over the next power of four, walked until it lands below `size`: nothing of
    the permutation is stored, however large `size` is.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = np.array(index, np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        value, keys = out[todo], key[todo]
        for round_ in range(6):
            left, right = value >> half, value & low
            value = right << half | (left ^ (draw(draw(keys, round_), right) & low))
        out[todo] = value
        todo = todo[value >= size]
    return out.astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """What windows are like, where a run may choose.

    Attributes:
        result_last_fraction: Part of the windows in which the fields stand as in a question,
            source, destination, time, result; in the others, in an order of their own each.
        untimed_fraction: Part of the windows that show no time. Of the others, four in seven show
            all times, the rest some.
    """

    result_last_fraction: float = 0.0
    untimed_fraction: float = 0.3

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} must be between 0 and 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "WindowConfig":
        """Returns the config among the settings of a run."""
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls)})


DEFAULTS = WindowConfig()


@dataclasses.dataclass(frozen=True)
class Windows:
    """Some windows, one (row, k) of one epoch each.

    Attributes:
        epoch: Which epoch [n], int64.
        row: Which probe row [n], int64.
        k: Which window of that row in that epoch [n], int64.
    """

    epoch: np.ndarray
    row: np.ndarray
    k: np.ndarray


def windows_per_row(n_measurements: np.ndarray) -> np.ndarray:
    """Returns how many windows an epoch draws of rows of that many measurements."""
    return np.minimum(-(-n_measurements // MEASUREMENTS_PER_WINDOW), MAX_WINDOWS)


class WindowOrder:
    """The endless sequence of windows: each (row, k) once an epoch, in an order of the epoch's own.

    Attributes:
        per_epoch: Windows in one epoch.
    """

    def __init__(self, n_measurements: np.ndarray, seed: int):
        per_row = windows_per_row(n_measurements)
        self._ends = np.cumsum(per_row)
        self._seed = seed
        self.per_epoch = int(per_row.sum())

    def __getitem__(self, index: np.ndarray) -> Windows:
        """Returns the windows at `index` [n], counted from the start of epoch 0."""
        epoch, position = np.divmod(index, self.per_epoch)
        number = permuted(position, self.per_epoch, make_keys(self._seed, epoch))
        row = np.searchsorted(self._ends, number, side="right")
        before = np.where(row > 0, self._ends[row - 1], 0)
        return Windows(epoch, row, number - before)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What windows show: a segment of measurements each, w of them, n measurements in all.

    Attributes:
        segment_offsets: Window i shows measurements `[i]:[i + 1]` of the rest [w + 1], int64.
        index: Which measurement of the window's row [n], int64.
        has_time: Whether its time is shown [n], bool.
        field_order: The order of its fields, for `tokenizer.encode` [n, 4], uint8.
    """

    segment_offsets: np.ndarray
    index: np.ndarray
    has_time: np.ndarray
    field_order: np.ndarray


def check_length(length: int) -> None:
    """Checks that sequences of `length` tokens hold any one measurement.

    Raises:
        ConfigError: They do not.
    """
    if length < tokenizer.MAX_MEASUREMENT_TOKENS:
        raise ConfigError(
            f"seq_len={length - 1} is too short for one measurement; "
            f"set it to {tokenizer.MAX_MEASUREMENT_TOKENS - 1} or more"
        )


def _untimed(m: np.ndarray, mode: np.ndarray, fraction: np.ndarray, coin: np.ndarray) -> np.ndarray:
    """Returns how many of the `m` measurements of each window lose their time, int64."""
    some = np.clip(np.rint(fraction * m).astype(np.int64), 1, np.maximum(m - 1, 1))
    partial = np.where(m > 1, some, coin)
    return np.where(mode == FULL, 0, np.where(mode == NONE, m, partial))


def largest_count(
    family: np.ndarray, mode: np.ndarray, fraction: np.ndarray, coin: np.ndarray, length: int
) -> np.ndarray:
    """Returns the most measurements [w] that fit `length` tokens whatever their values are."""
    base, source = (
        np.where(family == 6, tokens[6], tokens[4])
        for tokens in (tokenizer.BARE_TOKENS, tokenizer.SOURCE_TOKENS)
    )
    room = length - source  # the source is named once
    first, later = tokenizer.FIRST_TIME_TOKENS, tokenizer.NEXT_TIME_TOKENS
    timed_share = np.where(mode == FULL, 1.0, np.where(mode == NONE, 0.0, 1 - fraction))
    # Without rounding of the timed count this would be it; rounding moves it by less than 2.
    count = ((room + later - first) / (base + later * timed_share)).astype(np.int64) + 2
    for _ in range(4):
        timed = count - _untimed(count, mode, fraction, coin)
        tokens = count * base + np.where(timed > 0, first + later * (timed - 1), 0)
        count -= tokens > room
    return np.maximum(count, 1)


def _shuffled(counts: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns 0..count - 1 of each segment in uniformly random order, segments end to end."""
    segment, index = ragged(counts)
    # One sort of plain integers: segment, then random bits, then the index, which makes all differ.
    segment_bits = np.uint64(len(counts).bit_length())
    index_bits = int(counts.max(initial=0)).bit_length()
    low = np.uint64((1 << index_bits) - 1)
    packed = draw(key[segment], index) >> segment_bits & ~low
    packed |= segment.astype(np.uint64) << (np.uint64(64) - segment_bits) | index.astype(np.uint64)
    packed.sort()
    return (packed & low).astype(np.int64)


# Example: one window wants count 2 of size 5. It draws 2 * 2 numbers, [3, 3, 0, 4]. As pairs of
# value and index they sort to (0, 2), (3, 0), (3, 1), (4, 3). The first of each run of one value is
# its first draw, at indices 2, 0 and 3, so there are 3 distinct numbers: in the order drawn
# [3, 0, 4], of which the first 2 are the result, [3, 0]. If all had been 3, it would draw 8.
def _first_distinct(size: np.ndarray, count: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns the first `count` distinct numbers of each window's stream on 0..size - 1.

    Which is a uniform sample without replacement, in random order, at no cost in `size`.
    """
    draws = 2 * count
    while True:
        window, index = ragged(draws)
        value = (_uniform(key[window], index) * size[window]).astype(np.int64)
        # Sorted by (window, value, index), each value's first draw comes first in its run.
        index_bits = int(draws.max(initial=0)).bit_length()
        value_bits = int(size.max(initial=0)).bit_length()
        packed = (window << value_bits | value) << index_bits | index
        packed.sort()
        runs = packed >> index_bits
        firsts = packed[np.flatnonzero(np.diff(runs, prepend=-1))]
        owner = firsts >> (index_bits + value_bits)
        distinct = np.bincount(owner, minlength=len(size))
        if np.all(distinct >= count):
            break
        draws *= 2
    is_first = np.zeros(len(value), bool)
    is_first[(np.cumsum(draws) - draws)[owner] + (firsts & ((1 << index_bits) - 1))] = True
    owner, rank = ragged(distinct)
    return value[is_first][rank < count[owner]]


def _sample(size: np.ndarray, count: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns `count` of 0..size - 1 for each window, a uniform subset in random order."""
    dense = size <= 4 * count
    out = np.empty(count.sum(), np.int64)
    from_dense = np.repeat(dense, count)
    _, rank = ragged(size[dense])
    taken = rank < np.repeat(count[dense], size[dense])
    out[from_dense] = _shuffled(size[dense], key[dense])[taken]
    out[~from_dense] = _first_distinct(size[~dense], count[~dense], key[~dense])
    return out


# Example: one window of a row of 6 measurements. It spans 4 of them from offset 1 on: 1, 2, 3, 4.
# Of these 3 fit the sequence, so count is 3, and 1 of them is to lose its time. `chosen`, a sample
# of 0..3, is [2, 0, 3], and `slot`, a shuffle of 0..2, is [1, 0, 2]. The first one, 2, takes slot 1
# without its time. The others keep theirs; sorted, [0, 3] take slots [0, 2]. So the window shows
# measurements index = [1, 3, 4] of its row, with has_time = [True, False, True].
def select(
    keys: np.ndarray,
    n_measurements: np.ndarray,
    family: np.ndarray,
    length: int,
    config: WindowConfig = DEFAULTS,
) -> Selection:
    """Returns what windows show of their rows, such that each fits a sequence of `length` tokens.

    Args:
        keys: `make_keys(seed, epoch, row, k)` of each window [w].
        n_measurements: Measurements in the window's row [w].
        family: The row's family, 4 or 6 [w].
        length: Tokens of an empty sequence, at least `MAX_MEASUREMENT_TOKENS`.
        config: What windows are like.
    """
    n = n_measurements
    span = np.exp(_uniform(keys, _SIZE) * np.log(n + 1)).astype(np.int64)
    span = np.minimum(span, n)  # n + 1 only by rounding
    offset = (_uniform(keys, _OFFSET) * (n - span + 1)).astype(np.int64)
    toss = _uniform(keys, _MODE)
    timed_share = 1 - config.untimed_fraction
    some = np.where(toss < timed_share * FULL_TO_PARTIAL, FULL, PARTIAL)
    mode = np.where(toss < timed_share, some, NONE)
    low, high = UNTIMED_FRACTION
    fraction = low + (high - low) * _uniform(keys, _FRACTION)
    coin = (_uniform(keys, _COIN) < 0.5).astype(np.int64)

    count = np.minimum(span, largest_count(family, mode, fraction, coin, length))
    untimed = _untimed(count, mode, fraction, coin)
    window, rank = ragged(count)
    # The first `untimed` of those chosen, a uniform subset in random order, lose their time and
    # take the first `untimed` of the shuffled slots. The rest fill the others in time order.
    chosen = _sample(span, count, draw(keys, _SELECT))
    slot = _shuffled(count, draw(keys, _SLOT))
    timed = rank >= untimed[window]
    owner = window[timed]
    for numbers in (chosen, slot):
        base = owner * (int(numbers.max(initial=0)) + 1)
        numbers[timed] = np.sort(base + numbers[timed]) - base
    segment_offsets = np.concatenate([[0], np.cumsum(count)])
    position = segment_offsets[window] + slot
    index, has_time = np.empty_like(chosen), np.empty(len(window), bool)
    index[position] = offset[window] + chosen
    has_time[position] = timed
    bits = draw(draw(keys, _FIELDS)[window], rank)
    order = _PERMUTATIONS[(bits >> np.uint64(32)) * np.uint64(24) >> np.uint64(32)]
    result_last = _uniform(keys, _RESULT_LAST) < config.result_last_fraction
    order[result_last[window]] = np.arange(4, dtype=np.uint8)
    return Selection(segment_offsets, index, has_time, order)


def gather(rows: ProbeRows, row: np.ndarray, selection: Selection) -> MeasurementTable:
    """Returns the selected measurements of rows `row` [w], read from the files."""
    offsets = selection.segment_offsets
    counts, n = np.diff(offsets), len(selection.index)
    time, rtt = np.empty(n, np.int64), np.empty(n, np.float32)
    dst, src = np.empty(n, addresses.ADDRESS), np.empty(len(row), addresses.ADDRESS)
    batches = [rows.batches[b] for b in rows.batch_index[row].tolist()]
    starts = np.empty(len(row), np.int64)
    for i, (batch, r) in enumerate(zip(batches, rows.row_in_batch[row].tolist(), strict=True)):
        starts[i], src[i] = batch.offsets[r], batch.src[r]
    index = np.repeat(starts, counts) + selection.index
    bounds = offsets.tolist()
    for batch, start, stop in zip(batches, bounds, bounds[1:], strict=False):
        shown = index[start:stop]
        time[start:stop] = batch.time[shown]
        dst[start:stop] = batch.dst[shown]
        rtt[start:stop] = batch.rtt[shown]
    return MeasurementTable(
        time=np.where(selection.has_time, time, NO_TIME),
        src=np.repeat(src, counts),
        dst=dst,
        family=np.repeat(rows.family[row], counts),
        rtt=rtt,
    )


def encode_windows(
    rows: ProbeRows, chosen: Windows, *, seed: int, length: int, config: WindowConfig = DEFAULTS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, token_offsets): one segment of at most `length` tokens a window.

    Args:
        rows: The rows they are of.
        chosen: Which windows.
        seed: Of what they draw.
        length: As for `select`, like the next.
        config: What windows are like.

    Raises:
        DataError: A row is not in time order or has an RTT without a code.
    """
    keys = make_keys(seed, chosen.epoch, chosen.row, chosen.k)
    counts, families = rows.n_measurements[chosen.row], rows.family[chosen.row]
    selection = select(keys, counts, families, length, config)
    measurements = gather(rows, chosen.row, selection)
    return tokenizer.encode(
        measurements, segment_offsets=selection.segment_offsets, field_order=selection.field_order
    )
