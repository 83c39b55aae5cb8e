"""`ping-llm quickstart`."""

import dataclasses
from pathlib import Path

import click

from ping_llm.cli.options import common_options, print_result


@click.command("quickstart")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("quickstart"),
    show_default=True,
    help="Directory for everything that is made.",
)
@common_options
def command(output: Path, as_json: bool) -> None:
    """Run the whole story once on simulated data, in minutes.

    Simulates an internet, turns its measurements into probe rows, inspects them, trains a small
    decoder, compares it with classical methods and extracts its activations. Run it again to
    continue where it stopped.
    """
    from ping_llm.quickstart import quickstart

    result = quickstart(output)
    lines = [f"loss {result.loss_first:.3f} -> {result.loss_last:.3f} nats a token. Look at:"]
    lines += [f"  {path}  ({what})" for what, path in result.files.items()]
    print_result(dataclasses.asdict(result), as_json=as_json, text="\n".join(lines))
