"""What all tests share. Four devices stand in for a mesh; JAX must be told before it starts.

No test reads or writes the user's cache of compiled programs: what passes must not hang on it.
"""

import json
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from sized_rows import write_sized_rows

from ping_llm.addresses import from_bytes
from ping_llm.data.rows import SCHEMA_VERSION, SPLITS, RowBatch, RowWriter

os.environ["PING_LLM_COMPILATION_CACHE"] = "off"
# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
).strip()


@pytest.fixture(scope="session")
def probe_rows(tmp_path_factory) -> Path:
    """A small data set: 12 probes with 40 measurements each, an RTT that the pair decides."""
    directory = tmp_path_factory.mktemp("rows")
    for split in SPLITS:
        writer = RowWriter(directory, split)
        writer.append(_rows(seed=SPLITS.index(split), probes=12, measurements=40))
        writer.close()
    metadata = {"schema_version": SCHEMA_VERSION, "rows": dict.fromkeys(SPLITS, 12)}
    (directory / "dataset.json").write_text(json.dumps(metadata))
    return directory


def _rows(*, seed: int, probes: int, measurements: int) -> RowBatch:
    rng = np.random.default_rng(seed)
    count = probes * measurements
    mapped = np.zeros((256, 16), np.uint8)  # 198.18.0.0 to 198.18.255.0
    mapped[:, 10:14] = 255, 255, 198, 18
    mapped[:, 14] = np.arange(256)
    source, destination = np.arange(probes), rng.integers(0, 20, count)
    distance = np.abs(np.repeat(source, measurements) - destination)
    times = 1_700_000_000 + np.sort(rng.integers(0, 86_400, (probes, measurements)))
    return RowBatch(
        src=from_bytes(mapped)[source],
        family=np.full(probes, 4, np.int8),
        offsets=np.arange(probes + 1, dtype=np.int64) * measurements,
        time=times.reshape(-1).astype(np.int64),
        dst=from_bytes(mapped)[destination],
        rtt=(1.0 + 10 * distance).astype(np.float32),
    )


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory):
    """Returns a function that writes rows of the sizes given to a new data set."""

    def write(train, valid=(), *, seed=0):
        return write_sized_rows(tmp_path_factory.mktemp("rows"), train, valid, seed=seed)

    return write
