"""`ping-llm export`."""

import dataclasses
from pathlib import Path

import click

from ping_llm.cli.options import common_options, print_result


@click.command("export")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of the model."
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@common_options
def command(run: Path, output: Path, as_json: bool) -> None:
    """Write a run's model as safetensors and a config.

    The directory can stand for the run in predict, evaluate, generate and extract-activations.
    """
    from ping_llm.checkpoints import export_run

    result = export_run(run, output)
    text = f"{result.parameters:,} parameters, {result.bytes / 1e6:,.1f} MB in {result.output}"
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
