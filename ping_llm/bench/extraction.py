"""How fast activations are extracted, and how fast they are stored."""

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from ping_llm import settings, sharding
from ping_llm.activations.store import UnitPrompts, site_arrays
from ping_llm.activations.writer import UnitWriter
from ping_llm.bench.settings import BenchExtractSettings
from ping_llm.errors import ConfigError
from ping_llm.extraction import parity
from ping_llm.extraction.batches import make_batches
from ping_llm.extraction.extractor import Extractor
from ping_llm.extraction.model import open_model
from ping_llm.extraction.prompts import open_source
from ping_llm.extraction.run import ExtractResult, extract_activations
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.models import huggingface
from ping_llm.storage import KeyValueStore

WRITTEN_BYTES = 512 << 20
WIDTH, ARRAY = 896, "residual.00000"


@dataclasses.dataclass(frozen=True)
class BenchExtractResult:
    """How fast an extraction was, on prompts of random token ids.

    Attributes:
        real_tokens_per_second: With storing; loading and compiling are not counted.
        tokens_per_second: The same, padding included.
        padding_fraction: Fraction of all tokens that is padding.
        forward_tokens_per_second: Real tokens, of the forward pass alone.
        store_cost: What storing adds to the wall time of the forward pass, as a fraction of it.
        write_bytes_per_second: Of the store's writer alone.
        npy_bytes_per_second: Of `numpy.save` of the same rows to the same disk, flushed to it.
        transformers_tokens_per_second: Real tokens, of transformers' backbone, in batches of 4
            padded to their longest, with all CPUs; None: not measured.
        tokens: Real tokens extracted.
        bytes: Bytes stored.
        peak_device_bytes: The most memory used on one device; on a CPU, by the process.
    """

    real_tokens_per_second: float
    tokens_per_second: float
    padding_fraction: float
    forward_tokens_per_second: float
    store_cost: float
    write_bytes_per_second: float
    npy_bytes_per_second: float
    transformers_tokens_per_second: float | None
    tokens: int
    bytes: int
    peak_device_bytes: int


@settings.takes(BenchExtractSettings)
def bench_extract(chosen: BenchExtractSettings) -> BenchExtractResult:
    """Returns how fast activations are extracted, and how fast they are stored.

    Raises:
        ConfigError: A setting cannot be, or PyTorch or transformers is missing.
        CheckpointError: The model cannot be read.
    """
    if chosen.compare:
        parity.require_torch()
    if chosen.output is not None and not os.access(chosen.output, os.W_OK | os.X_OK):
        raise ConfigError(f"output={chosen.output!r} is not a local directory to write in")
    model = huggingface.resolve(chosen.model)
    prompts = _random_prompts(chosen, vocab_size=huggingface.read_config(model).vocab_size)
    transformers_seconds = None
    with tempfile.TemporaryDirectory(dir=chosen.output) as temporary:
        directory = Path(temporary)
        path = directory / "prompts.jsonl"
        lines = (json.dumps({"tokens": prompt.tolist()}) + "\n" for prompt in prompts)
        path.write_text("".join(lines))
        options = ExtractSettings(
            model=str(model),
            input=str(path),
            output=str(directory / "store"),
            format="tokens",
            layers=chosen.layers,
            sites=chosen.sites,
            dtype=chosen.dtype,
            batch_tokens=chosen.batch_tokens,
            max_length=chosen.max_length,
            unit_mb=1e3,
        )
        stored = extract_activations(options)
        assert isinstance(stored, ExtractResult)
        forward_seconds = _forward_seconds(options)
        write_speed, npy_speed = _write_speeds(directory, seed=chosen.seed)
    if chosen.compare:
        from ping_llm.bench import peers

        transformers_seconds = peers.transformers_seconds(
            model, prompts, dtype=chosen.dtype or "float32"
        )
    return BenchExtractResult(
        real_tokens_per_second=stored.tokens_per_second,
        tokens_per_second=stored.tokens_per_second / (1 - stored.padding_fraction),
        padding_fraction=stored.padding_fraction,
        forward_tokens_per_second=stored.tokens / forward_seconds,
        store_cost=stored.seconds / forward_seconds - 1,
        write_bytes_per_second=write_speed,
        npy_bytes_per_second=npy_speed,
        transformers_tokens_per_second=transformers_seconds
        and stored.tokens / transformers_seconds,
        tokens=stored.tokens,
        bytes=stored.bytes_written,
        peak_device_bytes=stored.peak_device_bytes,
    )


def _random_prompts(chosen: BenchExtractSettings, *, vocab_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(chosen.seed)
    mean = (chosen.min_length + chosen.max_length) / 2
    count = max(round(chosen.tokens / mean), 1)
    lengths = rng.integers(chosen.min_length, chosen.max_length + 1, count)
    return [rng.integers(0, vocab_size, length) for length in lengths]


def _forward_seconds(options: ExtractSettings) -> float:
    """Returns the time of the forward passes of an extraction that stores nothing."""
    source = open_model(options.model)
    cfg = source.fill_in(options)
    prompts = open_source(cfg, model=source.checkpoint, vocab_size=source.cfg.vocab_size)
    extractor = Extractor(source, cfg, sharding.make_mesh())
    arrays = site_arrays(cfg.sites, cfg.kept_layers).values()
    values = sum(source.cfg.width_of(site) for site, _ in arrays)
    started = time.perf_counter()
    for unit in prompts.units:
        for batch in make_batches(prompts.read(unit), cfg, values=values):
            jax.block_until_ready(extractor(batch))
    return time.perf_counter() - started - extractor.compile_seconds


def _write_speeds(directory: Path, *, seed: int) -> tuple[float, float]:
    """Returns bytes per second of (the store's writer, `numpy.save`), both flushed to the disk."""
    rows = WRITTEN_BYTES // (4 * WIDTH)
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH), np.float32)
    started = time.perf_counter()
    with open(directory / "rows.npy", "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    npy_seconds = time.perf_counter() - started
    (directory / "rows.npy").unlink()
    prompts = UnitPrompts(
        tokens=np.zeros(rows, np.int32),
        offsets=np.array([0, rows]),
        roles=np.zeros(rows, np.uint8),
        ids=["rows"],
        overlong=0,
        empty=0,
    )
    kv, norms = KeyValueStore(directory / "written"), np.ones(rows, np.float32)
    started = time.perf_counter()
    stored = {"dtype": values.dtype, "zstd": False, "store_identity": ""}
    writer = UnitWriter(kv, 0, "attempt", {ARRAY: WIDTH}, prompts, **stored)
    for first in range(0, rows, 2048):
        some = slice(first, first + 2048)
        writer.put(ARRAY, first, values[some], norms[some])
    attempt = writer.finish({})
    assert attempt is not None
    writer.commit(attempt)
    return values.nbytes / (time.perf_counter() - started), values.nbytes / npy_seconds
