"""Which tokens of a store are trained on, which are held out, and the order in which they come."""

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ping_llm.activations.reader import ActivationReader
from ping_llm.activations.roles import REAL
from ping_llm.errors import ConfigError

HELD_OUT_AT_MOST = 0.1  # of the prompts
_HOLDING_OUT = 1 << 63  # a key that no epoch has


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Which tokens of a store an autoencoder is about.

    Attributes:
        seed: Decides which prompts are held out.
        held_out_tokens: How many tokens these have, about.
        min_position: The first position in a prompt that is chosen.
        special_tokens: Whether special tokens are chosen.
    """

    seed: int
    held_out_tokens: int
    min_position: int
    special_tokens: bool

    def chosen(self, reader: ActivationReader, rows: slice) -> np.ndarray:
        """Returns whether each of `rows` is chosen, held out or not [n]."""
        chosen = np.ones(len(range(*rows.indices(len(reader)))), bool)
        if not self.special_tokens:
            chosen &= reader.column("roles", rows) == REAL
        if self.min_position:
            chosen &= reader.column("positions", rows) >= self.min_position
        return chosen

    def held_out(self, reader: ActivationReader) -> np.ndarray:
        """Returns (first row, row after the last) of each held-out prompt [n, 2], in their order.

        Raises:
            ConfigError: The store has one prompt only.
        """
        offsets = reader.sample_offsets()
        spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
        spans = spans[spans[:, 1] > spans[:, 0]]
        most = max(int(len(spans) * HELD_OUT_AT_MOST), 1)
        if len(spans) < 2:
            raise ConfigError("the store has one prompt only; there is none to hold out")
        rng = np.random.Generator(np.random.Philox(key=[self.seed, _HOLDING_OUT]))
        order = rng.permutation(len(spans))[:most]
        sizes = np.diff(spans[order], axis=1)[:, 0]
        enough = int(np.searchsorted(np.cumsum(sizes), self.held_out_tokens)) + 1
        return spans[np.sort(order[:enough])]


class TokenStream:
    """Endless shuffled batches of tokens; each is a pure function of the seed and its number.

    In each epoch the chunks of the store come in a random order, as many at once as fit a buffer,
    whose tokens are shuffled. What fills no batch at the end of an epoch is left out.

    Attributes:
        tokens: How many tokens there are.
        per_epoch: How many batches of them.
    """

    def __init__(
        self,
        readers: Sequence[ActivationReader],
        choice: TokenChoice,
        *,
        batch_size: int,
        buffer_mb: float,
    ):
        """Finds the tokens to train on.

        Args:
            readers: Readers of one store, one for each layer.
            choice: Which tokens.
            batch_size: Tokens of a batch.
            buffer_mb: Size of the buffer, over all layers.

        Raises:
            ConfigError: There are fewer tokens than a batch takes.
        """
        self._readers, self._seed, self._batch_size = readers, choice.seed, batch_size
        self._chunks = readers[0].chunks()
        held = choice.held_out(readers[0])
        self._masks = []
        for first, stop in self._chunks.tolist():
            mask = choice.chosen(readers[0], slice(first, stop))
            # One prompt may reach over several chunks, and a chunk hold several.
            touching = held[(held[:, 0] < stop) & (held[:, 1] > first)]
            for begin, end in touching.tolist():
                mask[max(begin - first, 0) : end - first] = False
            self._masks.append(np.packbits(mask))
        counts = [int(np.bitwise_count(mask).sum()) for mask in self._masks]
        self._counts = np.array(counts, np.int64)
        self.tokens = int(self._counts.sum())
        self.per_epoch = self.tokens // batch_size
        if not self.per_epoch:
            raise ConfigError(
                f"{batch_size=} is more than the {self.tokens} tokens there are to train on, "
                "without special, first and held-out ones; choose a smaller one"
            )
        row_bytes = sum(reader.shape[1] * reader.dtype.itemsize for reader in readers)
        longest = int(np.max(self._chunks[:, 1] - self._chunks[:, 0]))
        self._at_once = max(int(buffer_mb * 1e6 / (row_bytes * longest)), 1)

    def batches(self, first: int = 0) -> Generator[list[np.ndarray], None, None]:
        """Yields batches from number `first` on: of each reader its rows [batch_size, D]."""
        size, left = self._batch_size, None
        with ThreadPoolExecutor(1) as pool:  # reads ahead
            parts = self._parts(first)
            ahead = pool.submit(self._load, *next(parts))
            while True:
                epoch_ends, rows = ahead.result()
                ahead = pool.submit(self._load, *next(parts))
                if left is not None:
                    rows = [np.concatenate(pair) for pair in zip(left, rows, strict=True)]
                full = len(rows[0]) // size * size
                for start in range(0, full, size):
                    yield [each[start : start + size] for each in rows]
                left = None if epoch_ends else [each[full:] for each in rows]

    def _parts(self, first: int) -> Iterator[tuple[int, int, np.ndarray, int, bool]]:
        """Yields what to load: (epoch, number, chunks, rows to skip, whether the epoch ends)."""
        first_epoch, number = divmod(first, self.per_epoch)
        skip = number * self._batch_size
        for epoch in itertools.count(first_epoch):
            order = self._rng(epoch).permutation(len(self._chunks))
            groups = [order[i : i + self._at_once] for i in range(0, len(order), self._at_once)]
            for number, chunks in enumerate(groups):
                rows = int(self._counts[chunks].sum())
                if skip >= rows:
                    skip -= rows
                    continue
                yield epoch, number, chunks, skip, number + 1 == len(groups)
                skip = 0
            skip = 0

    def _load(
        self, epoch: int, number: int, chunks: np.ndarray, skip: int, epoch_ends: bool
    ) -> tuple[bool, list[np.ndarray]]:
        rng = self._rng(epoch, number + 1)
        order = rng.permutation(int(self._counts[chunks].sum()))[skip:]
        loaded = []
        for reader in self._readers:
            parts = []
            for chunk in chunks.tolist():
                first, stop = self._chunks[chunk].tolist()
                mask = np.unpackbits(self._masks[chunk], count=stop - first).astype(bool)
                parts.append(reader[first:stop][mask])
            loaded.append(np.concatenate(parts)[order])
        return epoch_ends, loaded

    def _rng(self, epoch: int, number: int = 0) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(key=[self._seed, epoch], counter=[0, 0, 0, number])
        )
