"""From probe rows to training batches.

A global batch of B sequences comes from B streams, one each; some of them give grids, the others
windows. Of W streams of windows, stream j reads windows j, j + W, j + 2W, ... in chunks. A chunk is
selected, tokenised and packed in one go, by itself, so the position of a stream is one whole
number: which sequence of which chunk comes next. Nothing else is remembered, so a batch depends on
the data, the seed, B, the length and the step, and not on processes or restarts.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ping_llm.data import windows
from ping_llm.data.grid_streams import GridChunks, Segments, check_length, eval_sequences
from ping_llm.data.rows import ProbeRows, data_fingerprint
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError, DataError
from ping_llm.hashing import hash_addresses
from ping_llm.packing import Batch, best_fit, next_token_batch, pack

# A bigger chunk leaves less padding: its last sequence is half empty on average, and the others
# find more to fill up with. It also takes memory, 2 bytes a token, and time before the first batch.
CHUNK_SEQUENCES = (128, 1024)  # at least, at most
BUFFERED_TOKENS = 2**25  # over all streams, between those two
MAX_CHUNK_WINDOWS = 16384
PREFETCHED_STEPS = 4
EVAL_SEED = 20_130_101
_ORDER = 201  # what the random order of a chunk's sequences is drawn for


@dataclasses.dataclass(frozen=True)
class _PackedWindows:
    """Windows as tokens, and how they pack.

    Attributes:
        tokens: Tokens of all windows, end to end, uint16.
        offsets: Window w is `tokens[offsets[w]:offsets[w + 1]]`.
        sequences: The windows of each sequence.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    sequences: list[list[int]]

    def __len__(self) -> int:
        return len(self.sequences)

    def segments(self, sequence: int) -> Segments:
        """Returns the tokens of each window of one sequence, all of which count alike."""
        offsets = self.offsets
        return [self.tokens[offsets[w] : offsets[w + 1]] for w in self.sequences[sequence]], None


@dataclasses.dataclass(frozen=True)
class _Packer:
    """Makes windows of `rows` into sequences of `length` tokens."""

    rows: ProbeRows
    length: int
    seed: int
    config: WindowConfig

    def encode(self, chosen: windows.Windows) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `windows.encode_windows` does."""
        return windows.encode_windows(
            self.rows, chosen, seed=self.seed, length=self.length, config=self.config
        )

    def pack(self, chosen: windows.Windows, *chunk: int) -> _PackedWindows:
        """Returns windows packed, the sequences in the random order that the numbers name."""
        tokens, offsets = self.encode(chosen)
        lengths = np.diff(offsets)
        if lengths.max() > self.length:
            row = int(chosen.row[np.argmax(lengths)])
            raise DataError(f"row {row} is not in time order; prepare the data again")
        sequences = best_fit(lengths, self.length)  # those of the longest windows come first
        key = windows.make_keys(self.seed, *np.array([*chunk, _ORDER])[:, None])
        order = np.argsort(windows.draw(key, np.arange(len(sequences))), kind="stable")
        return _PackedWindows(tokens, offsets, [sequences[i] for i in order])


class _Chunk(Protocol):
    """Some sequences of one stream."""

    def __len__(self) -> int: ...

    def segments(self, sequence: int) -> Segments:
        """Returns one sequence."""
        ...


class _Streams:
    """The sequences of all streams, as a pure function of stream and position.

    A position is `chunk * MAX_CHUNK_WINDOWS + sequence`: no chunk makes more sequences than that.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        config: WindowConfig,
        grid_fraction: float,
        simulated_fraction: float,
        workers: int,
        lanes: range,
    ):
        windows.check_length(seq_len + 1)
        rows = ProbeRows(data, "train")
        if len(rows) == 0:
            raise DataError(f"{data} has no train rows; prepare it again from more measurements")
        self._packer, self.length = _Packer(rows, seq_len + 1, seed, config), seq_len + 1
        self._order = windows.WindowOrder(rows.n_measurements, seed)
        self._grid_streams = round(grid_fraction * batch_size)  # the first ones
        self._window_streams = batch_size - self._grid_streams
        if self._grid_streams:
            check_length(self.length)
            own = lanes[: max(self._grid_streams - lanes.start, 0)]
            self._grids = GridChunks(
                data,
                own,
                workers,
                streams=self._grid_streams,
                length=self.length,
                seed=seed,
                simulated_fraction=simulated_fraction,
            )
        if self._window_streams:
            self._chunk_windows = self._choose_chunk_windows()

    def _choose_chunk_windows(self) -> int:
        """Returns how many windows make a chunk of the size wanted, about."""
        _, offsets = self._packer.encode(self._order[np.arange(min(self._order.per_epoch, 512))])
        least, most = CHUNK_SEQUENCES
        sequences = BUFFERED_TOKENS // (self._window_streams * self.length)
        tokens = min(max(sequences, least), most) * self.length
        return min(int(tokens * (len(offsets) - 1) / offsets[-1]), MAX_CHUNK_WINDOWS)

    def close(self) -> None:
        """Ends the processes that make grids."""
        if self._grid_streams:
            self._grids.__exit__()

    def chunk(self, stream: int, number: int) -> _Chunk:
        """Returns one chunk of one stream, its sequences in a random order."""
        if stream < self._grid_streams:
            return self._grids.chunk(stream, number)
        stream, size = stream - self._grid_streams, self._chunk_windows
        # First chunks differ in size from stream to stream, so that later ones do not fall due all
        # at the same step.
        first = max(size * (stream + 1) // self._window_streams, -(-size // 8))
        stop = first + number * size
        numbers = np.arange(stop - size if number else 0, stop)
        return self._packer.pack(
            self._order[numbers * self._window_streams + stream], stream, number
        )


class _Reader:
    """Steps some streams forward together, from the positions given."""

    def __init__(self, streams: _Streams, numbers: range, positions: Sequence[int]):
        self._streams, self._numbers, self._positions = streams, numbers, list(positions)
        self._chunks: list[_Chunk | None] = [None] * len(numbers)

    def read(self) -> tuple[Batch, list[int]]:
        """Returns (a batch of the next sequence of each stream, the positions after it)."""
        read = [self._next_of(i) for i in range(len(self._numbers))]
        return _batch(read, self._streams.length), list(self._positions)

    def _next_of(self, i: int) -> Segments:
        """Returns the segments of the next sequence of stream i, and moves it on."""
        number, sequence = divmod(self._positions[i], MAX_CHUNK_WINDOWS)
        chunk = self._chunks[i]
        if chunk is None:
            chunk = self._chunks[i] = self._streams.chunk(self._numbers[i], number)
        self._positions[i] += 1
        if sequence + 1 == len(chunk):
            self._positions[i] = (number + 1) * MAX_CHUNK_WINDOWS
            self._chunks[i] = None
        return chunk.segments(sequence)


def _batch(sequences: Sequence[Segments], length: int) -> Batch:
    """Returns the batch of some sequences of segments."""
    packed = pack([tokens for tokens, _ in sequences], length)
    if all(weights is None for _, weights in sequences):
        return next_token_batch(*packed)
    weights = [
        [np.ones(len(each), np.float32) for each in tokens] if weights is None else weights
        for tokens, weights in sequences
    ]
    return next_token_batch(*packed, list(itertools.chain(*weights)))


class TrainLoader(contextlib.AbstractContextManager):
    """An endless iterator of this process's part of each global batch, made in the background.

    Closing it, or leaving its `with` block, ends the thread that makes them.

    Attributes:
        streams: Which sequences of the global batch this process makes.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        window_config: WindowConfig = windows.DEFAULTS,
        grid_fraction: float = 0.0,
        simulated_fraction: float = 0.0,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the train rows of a data set.

        Args:
            data: A directory of probe rows.
            batch_size: Sequences of a global batch, B; a multiple of `process_count`.
            seq_len: Tokens of an example, T.
            seed: Names the order and the form of all windows.
            window_config: What windows are like.
            grid_fraction: Part of the sequences that hold grids, rounded to whole ones.
            simulated_fraction: Part of the worlds of grids that are simulated.
            workers: Processes that make grids, beside this one; 0: this one does.
            process_index: Which process this is.
            process_count: How many processes make a global batch together.

        Raises:
            ConfigError: A setting does not fit the others.
            DataError: `data` is not a data set, or has no train rows.
        """
        if batch_size < 1 or batch_size % process_count:
            raise ConfigError(f"{batch_size=} must be a positive multiple of {process_count=}")
        settings = {"batch_size": batch_size, "seq_len": seq_len, "seed": seed}
        of_grids: dict[str, Any] = {
            "grid_fraction": grid_fraction,
            "simulated_fraction": simulated_fraction,
        }
        share = batch_size // process_count
        self.streams = range(process_index * share, (process_index + 1) * share)
        self._source = _Streams(
            data,
            config=window_config,
            workers=workers,
            lanes=self.streams,
            **settings,
            **of_grids,
        )
        windows_like = dataclasses.asdict(window_config)
        self._settings = {"data": data_fingerprint(data), **settings, **windows_like, **of_grids}
        self._positions = [0] * share
        self._reader: _Reader | None = None
        self._ahead: collections.deque[Future[tuple[Batch, list[int]]]] = collections.deque()

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = _Reader(self._source, self.streams, self._positions)
            self._thread = ThreadPoolExecutor(1)
        while len(self._ahead) <= PREFETCHED_STEPS:
            self._ahead.append(self._thread.submit(self._reader.read))
        batch, self._positions = self._ahead.popleft().result()
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns what `set_state` needs to go on after the last batch taken; fit for JSON.

        It holds the positions of this process's streams; `merge_states` joins those of all.
        """
        positions = list(self._positions)
        return {**self._settings, "first_lane": self.streams.start, "positions": positions}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, by this process or by any number of others, merged.

        Raises:
            ConfigError: The state is of other data or settings, or lacks some of these streams.
        """
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise ConfigError(
                    f"cannot go on from this checkpoint: its {name} was {state.get(name)!r}, "
                    f"now it is {value!r}"
                )
        start = self.streams.start - state["first_lane"]
        positions = state["positions"][max(start, 0) : start + len(self.streams)]
        if start < 0 or len(positions) != len(self.streams):
            raise ConfigError(
                f"the state holds {len(state['positions'])} streams from {state['first_lane']}; "
                f"this process needs {len(self.streams)} from {self.streams.start}: merge the "
                "states"
            )
        self.close()
        self._positions = list(positions)

    def close(self) -> None:
        """Ends the thread that makes the batches; the next batch starts another."""
        if self._reader is not None:
            self._thread.shutdown(cancel_futures=True)
            self._ahead.clear()
            self._reader = None

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._source.close()


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
    grid_fraction: float = 0.0,
) -> list[Batch]:
    """Returns `count` fixed batches of a split, the same for every run on that data.

    Every row is drawn from once before any is again, so as many probes as can be are covered.
    The result of a measurement stands last, as in a question, however a run was trained. Of data
    split by probe only sources that training has not seen are shown; the others measured to
    destinations of which nothing can be known. A split without rows gives no batches.

    Args:
        data: A directory of probe rows.
        split: Which part of it.
        batch_size: Sequences in a batch.
        seq_len: Tokens in a sequence.
        count: Number of batches.
        grid_fraction: Part of the sequences that hold grids about measurements of the split.
    """
    windows.check_length(seq_len + 1)
    rows = ProbeRows(data, split)
    shown = rows.n_measurements > 0
    by_probe = rows.metadata.get("split") == "probe"
    if by_probe:
        shown &= ~np.isin(_sources(rows), _sources(ProbeRows(data, "train")))
    config = WindowConfig(result_last_fraction=1.0)
    with_any = np.flatnonzero(shown)
    if len(with_any) == 0:
        return []
    packer = _Packer(rows, seq_len + 1, EVAL_SEED, config)
    of_grids = round(grid_fraction * batch_size) * count
    made, needed = 0, batch_size * count - of_grids
    tried = needed
    while made < needed:
        turn, index = np.divmod(np.arange(tried), len(with_any))
        row = with_any[windows.permuted(index, len(with_any), windows.make_keys(EVAL_SEED, turn))]
        chunk = packer.pack(windows.Windows(turn, row, np.zeros_like(row)))
        made = len(chunk)
        tried = max(tried + 1, int(1.05 * tried * needed / made))
    sequences = [chunk.segments(i) for i in range(needed)] if needed else []
    sequences += eval_sequences(rows, data, length=seq_len + 1, count=of_grids)
    return [_batch(sequences[i::count], seq_len + 1) for i in range(count)]


def _sources(rows: ProbeRows) -> np.ndarray:
    """Returns a hash of the source of each row [R], uint64."""
    hashes = [hash_addresses(batch.src) for batch in rows.batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])
