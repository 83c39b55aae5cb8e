"""Parts of an extraction by themselves, for `ping-llm bench extract`."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ping_llm import sharding
from ping_llm.activations.writer import ArraySpec, UnitWriter
from ping_llm.extraction.batches import make_batches
from ping_llm.extraction.model import Extractor, open_model
from ping_llm.extraction.prompts import Prompts, open_source
from ping_llm.extraction.run import make_config
from ping_llm.storage import KeyValueStore

WRITTEN_BYTES = 512 << 20
WIDTH = 896


def forward_seconds(model: Path, path: Path, settings: Mapping[str, Any]) -> float:
    """Returns the time of the forward passes of an extraction that stores nothing."""
    source = open_model(model)
    cfg = make_config(source, **settings)
    prompts = open_source(
        str(path),
        cfg,
        model=source.checkpoint,
        vocab_size=source.cfg.vocab_size,
        law=source.law,
    )
    extractor = Extractor(source, cfg, sharding.make_mesh())
    started = time.perf_counter()
    for unit in prompts.units:
        for batch in make_batches(prompts.read(unit), cfg, d_model=source.cfg.d_model):
            jax.block_until_ready(extractor(batch))
    return time.perf_counter() - started - extractor.compile_seconds


def write_speeds(place: Path, *, seed: int) -> tuple[float, float]:
    """Returns bytes a second of (the store's writer, `numpy.save`), both to the disk's end."""
    rows = WRITTEN_BYTES // (4 * WIDTH)
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)
    started = time.perf_counter()
    with open(place / "rows.npy", "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    npy = time.perf_counter() - started
    (place / "rows.npy").unlink()
    prompts = Prompts(
        tokens=np.zeros(rows, np.int32),
        offsets=np.array([0, rows]),
        roles=np.zeros(rows, np.uint8),
        ids=["rows"],
        overlong=0,
        empty=0,
    )
    spec = ArraySpec("residual.00000", WIDTH, values.dtype)
    kv, norms = KeyValueStore(place / "written"), np.ones(rows, np.float32)
    started = time.perf_counter()
    writer = UnitWriter(kv, 0, "attempt", [spec], prompts, zstd=False, store_identity="")
    for at in range(0, rows, 2048):
        part = slice(at, at + 2048)
        writer.put(spec.name, at, values[part], norms[part])
    done = writer.finish({})
    assert done is not None
    writer.commit(done)
    written = time.perf_counter() - started
    return values.nbytes / written, values.nbytes / npy
