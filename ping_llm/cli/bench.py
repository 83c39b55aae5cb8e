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
    required=True,
    help="Directory of probe rows, as prepare-data writes it; may be remote.",
)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Sequences in a batch.")
@click.option("--seq-len", type=int, default=1024, show_default=True, help="Tokens in a sequence.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long to measure.")
@click.option("--num-workers", type=int, default=0, show_default=True, help="Worker processes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order.")
@common_options
def loader(data: str, as_json: bool, **settings: Any) -> None:
    """Measure how fast training batches are made of the rows in DATA.

    Real tokens are all but padding. The clock runs from opening the rows to the last batch.
    """
    from ping_llm.bench.measure import bench_loader

    result = bench_loader(data, **settings)
    text = (
        f"{result.real_tokens_per_second / 1e6:.2f} M real tokens/s "
        f"({result.tokens_per_cpu_second / 1e6:.2f} M a CPU second), "
        f"{result.padding_fraction:.2%} padding, "
        f"{result.peak_rss_bytes / 1e6:,.0f} MB, "
        f"first batch after {result.first_batch_seconds:.2f} s"
    )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)


@command.command("prepare")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--memory-limit", default="4GB", show_default=True, help="As in prepare-data.")
@click.option("--workers", type=int, help="Threads.  [default: one a CPU]")
@common_options
def prepare(inputs: tuple[str, ...], memory_limit: str, workers: int | None, as_json: bool) -> None:
    """Measure how fast INPUT becomes probe rows, which are thrown away.

    The rows are written to the temporary directory ($TMPDIR) for a while.
    """
    from ping_llm.bench.measure import bench_prepare

    result = bench_prepare(inputs, memory_limit=memory_limit, workers=workers)
    text = (
        f"{result.measurements_per_second / 1e6:.2f} M measurements/s "
        f"({result.measurements_per_cpu_second / 1e6:.2f} M a CPU second), "
        f"{result.peak_rss_bytes / 1e6:,.0f} MB"
    )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)


@command.command("train")
@click.option("--n-layers", default=4, show_default=True, help="Blocks.")
@click.option("--d-model", default=256, show_default=True, help="Width of the residual stream.")
@click.option("--n-heads", default=4, show_default=True, help="Heads.")
@click.option("--d-ff", default=704, show_default=True, help="Width of the MLP.")
@click.option("--vocab-size", default=267, show_default=True, help="Token ids.")
@click.option("--seq-len", default=512, show_default=True, help="Tokens in a row.")
@click.option("--batch-size", default=8, show_default=True, help="Rows in a batch.")
@click.option("--steps", default=10, show_default=True, help="Steps that are timed.")
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option(
    "--compare", is_flag=True, help="Plain JAX and PyTorch take turns; needs the extra [parity]."
)
@click.option("--seed", default=0, show_default=True, help="Seed of parameters and tokens.")
@common_options
def train(as_json: bool, **settings: Any) -> None:
    """Measure how fast the training step of a decoder of some shape is.

    On random tokens; compiling and loading data are not counted.
    """
    from ping_llm.bench.measure import bench_train

    result = bench_train(**settings)
    mfu = "" if result.mfu is None else f", MFU {result.mfu:.1%}"
    text = (
        f"{result.tokens_per_second:,.0f} tokens/s, {result.step_seconds:.3f} s a step, "
        f"{result.flops_per_second / 1e9:,.1f} GFLOP/s{mfu}, "
        f"{result.peak_device_bytes / 1e6:,.0f} MB"
    )
    beside = {
        "bare JAX": result.bare_jax,
        "PyTorch": result.pytorch,
        "torch.compile": result.pytorch_compiled,
    }
    for name, ratio in beside.items():
        text += "" if ratio is None else f"; {ratio:.2f} x {name}"
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)


@command.command("extract")
@click.option("--model", required=True, help="Checkpoint directory or hub id.")
@click.option("--tokens", default=20_000, show_default=True, help="About how many to extract.")
@click.option("--min-length", default=200, show_default=True, help="Tokens of the shortest prompt.")
@click.option("--max-length", default=1500, show_default=True, help="Tokens of the longest one.")
@click.option("--layers", default="all", show_default=True, help="all, or such as 0,5.")
@click.option("--sites", default="residual", show_default=True, help="Which sites, with commas.")
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the model's]")
@click.option("--batch-tokens", type=int, help="Tokens computed at once.  [default: 8192]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Directory to write in, for a while."
)
@click.option("--compare", is_flag=True, help="Run transformers too; needs the extra [parity].")
@click.option("--seed", default=0, show_default=True, help="Seed of the prompts.")
@common_options
def extract(as_json: bool, **settings: Any) -> None:
    """Measure how fast a model's activations are extracted and stored.

    On prompts of random token ids; loading and compiling are not counted.
    """
    from ping_llm.bench.measure import bench_extract

    result = bench_extract(**settings)
    text = (
        f"{result.real_tokens_per_second:,.1f} real tokens/s with storing, "
        f"{result.forward_tokens_per_second:,.1f} without ({result.store_cost:+.1%} time), "
        f"{result.padding_fraction:.1%} padding; "
        f"store {result.write_bytes_per_second / 1e6:,.0f} MB/s, "
        f".npy {result.npy_bytes_per_second / 1e6:,.0f} MB/s"
    )
    if result.transformers_tokens_per_second is not None:
        ratio = result.real_tokens_per_second / result.transformers_tokens_per_second
        text += (
            f"; transformers {result.transformers_tokens_per_second:,.1f} real tokens/s, "
            f"ours {ratio:.2f} x"
        )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)


@command.command("predict")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of the model."
)
@click.option("--pairs", type=int, default=2048, show_default=True, help="Pairs to predict.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the addresses.")
@common_options
def predict(run: Path, pairs: int, seed: int, as_json: bool) -> None:
    """Measure how fast RTT distributions are predicted, with and without history."""
    from ping_llm.bench.measure import bench_predict

    result = bench_predict(run, pairs=pairs, seed=seed)
    text = (
        f"{result.pairs_per_second:,.1f} pairs/s, "
        f"{result.pairs_per_second_with_history:,.1f} after {result.history_tokens} tokens of "
        f"history, {result.peak_rss_bytes / 1e6:,.0f} MB"
    )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
