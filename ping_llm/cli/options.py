"""What every command shares: `--json`, `--debug`, and how a result is printed."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import click


def _note_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value:
        ctx.find_root().meta["debug"] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_note_debug,
    help="Show the traceback of an error.",
)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json` (the argument `as_json`) and `--debug` to a command."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    return as_json(debug_option(command))


def print_result(result: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    """Puts `result` as one JSON object, or else `text`, on standard output."""
    click.echo(json.dumps(result, allow_nan=False) if as_json else text)
