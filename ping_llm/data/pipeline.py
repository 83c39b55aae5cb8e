"""From probe rows to training batches.

A global batch of B sequences is B lanes. Lane j reads visits j, j + B, j + 2B, ... in chunks. A
chunk is selected, tokenised and packed in one go, by itself, so the place of a lane is one whole
number: which sequence of which chunk comes next. Nothing else is remembered, so a batch depends on
the data, the seed, B, the length and the step, and not on processes, workers or restarts.
"""

import atexit
import dataclasses
import hashlib
import json
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from ping_llm.data import windows
from ping_llm.data.rows import ProbeRows, read_metadata
from ping_llm.data.windows import WindowLaw
from ping_llm.errors import ConfigError, DataError
from ping_llm.hashing import hash_addresses
from ping_llm.packing import Batch, best_fit, next_token_batch, pack

# A bigger chunk leaves less padding: its last sequence is half empty on average, and the others
# find more to fill up with. It also takes memory, 2 bytes a token, and time before the first batch.
CHUNK_SEQUENCES = (128, 1024)  # at least, at most
BUFFERED_TOKENS = 2**25  # over all lanes, between those two
MAX_CHUNK_VISITS = 16384
PREFETCHED_STEPS = 4
EVAL_SEED = 20_130_101
_ORDER = 201  # what the random order of a chunk's sequences is drawn for


def data_fingerprint(data: str | Path) -> str:
    """Returns a name for the content of a data set: `dataset.json`, less what making it cost."""
    metadata = read_metadata(data)
    content = {k: v for k, v in metadata.items() if k not in ("seconds", "peak_rss_bytes")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Windows as tokens, and how they pack.

    Attributes:
        tokens: Tokens of all windows, end to end, uint16.
        offsets: Window w is `tokens[offsets[w]:offsets[w + 1]]`.
        sequences: The windows of each sequence.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    sequences: list[list[int]]

    def segments(self, sequence: int) -> list[np.ndarray]:
        """Returns the tokens of each window of one sequence."""
        offsets = self.offsets
        return [self.tokens[offsets[w] : offsets[w + 1]] for w in self.sequences[sequence]]


def _make_chunk(
    rows: ProbeRows,
    visits: windows.Visits,
    *,
    seed: int,
    length: int,
    order_key: np.ndarray,
    law: WindowLaw,
) -> _Chunk:
    """Returns a chunk with its sequences in the random order that `order_key` [1] names."""
    tokens, offsets = windows.encode_visits(rows, visits, seed=seed, length=length, law=law)
    lengths = np.diff(offsets)
    if lengths.max() > length:
        row = int(visits.row[np.argmax(lengths)])
        raise DataError(f"row {row} is not in time order; prepare the data again")
    sequences = best_fit(lengths, length)  # those of the longest windows come first
    order = np.argsort(windows.draw(order_key, np.arange(len(sequences))), kind="stable")
    return _Chunk(tokens, offsets, [sequences[i] for i in order])


class _Lanes:
    """The sequences of all lanes, as a pure function of lane and position.

    A position is `chunk * MAX_CHUNK_VISITS + sequence`: no chunk makes more sequences than that.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        law: WindowLaw,
    ):
        windows.check_length(seq_len + 1)
        self._rows = ProbeRows(data, "train")
        self._order = windows.VisitOrder(self._rows.n_measurements, seed)
        self._batch_size, self.length, self._seed = batch_size, seq_len + 1, seed
        self._law = law
        if self._order.per_epoch == 0:
            raise DataError(f"{data} has no train rows; prepare it again from more measurements")
        self._chunk_visits = self._choose_chunk_visits()

    def _choose_chunk_visits(self) -> int:
        """Returns how many visits make a chunk of the size wanted, about."""
        sample = self._order[np.arange(min(self._order.per_epoch, 512))]
        _, offsets = windows.encode_visits(
            self._rows, sample, seed=self._seed, length=self.length, law=self._law
        )
        least, most = CHUNK_SEQUENCES
        sequences = BUFFERED_TOKENS // (self._batch_size * self.length)
        tokens = min(max(sequences, least), most) * self.length
        return min(int(tokens * (len(offsets) - 1) / offsets[-1]), MAX_CHUNK_VISITS)

    def chunk(self, lane: int, number: int) -> _Chunk:
        """Returns one chunk of one lane, its sequences in a random order."""
        size = self._chunk_visits
        # First chunks differ in size from lane to lane, so that later ones do not fall due all at
        # the same step.
        first = max(size * (lane + 1) // self._batch_size, -(-size // 8))
        start, stop = (
            (0, first) if number == 0 else (first + (number - 1) * size, first + number * size)
        )
        visits = self._order[np.arange(start, stop) * self._batch_size + lane]
        key = windows.make_keys(
            self._seed, np.array([lane]), np.array([number]), np.array([_ORDER])
        )
        return _make_chunk(
            self._rows,
            visits,
            seed=self._seed,
            length=self.length,
            order_key=key,
            law=self._law,
        )


Element = dict[str, np.ndarray]


class _LaneDataset(grain.IterDataset[Element]):
    """Grain's view of some neighbouring lanes: an element is one sequence of each."""

    def __init__(self, source: dict[str, Any], first_lane: int, positions: list[int]):
        super().__init__()
        self._source, self._first_lane, self._positions = source, first_lane, positions

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps the lanes of worker `sl.start` of `sl.step`; grain calls this in the worker."""
        del sequential_slice
        groups = np.array_split(np.arange(len(self._positions)), sl.step)
        group = groups[sl.start]
        self._first_lane += int(group[0])
        self._positions = [self._positions[i] for i in group]

    def __iter__(self) -> grain.DatasetIterator[Element]:
        return _LaneIterator(_Lanes(**self._source), self._first_lane, self._positions)


class _LaneIterator(grain.DatasetIterator[Element]):
    """Steps some neighbouring lanes forward together."""

    def __init__(self, lanes: _Lanes, first_lane: int, positions: list[int]):
        super().__init__()
        self._lanes, self._first_lane = lanes, first_lane
        self.set_state({"positions": positions})

    def __next__(self) -> Element:
        sequences = [self._next_of(i) for i in range(len(self._positions))]
        tokens, segment_ids, positions = pack(sequences, self._lanes.length)
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "positions": positions,
            "lane_positions": np.array(self._positions, np.int64),
        }

    def _next_of(self, i: int) -> list[np.ndarray]:
        """Returns the segments of lane i's next sequence, and moves it on."""
        number, at = divmod(self._positions[i], MAX_CHUNK_VISITS)
        chunk = self._chunks[i]
        if chunk is None:
            chunk = self._chunks[i] = self._lanes.chunk(self._first_lane + i, number)
        self._positions[i] += 1
        if at + 1 == len(chunk.sequences):
            self._positions[i] = (number + 1) * MAX_CHUNK_VISITS
            self._chunks[i] = None
        return chunk.segments(at)

    def get_state(self) -> dict[str, Any]:
        return {"positions": list(self._positions)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._positions: list[int] = list(state["positions"])
        self._chunks: list[_Chunk | None] = [None] * len(self._positions)


class TrainLoader:
    """An endless iterator of this process's part of each global batch, made in the background.

    Closing it, or leaving its `with` block, ends the thread and worker processes behind it.

    Attributes:
        lanes: The lanes of this process: which sequences of the global batch it makes.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        law: WindowLaw = windows.USUAL,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
    ):
        """Opens the train rows of a data set.

        Args:
            data: A directory of probe rows.
            batch_size: Sequences of a global batch, B; a multiple of `process_count`.
            seq_len: Tokens of an example, T.
            seed: Names the order and the form of everything.
            law: What windows are like.
            process_index: Which process this is.
            process_count: How many processes make a global batch together.
            num_workers: How many further processes make the batches; with 0, a thread of this one
                does. The batches are the same.

        Raises:
            ConfigError: A setting does not fit the others.
            DataError: `data` is not a data set, or has no train rows.
        """
        if batch_size < 1 or batch_size % process_count:
            raise ConfigError(f"{batch_size=} must be a positive multiple of {process_count=}")
        if num_workers < 0:
            raise ConfigError(f"{num_workers=} must be 0 or more")
        settings = {"batch_size": batch_size, "seq_len": seq_len, "seed": seed}
        self._source = {"data": data, **settings, "law": law}
        fingerprint = data_fingerprint(data)
        self._settings = {"data": fingerprint, **settings, **dataclasses.asdict(law)}
        _Lanes(**self._source)  # what is wrong shows here, not in the background
        share = batch_size // process_count
        self.lanes = range(process_index * share, (process_index + 1) * share)
        self._num_workers = min(num_workers, share)
        self._positions = [0] * share
        self._iterator: grain.DatasetIterator[Element] | None = None
        atexit.register(_close_if_alive, weakref.ref(self))  # left open, grain complains at exit

    def _start(self) -> grain.DatasetIterator[Element]:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which nobody here parses
        lanes = _LaneDataset(self._source, self.lanes.start, self._positions)
        if self._num_workers:
            options = grain.MultiprocessingOptions(self._num_workers, PREFETCHED_STEPS)
            return iter(lanes.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_parent))
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(
                lanes, prefetch_buffer_size=PREFETCHED_STEPS
            )
        )

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        iterator = self._iterator = self._iterator or self._start()
        # Workers take turns, in the order of their lanes.
        parts = [next(iterator) for _ in range(max(self._num_workers, 1))]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._positions = whole.pop("lane_positions").tolist()
        return next_token_batch(**whole)

    def get_state(self) -> dict[str, Any]:
        """Returns what `set_state` needs to go on after the last batch taken; fit for JSON.

        It holds the places of this process's lanes; `merge_states` joins those of all processes.
        """
        places = {"first_lane": self.lanes.start, "positions": list(self._positions)}
        return {**self._settings, **places}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, by this process or by any number of others, merged.

        Raises:
            ConfigError: The state is of other data or settings, or lacks some of these lanes.
        """
        for name, value in self._settings.items():
            if state[name] != value:
                raise ConfigError(
                    f"cannot go on from this checkpoint: its {name} was {state[name]!r}, "
                    f"now it is {value!r}"
                )
        start = self.lanes.start - state["first_lane"]
        positions = state["positions"][max(start, 0) : start + len(self.lanes)]
        if start < 0 or len(positions) != len(self.lanes):
            raise ConfigError(
                f"the state holds {len(state['positions'])} lanes from {state['first_lane']}; this "
                f"process needs {len(self.lanes)} from {self.lanes.start}: merge the states"
            )
        self.close()
        self._positions = list(positions)

    def close(self) -> None:
        """Ends the thread or processes behind the batches; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _leave_interrupts_to_parent(worker: int, workers: int) -> None:
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group


def _close_if_alive(loader: weakref.ReferenceType[TrainLoader]) -> None:
    alive = loader()
    if alive is not None:
        alive.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the state of the global batch out of the states of all its processes.

    A loader of any `process_count` accepts it.
    """
    ordered = sorted(states, key=lambda state: state["first_lane"])
    positions = [position for state in ordered for position in state["positions"]]
    return {**ordered[0], "positions": positions}


def eval_batches(
    data: str | Path,
    split: str,
    *,
    batch_size: int,
    seq_len: int,
    count: int,
    hide_unseen: bool = False,
) -> list[Batch]:
    """Returns `count` fixed batches of a split, the same for every run on that data.

    Every row is visited once before any is visited again, so as many probes as can be are covered.
    The result of a measurement stands last, as in a question, however a run was trained. Of data
    split by probe only sources that training has not seen are shown; the others measured to
    destinations of which nothing can be known. A split without rows gives no batches.

    Args:
        data: A directory of probe rows.
        split: Which part of it.
        batch_size: Sequences in a batch.
        seq_len: Tokens in a sequence.
        count: Number of batches.
        hide_unseen: Whether those sources are hidden, as `predict` does for runs that were trained
            on hidden ones.
    """
    windows.check_length(seq_len + 1)
    rows, length = ProbeRows(data, split), seq_len + 1
    shown = rows.n_measurements > 0
    by_probe = rows.metadata.get("split") == "probe"
    if by_probe:
        shown &= ~np.isin(_sources(rows), _sources(ProbeRows(data, "train")))
    hidden = float(by_probe and hide_unseen)
    law = WindowLaw(result_last_fraction=1.0, hidden_source_fraction=hidden)
    with_any = np.flatnonzero(shown)
    if len(with_any) == 0:
        return []
    needed = visits = batch_size * count
    order_key = windows.make_keys(EVAL_SEED, np.array([_ORDER]))
    while True:
        turn, place = np.divmod(np.arange(visits), len(with_any))
        row = with_any[windows.permuted(place, len(with_any), windows.make_keys(EVAL_SEED, turn))]
        wanted = windows.Visits(turn, row, np.zeros_like(row))
        chunk = _make_chunk(
            rows,
            wanted,
            seed=EVAL_SEED,
            length=length,
            order_key=order_key,
            law=law,
        )
        made = len(chunk.sequences)
        if made >= needed:
            break
        visits = max(visits + 1, int(1.05 * visits * needed / made))
    sequences = [chunk.segments(i) for i in range(needed)]
    starts = range(0, needed, batch_size)
    return [next_token_batch(*pack(sequences[i : i + batch_size], length)) for i in starts]


def _sources(rows: ProbeRows) -> np.ndarray:
    """Returns a hash of the source of each row [R], uint64."""
    hashes = [hash_addresses(batch.src_addr) for batch in rows.batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])
