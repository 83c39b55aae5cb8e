"""Reading a store: rows by number, and shuffled streams."""

import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from ping_llm.activations import store
from ping_llm.activations.arrays import open_array, store_result
from ping_llm.activations.roles import REAL
from ping_llm.errors import ConfigError, StorageError
from ping_llm.models.config import END_SITES
from ping_llm.storage import KeyValueStore, Location

if TYPE_CHECKING:
    from ping_llm.activations.torch_dataset import ActivationDataset

KINDS = ("numpy", "jax", "torch")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a store says of some rows beside their activations.

    Attributes:
        tokens: Token ids [n], int32.
        positions: Positions in their prompts [n], int32.
        roles: 0 real, 1 special, 2 BOS [n], uint8.
        samples: Id of the sample of each row [n].
    """

    tokens: np.ndarray
    positions: np.ndarray
    roles: np.ndarray
    samples: list[str]


class ActivationReader:
    """The activations of one site and layer, as if they were one array [tokens, width].

    Attributes:
        manifest: What the store says of itself.
        shape: (tokens, width of the site).
        dtype: Of the stored activations.
    """

    def __init__(
        self,
        url: str | Path | Location,
        *,
        site: str = "residual",
        layer: int | None = None,
        partial: bool = False,
    ):
        """Opens a store.

        Args:
            url: Path or URL of the store.
            site: Such as `residual`.
            layer: Which layer; None for `embed` and `final_norm`.
            partial: Whether a store that is not finished is read as far as it goes.

        Raises:
            StorageError: There is no store, it is damaged, or not finished.
            ConfigError: It does not hold that site and layer.
        """
        self._opened = functools.partial(
            ActivationReader, url, site=site, layer=layer, partial=partial
        )
        self._process = os.getpid()
        self._kv = KeyValueStore(url)
        self.manifest = store.open_manifest(self._kv)
        self._name = store.array_name(site, None if site in END_SITES else layer)
        held = {entry["name"]: entry for entry in self.manifest["arrays"]}
        if self._name not in held:
            raise ConfigError(f"{url} does not hold {site=}, {layer=}; it has {', '.join(held)}")
        units = len(self.manifest["units"])
        done = store.read_all_done(self._kv, units)
        if len(done) < units and not partial:
            raise StorageError(
                f"{url} has {len(done)} of its {units} units; finish it with "
                "`ping-llm extract-activations`, or pass partial=True"
            )
        self._done = [done[unit] for unit in sorted(done)]
        self._starts = np.cumsum([0, *(entry["tokens"] for entry in self._done)])
        self._arrays: dict[tuple[int, str], ts.TensorStore] = {}
        width = held[self._name].get("width", self.manifest["d_model"])  # unsaid in older stores
        self.shape = int(self._starts[-1]), int(width)
        self.dtype = np.dtype(ts.dtype(self.manifest["settings"]["dtype"]).numpy_dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:  # opened anew in the process that it is sent to
        return self._opened, ()

    def __getitems__(self, index: list[int]) -> list[Any]:
        """Returns rows as tensors: what a torch `DataLoader` over this reader asks for."""
        return [*_as("torch", self[index])]

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns rows as NumPy would: one [D], or those of a slice, numbers or a mask [n, D].

        Raises:
            IndexError: A number is out of range, a mask has another length, or the index is
                anything else: columns, floats, several dimensions.
        """
        one = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        rows = self._gather(self._name, self._numbers(np.array([index]) if one else index))
        return rows[0] if one else rows

    def rows(self, index: slice | Sequence[int] | np.ndarray) -> Rows:
        """Returns what the store says of rows beside their activations.

        Raises:
            IndexError: As for the rows themselves.
        """
        numbers = self._numbers(index)
        parts = [self._gather(name, numbers) for name in ("tokens", "positions", "roles")]
        samples = np.empty(len(numbers), object)
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        for unit in np.unique(which).tolist():
            chosen = which == unit
            samples[chosen] = self._samples(unit, numbers[chosen] - self._starts[unit])
        return Rows(*parts, samples=samples.tolist())

    def column(self, name: str, index: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the `tokens`, `positions` or `roles` of rows [n], without their samples.

        Raises:
            IndexError: As for the rows themselves.
        """
        return self._gather(name, self._numbers(index))

    def chunks(self) -> np.ndarray:
        """Returns (first row, row after the last) of each chunk [n, 2]: read rows by these."""
        pieces = self._pieces()
        firsts = np.array([self._starts[unit] + start for unit, start, _ in pieces], np.int64)
        return np.stack([firsts, firsts + [rows for _, _, rows in pieces]], axis=1)

    def sample_offsets(self) -> np.ndarray:
        """Returns where samples lie: s is the rows `offsets[s]:offsets[s + 1]` [S + 1], int64."""
        pending = [self._array(unit, "sample_offsets").read() for unit in range(len(self._done))]
        ends = [
            store_result(read, self._kv.url)[1:] + start
            for read, start in zip(pending, self._starts[:-1], strict=True)
        ]
        return np.concatenate([np.zeros(1, np.int64), *ends])

    def _numbers(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)))
        numbers = np.asarray(() if isinstance(index, tuple) else index)
        if numbers.dtype == bool and numbers.shape == (len(self),):
            return np.flatnonzero(numbers)
        empty = numbers.size == 0 and not isinstance(index, tuple)  # NumPy makes [] of floats
        if numbers.ndim != 1 or not (empty or np.issubdtype(numbers.dtype, np.integer)):
            raise IndexError(
                f"rows are chosen by whole numbers, by a slice, or by a mask of {len(self)} values"
            )
        numbers = numbers.astype(np.int64)
        if len(numbers) and not (numbers.min() >= -len(self) and numbers.max() < len(self)):
            raise IndexError(f"row numbers must be in 0..{len(self) - 1}")
        return np.where(numbers < 0, numbers + len(self), numbers)

    def _samples(self, unit: int, rows: np.ndarray) -> list[str]:
        names = ("sample_offsets", "sample_ids", "sample_id_offsets")
        stored = [self._array(unit, name).read() for name in names]
        offsets, text, bounds = (store_result(read, self._kv.url) for read in stored)
        sample = np.searchsorted(offsets, rows, side="right") - 1
        content = text.tobytes()
        return [content[bounds[s] : bounds[s + 1]].decode() for s in sample.tolist()]

    def _array(self, unit: int, name: str) -> ts.TensorStore:
        if os.getpid() != self._process:  # without the threads that read: it would hang
            raise StorageError(
                f"{self._kv.url} was opened in the process that this one was forked from; start "
                "workers with the method `spawn`"
            )
        if (unit, name) not in self._arrays:
            if not self._done:
                raise StorageError(f"{self._kv.url} has no unit yet")
            self._arrays[unit, name] = open_array(self._kv, self._done[unit], name)
        return self._arrays[unit, name]

    def _gather(self, name: str, numbers: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        pending = [
            (unit, self._array(unit, name)[_as_slice(numbers[which == unit] - start)].read())
            for unit, start in ((unit, self._starts[unit]) for unit in np.unique(which).tolist())
        ]
        first = self._array(0, name)
        rows = np.empty((len(numbers), *first.shape[1:]), first.dtype.numpy_dtype)
        for unit, read in pending:
            rows[which == unit] = store_result(read, self._kv.url)
        return rows

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        buffer_mb: float = 256.0,
        real_only: bool = False,
        kind: str = "numpy",
        part: tuple[int, int] | None = None,
    ) -> Iterator[Any]:
        """Yields shuffled batches [batch_size, D]; the last rows, which fill none, are left out.

        Chunks of about 1 MB are read in random order, and a buffer of them is shuffled by row. So
        memory is bounded, reads are long, and rows of one prompt are far apart where the buffer
        holds many chunks. Equal arguments give equal batches.

        Args:
            batch_size: Rows of a batch.
            seed: Decides the order, each epoch's another.
            epochs: How often every row comes; None: endlessly.
            buffer_mb: Size of the buffer; twice that is held while it is refilled.
            real_only: Whether rows of special and BOS tokens are left out.
            kind: numpy, jax or torch.
            part: (i, n) for the i-th of n parts of the chunks, each row in one of them; None: in a
                worker of a torch `DataLoader` that worker's part, else all.

        Raises:
            ConfigError: `kind` is unknown, there is no such part, or it has fewer rows than a
                batch.
        """
        if kind not in KINDS:
            raise ConfigError(f"{kind=} is not one of {', '.join(KINDS)}")
        number, parts = part or _torch_worker()
        if not 0 <= number < parts:
            raise ConfigError(f"{part=} is not one of 0..{parts - 1} of {parts} parts")
        pieces = self._pieces()[number::parts]
        rows = sum(n for _, _, n in pieces)
        if not 0 < batch_size <= rows:
            where = "the store" if parts == 1 else f"part {number} of {parts}"
            raise ConfigError(f"{batch_size=} must be in 1..{rows}, the rows of {where}")

        def stream() -> Iterator[Any]:
            row_bytes = self.shape[1] * self.dtype.itemsize
            per_buffer = max(int(buffer_mb * 1e6 / (row_bytes * max(n for _, _, n in pieces))), 1)
            left = np.empty((0, self.shape[1]), self.dtype)
            for epoch in itertools.count() if epochs is None else range(epochs):
                rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
                order = [pieces[i] for i in rng.permutation(len(pieces))]
                groups = [order[i : i + per_buffer] for i in range(0, len(order), per_buffer)]
                ahead = self._start(groups[0], real_only)
                for following in [*groups[1:], []]:
                    loaded = [left, *(_chosen(read, roles, self._kv.url) for read, roles in ahead)]
                    ahead = self._start(following, real_only)
                    rows = np.concatenate(loaded)
                    del loaded
                    shuffled = rng.permutation(len(rows))
                    full = len(rows) // batch_size * batch_size
                    for start in range(0, full, batch_size):
                        yield _as(kind, rows[shuffled[start : start + batch_size]])
                    left = rows[shuffled[full:]]

        return stream()

    def torch_dataset(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        buffer_mb: float = 256.0,
        real_only: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> "ActivationDataset":
        """Returns `batches` as an `IterableDataset` of torch, of tensors [batch_size, D].

        Give it to a `DataLoader` with `batch_size=None` and, where it has workers,
        `multiprocessing_context="spawn"`. Each worker reads its own part of the chunks with a
        buffer of its own, and leaves out the last rows that fill no batch.

        Args:
            batch_size: Rows of a batch.
            seed: Decides the order, each epoch's another.
            epochs: How often every row comes; None: endlessly.
            buffer_mb: Size of the buffer of each worker.
            real_only: Whether rows of special and BOS tokens are left out.
            part: (i, n) for the i-th of n processes that train together, such as
                (`torch.distributed.get_rank()`, `get_world_size()`).

        Raises:
            ConfigError: torch is not installed. What `batches` refuses is refused when iteration
                begins.
        """
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("torch is not installed; install the extra: ping-llm[parity]")
        from ping_llm.activations.torch_dataset import ActivationDataset

        batches = functools.partial(
            self.batches,
            batch_size,
            seed=seed,
            epochs=epochs,
            buffer_mb=buffer_mb,
            real_only=real_only,
            kind="torch",
        )
        return ActivationDataset(batches, part)

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Returns (unit, first row, rows) of every chunk."""
        pieces = []
        for unit, entry in enumerate(self._done):
            shape: Any = self._array(unit, self._name).chunk_layout.read_chunk.shape
            starts = range(0, entry["tokens"], shape[0])
            pieces += [(unit, start, min(shape[0], entry["tokens"] - start)) for start in starts]
        return pieces

    def _start(self, pieces: list[tuple[int, int, int]], real_only: bool) -> list[tuple[Any, Any]]:
        """Begins to read pieces; returns (activations, roles or None) to come."""
        started = []
        for unit, start, rows in pieces:
            chunk = slice(start, start + rows)
            roles = self._array(unit, "roles")[chunk].read() if real_only else None
            started.append((self._array(unit, self._name)[chunk].read(), roles))
        return started


def _as_slice(rows: np.ndarray) -> np.ndarray | slice:
    """Returns `rows` [n], n > 0, as a slice where they are consecutive: that is read faster."""
    first, last = int(rows[0]), int(rows[-1])
    consecutive = last - first == len(rows) - 1 and bool(np.all(np.diff(rows) == 1))
    return slice(first, last + 1) if consecutive else rows


def _chosen(read: Any, roles: Any, where: str) -> np.ndarray:
    rows = store_result(read, where)
    return rows if roles is None else rows[store_result(roles, where) == REAL]


def _torch_worker() -> tuple[int, int]:
    """Returns (number, how many there are) of this worker of a torch `DataLoader`; else (0, 1)."""
    torch_data = sys.modules.get("torch.utils.data")
    worker = torch_data and torch_data.get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _as(kind: str, batch: np.ndarray) -> Any:
    if kind == "jax":
        import jax

        return jax.numpy.asarray(batch)
    if kind == "torch":
        import torch

        if batch.dtype.name == "bfloat16":  # which torch does not take from NumPy
            return torch.from_numpy(batch.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(batch)
    return batch
