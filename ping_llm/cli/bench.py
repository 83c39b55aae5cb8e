"""`ping-llm bench`."""

from typing import Any

import click

from ping_llm import environment
from ping_llm.bench.settings import (
    BenchExtractSettings,
    BenchLoaderSettings,
    BenchPredictSettings,
    BenchPrepareSettings,
    BenchTrainSettings,
)
from ping_llm.cli.options import settings_command


def _in_its_environment(result: Any, text: str) -> tuple[Any, str]:
    """Returns figures with what holds in this process, which they depend on."""
    found = environment.in_force()
    cache = found["compilation_cache"] or "not kept"
    text += f"\nmemory kept: {'yes' if found['memory_kept'] else 'no'}; compiled programs: {cache}"
    return {**vars(result), "environment": found}, text


@click.group("bench")
def command() -> None:
    """Measure the throughput of one part on this machine."""


@command.add_command
@settings_command("prepare", BenchPrepareSettings)
def prepare(chosen: BenchPrepareSettings) -> tuple[Any, str]:
    """Runs the command."""
    from ping_llm.bench.prepare import bench_prepare

    result = bench_prepare(chosen)
    text = (
        f"{result.measurements_per_second / 1e6:.2f} M measurements/s "
        f"({result.measurements_per_cpu_second / 1e6:.2f} M per CPU second), "
        f"{result.peak_rss_bytes / 1e6:,.0f} MB"
    )
    return _in_its_environment(result, text)


@command.add_command
@settings_command("loader", BenchLoaderSettings)
def loader(chosen: BenchLoaderSettings) -> tuple[Any, str]:
    """Runs the command."""
    from ping_llm.bench.loader import bench_loader

    result = bench_loader(chosen)
    text = (
        f"{result.real_tokens_per_second / 1e6:.2f} M real tokens/s "
        f"({result.tokens_per_cpu_second / 1e6:.2f} M per CPU second), "
        f"{result.padding_fraction:.2%} padding, "
        f"{result.peak_rss_bytes / 1e6:,.0f} MB, "
        f"first batch after {result.first_batch_seconds:.2f} s"
    )
    return _in_its_environment(result, text)


@command.add_command
@settings_command("train", BenchTrainSettings)
def train(chosen: BenchTrainSettings) -> tuple[Any, str]:
    """Runs the command."""
    from ping_llm.bench.training import bench_train

    result = bench_train(chosen)
    mfu = "" if result.mfu is None else f", MFU {result.mfu:.1%}"
    text = (
        f"{result.tokens_per_second:,.0f} tokens/s, {result.step_seconds:.3f} s per step, "
        f"{result.flops_per_second / 1e9:,.1f} GFLOP/s{mfu}, "
        f"{result.peak_device_bytes / 1e6:,.0f} MB"
    )
    speedups = {
        "bare JAX": result.bare_jax,
        "PyTorch": result.pytorch,
        "torch.compile": result.pytorch_compiled,
    }
    for name, speedup in speedups.items():
        text += "" if speedup is None else f"; {speedup:.2f} x {name}"
    return _in_its_environment(result, text)


@command.add_command
@settings_command("predict", BenchPredictSettings)
def predict(chosen: BenchPredictSettings) -> tuple[Any, str]:
    """Runs the command."""
    from ping_llm.bench.prediction import bench_predict

    result = bench_predict(chosen)
    text = f"{result.pairs_per_second:,.1f} pairs/s, {result.peak_rss_bytes / 1e6:,.0f} MB"
    return _in_its_environment(result, text)


@command.add_command
@settings_command("extract", BenchExtractSettings)
def extract(chosen: BenchExtractSettings) -> tuple[Any, str]:
    """Runs the command."""
    from ping_llm.bench.extraction import bench_extract

    result = bench_extract(chosen)
    text = (
        f"{result.real_tokens_per_second:,.1f} real tokens/s with storing, "
        f"{result.forward_tokens_per_second:,.1f} without ({result.store_cost:+.1%} time), "
        f"{result.padding_fraction:.1%} padding; "
        f"store {result.write_bytes_per_second / 1e6:,.0f} MB/s, "
        f".npy {result.npy_bytes_per_second / 1e6:,.0f} MB/s"
    )
    if result.transformers_tokens_per_second is not None:
        speedup = result.real_tokens_per_second / result.transformers_tokens_per_second
        text += (
            f"; transformers {result.transformers_tokens_per_second:,.1f} real tokens/s, "
            f"ours {speedup:.2f} x"
        )
    return _in_its_environment(result, text)
