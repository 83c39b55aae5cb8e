"""`ping-llm bench`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ping_llm.cli.options import common_options, print_result


@click.group("bench")
def command() -> None:
    """Measure the throughput of one part on this machine."""


@command.command("loader")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of probe rows, as prepare-data writes it.",
)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Sequences in a batch.")
@click.option("--seq-len", type=int, default=1024, show_default=True, help="Tokens in a sequence.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long to measure.")
@click.option("--num-workers", type=int, default=0, show_default=True, help="Worker processes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order.")
@common_options
def loader(data: Path, as_json: bool, **settings: Any) -> None:
    """Measure how fast training batches are made of the rows in DATA.

    Real tokens are all but padding. The clock runs from opening the rows to the last batch.
    """
    from ping_llm.benchmarks import bench_loader

    result = bench_loader(data, **settings)
    text = (
        f"{result.real_tokens_per_second / 1e6:.2f} M real tokens/s "
        f"({result.tokens_per_cpu_second / 1e6:.2f} M a CPU second), "
        f"{result.padding_fraction:.2%} padding, "
        f"{result.peak_rss_bytes / 1e6:,.0f} MB, "
        f"first batch after {result.first_batch_seconds:.2f} s"
    )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
