"""Writes the pages of this directory that are made from the code: `nox -s docs`.

A test compares the pages with what this makes, so they stay true.
"""

import inspect
from pathlib import Path

import click

from ping_llm.cli import COMMANDS, cli

HERE = Path(__file__).parent


def option_row(param: click.Parameter) -> str:
    """Returns one row of a command's table of arguments and options."""
    if isinstance(param, click.Argument):
        return f"| `{param.human_readable_name}` | | |"
    assert isinstance(param, click.Option)
    kind = "" if param.is_flag else f" {param.type.get_metavar(param, click.Context(cli)) or ''}"
    if not param.is_flag and not kind.strip():
        kind = f" {param.type.name}"
    default = param.default
    shown = "" if param.is_flag or not isinstance(default, str | int | float | Path) else default
    shown = "required" if param.required else (f"`{shown}`" if shown != "" else "")
    names = " / ".join(f"`{opt}`" for opt in param.opts)
    kind = kind.replace("|", "\\|").strip()
    return f"| {names} {kind} | {shown} | {param.help} |"


def command_lines(path: str, command: click.Command) -> list[str]:
    """Returns the section of one command, and those of its subcommands."""
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    lines = [f"## `{path}`", "", text, ""]
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            lines += command_lines(f"{path} {name}", command.commands[name])
        return lines
    rows = [option_row(param) for param in command.params]
    return [*lines, "| argument or option | default | |", "| --- | --- | --- |", *rows, ""]


def cli_page() -> str:
    """Returns docs/reference/cli.md."""
    lines = [
        "# Command line",
        "",
        "<!-- Made by generate.py from the code: `nox -s docs`. -->",
        "",
        "Exit codes: 0 done, 1 an error (one line says what, which value and what to do; `--debug`",
        "adds the traceback), 2 wrong usage, 130 / 143 stopped by SIGINT / SIGTERM, work saved.",
        "Results go to standard output, all else to standard error.",
        "",
    ]
    context = click.Context(cli)
    for name in sorted(COMMANDS):
        command = cli.get_command(context, name)
        assert command is not None
        lines += command_lines(f"ping-llm {name}", command)
    return "\n".join(lines)


def config_page() -> str:
    """Returns docs/reference/configuration.md."""
    from ping_llm.models.config import DecoderConfig, YarnScaling
    from ping_llm.settings import describe
    from ping_llm.training.settings import TrainSettings

    lines = [
        "# Configuration",
        "",
        "<!-- Made by generate.py from the code: `nox -s docs`. -->",
        "",
    ]
    for cls in (TrainSettings, DecoderConfig, YarnScaling):
        summary = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"## `{cls.__name__}`", "", summary, ""]
        lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
        for each in describe(cls):
            default = "required" if each.required else f"`{each.shown_default}`"
            kind, text = (part.replace("|", "\\|") for part in (each.type_text, each.help))
            bounds = f" {each.bounds_text.capitalize()}." if each.bounds else ""
            lines.append(f"| `{each.name}` | {kind} | {default} | {text}{bounds} |")
        lines.append("")
    return "\n".join(lines)


PAGES = {"cli.md": cli_page, "configuration.md": config_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make())
