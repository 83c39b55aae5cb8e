"""`ping-llm extract-activations`."""

import dataclasses
from typing import Any

import click

from ping_llm.cli.options import common_options, print_result


@click.command("extract-activations")
@click.option("--model", required=True, help="Checkpoint directory, hub id, or run of our own.")
@click.option("--input", required=True, help="File, directory or glob; local, gs:// or s3://.")
@click.option("--output", required=True, help="The store; local, gs:// or s3://.")
@click.option(
    "--format",
    default="text",
    show_default=True,
    help="A record is: text, chat, tokens, arc or measurements.",
)
@click.option("--layers", default="all", show_default=True, help="all, or such as 0,5; -1: last.")
@click.option(
    "--sites",
    default="residual",
    show_default=True,
    help="Some of residual, attn, mlp, embed, final_norm, with commas.",
)
@click.option("--max-length", type=int, help="Tokens of the longest prompt.  [default: 2048]")
@click.option(
    "--overlong",
    default="error",
    show_default=True,
    help="Longer ones: error, truncate-left, truncate-right or split.",
)
@click.option("--batch-tokens", type=int, help="Tokens computed at once.  [default: 8192]")
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: the model's]")
@click.option("--compression", default="none", show_default=True, help="none or zstd.")
@click.option("--unit-mb", default=1.0, show_default=True, help="MB of input in a work unit.")
@click.option(
    "--lease-seconds",
    type=float,
    default=60.0,
    show_default=True,
    help="A unit whose worker gives no sign of life for so long is free again; equal for all.",
)
@click.option("--worker-id", help="Name of this worker.  [default: made up]")
@click.option(
    "--arc-encoder",
    help="Grids are written: minimal or separated, with + and any of row-numbers, shape-header, "
    "code-block.  [default: minimal]",
)
@click.option(
    "--arc-augmentations", type=int, help="Prompts made of each test of an ARC task.  [default: 1]"
)
@click.option(
    "--arc-colors",
    help="Their permutations of colours move: keep (none), foreground (all but 0) or all.  "
    "[default: foreground]",
)
@click.option("--arc-seed", type=int, help="Seed of the augmentations.  [default: 0]")
@click.option("--mesh", default="", help="Devices by axis, such as data=-1,fsdp=1,tensor=1.")
@click.option(
    "--coordinator", help="Several processes, one model: address of process 0, HOST:PORT."
)
@click.option("--num-processes", type=int, help="Several processes: how many.")
@click.option("--process-id", type=int, help="Several processes: which one this is, from 0.")
@click.option("--limit", type=int, help="Take this many records only, the first ones.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@common_options
def command(as_json: bool, **arguments: Any) -> None:
    """Write a model's activations over a data set into a store.

    Run it again with the same OUTPUT to go on where it stopped. Any number of workers may run the
    same command on one OUTPUT.
    """
    from ping_llm.extraction.run import DryRunResult, extract_activations

    result = extract_activations(**arguments)
    if isinstance(result, DryRunResult):
        shapes = ", ".join(f"{rows} x {width}" for rows, width in result.shapes)
        text = (
            f"{result.samples:,} samples, {result.tokens:,} tokens in {result.units:,} units; "
            f"{result.bytes / 1e9:,.2f} GB in {len(result.bytes_by_array)} arrays; "
            f"batches of {shapes}, {result.padding_fraction:.1%} padding; "
            f"{result.overlong:,} overlong, {result.empty:,} empty"
        )
    else:
        text = (
            f"{result.samples:,} samples, {result.tokens:,} tokens, "
            f"{result.tokens_per_second:,.0f} tokens/s, {result.bytes_written / 1e9:,.2f} GB, "
            f"{result.padding_fraction:.1%} padding; {result.overlong:,} overlong, "
            f"{result.empty:,} empty  {result.output}"
        )
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
