"""The activation store: a manifest, and work units that are either published whole or not there.

`manifest.json` says what the store is. A unit is computed into a directory of its own attempt,
`units/00012/<attempt>/`, and published by creating `units/00012/done.json`, which names the
attempt, its counts and its checksums. Readers follow `done.json` and nothing else.
"""

import dataclasses
import json
import secrets
import time
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.extraction.config import canonical_json, digest, seal, unseal
from ping_llm.extraction.prompts import Prompts
from ping_llm.storage import KeyValueStore

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SINK_RATIO = 10.0  # a token whose norm is above so many medians is counted as a sink
STALE_ATTEMPT_S = 3600.0

CHUNK_BYTES = 1 << 20  # what a reader reads at once
SHARD_BYTES = 32 << 20  # one file
OPEN_BYTES = 512 << 20  # of all shards that a unit is writing side by side
IN_FLIGHT_BYTES = 256 << 20  # handed to TensorStore and not yet on disk


def done_key(unit: int) -> str:
    """Returns the key of a unit's commit marker."""
    return f"units/{unit:05d}/done.json"


def attempt_prefix(unit: int, attempt: str) -> str:
    """Returns what the keys of an attempt at a unit begin with."""
    return f"units/{unit:05d}/{attempt}/"


# --- manifest ---------------------------------------------------------------------------------


def identity(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of what decides a store's content."""
    return digest({key: manifest[key] for key in ("schema_version", "settings", "model", "input")})


def read_manifest(kv: KeyValueStore) -> dict[str, Any] | None:
    """Returns the manifest, or None where there is no store.

    Raises:
        StorageError: It is damaged, or of a version that this code does not read.
    """
    data, _ = kv.read(MANIFEST)
    if data is None:
        return None
    manifest = unseal(data)
    if manifest is None:
        raise StorageError(f"{kv.url}/{MANIFEST} is damaged: its checksum does not fit")
    if manifest["schema_version"] != SCHEMA_VERSION:
        found = manifest["schema_version"]
        raise StorageError(f"{kv.url} has schema_version {found}; expected {SCHEMA_VERSION}")
    return manifest


def open_store(kv: KeyValueStore, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest in place: `manifest` where there was none, else one with equal content.

    Raises:
        ConfigError: The store was begun with other settings, another model or another input.
    """
    manifest = json.loads(canonical_json(manifest))  # as it will be read back
    kv.create(MANIFEST, seal(manifest))
    stored = read_manifest(kv)
    if stored is None:
        raise StorageError(f"{kv.url}/{MANIFEST} was written and is not there")
    differences = [
        difference
        for part in ("settings", "model", "input")
        for difference in _differences(stored[part], manifest[part])
    ]
    # Not of the content, but workers with other leases would take each other's units.
    leases = [{"lease_seconds": one.get("lease_seconds")} for one in (stored, manifest)]
    differences += _differences(*leases)
    if differences:
        raise ConfigError(
            f"{kv.url} was begun with other settings: {'; '.join(differences)}; "
            "use those, or another output"
        )
    return stored


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} was {_shown(old.get(name))}, now {_shown(new.get(name))}" for name in changed]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def read_done(kv: KeyValueStore, unit: int) -> dict[str, Any] | None:
    """Returns what a unit's commit marker says, or None where the unit is not published.

    Raises:
        StorageError: It is damaged.
    """
    data, _ = kv.read(done_key(unit))
    if data is None:
        return None
    done = unseal(data)
    if done is None:
        raise StorageError(f"{kv.url}/{done_key(unit)} is damaged: its checksum does not fit")
    return done


def read_all_done(kv: KeyValueStore, units: int) -> dict[int, dict[str, Any]]:
    """Returns {unit: what its commit marker says} of the units that are published."""
    with ThreadPoolExecutor(16) as pool:  # many small reads
        found = enumerate(pool.map(lambda unit: read_done(kv, unit), range(units)))
        return {unit: done for unit, done in found if done is not None}


def new_attempt() -> str:
    """Returns a name that no other attempt has; it begins with the time, for `remove_stale`."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def remove_stale(
    kv: KeyValueStore, done: Mapping[int, Mapping[str, Any]], *, older_than_s: float
) -> None:
    """Deletes the attempts of a complete store that were not published and began long ago."""
    limit = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - older_than_s))
    found = {tuple(key.split("/")[1:3]) for key in kv.keys("units/") if key.count("/") > 2}
    for unit, attempt in sorted(found):
        if done[int(unit)]["attempt"] != attempt and attempt < limit:
            kv.delete(attempt_prefix(int(unit), attempt))


# --- arrays -----------------------------------------------------------------------------------


def _chunking(rows: int, row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Returns (rows of a chunk, rows of a shard), the second a multiple of the first."""
    chunk = max(CHUNK_BYTES // row_bytes, 1)
    chunk = 1 << (chunk.bit_length() - 1)
    if rows <= chunk:
        return max(rows, 1), max(rows, 1)
    shard = max(min(shard_bytes // (chunk * row_bytes), -(-rows // chunk)), 1)
    return chunk, chunk * shard


def _create_array(
    kv: KeyValueStore, key: str, shape: tuple[int, ...], dtype: np.dtype, *, zstd: bool, shard: int
) -> tuple[ts.TensorStore, int]:
    """Returns (a new Zarr v3 array, rows of one of its shards)."""
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    chunk_rows, shard_rows = _chunking(shape[0], row_bytes, shard)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little if dtype.itemsize > 1 else {"name": "bytes"}]
    if zstd:
        codecs.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    codecs.append({"name": "crc32c"})
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": codecs,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *shape[1:]]}}
    spec = {
        "driver": "zarr3",
        "kvstore": kv.spec(key),
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "fill_value": 0,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # A chunk of zeros is stored like any other: a missing one is an error, never zeros.
        "store_data_equal_to_fill_value": True,
        # A request whose answer was lost is sent again, and then finds what it made itself.
        "create": True,
        "open": True,
    }
    try:
        return ts.open(spec, context=kv.context).result(), shard_rows
    except (ValueError, OSError, RuntimeError) as error:
        raise StorageError(f"{kv.url}/{key} cannot be created: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class _Column:
    """One array, written in shards as soon as all of a shard's rows are there, in any order."""

    def __init__(self, array: ts.TensorStore, shard_rows: int, dtype: np.dtype):
        self._array, self.shard_rows, self.dtype = array, shard_rows, dtype
        self._open: dict[int, tuple[np.ndarray, int]] = {}  # by shard: (rows, how many are there)
        self.checksums = [0] * -(-array.shape[0] // shard_rows)

    def put(self, start: int, rows: np.ndarray) -> list[tuple[ts.WriteFutures, int]]:
        """Takes rows that begin at `start`; returns (write, bytes) of each shard that is full."""
        writes = []
        while len(rows):
            shard, within = divmod(start, self.shard_rows)
            first = shard * self.shard_rows
            size = min(self.shard_rows, self._array.shape[0] - first)
            if shard not in self._open:
                self._open[shard] = np.empty((size, *self._array.shape[1:]), self.dtype), 0
            buffer, present = self._open[shard]
            part = rows[: size - within]
            buffer[within : within + len(part)] = part
            present += len(part)
            if present == size:
                del self._open[shard]
                self.checksums[shard] = zlib.crc32(buffer.view(np.uint8).data)
                # The buffer is never touched again, so TensorStore need not copy it.
                write = self._array[first : first + size].write(
                    buffer, can_reference_source_data_indefinitely=True
                )
                writes.append((write, buffer.nbytes))
            else:
                self._open[shard] = buffer, present
            rows, start = rows[len(part) :], start + len(part)
        return writes

    @property
    def complete(self) -> bool:
        return not self._open


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An activation array of a store.

    Attributes:
        name: Such as `residual.00007`.
        width: Its second dimension.
        dtype: Its element.
    """

    name: str
    width: int
    dtype: np.dtype


class UnitWriter:
    """Writes one attempt at one unit, and publishes it."""

    def __init__(
        self,
        kv: KeyValueStore,
        unit: int,
        arrays: list[ArraySpec],
        prompts: Prompts,
        *,
        zstd: bool,
        store_identity: str,
    ):
        self._kv, self._unit, self._prompts, self._zstd = kv, unit, prompts, zstd
        self._identity = store_identity
        self.attempt = new_attempt()
        self._prefix = attempt_prefix(unit, self.attempt)
        self._writes: deque[tuple[ts.WriteFutures, int]] = deque()
        self._in_flight = 0
        self.bytes_written = 0
        n = len(prompts.tokens)
        shard = min(SHARD_BYTES, OPEN_BYTES // len(arrays))
        self._shapes: dict[str, tuple[list[int], str]] = {}
        self._columns = {
            spec.name: self._column(spec.name, (n, spec.width), spec.dtype, shard, zstd=zstd)
            for spec in arrays
        }
        self._norms = {spec.name: np.zeros(n, np.float32) for spec in arrays}
        self._sums = {spec.name: np.zeros(spec.width, np.float64) for spec in arrays}

    def _column(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, shard: int, *, zstd: bool
    ) -> _Column:
        key = self._prefix + name
        array, rows = _create_array(self._kv, key, shape, dtype, zstd=zstd, shard=shard)
        self._shapes[name] = list(shape), dtype.name
        return _Column(array, rows, dtype)

    def put(self, name: str, start: int, rows: np.ndarray, norms: np.ndarray) -> None:
        """Takes the activations of tokens `start`... of the unit, and their norms.

        Waits while too much is still on its way to disk.
        """
        if not np.isfinite(norms).all():
            at = int(np.flatnonzero(~np.isfinite(norms))[0]) + start
            sample = self._prompts.ids[int(np.searchsorted(self._prompts.offsets, at, "right")) - 1]
            raise DataError(
                f"{name} of sample {sample} is not finite in {self._columns[name].dtype}; "
                "store bfloat16 or float32, or look at the model's weights"
            )
        self._norms[name][start : start + len(rows)] = norms
        self._send(self._columns[name].put(start, rows))

    def add_sum(self, name: str, total: np.ndarray) -> None:
        """Takes the sum of some tokens' activations [D]; of every token once."""
        self._sums[name] += total

    def _send(self, writes: list[tuple[ts.WriteFutures, int]]) -> None:
        for write in writes:
            self._writes.append(write)
            self._in_flight += write[1]
            self.bytes_written += write[1]
        while self._in_flight > IN_FLIGHT_BYTES:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        write, size = self._writes.popleft()
        try:
            write.result()
        except (ValueError, OSError, RuntimeError) as error:
            where = f"{self._kv.url}/{self._prefix}"
            raise StorageError(f"{where} cannot be written: {_line(error)}") from None
        self._in_flight -= size

    def finish(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for all writes; returns what the commit marker is to say, `notes` among it."""
        prompts, lengths = self._prompts, np.diff(self._prompts.offsets)
        encoded = [sample.encode() for sample in prompts.ids]
        id_offsets = np.concatenate([[0], np.cumsum([len(text) for text in encoded])])
        first = np.repeat(prompts.offsets[:-1], lengths)
        positions = (np.arange(len(prompts.tokens)) - first).astype(np.int32)
        means = np.stack(list(self._sums.values())) / max(len(prompts.tokens), 1)
        small = {
            "tokens": prompts.tokens,
            "positions": positions,
            "roles": prompts.roles,
            "sample_offsets": prompts.offsets,
            "sample_ids": np.frombuffer(b"".join(encoded), np.uint8),
            "sample_id_offsets": id_offsets.astype(np.int64),
            "means": means.astype(np.float32),
        }
        activations = list(self._columns)
        for name, values in small.items():
            column = self._column(name, values.shape, values.dtype, SHARD_BYTES, zstd=False)
            self._columns[name] = column
            self._send(column.put(0, values))
        while self._writes:
            self._wait_for_oldest()
        assert all(column.complete for column in self._columns.values())
        return {
            "unit": self._unit,
            "attempt": self.attempt,
            "identity": self._identity,
            "samples": len(prompts.ids),
            "tokens": len(prompts.tokens),
            "overlong": prompts.overlong,
            "empty": prompts.empty,
            "bytes": self.bytes_written,
            **notes,
            "arrays": {name: self._entry(name) for name in self._columns},
            "statistics": {
                name: statistics(self._norms[name], positions, mean)
                for name, mean in zip(activations, means, strict=True)
            },
        }

    def commit(self, done: dict[str, Any]) -> dict[str, Any]:
        """Creates `done.json`; returns what it says, which is another attempt's if one was first.

        Args:
            done: What `finish` returned.
        """
        if self._kv.create(done_key(self._unit), seal(done)):
            return done
        published = read_done(self._kv, self._unit)
        if published is None:
            where = f"{self._kv.url}/{done_key(self._unit)}"
            raise StorageError(f"{where} was there, and is gone")
        return published

    def _entry(self, name: str) -> dict[str, Any]:
        metadata, _ = self._kv.read(f"{self._prefix}{name}/zarr.json")
        if metadata is None:
            raise StorageError(f"{self._kv.url}/{self._prefix}{name}/zarr.json is gone")
        shape, dtype = self._shapes[name]
        return {
            "shape": shape,
            "dtype": dtype,
            "shard_rows": self._columns[name].shard_rows,
            "crc32": self._columns[name].checksums,
            "zarr_crc32": zlib.crc32(metadata),
        }

    def discard(self) -> None:
        """Deletes the attempt, after a failure."""
        for write, _ in self._writes:
            write.exception()  # waits; whatever it is, the attempt goes
        self._kv.delete(self._prefix)


def statistics(norms: np.ndarray, positions: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
    """Returns what a unit's activations at one site are like.

    Args:
        norms: L2 norm of each token's activation [n].
        positions: Position of each token [n].
        mean: Mean activation [D].
    """
    if not len(norms):
        return {"tokens": 0}
    first = positions == 0
    median = float(np.median(norms))
    sinks = norms > SINK_RATIO * median
    return {
        "tokens": len(norms),
        "norm_mean": float(norms.mean(dtype=np.float64)),
        "norm_median": median,
        "norm_max": float(norms.max()),
        "norm_of_mean": float(np.linalg.norm(mean)),
        "first_tokens": int(first.sum()),
        "first_token_norm_mean": float(norms[first].mean(dtype=np.float64)),
        "sink_tokens": int(sinks.sum()),
        "sink_tokens_at_first": int((sinks & first).sum()),
    }
