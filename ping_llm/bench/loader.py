"""How fast the loader makes training batches."""

import time
from typing import Any

import numpy as np

from ping_llm import settings
from ping_llm.bench.settings import BenchLoaderSettings
from ping_llm.data.pipeline import TrainLoader
from ping_llm.progress import progress
from ping_llm.resources import PeakMemory


@settings.takes(BenchLoaderSettings)
def bench_loader(chosen: BenchLoaderSettings) -> dict[str, Any]:
    """Returns how fast the loader makes training batches when nothing else holds it up.

    The clock runs from opening the data set to the last batch.

    Returns:
        By name:

        tokens_per_second: Tokens of the batches, padding included, per second of wall time.
        real_tokens_per_second: The same without padding.
        padding_fraction: Fraction of all tokens that is padding.
        tokens_per_cpu_second: Real tokens per second of this process's CPU time.
        first_batch_seconds: How long the first batch took.
        batches: Number of batches.
        seconds: Wall time.
        cpu_seconds: CPU time of this process.
        peak_rss_bytes: The most memory held at once, mapped files included.

    Raises:
        ConfigError: A setting cannot be.
        DataError: `data` is not a data set, or has no train rows.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    real = batches = 0
    first_batch_seconds = seconds = 0.0
    with (
        PeakMemory() as memory,
        TrainLoader(
            chosen.data, batch_size=chosen.batch_size, seq_len=chosen.seq_len, seed=chosen.seed
        ) as loader,
        progress("loader", total=chosen.seconds, unit="s") as bar,
    ):
        for batch in loader:
            seconds = time.perf_counter() - started
            first_batch_seconds = first_batch_seconds or seconds
            batches += 1
            real += int(np.count_nonzero(batch.segment_ids))
            bar.update(done=seconds)
            if seconds >= chosen.seconds:
                break
        cpu_seconds = time.process_time() - cpu_started
        peak_rss_bytes = memory.peak()
    tokens = batches * chosen.batch_size * chosen.seq_len
    return {
        "tokens_per_second": tokens / seconds,
        "real_tokens_per_second": real / seconds,
        "padding_fraction": 1 - real / tokens,
        "tokens_per_cpu_second": real / cpu_seconds,
        "first_batch_seconds": first_batch_seconds,
        "batches": batches,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": peak_rss_bytes,
    }
