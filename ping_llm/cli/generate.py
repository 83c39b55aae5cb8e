"""`ping-llm generate`."""

from pathlib import Path

import click

from ping_llm.cli.options import common_options, print_result


@click.command("generate")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of the model."
)
@click.option("--count", type=click.IntRange(min=1), required=True, help="How many measurements.")
@click.option(
    "--history",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measurements to go on from.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the samples.")
@common_options
def command(run: Path, count: int, history: Path | None, seed: int, as_json: bool) -> None:
    """Sample measurements from a model.

    Prints CSV as prepare-data reads it; a measurement that the model gives no time has none.
    """
    from ping_llm.prediction.generate import generate

    result = generate(run, count=count, history=history, seed=seed)
    names = ("event_time", "src_addr", "dst_addr", "ip_version", "rtt")
    lines = [",".join(names)]
    for each in result["measurements"]:
        lines.append(",".join("" if each[name] is None else str(each[name]) for name in names))
    print_result(result, as_json=as_json, text="\n".join(lines))
