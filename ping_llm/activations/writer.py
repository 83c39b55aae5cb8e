"""Writing a unit: its arrays in shards as their rows arrive, then the commit marker."""

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.activations.arrays import ShardedArray, create_array, first_line
from ping_llm.activations.statistics import unit_statistics
from ping_llm.activations.store import UnitPrompts, attempt_prefix, done_key, read_done
from ping_llm.errors import DataError, StorageError
from ping_llm.hashing import seal, unseal
from ping_llm.storage import KeyValueStore

SHARD_BYTES = 32 << 20  # one file
OPEN_BYTES = 512 << 20  # of all shards that a unit is writing side by side
IN_FLIGHT_BYTES = 256 << 20  # handed to TensorStore and not yet on disk
PART_POLL_S, PART_DEADLINE_S = 0.1, 600.0  # for the parts of other processes


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


@dataclasses.dataclass(frozen=True)
class ColumnSlice:
    """What one process of a group writes: some columns of every activation array.

    Attributes:
        index: Which of the equal parts of the columns.
        count: How many there are, one a process.
        leads: Whether this process also writes everything else, and commits.
    """

    index: int = 0
    count: int = 1
    leads: bool = True


class UnitWriter:
    """Writes one attempt at one unit, or its part of it, and publishes it."""

    def __init__(
        self,
        kv: KeyValueStore,
        unit: int,
        attempt: str,
        arrays: list[ArraySpec],
        prompts: UnitPrompts,
        *,
        zstd: bool,
        store_identity: str,
        part: ColumnSlice = ColumnSlice(),
    ):
        """Begins the arrays.

        Args:
            kv: The store.
            unit: Which unit.
            attempt: Name of the attempt; the processes of a group share it.
            arrays: The activation arrays.
            prompts: The unit's prompts.
            zstd: Whether activations are compressed.
            store_identity: Hash of what decides the store's content.
            part: What of the arrays this process writes.

        Raises:
            StorageError: They cannot be made.
        """
        self._kv, self._unit, self._prompts, self._zstd = kv, unit, prompts, zstd
        self._identity, self._part = store_identity, part
        self.attempt = attempt
        self._prefix = attempt_prefix(unit, attempt)
        self._writes: deque[tuple[ts.WriteFutures, int]] = deque()
        self._in_flight = 0
        n = len(prompts.tokens)
        shard = min(SHARD_BYTES, OPEN_BYTES // len(arrays))
        self._shapes: dict[str, tuple[list[int], str]] = {}
        self._columns = {
            spec.name: self._column(spec.name, (n, spec.width), spec.dtype, shard, part, zstd=zstd)
            for spec in arrays
        }
        self._norms = {spec.name: np.zeros(n, np.float32) for spec in arrays}
        self._sums = {spec.name: np.zeros(spec.width, np.float64) for spec in arrays}

    def _column(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        shard: int,
        part: ColumnSlice,
        *,
        zstd: bool,
    ) -> ShardedArray:
        key = self._prefix + name
        array, rows = create_array(
            self._kv, key, shape, dtype, zstd=zstd, shard=shard, parts=part.count
        )
        self._shapes[name] = list(shape), dtype.name
        if part.count > 1:
            width = shape[1] // part.count
            array = array[:, part.index * width : (part.index + 1) * width]
        return ShardedArray(array, rows, dtype)

    def put(self, name: str, start: int, rows: np.ndarray, norms: np.ndarray) -> None:
        """Takes the activations of tokens `start`... of the unit, this part's, and whole norms.

        Waits while too much is still on its way to disk.
        """
        if not np.isfinite(norms).all():
            row = int(np.flatnonzero(~np.isfinite(norms))[0]) + start
            offsets = self._prompts.offsets
            sample = self._prompts.ids[int(np.searchsorted(offsets, row, "right")) - 1]
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
        while self._in_flight > IN_FLIGHT_BYTES:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        write, size = self._writes.popleft()
        try:
            write.result()
        except (ValueError, OSError, RuntimeError) as error:
            where = f"{self._kv.url}/{self._prefix}"
            raise StorageError(f"{where} cannot be written: {first_line(error)}") from None
        self._in_flight -= size

    def finish(self, notes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Waits for all writes; returns what the commit marker is to say, `notes` among it.

        Where a group writes the unit, its leader waits for the others; they return None.

        Raises:
            StorageError: A write failed, or another process of the group did not write its part.
        """
        if not self._part.leads:
            self._wait_for_all()
            sums = {name: column.checksums for name, column in self._columns.items()}
            self._kv.write(self._part_key(self._part.index), seal(sums))
            return None
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
            column = self._column(
                name, values.shape, values.dtype, SHARD_BYTES, ColumnSlice(), zstd=False
            )
            self._columns[name] = column
            self._send(column.put(0, values))
        self._wait_for_all()
        checksums = self._checksums(activations)
        sizes = [
            int(np.prod(shape)) * ts.dtype(kind).numpy_dtype.itemsize
            for shape, kind in self._shapes.values()
        ]
        return {
            "unit": self._unit,
            "attempt": self.attempt,
            "identity": self._identity,
            "samples": len(prompts.ids),
            "tokens": len(prompts.tokens),
            "overlong": prompts.overlong,
            "empty": prompts.empty,
            "bytes": sum(sizes),
            **notes,
            "arrays": {name: self._entry(name, checksums[name]) for name in self._columns},
            "statistics": {
                name: unit_statistics(self._norms[name], positions, mean)
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

    def _wait_for_all(self) -> None:
        while self._writes:
            self._wait_for_oldest()
        assert all(column.complete for column in self._columns.values())

    def _part_key(self, index: int) -> str:
        return f"{self._prefix}part-{index:05d}.json"

    def _checksums(self, activations: list[str]) -> dict[str, list[int]]:
        """Returns {array: checksums of its shards, in the order of rows, then columns}."""
        own = {name: column.checksums for name, column in self._columns.items()}
        parts = [
            own if i == self._part.index else self._wait_for_part(i)
            for i in range(self._part.count)
        ]
        for name in activations:
            own[name] = [
                crc for shard in zip(*(part[name] for part in parts), strict=True) for crc in shard
            ]
        return own

    def _wait_for_part(self, index: int) -> dict[str, list[int]]:
        until = time.monotonic() + PART_DEADLINE_S
        key = self._part_key(index)
        while (data := self._kv.read(key)[0]) is None:
            if time.monotonic() >= until:
                raise StorageError(
                    f"{self._kv.url}/{key} is not there after {PART_DEADLINE_S:.0f} s: "
                    "a process of the group failed"
                )
            time.sleep(PART_POLL_S)
        part = unseal(data)
        if part is None:
            raise StorageError(f"{self._kv.url}/{key} is damaged: its checksum does not fit")
        return part

    def _entry(self, name: str, checksums: list[int]) -> dict[str, Any]:
        metadata, _ = self._kv.read(f"{self._prefix}{name}/zarr.json")
        if metadata is None:
            raise StorageError(f"{self._kv.url}/{self._prefix}{name}/zarr.json is gone")
        shape, dtype = self._shapes[name]
        column = self._columns[name]
        return {
            "shape": shape,
            "dtype": dtype,
            "shard_shape": [column.shard_rows, *column.width],
            "crc32": checksums,
            "zarr_crc32": zlib.crc32(metadata),
        }

    def discard(self) -> None:
        """Deletes the attempt, after a failure; of a group, its leader does."""
        for write, _ in self._writes:
            write.exception()  # waits; whatever it is, the attempt goes
        if self._part.leads:
            self._kv.delete(self._prefix)
