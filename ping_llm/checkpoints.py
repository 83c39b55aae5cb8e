"""Checkpoints of a run: written in the background, whole or not at all, read onto any mesh.

A checkpoint holds named trees of arrays and a JSON object of notes. Arrays are stored by the name
of their place in the tree, so that what is on disk knows nothing of Flax's and Optax's classes.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers as policies

from ping_llm import tokenizer
from ping_llm.errors import CheckpointError, ConfigError, StorageError
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.models.safetensors import SafetensorsFile

TREES = ("params", "opt_state")
_NOTES = "notes"
_OBJECTIVE = "valid_objective"  # among the notes
EXPORTED = "model.safetensors"


class _Best:
    """Orbax's way to ask which checkpoints stay: the one of the lowest valid objective does."""

    def __init__(self, of: "Checkpoints"):
        self._of = of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = self._of.best()
        return [checkpoint.step == best for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints in one directory, by step; a context manager.

    Opening it removes what a killed process left half written. Saving returns as soon as the
    arrays are copied; a failure to write is raised by the next `save`, `wait` or exit.
    """

    def __init__(self, directory: str | Path, *, keep: int | None):
        """Opens `directory`, made where there is none.

        Args:
            directory: Where they are.
            keep: Number of newest checkpoints to keep, besides the best; None: for reading; opening
                changes nothing.
        """
        self.directory = Path(directory).absolute()
        self._objectives: dict[int, float] = {}  # of the checkpoints that have one
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), _Best(self)]
            ),
            create=keep is not None,
        )
        handlers: dict[str, ocp.CheckpointHandler] = {
            **{name: ocp.StandardCheckpointHandler() for name in TREES},
            _NOTES: ocp.JsonCheckpointHandler(),
        }
        try:
            if keep is not None and jax.process_index() == 0:
                # Orbax's own cleaning leaves a directory killed between commit and rename.
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
            for step in self._manager.all_steps():
                if (objective := self._read_objective(step)) is not None:
                    self._objectives[step] = objective
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(f"{directory}: cannot be opened: {_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # else the error on its way says more
                raise self._failed(error) from error

    def _read_objective(self, step: int) -> float | None:
        only_notes = ocp.args.Composite(**{_NOTES: ocp.args.JsonRestore()})
        try:
            return self._manager.restore(step, args=only_notes)[_NOTES][_OBJECTIVE]
        except Exception:  # a damaged checkpoint is not the best; whoever restores it is told
            return None

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the lowest valid objective, or the newest where none has one."""
        objectives = self._objectives
        return min(objectives, key=objectives.__getitem__) if objectives else self.latest()

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        notes: Mapping[str, Any],
        *,
        objective: float | None = None,
    ) -> None:
        """Begins to write a checkpoint, after waiting for the one before.

        Args:
            step: Its number.
            trees: Trees of arrays by their names in `TREES`. They may be donated once this
                returns: on a CPU, JAX does not reuse a buffer that Orbax is still reading.
            notes: What JSON can hold.
            objective: What is minimised, on the valid split at this step, where it is known.
        """
        if objective is not None:
            self._objectives[step] = objective
        notes = {**notes, _OBJECTIVE: objective}
        items = {name: ocp.args.StandardSave(_by_place(tree)) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, **{_NOTES: ocp.args.JsonSave(notes)})
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when everything is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (trees, notes) of a checkpoint.

        Args:
            step: Its number.
            trees: By name, trees of `jax.ShapeDtypeStruct`; their shardings say where arrays go.
                Trees of the checkpoint that are not named are not read.
        """
        where = self.directory / str(step)
        wanted = {name: _by_place(tree) for name, tree in trees.items()}
        try:
            stored = self._manager.item_metadata(step)
            shapes = {name: stored[name].tree if stored[name] else {} for name in wanted}
        except Exception as error:
            raise _unreadable(where, error) from error
        for name in wanted:
            _check_shapes(where, wanted[name], shapes[name])
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        args = ocp.args.Composite(**items, **{_NOTES: ocp.args.JsonRestore()})
        try:
            read = self._manager.restore(step, args=args)
        except Exception as error:
            raise _unreadable(where, error) from error
        restored = {
            name: jax.tree.unflatten(
                jax.tree.structure(tree), [read[name][at] for at in wanted[name]]
            )
            for name, tree in trees.items()
        }
        notes = {name: value for name, value in read[_NOTES].items() if name != _OBJECTIVE}
        return restored, notes

    def _failed(self, error: Exception) -> CheckpointError:
        latest = self.latest()
        kept = "no earlier one exists" if latest is None else f"the one of step {latest} is intact"
        return CheckpointError(
            f"{self.directory}: a checkpoint could not be written: {_line(error)}; {kept}"
        )


def load_run(run: str | Path) -> tuple[dict[str, Any], Any, Any]:
    """Returns (config, graphdef, params): `config.json` of a run and its best decoder.

    Which is that of the lowest valid objective among the checkpoints, or the newest one where none
    has a valid objective.

    The run may be in training meanwhile; nothing of it is changed. What `export_run` wrote is read
    the same way.

    Raises:
        CheckpointError: `run` is no run, has no checkpoint yet, is damaged, or was trained on
            another version of the token language.
    """
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        cfg = DecoderConfig.from_json(config["model"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{run} is not a run: it has no config.json; make one with `ping-llm train`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {_line(error)}; restore it") from None
    check_language(run, config)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    exported = Path(run) / EXPORTED
    if exported.exists():
        return config, graphdef, _read_exported(exported, abstract)
    checkpoints = Path(run) / "checkpoints"
    if not checkpoints.is_dir():
        raise CheckpointError(f"{run} has no checkpoint yet; train it for some steps first")
    with Checkpoints(checkpoints, keep=None) as stored:
        step = stored.best()
        if step is None:
            raise CheckpointError(f"{run} has no checkpoint yet; train it for some steps first")
        trees, _ = stored.restore(step, {"params": abstract})
    return config, graphdef, trees["params"]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export holds.

    Attributes:
        parameters: Number of parameters.
        bytes: Size of their file.
        output: The directory.
    """

    parameters: int
    bytes: int
    output: str


def export_run(run: str | Path, output: str | Path) -> ExportResult:
    """Writes a run's best decoder as one safetensors file beside its config.

    The directory can stand for the run wherever one is read: `predict`, `evaluate`, `generate`,
    `extract-activations`. Exporting again what is there already changes nothing.

    Raises:
        CheckpointError: `run` cannot be read.
        ConfigError: `output` holds something else.
        StorageError: `output` cannot be written.
    """
    from safetensors.numpy import save

    config, _, params = load_run(run)
    tensors = {name: np.asarray(leaf) for name, leaf in _by_name(params).items()}
    content = {
        EXPORTED: save(tensors, metadata={"format": "ping-llm"}),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
    output = Path(output)
    try:
        if output.is_dir() and any(output.iterdir()):
            held = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
            if held != content:
                raise ConfigError(f"{output} is not empty and holds another model; choose another")
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
            try:
                for name, data in content.items():
                    (building / name).write_bytes(data)
                building.chmod(0o755)
                building.replace(output)  # in one move: whoever sees it sees it whole
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error.strerror}") from None
    parameters = sum(tensor.size for tensor in tensors.values())
    return ExportResult(parameters, len(content[EXPORTED]), str(output))


def _by_name(params: Any) -> dict[str, Any]:
    """Returns parameters by the names they have in an export, such as `blocks.mlp.up.kernel`."""
    return {place.removesuffix(".value"): leaf for place, leaf in _by_place(params).items()}


def _read_exported(path: Path, abstract: Any) -> Any:
    names = _by_name(abstract)
    with SafetensorsFile(path) as file:
        stored = {
            name: jax.ShapeDtypeStruct(shape, file.dtypes[name])
            for name, shape in file.shapes.items()
        }
        _check_shapes(path, names, stored)
        values = [
            jax.device_put(file.read(name).astype(leaf.dtype), leaf.sharding)
            for name, leaf in names.items()
        ]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def check_language(run: str | Path, config: Mapping[str, Any]) -> None:
    """Raises a `CheckpointError` where the run of `config` was trained on other tokens."""
    version = config.get("language_version", 1)
    if version != tokenizer.LANGUAGE_VERSION:
        raise CheckpointError(
            f"{run} was trained on version {version} of the token language, this is version "
            f"{tokenizer.LANGUAGE_VERSION}; train it again"
        )


def _by_place(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_shapes(where: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{where} lacks {missing[0]}; it is of another model or damaged")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise CheckpointError(f"{where} holds {extra[0]}, which this model does not have")
    for place, leaf in wanted.items():
        if tuple(stored[place].shape) != tuple(leaf.shape):
            have, want = tuple(stored[place].shape), tuple(leaf.shape)
            raise CheckpointError(
                f"{where}: {place} has shape {have}, this model's has {want}; "
                "load it with the settings it was trained with"
            )


def _unreadable(where: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{where}: cannot be read, it may be damaged: {_line(error)}; "
        "remove that directory to go on from the checkpoint before it"
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
