"""The Zarr arrays of a store: created, written shard by shard, opened and verified."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from ping_llm.activations.store import attempt_prefix
from ping_llm.errors import StorageError
from ping_llm.storage import KeyValueStore, Location

CHUNK_BYTES = 1 << 20  # what a reader reads at once


def _chunking(rows: int, row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Returns (rows of a chunk, rows of a shard), the second a multiple of the first."""
    chunk = max(CHUNK_BYTES // row_bytes, 1)
    chunk = 1 << (chunk.bit_length() - 1)
    if rows <= chunk:
        return max(rows, 1), max(rows, 1)
    shard = max(min(shard_bytes // (chunk * row_bytes), -(-rows // chunk)), 1)
    return chunk, chunk * shard


def create_array(
    kv: KeyValueStore,
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    zstd: bool,
    shard: int,
    parts: int = 1,
) -> tuple[ts.TensorStore, int]:
    """Returns (a new Zarr v3 array, rows per shard).

    Args:
        kv: The store.
        key: Its name there.
        shape: Its shape; it is cut into shards along its rows, and its columns into `parts`.
        dtype: Of its elements.
        zstd: Whether it is compressed.
        shard: Bytes of a shard, at most.
        parts: How many equal parts its columns are stored in.

    Raises:
        StorageError: It cannot be created.
    """
    width = [columns // parts for columns in shape[1:]]
    row_bytes = int(np.prod(width)) * dtype.itemsize
    chunk_rows, shard_rows = _chunking(shape[0], row_bytes, shard)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little if dtype.itemsize > 1 else {"name": "bytes"}]
    if zstd:
        codecs.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    codecs.append({"name": "crc32c"})
    sharding = {
        "chunk_shape": [chunk_rows, *width],
        "codecs": codecs,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *width]}}
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
        # It may be there: made by another process of the group, or by a request whose answer was
        # lost.
        "create": True,
        "open": True,
    }
    try:
        return ts.open(spec, context=kv.context).result(), shard_rows
    except (ValueError, OSError, RuntimeError) as error:
        raise StorageError(f"{kv.url}/{key} cannot be created: {first_line(error)}") from None


class ShardedArray:
    """An array that is written shard by shard, each as soon as all its rows are known.

    Rows may come in any order.

    Attributes:
        shard_rows: Rows per shard.
        dtype: Of its elements.
        checksums: CRC-32 of each shard, 0 until it is written.
    """

    def __init__(self, array: ts.TensorStore, shard_rows: int, dtype: np.dtype):
        self._array, self.shard_rows, self.dtype = array, shard_rows, dtype
        self._open: dict[int, tuple[np.ndarray, int]] = {}  # by shard: (rows, how many are there)
        self.checksums = [0] * -(-array.shape[0] // shard_rows)
        self._missing = array.shape[0]

    def put(self, start: int, rows: np.ndarray) -> list[tuple[ts.WriteFutures, int]]:
        """Takes rows that begin at `start`; returns (write, bytes) of each shard that is full."""
        writes = []
        self._missing -= len(rows)
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
        """Whether every row was put."""
        return not self._missing

    @property
    def width(self) -> list[int]:
        """Its shape without the rows."""
        return list(self._array.shape[1:])


def _published_key(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> str:
    for component in (done["attempt"], name):
        Location.of(kv.url).child(component)  # refuses names that lead out of the store
    return attempt_prefix(done["unit"], done["attempt"]) + name


def open_array(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> ts.TensorStore:
    """Returns an array of a published unit."""
    key = _published_key(kv, done, name)
    spec = {"driver": "zarr3", "kvstore": kv.spec(key), "fill_missing_data_reads": False}
    return read_result(ts.open(spec, read=True, context=kv.context), f"{kv.url}/{key}")


def read_result(read: Any, where: str) -> Any:
    """Returns what a read of TensorStore gives.

    Raises:
        StorageError: It failed; the message names `where`.
    """
    try:
        return read.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise StorageError(f"{where} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Returns the first line of TensorStore's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def verify_array(kv: KeyValueStore, done: Mapping[str, Any], name: str) -> list[str]:
    """Returns what is wrong with an array of a unit."""
    key = _published_key(kv, done, name)
    entry = done["arrays"][name]
    metadata, _ = kv.read(f"{key}/zarr.json")
    if metadata is None or zlib.crc32(metadata) != entry["zarr_crc32"]:
        return [f"{kv.url}/{key}/zarr.json is {'gone' if metadata is None else 'damaged'}"]
    array = open_array(kv, done, name)
    errors, shard = [], entry["shard_shape"]
    places = np.ndindex(
        *(-(-size // step) for size, step in zip(entry["shape"], shard, strict=True))
    )
    for place, expected in zip(places, entry["crc32"], strict=True):
        file = "/".join(["c", *map(str, place)])
        part = tuple(
            slice(at * step, min((at + 1) * step, size))
            for at, step, size in zip(place, shard, entry["shape"], strict=True)
        )
        try:
            content = np.ascontiguousarray(read_result(array[part].read(), f"{kv.url}/{key}"))
        except StorageError as error:
            errors.append(f"{kv.url}/{key}/{file} is damaged: {error}")
            continue
        if zlib.crc32(content.view(np.uint8).data) != expected:
            errors.append(f"{kv.url}/{key}/{file} is damaged: its checksum does not fit")
    return errors
