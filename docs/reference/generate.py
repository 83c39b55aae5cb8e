"""Writes the pages of this directory that are made from the code: `nox -s docs`.

A test compares the pages with what this makes, so they stay true.
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from ping_llm import settings
from ping_llm.cli import COMMANDS, cli
from ping_llm.cli.options import SettingsCommand
from ping_llm.settings import Setting

HERE = Path(__file__).parent
MADE = "<!-- Made by generate.py from the code: `nox -s docs`. -->"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yields (words of the command, command), in order of names; a group before its commands."""
    for name in sorted(COMMANDS):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from (
                (f"{name} {sub}", command.commands[sub]) for sub in sorted(command.commands)
            )


def summary(text: str | None) -> str:
    """Returns the first paragraph of a docstring or help text as one line."""
    return inspect.cleandoc(text or "").split("\n\n")[0].replace("\n", " ")


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Returns the lines of a table and an empty one."""
    lines = [list(headers), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [*(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines), ""]


# --- cli.md --------------------------------------------------------------------------------------


def cli_page() -> str:
    """Returns docs/reference/cli.md."""
    lines = [
        "# Command line",
        "",
        MADE,
        "",
        "Every command takes `--help`, `--json` (print one JSON object), and `--debug` (show the",
        "traceback of an error). Results go to standard output, all else to standard error.",
        "`python -m ping_llm` does the same as `ping-llm`.",
        "",
        *table(
            ("exit code", "meaning"),
            [
                ("0", "Done."),
                ("1", "An error. One line says what, which value and what to do."),
                ("2", "Wrong usage."),
                ("130, 143", "Stopped by SIGINT or SIGTERM. Work is saved."),
            ],
        ),
    ]
    described = list(commands())
    links = [
        (f"[`{words}`](#ping-llm-{words.replace(' ', '-')})", summary(command.help))
        for words, command in described
    ]
    lines += table(("command", ""), links)
    for words, command in described:
        lines += [f"## `ping-llm {words}`", "", inspect.cleandoc(command.help or ""), ""]
        if isinstance(command, SettingsCommand):
            if settings.takes_file(command.settings_class):
                lines += [
                    "Takes `--config` and `--set`: see [configuration](configuration.md).",
                    "",
                ]
            described_settings = settings.describe(command.settings_class)
            shown = [each for each in described_settings if each.flag or each.argument]
            rows = [(_option(each), _kind(each), _default(each), each.help) for each in shown]
            lines += table(("option", "type", "default", ""), rows)
    return "\n".join(lines)


def _option(setting: Setting) -> str:
    if setting.argument:
        return f"`{setting.metavar or setting.name.upper()}`"
    flag = setting.name.replace("_", "-")
    turns_off = f" `--no-{flag}`" if setting.kind is bool and setting.default else ""
    return f"`--{flag}`{turns_off}"


def _kind(setting: Setting) -> str:
    kind = setting.type_text
    if setting.is_tuple:
        kind = f"list of {kind.removesuffix(',...')}"
    if setting.choices:
        words = ", ".join(f"`{choice}`" for choice in setting.choices)
        kind = f"some of {words}" if setting.is_tuple else f"one of {words}"
    or_none = "or `none`" if setting.optional and setting.default is not None else ""
    return ", ".join(filter(None, [kind, setting.bounds_text, or_none]))


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.kind is bool and not setting.default:
        return ""
    return setting.default_text or (
        f"`{setting.shown_default}`" if setting.shown_default else "empty"
    )


# --- configuration.md ----------------------------------------------------------------------------


def config_page() -> str:
    """Returns docs/reference/configuration.md."""
    lines = [
        "# Configuration",
        "",
        MADE,
        "",
        "The settings of the commands that take `--config FILE` and `--set KEY=VALUE`. Later",
        "sources win: defaults, `preset`, the file, `--set`, and flags of the command. The file is",
        "TOML, in which the settings of a table stand under its name:",
        "",
        "```toml",
        "steps = 2000",
        "",
        "[model]",
        "n_layers = 6",
        "```",
        "",
        "`--set model.n_layers=6` says the same. `none` stands for no value.",
        "",
    ]
    for words, cls in _configured():
        lines += [f"## `ping-llm {words}`", "", *_fields(cls)]
        for preset, values in getattr(cls, "presets", {}).items():
            assignments = ", ".join(f"`{name}={value}`" for name, value in _flat(values))
            lines.append(f"- Preset `{preset}`: {assignments or 'the defaults'}.")
        lines += [""] * (lines[-1] != "")
        for name, table_class in _tables(cls):
            lines += [f"### `[{name}]`", "", summary(table_class.__doc__), ""]
            lines += _fields(table_class)
    return "\n".join(lines)


def _configured() -> list[tuple[str, type]]:
    """Returns the commands that take a file, with their settings."""
    return [
        (words, command.settings_class)
        for words, command in commands()
        if isinstance(command, SettingsCommand) and settings.takes_file(command.settings_class)
    ]


def _fields(cls: type) -> list[str]:
    """Returns a table of the settings of a class."""
    described = [each for each in settings.describe(cls) if not each.is_table]
    headers = ["setting", "type", "default", ""]
    rows = [
        [f"`{each.name}`", _kind(each), _default(each) or "`false`", each.help]
        for each in described
    ]
    if any(each.changeable for each in described):
        headers.insert(3, "on resume")
        for row, each in zip(rows, described, strict=True):
            row.insert(3, "may change" * each.changeable)
    return table(headers, rows)


def _tables(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields (name, class) of the tables among the settings of a class, and those in them."""
    for each in settings.describe(cls):
        if each.is_table:
            yield prefix + each.name, each.kind
            yield from _tables(each.kind, f"{prefix}{each.name}.")


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, settings.Settings):
            fields = {
                each.name: getattr(value, each.name) for each in settings.describe(type(value))
            }
            defaults = {each.name: each.default for each in settings.describe(type(value))}
            value = {key: field for key, field in fields.items() if field != defaults[key]}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


PAGES = {"cli.md": cli_page, "configuration.md": config_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make())
