"""Reading a store: rows by number, shuffled streams, and a look at what it holds."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.errors import ConfigError, StorageError
from ping_llm.extraction import store
from ping_llm.extraction.config import array_name
from ping_llm.extraction.prompts import REAL
from ping_llm.models.decoder import END_SITES
from ping_llm.progress import progress
from ping_llm.storage import KeyValueStore

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
    """The activations of one site and layer, as if they were one array [tokens, d_model].

    Attributes:
        manifest: What the store says of itself.
        shape: (tokens, d_model).
        dtype: Of the stored activations.
    """

    def __init__(
        self, url: str, *, site: str = "residual", layer: int | None = None, partial: bool = False
    ):
        """Opens a store.

        Args:
            url: Where it is.
            site: Such as `residual`.
            layer: Which layer; None for `embed` and `final_norm`.
            partial: Whether a store that is not finished is read as far as it goes.

        Raises:
            StorageError: There is no store, it is damaged, or not finished.
            ConfigError: It does not hold that site and layer.
        """
        self._kv = KeyValueStore(url)
        self.manifest = _manifest(self._kv)
        self._name = array_name(site, None if site in END_SITES else layer)
        held = [entry["name"] for entry in self.manifest["arrays"]]
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
        self.shape = int(self._starts[-1]), int(self.manifest["d_model"])
        self.dtype = np.dtype(ts.dtype(self.manifest["settings"]["dtype"]).numpy_dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """Returns rows: one [D], or those of a slice or of an array of numbers [n, D]."""
        if isinstance(index, (int, np.integer)):
            return self._gather(self._name, self._numbers(np.array([index])))[0]
        return self._gather(self._name, self._numbers(index))

    def rows(self, index: slice | np.ndarray) -> Rows:
        """Returns what the store says of rows beside their activations."""
        numbers = self._numbers(index)
        parts = [self._gather(name, numbers) for name in ("tokens", "positions", "roles")]
        samples = np.empty(len(numbers), object)
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        for unit in np.unique(which).tolist():
            chosen = which == unit
            samples[chosen] = self._samples(unit, numbers[chosen] - self._starts[unit])
        return Rows(*parts, samples=samples.tolist())

    def _numbers(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            return np.arange(*index.indices(len(self)))
        numbers = np.asarray(index, np.int64)
        if len(numbers) and not (numbers.min() >= -len(self) and numbers.max() < len(self)):
            raise IndexError(f"row numbers must be in 0..{len(self) - 1}")
        return np.where(numbers < 0, numbers + len(self), numbers)

    def _samples(self, unit: int, rows: np.ndarray) -> list[str]:
        names = ("sample_offsets", "sample_ids", "sample_id_offsets")
        offsets, text, bounds = (self._read(self._array(unit, name)) for name in names)
        sample = np.searchsorted(offsets, rows, side="right") - 1
        content = text.tobytes()
        return [content[bounds[s] : bounds[s + 1]].decode() for s in sample.tolist()]

    def _array(self, unit: int, name: str) -> ts.TensorStore:
        if (unit, name) not in self._arrays:
            self._arrays[unit, name] = open_array(self._kv, self._done[unit], name)
        return self._arrays[unit, name]

    def _read(self, array: ts.TensorStore) -> np.ndarray:
        return _result(array.read(), self._kv.url)

    def _gather(self, name: str, numbers: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        pending = [
            (unit, self._array(unit, name)[numbers[which == unit] - self._starts[unit]].read())
            for unit in np.unique(which).tolist()
        ]
        first = self._array(0, name)
        rows = np.empty((len(numbers), *first.shape[1:]), first.dtype.numpy_dtype)
        for unit, read in pending:
            rows[which == unit] = _result(read, self._kv.url)
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

        Raises:
            ConfigError: `kind` is unknown, or the store has fewer rows than a batch.
        """
        if kind not in KINDS:
            raise ConfigError(f"{kind=} is not one of {', '.join(KINDS)}")
        if not 0 < batch_size <= len(self):
            raise ConfigError(f"{batch_size=} must be in 1..{len(self)}, the rows of the store")
        return self._stream(batch_size, seed, epochs, buffer_mb, real_only, kind)

    def _stream(
        self,
        batch_size: int,
        seed: int,
        epochs: int | None,
        buffer_mb: float,
        real_only: bool,
        kind: str,
    ) -> Iterator[Any]:
        pieces = self._pieces()
        row_bytes = self.shape[1] * self.dtype.itemsize
        per_buffer = max(int(buffer_mb * 1e6 / (row_bytes * max(n for _, _, n in pieces))), 1)
        left = np.empty((0, self.shape[1]), self.dtype)
        rounds = itertools.count() if epochs is None else range(epochs)
        orders = (
            (np.random.Generator(np.random.Philox(key=[seed, epoch])), epoch) for epoch in rounds
        )
        for rng, _ in orders:
            order = rng.permutation(len(pieces))
            groups = [order[i : i + per_buffer] for i in range(0, len(order), per_buffer)]
            ahead = self._start([pieces[i] for i in groups[0]], real_only)
            for following in [*groups[1:], None]:
                loaded = [left, *(_chosen(read, roles, self._kv.url) for read, roles in ahead)]
                if following is not None:
                    ahead = self._start([pieces[i] for i in following], real_only)
                rows = np.concatenate(loaded)
                del loaded
                shuffled = rng.permutation(len(rows))
                full = len(rows) // batch_size * batch_size
                for start in range(0, full, batch_size):
                    yield _as(kind, rows[shuffled[start : start + batch_size]])
                left = rows[shuffled[full:]]

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Returns (unit, first row, rows) of every chunk."""
        pieces = []
        for unit, entry in enumerate(self._done):
            if not entry["tokens"]:
                continue
            shape: Any = self._array(unit, self._name).chunk_layout.read_chunk.shape
            step = shape[0]
            starts = range(0, entry["tokens"], step)
            pieces += [(unit, start, min(step, entry["tokens"] - start)) for start in starts]
        return pieces

    def _start(self, pieces: list[tuple[int, int, int]], real_only: bool) -> list[tuple[Any, Any]]:
        """Begins to read pieces; returns (activations, roles or None) to come."""
        started = []
        for unit, start, rows in pieces:
            part = slice(start, start + rows)
            roles = self._array(unit, "roles")[part].read() if real_only else None
            started.append((self._array(unit, self._name)[part].read(), roles))
        return started


def _chosen(read: Any, roles: Any, where: str) -> np.ndarray:
    rows = _result(read, where)
    return rows if roles is None else rows[_result(roles, where) == REAL]


def _as(kind: str, batch: np.ndarray) -> Any:
    if kind == "jax":
        import jax

        return jax.numpy.asarray(batch)
    if kind == "torch":
        from ping_llm.extraction.parity import to_torch

        return to_torch(batch)
    return batch


def _result(read: Any, where: str) -> Any:
    try:
        return read.result()
    except (ValueError, OSError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StorageError(f"{where} cannot be read: {line[:400]}") from None


def _manifest(kv: KeyValueStore) -> dict[str, Any]:
    manifest = store.read_manifest(kv)
    if manifest is None:
        raise StorageError(f"{kv.url} is no activation store: it has no {store.MANIFEST}")
    return manifest


def open_array(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> ts.TensorStore:
    """Returns an array of a published unit."""
    key = store.attempt_prefix(done["unit"], done["attempt"]) + name
    spec = {"driver": "zarr3", "kvstore": kv.spec(key), "fill_missing_data_reads": False}
    return _result(ts.open(spec, read=True), f"{kv.url}/{key}")


@dataclasses.dataclass(frozen=True)
class InspectResult:
    """What `inspect_activations` returns.

    Attributes:
        samples: Number of prompts in published units.
        tokens: Number of tokens in them.
        layers: Layers held.
        sites: Sites held.
        d_model: Width of an activation.
        dtype: Of the stored activations.
        units_done: Number of published units.
        units: Number of all units.
        bytes: Size of all arrays, before compression.
        complete: Whether every unit is published.
        statistics: {array: norms and attention sinks over all units}.
        made_from: Names of model and input, and what computed the store.
        errors: What is wrong, each naming the file; without `verify` only what shows by itself.
    """

    samples: int
    tokens: int
    layers: list[int]
    sites: list[str]
    d_model: int
    dtype: str
    units_done: int
    units: int
    bytes: int
    complete: bool
    statistics: dict[str, dict[str, float]]
    made_from: dict[str, str]
    errors: list[str]


def inspect_activations(url: str, *, verify: bool = False) -> InspectResult:
    """Returns what a store holds.

    Args:
        url: Where it is.
        verify: Whether every byte is read and compared with its checksum.

    Raises:
        StorageError: There is no store, or its manifest is damaged.
    """
    kv = KeyValueStore(url)
    manifest = _manifest(kv)
    errors: list[str] = []
    done = []
    for unit in range(len(manifest["units"])):
        try:
            published = store.read_done(kv, unit)
        except StorageError as error:
            errors.append(str(error))
            continue
        if published is None:
            continue
        if published["identity"] != store.identity(manifest):
            errors.append(f"{url}/{store.done_key(unit)} is of a store with other settings")
        done.append(published)
    if verify:
        with progress("verify", total=sum(entry["bytes"] for entry in done), unit="bytes") as bar:
            for entry in done:
                for name in entry["arrays"]:
                    errors += _verify(kv, entry, name)
                bar.update(entry["bytes"])
    sites = [entry["site"] for entry in manifest["arrays"]]
    layers = {entry["layer"] for entry in manifest["arrays"]} - {None}
    return InspectResult(
        samples=sum(entry["samples"] for entry in done),
        tokens=sum(entry["tokens"] for entry in done),
        layers=sorted(layers),
        sites=list(dict.fromkeys(sites)),
        d_model=manifest["d_model"],
        dtype=manifest["settings"]["dtype"],
        units_done=len(done),
        units=len(manifest["units"]),
        bytes=sum(entry["bytes"] for entry in done),
        complete=len(done) == len(manifest["units"]),
        statistics={
            entry["name"]: _overall([unit["statistics"][entry["name"]] for unit in done])
            for entry in manifest["arrays"]
        },
        made_from=manifest["made_from"],
        errors=errors,
    )


def _overall(units: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the statistics of units as those of their union."""
    units = [unit for unit in units if unit["tokens"]]
    if not units:
        return {}

    def mean(name: str, weight: str) -> float:
        weights = sum(unit[weight] for unit in units)
        return sum(unit[name] * unit[weight] for unit in units) / weights

    return {
        "norm_mean": mean("norm_mean", "tokens"),
        "norm_max": max(unit["norm_max"] for unit in units),
        "first_token_norm_mean": mean("first_token_norm_mean", "first_tokens"),
        "sink_tokens": sum(unit["sink_tokens"] for unit in units),
        "sink_tokens_at_first": sum(unit["sink_tokens_at_first"] for unit in units),
    }


def _verify(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> list[str]:
    """Returns what is wrong with an array of a unit."""
    key = store.attempt_prefix(done["unit"], done["attempt"]) + name
    entry = done["arrays"][name]
    metadata, _ = kv.read(f"{key}/zarr.json")
    if metadata is None or zlib.crc32(metadata) != entry["zarr_crc32"]:
        return [f"{kv.url}/{key}/zarr.json is {'gone' if metadata is None else 'damaged'}"]
    array = open_array(kv, done, name)
    errors = []
    for shard, expected in enumerate(entry["crc32"]):
        file = "/".join(["c", str(shard), *["0"] * (len(entry["shape"]) - 1)])
        start = shard * entry["shard_rows"]
        stop = min(start + entry["shard_rows"], entry["shape"][0])
        try:
            content = np.ascontiguousarray(_result(array[start:stop].read(), f"{kv.url}/{key}"))
        except StorageError as error:
            errors.append(f"{kv.url}/{key}/{file} is damaged: {error}")
            continue
        if zlib.crc32(content.view(np.uint8).data) != expected:
            errors.append(f"{kv.url}/{key}/{file} is damaged: its checksum does not fit")
    return errors
