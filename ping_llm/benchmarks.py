"""What `ping-llm bench` measures: honest throughput on this machine."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import psutil

from ping_llm.errors import ConfigError
from ping_llm.progress import progress


@dataclasses.dataclass(frozen=True)
class LoaderResult:
    """What the loader turned out, from opening the data set to the last batch.

    Attributes:
        tokens_per_second: Tokens of the batches, padding included, by the wall clock.
        real_tokens_per_second: The same without padding.
        padding_fraction: Padding among all tokens.
        tokens_per_cpu_second: Real tokens by the CPU time of this process and its workers.
        first_batch_seconds: How long the first batch took.
        batches: Batches taken.
        seconds: Wall time.
        cpu_seconds: CPU time of this process and its workers.
        peak_rss_bytes: Most memory at once, as seen ten times a second: this process and its
            workers, mapped files included.
    """

    tokens_per_second: float
    real_tokens_per_second: float
    padding_fraction: float
    tokens_per_cpu_second: float
    first_batch_seconds: float
    batches: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


class _Usage:
    """CPU time and memory of this process and its children."""

    def __init__(self) -> None:
        self._cpu: dict[int, float] = {}
        self._before = 0.0
        self.peak_rss_bytes = 0
        self.sample()
        self._before = self.cpu_seconds

    def sample(self) -> None:
        """Looks once; what children used after the last look is not seen."""
        own = psutil.Process(os.getpid())
        rss = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                rss += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self._cpu[process.pid] = times.user + times.system
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds used since this object was made, up to the last look."""
        return sum(self._cpu.values()) - self._before


def bench_loader(
    data: Path,
    *,
    batch_size: int = 32,
    seq_len: int = 1024,
    seconds: float = 10.0,
    num_workers: int = 0,
    seed: int = 0,
) -> LoaderResult:
    """Returns how fast the loader makes training batches when nobody else holds it up.

    Args:
        data: A directory of probe rows.
        batch_size: Sequences of a batch.
        seq_len: Tokens of a sequence.
        seconds: How long to take batches.
        num_workers: Worker processes; with 0, the loader is one thread of this process.
        seed: Seed of the order.

    Raises:
        ConfigError: A setting cannot be.
        DataError: `data` is not a data set, or has no train rows.
    """
    if not seconds > 0:
        raise ConfigError(f"{seconds=} must be above 0")
    # The time to import is not the loader's.
    from ping_llm.data.pipeline import TrainLoader

    usage, start = _Usage(), time.perf_counter()
    real = batches = 0
    first_batch_seconds = elapsed = looked = 0.0
    with (
        TrainLoader(
            data, batch_size=batch_size, seq_len=seq_len, seed=seed, num_workers=num_workers
        ) as loader,
        progress("loader", total=seconds, unit="s") as bar,
    ):
        for batch in loader:
            elapsed = time.perf_counter() - start
            first_batch_seconds = first_batch_seconds or elapsed
            batches += 1
            real += int(np.count_nonzero(batch.segment_ids))
            if elapsed - looked > 0.1:
                looked = elapsed
                usage.sample()
                bar.update(done=elapsed)
            if elapsed >= seconds:
                break
        usage.sample()
    tokens = batches * batch_size * seq_len
    return LoaderResult(
        tokens_per_second=tokens / elapsed,
        real_tokens_per_second=real / elapsed,
        padding_fraction=1 - real / tokens,
        tokens_per_cpu_second=real / max(usage.cpu_seconds, 1e-9),
        first_batch_seconds=first_batch_seconds,
        batches=batches,
        seconds=elapsed,
        cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=usage.peak_rss_bytes,
    )
