"""Families of checkpoints. They differ in the values of a `DecoderConfig` and in a weight table.

A family is a module: `read_config` makes a `DecoderConfig` of a `config.json`, `write_config` the
other way round; `BLOCK` and `ENDS` name the tensor of each parameter.
"""

from types import ModuleType
from typing import Any

from ping_llm.errors import ConfigError
from ping_llm.models.families import llama

FAMILIES: dict[Any, ModuleType] = dict.fromkeys(llama.MEMBERS, llama)  # by `model_type`


def open(model_type: Any, where: str) -> ModuleType:  # noqa: A001
    """Returns the family of a `model_type`.

    Raises:
        ConfigError: It is not supported; the message begins with `where`.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
