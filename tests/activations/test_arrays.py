import zlib

import numpy as np
import pytest

from ping_llm.activations.arrays import ShardedArray, open_array, verify_array
from ping_llm.activations.store import attempt_prefix
from ping_llm.storage import KeyValueStore

WIDTH = 1 << 16  # a row of 256 KiB, so that a chunk holds four rows and a shard eight


@pytest.mark.parametrize("rows", [1, 4, 8, 13, 16])
def test_an_array_is_whole_also_where_its_last_shard_is_not_full(tmp_path, rows):
    kv, key = KeyValueStore(tmp_path), attempt_prefix(0, "attempt") + "mlp.00000"
    written = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    array = ShardedArray(kv, key, written.shape, written.dtype, shard_bytes=2 << 20)
    for write, _ in array.put(0, written):
        write.result()
    metadata, _ = kv.read(f"{key}/zarr.json")
    entry = {
        "shape": list(array.shape),
        "shard_shape": array.shard_shape,
        "crc32": array.checksums,
        "zarr_crc32": zlib.crc32(metadata),
    }
    done = {"unit": 0, "attempt": "attempt", "arrays": {"mlp.00000": entry}}
    np.testing.assert_array_equal(open_array(kv, done, "mlp.00000").read().result(), written)
    assert verify_array(kv, done, "mlp.00000") == []
    entry["crc32"] = [checksum ^ 1 for checksum in entry["crc32"]]
    assert len(verify_array(kv, done, "mlp.00000")) == len(array.checksums)
