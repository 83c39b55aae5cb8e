"""The settings of a command, stated once.

A command's settings are one frozen class, `class PrepareSettings(Settings)`. Its docstring says
what the command does and, under `Attributes:`, what each setting means; its fields hold the types,
defaults and bounds. Command-line options, `--config`, `--set`, the signature of the library
function, the reference page, the stored JSON and the refusal of changed settings are all derived
from it.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from ping_llm.errors import ConfigError

_BOUNDS = {
    "gt": ("above", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("below", operator.lt),
    "le": ("at most", operator.le),
}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_TYPE_TEXTS = {bool: "boolean", int: "integer", float: "float", str: "text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a settings class.

    Attributes:
        name: Name of the field.
        kind: Its type, without None.
        optional: Whether it may be None.
        default: Its default; None where it has none, see `required`.
        required: Whether it has no default.
        help: One or two sentences for whoever sets it.
        bounds: {`gt`, `ge`, `lt` or `le`: a number}; for a tuple, of each item.
        default_text: What to show in place of the default, such as what None stands for.
        changeable: Whether a resumed output may change it.
        stored: Whether it decides the result, so that it is stored and compared.
        argument: Whether it is an argument of the command instead of an option.
        location: Whether it is a path or URL.
        flag: Whether it is an option; one that is not is set by `--set` or `--config`.
        metavar: What stands for its value in `--help`.
        positional: Whether Python may give it by its place though it has a default.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    required: bool
    help: str
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    default_text: str | None = None
    changeable: bool = False
    stored: bool = True
    argument: bool = False
    location: bool = False
    flag: bool = True
    metavar: str | None = None
    positional: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it is a settings class itself, whose fields are set as `name.field`."""
        return dataclasses.is_dataclass(self.kind)

    @property
    def item_kind(self) -> Any:
        """The type of an item of a tuple, or else `kind`."""
        return typing.get_args(self.kind)[0] if self.is_tuple else self.kind

    @property
    def is_tuple(self) -> bool:
        """Whether it holds several values."""
        return typing.get_origin(self.kind) is tuple

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values it, or an item of it, may have; empty where any may be."""
        is_choice = typing.get_origin(self.item_kind) is Literal
        return typing.get_args(self.item_kind) if is_choice else ()

    @property
    def type_text(self) -> str:
        """Its type for a reader, such as `integer`, `pair|time` or `float,...`."""
        named = "table" if self.is_table else _TYPE_TEXTS.get(self.item_kind, "text")
        text = "path" if self.location else "|".join(map(str, self.choices)) or named
        return text + ",..." * self.is_tuple

    @property
    def bounds_text(self) -> str:
        """Its bounds for a reader, such as `at least 0 and below 1`; may be empty."""
        return " and ".join(f"{_BOUNDS[key][0]} {bound}" for key, bound in self.bounds.items())

    @property
    def shown_default(self) -> str:
        """Its default as `--help` and the reference page show it; empty where it has none."""
        if self.default_text is not None or self.required:
            return self.default_text or ""
        value = self.default
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def field(*, default: Any = dataclasses.MISSING, **properties: Any) -> Any:
    """Returns a field of a settings class.

    Args:
        default: Its default; a field without one must be given.
        properties: Bounds (`gt`, `ge`, `lt`, `le`) and further attributes of `Setting`.
    """
    bounds = {key: properties.pop(key) for key in _BOUNDS if key in properties}
    return dataclasses.field(default=default, metadata={"bounds": bounds, **properties})


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(field, dataclasses.field)
)
class Settings:
    """Base of settings classes; each subclass becomes a frozen dataclass with keyword arguments.

    Values are converted to the types of their fields and checked when an object is made, so a
    `ConfigError` names a bad one wherever it came from. The docstring of a subclass is the help
    text of its command and, under `Attributes:`, that of each setting. `presets` holds other
    defaults by the value of the field `preset`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for setting in describe(type(self)):
            value = convert(setting, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        self.check()

    def check(self) -> None:
        """Raises a `ConfigError` if values that are right by themselves do not fit together."""


S = TypeVar("S", bound=Settings)
R = TypeVar("R")


@functools.cache
def describe(cls: type) -> tuple[Setting, ...]:
    """Returns the fields of a settings class, in their order."""
    hints, helps = typing.get_type_hints(cls), _helps(cls)
    return tuple(
        _describe(each, hints[each.name], helps[each.name]) for each in dataclasses.fields(cls)
    )


def help_text(cls: type) -> str:
    """Returns what the docstring of a settings class says of its command."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\nAttributes:\n")[0]


def _helps(cls: type) -> dict[str, str]:
    """Returns what the docstrings of a class and its bases say of each attribute."""
    helps = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.split(r"^    (\w+): ", text, flags=re.MULTILINE)[1:]
        helps |= {k: " ".join(v.split()) for k, v in zip(entries[::2], entries[1::2], strict=True)}
    return helps


def _describe(each: dataclasses.Field, kind: Any, text: str) -> Setting:
    # `Literal["a"] | None` is a typing.Union, `int | None` is not.
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    kinds = typing.get_args(kind) if is_union else (kind,)
    optional = types.NoneType in kinds
    if optional:
        (kind,) = set(kinds) - {types.NoneType}
    required = each.default is dataclasses.MISSING
    return Setting(
        name=each.name,
        kind=kind,
        optional=optional,
        default=None if required else each.default,
        required=required,
        help=text,
        **{"flag": not dataclasses.is_dataclass(kind), **each.metadata},
    )


def takes_file(cls: type) -> bool:
    """Returns whether some fields have no option, so that `--config` and `--set` are needed."""
    return not all(setting.flag for setting in describe(cls))


def convert(setting: Setting, value: Any, name: str | None = None) -> Any:
    """Returns `value`, or what the text `value` stands for, in the type of a setting.

    Args:
        setting: What the value is for.
        value: A value from Python, TOML or JSON, or a text from a command line.
        name: What messages call the setting; None: by its name.

    Raises:
        ConfigError: The value has the wrong type, or is out of bounds.
    """
    name = name or setting.name
    if setting.optional and (value is None or (isinstance(value, str) and value == "none")):
        return None
    if setting.is_table:
        if isinstance(value, Mapping):
            return _make(setting.kind, value, f"{name}.")
        if not isinstance(value, setting.kind):
            raise ConfigError(f"{name} is a table: set its fields, {name}.<field>")
        return value
    if not setting.is_tuple:
        return _convert(setting, value, name)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        parts = [part.strip() for part in text.split(",")] if text else []
        value = [text] if setting.argument else parts
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}={value!r} is not a list")
    return tuple(_convert(setting, item, name) for item in value)


def _convert(setting: Setting, value: Any, name: str) -> Any:
    kind = setting.item_kind
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        if hasattr(value, "item"):  # a NumPy scalar
            value = value.item()
        # Python reads more forms of numbers than msgspec: .5, +3
        number = kind(value) if isinstance(value, str) and kind in (int, float) else value
        new = msgspec.convert(number, kind, strict=not isinstance(value, str))
        if isinstance(new, float) and not math.isfinite(new):
            raise ValueError
    except (ValueError, msgspec.ValidationError):
        if setting.choices:
            allowed = ", ".join(map(str, setting.choices))
            hint = _suggest(str(value), map(str, setting.choices))
            raise ConfigError(f"{name}={value!r} is not one of {allowed}{hint}") from None
        expected = _EXPECTED.get(kind, "a valid value")
        raise ConfigError(f"{name}={value!r} is not {expected}") from None
    if not all(_BOUNDS[key][1](new, bound) for key, bound in setting.bounds.items()):
        alternative = ", or none" if setting.optional else ""
        raise ConfigError(f"{name}={new} must be {setting.bounds_text}{alternative}")
    return new


def _read(cls: type, values: Mapping[str, Any], prefix: str = "", *, partial: bool = False) -> dict:
    """Returns the converted `values`; with `partial`, tables stay mappings of what was given."""
    settings = {setting.name: setting for setting in describe(cls)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if key not in settings:
            names = _names(cls, prefix)
            where = f"table [{prefix[:-1]}]" if prefix else _title(cls)
            raise ConfigError(f"{name!r} is not a setting of {where}{_suggest(key, names)}")
        setting = settings[key]
        if partial and setting.is_table and isinstance(value, Mapping):
            converted[key] = _read(setting.kind, value, f"{name}.", partial=True)
        else:
            converted[key] = convert(setting, value, name)
    return converted


def _make(cls: type[R], values: Mapping[str, Any], prefix: str = "") -> R:
    converted = _read(cls, values, prefix)
    required = (setting.name for setting in describe(cls) if setting.required)
    if missing := [name for name in required if name not in converted]:
        where = f"the table {prefix[:-1]}" if prefix else _title(cls)
        raise ConfigError(f"{where} needs {', '.join(missing)}")
    return cls(**converted)


def _title(cls: type) -> str:
    return re.sub("(?<!^)(?=[A-Z])", "-", cls.__name__.removesuffix("Settings")).lower()


def _names(cls: type, prefix: str = "") -> Iterable[str]:
    """Yields the full names of the settings of a class, then of those in its tables."""
    settings = describe(cls)
    yield from (prefix + setting.name for setting in settings)
    for setting in settings:
        if setting.is_table:
            yield from _names(setting.kind, f"{prefix}{setting.name}.")


def _suggest(word: str, names: Iterable[str]) -> str:
    """Returns a hint at the names that `word` resembles, is the initials of, or is a part of."""
    full: dict[str, str] = {}
    for name in names:
        full.setdefault(name.rpartition(".")[2], name)
    matches = [word] if word in full else difflib.get_close_matches(word, full, n=3)
    if not matches:
        parts = {last: last.split("_") for last in full}
        initials = {last: "".join(part[:1] for part in parts[last]) for last in full}
        matches = [last for last in full if word in (initials[last], *parts[last])]
    return f"; did you mean {' or '.join(full[last] for last in matches)}?" if matches else ""


def load(
    cls: type[S],
    *,
    config_file: str | os.PathLike | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Returns settings. Later sources win: defaults, preset, TOML file, `overrides`, `flags`.

    Args:
        cls: The settings class.
        config_file: TOML with the fields of `cls`, those of a table under `[table]`.
        overrides: `key=value` each; fields of a table are `table.field`.
        flags: Values by field.

    Raises:
        ConfigError: A setting is unknown, missing, or has a value that cannot be.
    """
    given: dict[str, Any] = {}
    if config_file is not None:
        _merge(given, _read_from(str(config_file), cls, _read_toml(config_file)))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value")
        nested: Any = value.strip()
        for name in reversed(key.strip().split(".")):
            nested = {name: nested}
        _merge(given, _read_from(f"--set {text}", cls, nested))
    _merge(given, _read(cls, flags or {}, partial=True))
    values = {each.name: each.default for each in describe(cls) if not each.required}
    _merge(values, cls.presets.get(str(given.get("preset", values.get("preset"))), {}))
    _merge(values, given)
    return _make(cls, values)


def _read_from(source: str, cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _read(cls, values, partial=True)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_toml(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text, which TOML must be") from None
    except (ValueError, RecursionError) as error:  # also a null byte in the path
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def _merge(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Updates `values` with `new`, table by table."""
    for key, value in new.items():
        if isinstance(value, Mapping):
            table = values.get(key) or {}
            values[key] = dict(table if isinstance(table, Mapping) else vars(table))
            _merge(values[key], value)
        else:
            values[key] = value


def to_json(settings: Any) -> dict[str, Any]:
    """Returns the settings that decide the result as JSON values, those of a table in an object."""
    stored = (each.name for each in describe(type(settings)) if each.stored)
    return {name: _plain(getattr(settings, name)) for name in stored}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return list(value) if isinstance(value, tuple) else value


def from_json(cls: type[S], stored: Mapping[str, Any], **not_stored: Any) -> S:
    """Returns the settings of which `to_json` made `stored`.

    Args:
        cls: The settings class.
        stored: What `to_json` returned.
        not_stored: Values of fields that are not stored; those left out have their defaults.

    Raises:
        ConfigError: A setting is unknown, missing, or has a value that cannot be.
    """
    return _make(cls, {**stored, **not_stored})


def differences(
    stored: Mapping[str, Any], now: Settings | Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns (name, stored value, value now) of each setting that may not differ but does.

    A setting that `stored` lacks, being newer, had its default.

    Args:
        stored: What `to_json` returned when the output was begun.
        now: The settings asked for, or a mapping of further facts of which none may differ.
    """
    after = now if isinstance(now, Mapping) else to_json(now)
    settings = () if isinstance(now, Mapping) else describe(type(now))
    free = {each.name for each in settings if each.changeable or not each.stored}
    before = {each.name: _plain(each.default) for each in settings} | dict(stored)
    changes = []
    for name in [name for name in {**after, **stored} if name not in free]:
        was, value = before.get(name), after.get(name)
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            table = now[name] if isinstance(now, Mapping) else getattr(now, name)
            changes += [(f"{name}.{inner}", *pair) for inner, *pair in differences(was, table)]
        elif was != value:
            changes.append((name, was, value))
    return changes


def refuse_changes(
    stored: Mapping[str, Any], now: Settings | Mapping[str, Any], where: object
) -> None:
    """Raises a `ConfigError` that names every one of the `differences`, if there are any.

    Args:
        stored: As in `differences`.
        now: As in `differences`.
        where: The output that was begun with `stored`.
    """
    if changes := differences(stored, now):
        changed = ", ".join(f"{name}={value!r}, was {was!r}" for name, was, value in changes)
        raise ConfigError(
            f"{where} was begun with other settings: {changed}; "
            "give these their old values, or choose another output"
        )


def takes(cls: type[S]) -> Callable[[Callable[[S], R]], Callable[..., R]]:
    """Returns a decorator that lets a function of settings be called with their fields.

    It can then be called as `f(settings)`, or with the fields of `cls` as arguments; those without
    a default, and those that say so, may be positional. Where `takes_file(cls)`, `config_file` and
    `overrides` are arguments too, as in `load`.
    """
    extra = {"config_file": None, "overrides": ()} if takes_file(cls) else {}
    hints = typing.get_type_hints(cls)

    def decorate(function: Callable[[S], R]) -> Callable[..., R]:
        keyword, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        ordered = sorted(describe(cls), key=lambda each: not (each.required or each.positional))
        required = {each.name for each in ordered if each.required}
        # After one that has a default all must have one.
        needed = None if any(each.positional for each in ordered) else inspect.Parameter.empty
        parameters = [
            inspect.Parameter(
                each.name,
                either if each.required or each.positional else keyword,
                default=needed if each.required else each.default,
                annotation=hints[each.name],
            )
            for each in ordered
        ]
        parameters += [inspect.Parameter(name, keyword, default=extra[name]) for name in extra]
        returns = inspect.signature(function).return_annotation
        signature = inspect.Signature(parameters, return_annotation=returns)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            if len(args) == 1 and not kwargs and isinstance(args[0], cls):
                return function(args[0])
            given: dict[str, Any] = {
                name: value
                for name, value in signature.bind(*args, **kwargs).arguments.items()
                if value is not None or name not in required
            }
            sources = {name: given.pop(name) for name in extra if name in given}
            return function(load(cls, flags=given, **sources))

        lines = [f"    {each.name}: {each.help}" for each in ordered]
        lines += ["    config_file: TOML file of settings."] * bool(extra)
        lines += ["    overrides: Settings as `key=value`."] * bool(extra)
        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])
        call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate
