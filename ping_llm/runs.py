"""Run directories, local or in an object store: their configs, weights and finished checkpoints.

Orbax writes to local disks only. A run in an object store is trained in a local directory, and
each finished checkpoint is copied: first its files, then `checkpoints/<step>.json`, which lists
them with their checksums. A checkpoint without that list is not whole.
"""

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ping_llm import settings, tokenizer
from ping_llm.data.network import KNOWN
from ping_llm.errors import CheckpointError, ConfigError, DataError
from ping_llm.hashing import digest, file_digest
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.models.trees import by_path, check_shapes
from ping_llm.outputs import Claim, publish_json
from ping_llm.storage import Location
from ping_llm.text import safe

EXPORTED = "model.safetensors"
PRETRAINED = Location.of(Path(__file__).parent / "pretrained")  # the model in the box
# Beside the checkpoints.
_FILES = ("config.json", "metrics.jsonl", "loss.png", KNOWN, "wandb/id.txt")
_TRANSFERS = 8  # files at a time


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's decoder.

    Attributes:
        config: The content of its `config.json`.
        graphdef: The decoder's static part.
        params: Its parameters, an `nnx.State` on the first device.
    """

    config: dict[str, Any]
    graphdef: Any
    params: Any


def load_run(run: str | Path | Location, step: int | None = None) -> LoadedRun:
    """Returns the best decoder of a run directory or an export, local or remote.

    The best one has the lowest valid objective among the checkpoints; where none has a valid
    objective, it is the newest.

    The run may be in training meanwhile; nothing of it is changed.

    Args:
        run: Where it is.
        step: Of which checkpoint; None: the best.

    Raises:
        CheckpointError: `run` is no run, has no checkpoint yet or none of that step, is damaged, or
            was trained on another version of the token language.
        StorageError: `run` cannot be reached.
    """
    location = Location.of(run)
    config = read_config(location)
    check_language(location, config)
    try:
        cfg = settings.from_json(DecoderConfig, config["model"])
    except ConfigError as error:
        raise CheckpointError(f"{location / 'config.json'} is damaged: {error}") from None
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: leaf.update(sharding=on_device), shapes)
    exported = location / EXPORTED
    is_export = exported.is_file()
    if step is not None:
        _check_step(location, step, is_export)
    read = _read_exported if is_export else functools.partial(_read_checkpoint, step)
    if location.is_local:
        return LoadedRun(config, graphdef, read(location, location.path, abstract))
    with tempfile.TemporaryDirectory(prefix="ping-llm-") as temporary:
        directory = Path(temporary)
        if is_export:
            exported.download(directory / EXPORTED)
        elif objectives := _objectives(location):
            from ping_llm.checkpoints import best_step

            wanted = best_step(objectives) if step is None else step
            fetch_checkpoint(location, wanted, directory, only=("params/", "notes/", "_"))
        return LoadedRun(config, graphdef, read(location, directory, abstract))


def read_config(run: Location) -> dict[str, Any]:
    """Returns the content of a run's `config.json`.

    Raises:
        CheckpointError: It is absent or damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{run} is not a run: it has no config.json; make one with `ping-llm train`"
        )
    try:
        config = json.loads(path.read_text())
        if "model_type" in config:
            raise CheckpointError(
                f"{run} is no run but a checkpoint of {safe(config['model_type'])}; give it as "
                "--model to generate, extract-activations or verify-parity"
            )
        checksum = config.pop("checksum", None)  # none in runs of earlier versions
        _ = {**config["model"]}, {**config["train"]}, config["data"]["fingerprint"]
        if checksum not in (None, digest(config)):
            raise ValueError("its checksum is another")
    except (ValueError, KeyError, TypeError, DataError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged: {reason}; restore it") from None
    return config


def with_checksum(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `config.json` is to hold, which `read_config` checks."""
    return {**config, "checksum": digest(config)}


def check_language(run: Location, config: Mapping[str, Any]) -> None:
    """Raises a `CheckpointError` where the run of `config` was trained on other tokens."""
    version = config.get("language_version", 1)
    if version != tokenizer.LANGUAGE_VERSION:
        raise CheckpointError(
            f"{run} was trained on version {version} of the token language, this is version "
            f"{tokenizer.LANGUAGE_VERSION}; train it again"
        )


# --- weights -------------------------------------------------------------------------------------


def by_name(params: Any) -> dict[str, Any]:
    """Returns parameters by the names they have in an export, such as `blocks.mlp.up.kernel`."""
    return {path.removesuffix(".value"): leaf for path, leaf in by_path(params).items()}


def _read_exported(run: Location, directory: Path, abstract: Any) -> Any:
    from safetensors import SafetensorError, safe_open

    where, wanted = run / EXPORTED, by_name(abstract)
    try:
        with safe_open(directory / EXPORTED, framework="numpy") as file:
            checksum = (file.metadata() or {}).get("checksum")
            names = sorted(file.keys())
            if checksum not in (None, tensors_digest((n, file.get_tensor(n)) for n in names)):
                raise OSError("its checksum is another")
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            check_shapes(where, wanted, shapes)
            leaves = [
                jax.device_put(file.get_tensor(name).astype(leaf.dtype), leaf.sharding)
                for name, leaf in wanted.items()
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{where} is not a sound safetensors file ({error}); export it again"
        ) from None
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def tensors_digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Returns the SHA-256 of named tensors, which are in the order of their names."""
    sha256 = hashlib.sha256()
    for name, tensor in tensors:
        sha256.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        sha256.update(tensor.tobytes())
    return sha256.hexdigest()


def _check_step(run: Location, step: int, is_export: bool) -> None:
    if is_export:
        raise CheckpointError(f"{run} is an export of one checkpoint; leave step={step} out")
    if step not in (steps := whole_steps(run)):
        kept = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {kept}")


def _read_checkpoint(step: int | None, run: Location, directory: Path, abstract: Any) -> Any:
    from ping_llm.checkpoints import Checkpoints

    if (directory / "checkpoints").is_dir():
        with Checkpoints(directory / "checkpoints", keep=None) as checkpoints:
            if (wanted := checkpoints.best() if step is None else step) is not None:
                return checkpoints.restore(wanted, {"params": abstract})[0]["params"]
    raise CheckpointError(f"{run} has no checkpoint yet; train it for some steps first")


# --- checkpoints in an object store --------------------------------------------------------------


def _list_of(run: Location, step: int) -> Location:
    return run / "checkpoints" / f"{step}.json"


def _read_list(run: Location, step: int) -> dict[str, Any]:
    """Returns {objective: a number or None, files: {name: SHA-256}} of a remote checkpoint."""
    location = _list_of(run, step)
    try:
        content = json.loads(location.read_text())
        _ = content["objective"], {**content["files"]}
    except (ValueError, KeyError, TypeError, DataError):
        raise CheckpointError(
            f"{location} is damaged; remove it to use the checkpoint before it"
        ) from None
    return content


def whole_steps(run: Location) -> list[int]:
    """Returns the steps of the whole checkpoints of a run, local or remote."""
    kind = r"\d+" if run.is_local else r"\d+\.json"
    names = (run / "checkpoints").names()
    return sorted(int(name.partition(".")[0]) for name in names if re.fullmatch(kind, name))


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """A whole checkpoint of a run.

    Attributes:
        step: After how many steps it was written.
        bytes: Size of its files.
        objective: Valid objective at that step; None where it is not known.
    """

    step: int
    bytes: int
    objective: float | None


def stored_checkpoints(run: Location) -> list[StoredCheckpoint]:
    """Returns the whole checkpoints of a run, local or remote, in the order of their steps."""
    found = []
    for step in whole_steps(run):
        # A local one that was killed before it was listed is whole all the same.
        listed = _list_of(run, step).is_file()
        objective = _read_list(run, step)["objective"] if listed else None
        size = (run / "checkpoints" / str(step)).total_bytes()
        found.append(StoredCheckpoint(step, size, objective))
    return found


def _objectives(run: Location) -> dict[int, float | None]:
    """Returns the valid objective of each whole checkpoint of a remote run by its step."""
    return {step: _read_list(run, step)["objective"] for step in whole_steps(run)}


def fetch_checkpoint(
    run: Location, step: int, directory: Path, *, only: tuple[str, ...] = ("",)
) -> None:
    """Copies a checkpoint of a remote run to `directory / "checkpoints" / str(step)`.

    Args:
        run: The remote run.
        step: Which checkpoint.
        directory: The local run directory; files that are there already stay.
        only: Beginnings of the names of the files wanted, such as `params/`.

    Raises:
        CheckpointError: A file is not what was written.
        StorageError: A file cannot be read.
    """

    def fetch(item: tuple[str, str]) -> None:
        name, sha256 = item
        source, target = run / "checkpoints" / str(step), directory / "checkpoints" / str(step)
        for part in name.split("/"):
            source, target = source.child(part), target / part
        if target.is_file() and _digest(target) == sha256:
            return
        source.download(target)
        if _digest(target) != sha256:
            raise CheckpointError(
                f"{source} is damaged: its checksum is another; remove {_list_of(run, step)} to "
                "use the checkpoint before it"
            )

    files = _read_list(run, step)["files"]
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        list(pool.map(fetch, [item for item in files.items() if item[0].startswith(only)]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file)


class RemoteRun:
    """A run in an object store that is trained in a local directory.

    Attributes:
        objectives: Valid objective of each whole checkpoint by its step.
    """

    def __init__(self, location: Location, directory: Path, claim: Claim):
        """Makes the files in `directory` those of the run: its newest checkpoint and its log.

        Args:
            location: The run.
            directory: Where it is trained; what it holds of an earlier training is replaced.
            claim: The claim under which the run is written.
        """
        self._location, self._directory, self._claim = location, directory, claim
        self.objectives = _objectives(location)
        for name in (location / "checkpoints").names():  # what a killed process left half copied
            step = name.removesuffix(".json")
            if step.isdecimal() and int(step) not in self.objectives:
                (location / "checkpoints" / name).remove()
        newest = max(self.objectives, default=None)
        for other in (directory / "checkpoints").glob("*"):
            if other.name != str(newest):
                Location.of(other).remove()
        for name in _FILES:
            (directory / name).unlink(missing_ok=True)
            if newest is not None and (location / name).is_file():
                (location / name).download(directory / name)
        if newest is not None:
            fetch_checkpoint(location, newest, directory)

    def push(self, step: int, kept: Mapping[int, float | None]) -> None:
        """Copies a finished checkpoint and the files beside it; removes all but those `kept`.

        Args:
            step: Which checkpoint.
            kept: Valid objective of each checkpoint to keep by its step.
        """
        self.push_files()
        local = self._directory / "checkpoints" / str(step)
        remote = self._location / "checkpoints" / str(step)
        content = json.loads(_list_of(Location.of(self._directory), step).read_text())
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lambda name: (remote / name).upload(local / name), content["files"]))
        publish_json(_list_of(self._location, step), content, claim=self._claim)
        for old in self.objectives.keys() - kept.keys():
            _list_of(self._location, old).remove()
            (self._location / "checkpoints" / str(old)).remove()
        self.objectives = dict(kept)

    def push_files(self) -> None:
        """Copies the files beside the checkpoints."""
        self._claim.check()
        for name in _FILES:
            path, target = self._directory / name, self._location / name
            if path.is_file() and not (name == KNOWN and target.is_file()):  # which never changes
                target.upload(path)
