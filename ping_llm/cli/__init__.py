"""The command line: one lazy Click group, then one thin module per command."""

import importlib
import signal
import sys
from typing import Any

import click

from ping_llm import __version__, environment
from ping_llm.cli.options import debug_option
from ping_llm.errors import ConfigError, PingLLMError, Stopped

# The first line of each command's help text. It is repeated here, under a test: `ping-llm --help`
# imports no command, which would take longer than all the rest.
COMMANDS = {
    "bench": "Measure the throughput of one part on this machine.",
    "detect": "Find what is strange in a stream of measurements.",
    "evaluate": "Compare a model with classical methods.",
    "export": "Write a run's model as safetensors and a config.",
    "extract-activations": "Write a model's activations over a data set into a store.",
    "generate": "Sample measurements from a model.",
    "inspect-activations": (
        "Show what an activation store holds, whether it is whole, and who is at work on it."
    ),
    "inspect-data": "Show what a data set holds, and what is wrong with it.",
    "predict": "Predict RTT distributions and failures.",
    "prepare-data": "Turn measurements into probe rows for training.",
    "quickstart": "Run the whole story once, in minutes.",
    "serve": "Answer questions over HTTP, and show a page.",
    "simulate": "Write the measurements of a synthetic internet.",
    "train": "Train a decoder on probe rows.",
    "verify-parity": "Compare a checkpoint's activations with those of transformers.",
}


class LazyGroup(click.Group):
    """Imports a command's module when it is asked for; turns errors into exit codes, once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands, sorted."""
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command of that name, or None where there is none."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"ping_llm.cli.{cmd_name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table of commands without importing any of them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command. Exits 1 after a `PingLLMError`, 130 / 143 after SIGINT / SIGTERM."""
        try:
            return super().invoke(ctx)
        except PingLLMError as error:
            if ctx.find_root().meta.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except (RuntimeError, AssertionError):  # what JAX raises where a device is not there
            if ctx.find_root().meta.get("debug") or (problem := environment.problem()) is None:
                raise
            click.echo(f"error: {problem}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to continue", err=True)
            ctx.exit(130)
        except Stopped as stopped:
            name = signal.Signals(stopped.signum).name
            click.echo(f"stopped by {name}; run the same command again to continue", err=True)
            ctx.exit(128 + stopped.signum)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ping-llm")
@debug_option
def cli() -> None:
    """Learn the internet's latencies, and read what language models compute."""


def _terminate(signum: int, _: object) -> None:
    raise Stopped(signum)


def main() -> None:
    """Runs the command line; the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        environment.prepare()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    cli()
