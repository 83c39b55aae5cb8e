"""How fast measurements become probe rows."""

import tempfile
import time
from pathlib import Path
from typing import Any

from ping_llm import settings
from ping_llm.bench.settings import BenchPrepareSettings
from ping_llm.ingest.files import find_files
from ping_llm.ingest.prepare import prepare_data


@settings.takes(BenchPrepareSettings)
def bench_prepare(chosen: BenchPrepareSettings) -> dict[str, Any]:
    """Returns how fast the inputs become probe rows, which are thrown away.

    Returns:
        By name:

        measurements_per_second: Measurements in the rows, per second of wall time.
        measurements_per_cpu_second: The same per second of this process's CPU time.
        measurements: Number of measurements.
        rejected: Number of records that could not be used.
        input_bytes: Size of the inputs.
        seconds: Wall time.
        cpu_seconds: CPU time of this process.
        peak_rss_bytes: The most memory this process and its children held at once.

    Raises:
        ConfigError: A setting cannot be.
        DataError: An input is missing or broken, or holds no measurement.
    """
    size = sum(file.size for file in find_files(chosen.inputs))
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="ping-llm-bench-") as directory:
        made = prepare_data(
            chosen.inputs,
            output=Path(directory) / "rows",
            memory_limit=chosen.memory_limit,
            workers=chosen.workers,
        )
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu_started
    return {
        "measurements_per_second": made.measurements / seconds,
        "measurements_per_cpu_second": made.measurements / cpu_seconds,
        "measurements": made.measurements,
        "rejected": sum(made.rejected.values()),
        "input_bytes": size,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": made.peak_rss_bytes,
    }
