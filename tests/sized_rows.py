"""Data sets of probe rows with rows of given sizes, for tests."""

import json

import numpy as np

from ping_llm.addresses import MAPPED_PREFIX, from_bytes
from ping_llm.data.rows import SPLITS, FlatRows, RowWriter


def make_row(rng, n, *, version=4, source=0):
    """Makes one probe row of n measurements, each with a destination and an RTT of its own."""
    address = np.zeros((n + 1, 16), np.uint8)
    if version == 4:
        address[:, :12] = np.frombuffer(MAPPED_PREFIX, np.uint8)
    address[:, 12] = version
    address[:, 13] = source
    address[1:, 14:] = np.arange(n, dtype=">u2").view(np.uint8).reshape(-1, 2)
    return FlatRows(
        src_addr=from_bytes(address[:1] | np.uint8(128) * (np.arange(16) == 12)),
        ip_version=np.array([version], np.int8),
        offsets=np.array([0, n]),
        event_time=np.sort(rng.integers(0, 40 * n + 1, n)) + 1_700_000_000,
        dst_addr=from_bytes(address[1:]),
        rtt=np.where(rng.random(n) < 0.05, -1, rng.gamma(2, 30, n)).astype(np.float32),
    )


def write_sized_rows(directory, train, valid=(), *, seed=0):
    """Returns `directory`, in which rows of these sizes now make a data set."""
    rng, counts = np.random.default_rng(seed), {}
    for split, sizes in zip(SPLITS, (train, valid, ()), strict=True):
        writer = RowWriter(directory, split)
        for i, n in enumerate(sizes):
            writer.append(make_row(rng, n, version=6 if i % 3 == 2 else 4, source=i))
        writer.close()
        counts[split] = writer.rows
    metadata = {"schema_version": 1, "rows": counts, "sizes": [list(train), list(valid), seed]}
    (directory / "dataset.json").write_text(json.dumps(metadata))
    return directory
