"""The run directory of a training: claimed, checked against its settings, cleaned up."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ping_llm import outputs, sharding, storage, tokenizer
from ping_llm.data.network import KNOWN
from ping_llm.errors import ConfigError
from ping_llm.runs import RemoteRun, check_language, read_config, whole_steps
from ping_llm.settings import refuse_changes, to_json
from ping_llm.storage import Location
from ping_llm.training.settings import TrainSettings

SCHEMA_VERSION = 1
_OWN = {"config.json", "metrics.jsonl", "loss.png", "checkpoints", "wandb", KNOWN}


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run that this training alone writes.

    Attributes:
        path: Where its files are on this machine.
        remote: The run in the object store that they are copied to; None for a local run, and in
            all processes but the first.
        config: What its `config.json` is to hold.
    """

    path: Path
    remote: RemoteRun | None
    config: dict[str, Any]


@contextlib.contextmanager
def open_run(cfg: TrainSettings, data: Path, fingerprint: str) -> Iterator[RunDirectory]:
    """Claims the run directory `cfg.output` for all processes of this training.

    If a new run fails before it has logged a step, nothing is left of it.

    Args:
        cfg: The run's settings.
        data: Its data, on this machine.
        fingerprint: That of the data.

    Raises:
        ConfigError: Another process has claimed it, or it holds another run or something else.
        CheckpointError: Its files are damaged.
        StorageError: It cannot be read or written.
    """
    output = Location.of(cfg.output)
    stored = functools.partial(_stored_settings, output, data, fingerprint)
    with open_directory(output, what="train", settings=cfg, stored=stored) as (path, remote):
        yield RunDirectory(path, remote, _config(cfg, data, fingerprint))


@contextlib.contextmanager
def open_directory(
    output: Location,
    *,
    what: str,
    settings: Any,
    stored: Callable[[], Mapping[str, Any] | None],
    own: Collection[str] = _OWN,
) -> Iterator[tuple[Path, RemoteRun | None]]:
    """Claims a directory of checkpoints for all processes of a training; yields (path, remote).

    Both are as in `RunDirectory`. If a new training fails before it has logged a step, nothing is
    left of it.

    Args:
        output: The directory.
        what: The command, for messages.
        settings: The training's settings.
        stored: Returns the settings that `output` was begun with, or None.
        own: Names of what a training puts there.

    Raises:
        ConfigError: Another process has claimed it, or it was begun with other settings.
        StorageError: It cannot be read or written.
    """
    remote = None
    key = hashlib.sha256(output.url.encode()).hexdigest()[:24]
    path = output.path if output.is_local else storage.cache_root() / "runs" / key
    before = set(Location.of(path).names())
    with contextlib.ExitStack() as stack:
        with sharding.by_first_process() as is_first:
            if is_first:
                claim = outputs.claim(output, what=what, settings=settings, stored=stored)
                claimed = stack.enter_context(claim)
                if not output.is_local:
                    stack.enter_context(outputs.claim(Location.of(path), what=what))
                    path.mkdir(parents=True, exist_ok=True)
                    remote = RemoteRun(output, path, claimed)
        if not output.is_local and jax.process_count() > 1:
            sharding.check_shared(path)
        try:
            yield path, remote
        except BaseException:
            if is_first:
                _remove_unbegun(path, before, own)
            raise


def _stored_settings(output: Location, data: Path, fingerprint: str) -> Mapping[str, Any] | None:
    """Returns the settings of the run in `output`, or None where no checkpoint binds to them."""
    names = outputs.contents(output)
    if "config.json" not in names:
        # The only thing that a killed start leaves without it is an empty directory.
        if names and (names != ["checkpoints"] or (output / "checkpoints").names()):
            raise ConfigError(f"{output} is not empty and holds no run; choose another output")
        return None
    config = read_config(output)
    if not whole_steps(output):
        return None
    check_language(output, config)
    was = config["data"]
    if was["fingerprint"] != fingerprint:
        described = ((was["path"], was["fingerprint"]), (data, fingerprint))
        before, now = ({"data": f"{path} (fingerprint {name})"} for path, name in described)
        refuse_changes(before, now, output)
    return config["train"] | {"model": config["model"]}


def _config(cfg: TrainSettings, data: Path, fingerprint: str) -> dict[str, Any]:
    settings = to_json(cfg)
    return {
        "schema_version": SCHEMA_VERSION,
        "language_version": tokenizer.LANGUAGE_VERSION,
        "parameters": cfg.model.parameter_count(),
        "model": settings.pop("model"),
        "train": settings,
        "data": {"path": str(data), "fingerprint": fingerprint},
    }


def _remove_unbegun(path: Path, before: set[str], own: Collection[str]) -> None:
    """Removes what was made, beside what was there before, of a run that has logged no step."""
    run, metrics = Location.of(path), path / "metrics.jsonl"
    if (metrics.exists() and metrics.stat().st_size > 0) or whole_steps(run):
        return
    for name in set(own) - before:
        (run / name).remove()
    if not before:
        with contextlib.suppress(OSError):  # something else is in it
            path.rmdir()
