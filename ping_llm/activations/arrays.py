"""The Zarr arrays of a store: created, written shard by shard, opened and verified."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.activations.store import attempt_prefix
from ping_llm.errors import StorageError
from ping_llm.storage import KeyValueStore, Location

CHUNK_BYTES = 1 << 20  # what a reader reads at once
SHARD_BYTES = 32 << 20  # one file


def _chunking(rows: int, row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Returns (rows of a chunk, rows of a shard), the second a multiple of the first."""
    chunk = max(CHUNK_BYTES // row_bytes, 1)
    chunk = 1 << (chunk.bit_length() - 1)
    if rows <= chunk:
        return max(rows, 1), max(rows, 1)
    shard = max(min(shard_bytes // (chunk * row_bytes), -(-rows // chunk)), 1)
    return chunk, chunk * shard


@dataclasses.dataclass(frozen=True)
class ColumnSlice:
    """What one process of a group writes: some columns of every activation array.

    Attributes:
        index: Which of the equal parts of the columns.
        count: How many there are, one a process.
        leads: Whether this process writes all other arrays as well, and commits.
    """

    index: int = 0
    count: int = 1
    leads: bool = True


ALL_COLUMNS = ColumnSlice()


class ShardedArray:
    """A Zarr v3 array that is written shard by shard, each as soon as all its rows are known.

    Rows may come in any order.

    Attributes:
        shape: Its shape.
        dtype: Of its elements.
        shard_shape: Shape of a shard; the last ones may have fewer rows.
        checksums: CRC-32 of each shard that this process writes, 0 until it is written.
        missing: Number of rows that were not put yet.
    """

    def __init__(
        self,
        kv: KeyValueStore,
        key: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        zstd: bool = False,
        shard_bytes: int = SHARD_BYTES,
        columns: ColumnSlice = ALL_COLUMNS,
    ):
        """Creates the array.

        Args:
            kv: The store.
            key: Its name there.
            shape: Its shape.
            dtype: Of its elements.
            zstd: Whether it is compressed.
            shard_bytes: Size of a shard, at most.
            columns: Those that this process writes, in shards of their own.

        Raises:
            StorageError: It cannot be created.
        """
        width = [size // columns.count for size in shape[1:]]
        row_bytes = int(np.prod(width)) * dtype.itemsize
        chunk_rows, shard_rows = _chunking(shape[0], row_bytes, shard_bytes)
        self.shape, self.dtype, self.shard_shape = shape, dtype, [shard_rows, *width]
        self.missing, self.checksums = shape[0], [0] * -(-shape[0] // shard_rows)
        self._open: dict[int, tuple[np.ndarray, int]] = {}  # by shard: (rows, how many are there)
        spec = {
            "driver": "zarr3",
            "kvstore": kv.spec(key),
            "metadata": self._metadata([chunk_rows, *width], zstd=zstd),
            # A chunk of zeros is stored like any other: a missing one is an error, never zeros.
            "store_data_equal_to_fill_value": True,
            # It may be there: made by another process of the group, or by a request whose answer
            # was lost.
            "create": True,
            "open": True,
        }
        array = store_result(ts.open(spec, context=kv.context), f"{kv.url}/{key}", "created")
        own = (slice(columns.index * size, (columns.index + 1) * size) for size in width)
        self._array = array[(slice(None), *own)]

    @property
    def nbytes(self) -> int:
        """Size of the whole array, before compression."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def put(self, start: int, rows: np.ndarray) -> list[tuple[ts.WriteFutures, int]]:
        """Takes rows that begin at `start`; returns (write, bytes) of each shard that is full."""
        writes = []
        self.missing -= len(rows)
        shard_rows = self.shard_shape[0]
        while len(rows):
            shard, within = divmod(start, shard_rows)
            first = shard * shard_rows
            size = min(shard_rows, self.shape[0] - first)
            if shard not in self._open:
                self._open[shard] = np.empty((size, *self.shard_shape[1:]), self.dtype), 0
            buffer, present = self._open.pop(shard)
            taken = rows[: size - within]
            buffer[within : within + len(taken)] = taken
            if present + len(taken) < size:
                self._open[shard] = buffer, present + len(taken)
            else:
                self.checksums[shard] = zlib.crc32(buffer.view(np.uint8).data)
                # The buffer is never touched again, so TensorStore need not copy it.
                write = self._array[first : first + size].write(
                    buffer, can_reference_source_data_indefinitely=True
                )
                writes.append((write, buffer.nbytes))
            rows, start = rows[len(taken) :], start + len(taken)
        return writes

    def _metadata(self, chunk: list[int], *, zstd: bool) -> dict[str, Any]:
        """Returns what `zarr.json` says of an array in shards, each of chunks with a CRC-32C."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = [little if self.dtype.itemsize > 1 else {"name": "bytes"}]
        if zstd:
            codecs.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
        sharding = {
            "chunk_shape": chunk,
            "codecs": [*codecs, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.shard_shape}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }


def _published_key(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> str:
    for component in (done["attempt"], name):
        Location.of(kv.url).child(component)  # refuses names that lead out of the store
    return attempt_prefix(done["unit"], done["attempt"]) + name


def open_array(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> ts.TensorStore:
    """Returns an array of a published unit."""
    key = _published_key(kv, done, name)
    spec = {"driver": "zarr3", "kvstore": kv.spec(key), "fill_missing_data_reads": False}
    return store_result(ts.open(spec, read=True, context=kv.context), f"{kv.url}/{key}")


def store_result(pending: Any, where: str, what: str = "read") -> Any:
    """Returns what TensorStore makes of an operation, once it is done.

    Raises:
        StorageError: It failed; the message says that `where` cannot be `what`.
    """
    try:
        return pending.result()
    except (ValueError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(f"{where} cannot be {what}: {reason}") from None


def verify_array(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> list[str]:
    """Returns what is wrong with an array of a unit."""
    key = _published_key(kv, done, name)
    entry = done["arrays"][name]
    metadata, _ = kv.read(f"{key}/zarr.json")
    if metadata is None or zlib.crc32(metadata) != entry["zarr_crc32"]:
        return [f"{kv.url}/{key}/zarr.json is {'gone' if metadata is None else 'damaged'}"]
    array = open_array(kv, done, name)
    errors, shape, shard = [], entry["shape"], entry["shard_shape"]
    shards = [-(-size // step) for size, step in zip(shape, shard, strict=False)]
    if (
        list(array.shape) != shape
        or len(shape) != len(shard)
        or math.prod(shards) != len(entry["crc32"])
    ):
        return [f"{kv.url}/{key}: its shape is not what its commit marker says"]
    for index, expected in zip(np.ndindex(*shards), entry["crc32"], strict=True):
        file = "/".join(["c", *map(str, index)])
        region = tuple(
            slice(i * step, min((i + 1) * step, size))
            for i, step, size in zip(index, shard, shape, strict=True)
        )
        try:
            content = np.ascontiguousarray(store_result(array[region].read(), f"{kv.url}/{key}"))
        except StorageError as error:
            errors.append(f"{kv.url}/{key}/{file} is damaged: {error}")
            continue
        if zlib.crc32(content.view(np.uint8).data) != expected:
            errors.append(f"{kv.url}/{key}/{file} is damaged: its checksum does not fit")
    return errors
