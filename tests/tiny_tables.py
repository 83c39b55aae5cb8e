"""Small tables of measurements, and what was prepared from them."""

import numpy as np
import pyarrow as pa

T0 = 1_700_000_000


def make_table(n, *, seed=0, sources_=20, destinations=30, days=1):
    """Returns n random measurements of both families, with ties, duplicates and failures."""
    rng = np.random.default_rng(seed)
    v4 = [f"10.0.{i}.1" for i in range(sources_)], [f"10.1.{i}.1" for i in range(destinations)]
    v6 = [f"2001:db8::{i:x}" for i in range(sources_)], [f"2001:db8:1::{i:x}" for i in range(9)]
    family = rng.random(n) < 0.3
    src, dst = (
        np.where(family, rng.choice(six, n), rng.choice(four, n))
        for four, six in zip(v4, v6, strict=True)
    )
    rtt = np.where(rng.random(n) < 0.1, -1, rng.integers(1, 50, n))
    return pa.table(
        {
            "event_time": pa.array(T0 + rng.integers(0, days * 86400, n), pa.timestamp("s", "UTC")),
            "src_addr": src,
            "dst_addr": dst,
            "ip_version": pa.array(np.where(family, 6, 4), pa.int8()),
            "rtt": pa.array(rtt, pa.float32()),
        }
    )


def files_of(directory):
    """Returns the content of every file but the one that says how long it took."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "dataset.json"}
