"""What every command shares: its options, from its settings; `--json`, `--debug`, the result."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ping_llm.settings import Setting, Settings

S = TypeVar("S", bound="Settings")


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


class SettingsCommand(click.Command):
    """A command whose arguments and options are those of a settings class."""

    settings_class: "type[Settings]"


def settings_command(
    name: str, cls: type[S]
) -> Callable[[Callable[[S], tuple[Any, str] | tuple[Any, str, int]]], click.Command]:
    """Returns a decorator that makes a function of settings a command.

    The command's arguments, options and help text are those of the settings. The function returns
    the result (a dataclass), the same as text, and, unless it is 0, the exit code.
    """
    from ping_llm import settings

    described = settings.describe(cls)
    params = [_parameter(each) for each in described if each.flag or each.argument]

    def decorate(function: Callable[[S], tuple[Any, ...]]) -> click.Command:
        @common_options
        @functools.wraps(function)
        def run(
            as_json: bool, config_file: str | None = None, overrides: tuple = (), **values: Any
        ) -> None:
            given = {key: value for key, value in values.items() if value is not None}
            chosen = settings.load(cls, config_file=config_file, overrides=overrides, flags=given)
            result, text, *code = function(chosen)
            print_result(result, as_json=as_json, text=text)
            if code:
                click.get_current_context().exit(code[0])

        if settings.takes_file(cls):
            params.extend(_file_options())
        command = click.command(name, SettingsCommand, params=params, help=settings.help_text(cls))(
            run
        )
        command.settings_class = cls
        return command

    return decorate


def _parameter(setting: "Setting") -> click.Parameter:
    is_choice = setting.choices and not setting.is_tuple
    kind = click.Choice(setting.choices) if is_choice else _Value(setting)
    if setting.argument:
        return click.Argument(
            [setting.name],
            type=click.STRING if setting.is_tuple else kind,
            nargs=-1 if setting.is_tuple else 1,
            required=setting.required,
            metavar=setting.metavar,
        )
    flag = "--" + setting.name.replace("_", "-")
    is_flag, is_off = setting.kind is bool, setting.default is False
    if is_flag and not is_off:
        flag += "/--no-" + flag.removeprefix("--")
    has_default = setting.default_text or (setting.default is not None and not is_off)
    shown = f"  [default: {setting.shown_default}]" if has_default else ""
    # None tells a flag that was not given from one that is off; Click would take it for a value of
    # a required option.
    default: dict[str, Any] = {} if setting.required else {"default": None}
    return click.Option(
        [flag, setting.name],
        type=None if is_flag else kind,
        is_flag=is_flag,
        required=setting.required,
        metavar=setting.metavar,
        help=setting.help + shown,
        **default,
    )


def _file_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--config", "config_file"],
            type=click.Path(),
            help="TOML file of settings; those of a table stand under its name, such as [model].",
        ),
        click.Option(
            ["--set", "overrides"],
            multiple=True,
            metavar="KEY=VALUE",
            help="One setting, such as seed=3 or model.n_layers=2. May be repeated.",
        ),
    ]


class _Value(click.ParamType):
    """The text of a setting's value."""

    def __init__(self, setting: "Setting") -> None:
        self.name = setting.type_text
        self.setting = setting

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Returns what stands for the value in `--help`."""
        del param, ctx
        return f"[{self.name}]" if self.setting.choices else self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the value; what settings refuse is wrong usage."""
        from ping_llm import settings
        from ping_llm.errors import ConfigError

        try:
            return settings.convert(self.setting, value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def print_result(result: Any, *, as_json: bool, text: str) -> None:
    """Puts `result`, a dataclass or mapping, as one JSON object, or else `text`, on stdout."""
    values = result if isinstance(result, Mapping) else dataclasses.asdict(result)
    click.echo(json.dumps(values, allow_nan=False) if as_json else text)
