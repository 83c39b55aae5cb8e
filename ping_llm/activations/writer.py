"""Writing a unit: its arrays in shards as their rows arrive, then the commit marker."""

import itertools
import time
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.activations.arrays import (
    ALL_COLUMNS,
    SHARD_BYTES,
    ColumnSlice,
    ShardedArray,
    store_result,
)
from ping_llm.activations.statistics import unit_statistics
from ping_llm.activations.store import UnitPrompts, attempt_prefix, done_key, read_done, read_sealed
from ping_llm.errors import DataError, StorageError
from ping_llm.hashing import seal
from ping_llm.storage import KeyValueStore

OPEN_BYTES = 512 << 20  # of all shards that a unit is writing side by side
IN_FLIGHT_BYTES = 256 << 20  # handed to TensorStore and not yet on disk
PART_POLL_S, PART_DEADLINE_S = 0.1, 600.0  # for the parts of other processes


class UnitWriter:
    """Writes one attempt at one unit, or its part of it, and publishes it."""

    def __init__(
        self,
        kv: KeyValueStore,
        unit: int,
        attempt: str,
        widths: Mapping[str, int],
        prompts: UnitPrompts,
        *,
        kept: np.ndarray | None = None,
        dtype: np.dtype,
        zstd: bool,
        store_identity: str,
        columns: ColumnSlice = ALL_COLUMNS,
    ):
        """Begins the arrays.

        Args:
            kv: The store.
            unit: Which unit.
            attempt: Name of the attempt; the processes of a group share it.
            widths: The activation arrays, such as `residual.00007`, with their width.
            prompts: The unit's prompts.
            kept: Which of the unit's tokens are stored [n], bool; None: all.
            dtype: Of the stored activations.
            zstd: Whether activations are compressed.
            store_identity: Hash of what decides the store's content.
            columns: Those of the arrays that this process writes.

        Raises:
            StorageError: They cannot be made.
        """
        self._kv, self._unit, self._prompts = kv, unit, prompts
        self._identity, self._slice, self.attempt = store_identity, columns, attempt
        self._prefix = attempt_prefix(unit, attempt)
        self._writes: deque[tuple[ts.WriteFutures, int]] = deque()
        self._in_flight = 0
        self._kept = np.ones(len(prompts.tokens), bool) if kept is None else kept
        self._row_of = np.append(0, np.cumsum(self._kept))  # of each token, counting those stored
        n = int(self._row_of[-1])
        sharding = {"shard_bytes": min(SHARD_BYTES, OPEN_BYTES // len(widths)), "columns": columns}
        self._arrays = {
            name: ShardedArray(kv, self._prefix + name, (n, width), dtype, zstd=zstd, **sharding)
            for name, width in widths.items()
        }
        self._norms = {name: np.zeros(n, np.float32) for name in widths}
        self._sums = {name: np.zeros(width, np.float64) for name, width in widths.items()}

    def put(self, name: str, start: int, rows: np.ndarray, norms: np.ndarray) -> None:
        """Takes the activations of tokens `start`... of the unit, this part's, and whole norms.

        Those that are not kept are left out.

        Waits while too much is still on its way to disk.
        """
        kept = self._kept[start : start + len(rows)]
        if not np.isfinite(norms[kept]).all():
            token = int(np.flatnonzero(~np.isfinite(norms) & kept)[0]) + start
            offsets = self._prompts.offsets
            sample = self._prompts.ids[int(np.searchsorted(offsets, token, "right")) - 1]
            raise DataError(
                f"{name} of sample {sample} is not finite in {self._arrays[name].dtype}; "
                "store bfloat16 or float32, or look at the model's weights"
            )
        if not kept.all():
            rows, norms = rows[kept], norms[kept]
        first = int(self._row_of[start])
        self._norms[name][first : first + len(rows)] = norms
        self._send(self._arrays[name].put(first, rows))

    def add_sum(self, name: str, total: np.ndarray) -> None:
        """Takes the sum of some tokens' activations [D]; of every one kept once."""
        self._sums[name] += total

    def _send(self, writes: list[tuple[ts.WriteFutures, int]]) -> None:
        for write in writes:
            self._writes.append(write)
            self._in_flight += write[1]
        while self._in_flight > IN_FLIGHT_BYTES:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        write, size = self._writes.popleft()
        store_result(write, f"{self._kv.url}/{self._prefix}", "written")
        self._in_flight -= size

    def finish(self, notes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Waits for all writes; returns what the commit marker is to say, `notes` among it.

        Where a group writes the unit, its leader waits for the others; they return None.

        Raises:
            StorageError: A write failed, or another process of the group did not write its part.
        """
        if not self._slice.leads:
            self._wait_for_all()
            sums = {name: array.checksums for name, array in self._arrays.items()}
            self._kv.write(self._part_key(self._slice.index), seal(sums))
            return None
        prompts = self._prompts
        encoded = [sample.encode() for sample in prompts.ids]
        positions = prompts.positions[self._kept].astype(np.int32)
        means = np.zeros((len(self._sums), max(map(len, self._sums.values()))))
        for mean, total in zip(means, self._sums.values(), strict=True):
            mean[: len(total)] = total / max(len(positions), 1)
        small = {
            "tokens": prompts.tokens[self._kept],
            "positions": positions,
            "roles": prompts.roles[self._kept],
            "sample_offsets": self._row_of[prompts.offsets],
            "sample_ids": np.frombuffer(b"".join(encoded), np.uint8),
            "sample_id_offsets": np.cumsum([0, *map(len, encoded)]),
            "means": means.astype(np.float32),
        }
        activations = list(self._arrays)
        for name, values in small.items():
            array = ShardedArray(self._kv, self._prefix + name, values.shape, values.dtype)
            self._arrays[name] = array
            self._send(array.put(0, values))
        self._wait_for_all()
        self._join_checksums(activations)
        return {
            "unit": self._unit,
            "attempt": self.attempt,
            "identity": self._identity,
            **prompts.counts,
            "tokens": len(positions),
            "prompt_tokens": len(prompts.tokens),
            "bytes": sum(array.nbytes for array in self._arrays.values()),
            **notes,
            "arrays": {name: self._entry(name) for name in self._arrays},
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
        if (published := read_done(self._kv, self._unit)) is None:
            where = f"{self._kv.url}/{done_key(self._unit)}"
            raise StorageError(f"{where} was there, and is gone")
        return published

    def _wait_for_all(self) -> None:
        while self._writes:
            self._wait_for_oldest()
        assert not any(array.missing for array in self._arrays.values())

    def _part_key(self, index: int) -> str:
        return f"{self._prefix}part-{index:05d}.json"

    def _join_checksums(self, activations: list[str]) -> None:
        """Puts the checksums of all processes' shards in the order of rows, then columns."""
        own = {name: self._arrays[name].checksums for name in activations}
        by_process = [
            own if index == self._slice.index else self._wait_for_part(index)
            for index in range(self._slice.count)
        ]
        for name in activations:
            by_row = zip(*(checksums[name] for checksums in by_process), strict=True)
            self._arrays[name].checksums = list(itertools.chain(*by_row))

    def _wait_for_part(self, index: int) -> dict[str, list[int]]:
        until = time.monotonic() + PART_DEADLINE_S
        key = self._part_key(index)
        while (checksums := read_sealed(self._kv, key)) is None:
            if time.monotonic() >= until:
                raise StorageError(
                    f"{self._kv.url}/{key} is not there after {PART_DEADLINE_S:.0f} s: "
                    "a process of the group failed"
                )
            time.sleep(PART_POLL_S)
        return checksums

    def _entry(self, name: str) -> dict[str, Any]:
        metadata, _ = self._kv.read(f"{self._prefix}{name}/zarr.json")
        if metadata is None:
            raise StorageError(f"{self._kv.url}/{self._prefix}{name}/zarr.json is gone")
        array = self._arrays[name]
        return {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "shard_shape": array.shard_shape,
            "crc32": array.checksums,
            "zarr_crc32": zlib.crc32(metadata),
        }

    def discard(self) -> None:
        """Deletes the attempt, after a failure; of a group, its leader does."""
        for write, _ in self._writes:
            write.exception()  # waits; whatever it is, the attempt goes
        if self._slice.leads:
            self._kv.delete(self._prefix)
