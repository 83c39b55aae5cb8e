"""`ping-llm bench`."""

import importlib
from collections.abc import Callable
from typing import Any

import click

from ping_llm.bench import settings
from ping_llm.cli.options import settings_command


@click.group("bench")
def command() -> None:
    """Measure the throughput of one part on this machine."""


def _measures(
    name: str, cls: type[settings.Settings], module: str
) -> Callable[[Callable[[dict[str, Any]], str]], click.Command]:
    """Returns a decorator that makes what tells a result as text a command that measures.

    It runs `bench_<name>` of `ping_llm.bench.<module>`.
    """

    def decorate(as_text: Callable[[dict[str, Any]], str]) -> click.Command:
        def measure(chosen: Any) -> tuple[Any, str]:
            imported = importlib.import_module(f"ping_llm.bench.{module}")
            result = getattr(imported, f"bench_{name}")(chosen)
            return result, as_text(result)

        made = settings_command(name, cls)(measure)
        command.add_command(made)
        return made

    return decorate


@_measures("prepare", settings.BenchPrepareSettings, "prepare")
def prepare(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    return (
        f"{result['measurements_per_second'] / 1e6:.2f} M measurements/s "
        f"({result['measurements_per_cpu_second'] / 1e6:.2f} M per CPU second), "
        f"{result['peak_rss_bytes'] / 1e6:,.0f} MB"
    )


@_measures("loader", settings.BenchLoaderSettings, "loader")
def loader(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    return (
        f"{result['real_tokens_per_second'] / 1e6:.2f} M real tokens/s "
        f"({result['tokens_per_cpu_second'] / 1e6:.2f} M per CPU second), "
        f"{result['padding_fraction']:.2%} padding, {result['peak_rss_bytes'] / 1e6:,.0f} MB, "
        f"first batch after {result['first_batch_seconds']:.2f} s"
    )


@_measures("train", settings.BenchTrainSettings, "training")
def train(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    text = (
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['step_seconds']:.3f} s per step, "
        f"{result['flops_per_second'] / 1e9:,.1f} GFLOP/s{mfu}, "
        f"{result['peak_device_bytes'] / 1e6:,.0f} MB"
    )
    names = {"bare_jax": "bare JAX", "pytorch": "PyTorch", "pytorch_compiled": "torch.compile"}
    for key, name in names.items():
        speedup = result[key]
        text += "" if speedup is None else f"; {speedup:.2f} x {name}"
    return text


@_measures("predict", settings.BenchPredictSettings, "prediction")
def predict(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    return (
        f"{result['pairs_per_second']:,.1f} pairs/s, "
        f"{result['pairs_per_second_with_history']:,.1f} after {result['history_tokens']} tokens "
        f"of history, {result['peak_rss_bytes'] / 1e6:,.0f} MB"
    )


@_measures("extract", settings.BenchExtractSettings, "extraction")
def extract(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    text = (
        f"{result['real_tokens_per_second']:,.1f} real tokens/s with storing, "
        f"{result['forward_tokens_per_second']:,.1f} without ({result['store_cost']:+.1%} time), "
        f"{result['padding_fraction']:.1%} padding; "
        f"store {result['write_bytes_per_second'] / 1e6:,.0f} MB/s, "
        f".npy {result['npy_bytes_per_second'] / 1e6:,.0f} MB/s"
    )
    if (theirs := result["transformers_tokens_per_second"]) is not None:
        speedup = result["real_tokens_per_second"] / theirs
        text += f"; transformers {theirs:,.1f} real tokens/s, ours {speedup:.2f} x"
    return text
