"""`ping-llm inspect-data`."""

from pathlib import Path

import click

from ping_llm.cli.options import common_options, print_result


@click.command("inspect-data")
@click.argument("path")
@click.option("--samples", default=0, show_default=True, help="Contexts to show, decoded.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="An HTML page.")
@common_options
def command(path: str, samples: int, report: Path | None, as_json: bool) -> None:
    """Show what a data set holds, and what is wrong with it.

    PATH is a directory of probe rows, or measurements in any format that `prepare-data` reads: a
    file, a directory or a glob. Everything is read once, in bounded memory.
    """
    import dataclasses
    import shutil
    import sys

    from ping_llm.inspection.dataset import inspect_data
    from ping_llm.inspection.view import terminal_text

    result = inspect_data(path, samples=samples, report=report)
    width = min(shutil.get_terminal_size().columns, 120)
    text = "" if as_json else terminal_text(result, width=width, colour=sys.stdout.isatty())
    print_result(dataclasses.asdict(result), as_json=as_json, text=text)
