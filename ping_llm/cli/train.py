"""`ping-llm train`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ping_llm.cli.options import common_options, print_result


@click.command("train")
@click.option(
    "--data",
    required=True,
    help="Directory of probe rows, as prepare-data writes it; may be remote.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Run directory: settings, metrics, checkpoints.",
)
@click.option("--preset", help="Model and its settings: tiny (default), small, base or large.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file of settings; those of the model stand under [model].",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, such as learning_rate=1e-3 or model.n_layers=2. May be repeated.",
)
@click.option("--steps", type=int, help="Optimizer steps of the whole run.")
@click.option("--batch-size", type=int, help="Sequences in a batch, over all devices.")
@click.option("--seq-len", type=int, help="Tokens in a sequence.")
@click.option("--mesh", help="Devices by axis, such as data=-1,fsdp=1,tensor=1; -1: what is left.")
@click.option("--seed", type=int, help="Seed of the parameters and of the order of the data.")
@click.option(
    "--wandb",
    help="Weights & Biases: disabled (default), offline or online.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Directory for XLA's trace of five steps, for TensorBoard or Perfetto.",
)
@click.option("--coordinator", help="Several processes: address of process 0, HOST:PORT.")
@click.option("--num-processes", type=int, help="Several processes: how many.")
@click.option("--process-id", type=int, help="Several processes: which one this is, from 0.")
@common_options
def command(as_json: bool, **arguments: Any) -> None:
    """Train a decoder on probe rows.

    Run it again with the same OUTPUT to go on from the newest checkpoint, with more --steps to
    train longer. Settings come from the preset, then --config, then --set, then the other flags.
    """
    from ping_llm.training.loop import train

    result = train(**arguments)
    speed = f"{result.real_tokens_per_second:,.0f} real tokens/s"
    valid = "" if result.valid_loss is None else f"  valid {result.valid_loss:.4f}"
    mfu = "" if result.mfu is None else f"  MFU {result.mfu:.1%}"
    text = f"step {result.step}  loss {result.loss:.4f}{valid}  {speed}{mfu}  {result.output}"
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
