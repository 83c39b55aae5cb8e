"""Checkpoints of a run: written in the background, whole or not at all, read onto any mesh.

A checkpoint holds named trees of arrays and a JSON object of notes. Arrays are stored by their
paths in the tree, so that what is on disk knows nothing of Flax's and Optax's classes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ping_llm.environment import signals_held
from ping_llm.errors import CheckpointError, DataError
from ping_llm.models.trees import by_path, check_shapes
from ping_llm.outputs import digest_files, publish_json
from ping_llm.storage import Location, StoredFile

TREES = ("params", "opt_state")
_NOTES = "notes"
_OBJECTIVE = "valid_objective"  # among the notes


class Checkpoints:
    """The checkpoints in one directory, by step; a context manager.

    Opening it removes what a killed process left half written. Saving returns as soon as the
    arrays are copied; a failure to write is raised by the next `save`, `wait` or exit.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int | None,
        elsewhere: Mapping[int, float | None] | None = None,
        on_saved: Callable[[int, Mapping[int, float | None]], None] | None = None,
    ):
        """Opens `directory`, made where there is none.

        Args:
            directory: Where they are.
            keep: Number of newest checkpoints to keep, besides the best; None: for reading; opening
                changes nothing.
            elsewhere: Valid objectives, by step, of further checkpoints that are not in
                `directory`, but count for which are kept.
            on_saved: Called in the background with the step of each finished checkpoint and the
                objectives of those to keep; the next save waits for it.
        """
        self.directory = directory.absolute()
        self._keep, self._on_saved = keep, on_saved
        self._objectives: dict[int, float | None] = dict(elsewhere or {})
        self._pool = ThreadPoolExecutor(1)
        self._saved: Future[None] | None = None  # what `on_saved` still does
        options = ocp.CheckpointManagerOptions(preservation_policy=self, create=keep is not None)
        handlers: dict[str, ocp.CheckpointHandler] = {
            **{name: ocp.StandardCheckpointHandler() for name in TREES},
            _NOTES: ocp.JsonCheckpointHandler(),
        }
        with _failing_with(lambda line: f"{directory}: cannot be opened: {line}"):
            if keep is not None and jax.process_index() == 0:
                # Orbax's own cleaning leaves a directory killed between commit and rename.
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
            for step in self._manager.all_steps():
                self._objectives[step] = self._read_objective(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()  # the last one too has its list before the pool ends
            with _failing_with(self._not_written):
                self._manager.close()
        except CheckpointError:
            if kind is None:  # otherwise the error being raised says more
                raise
        finally:
            self._pool.shutdown()

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
        return best_step(self._objectives) if self._objectives else None

    def kept(self) -> dict[int, float | None]:
        """Returns the valid objective of each checkpoint that is to be kept, by its step."""
        steps = {*sorted(self._objectives)[-(self._keep or 0) :], self.best()}
        return {step: value for step, value in self._objectives.items() if step in steps}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tells Orbax which checkpoints are to be kept."""
        del context
        kept = self.kept()
        return [checkpoint.step in kept for checkpoint in checkpoints]

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
        self.wait()
        self._objectives = {**self._objectives, step: objective}
        self._objectives = self.kept()
        notes = {**notes, _OBJECTIVE: objective}
        items = {name: ocp.args.StandardSave(by_path(tree)) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, **{_NOTES: ocp.args.JsonSave(notes)})
        with _failing_with(self._not_written):
            self._manager.save(step, args=args, force=True)
        self._saved = self._pool.submit(self._after_save, step)

    def _after_save(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            objective = self._objectives.get(step)
            content = {"objective": objective, "files": _digests(self.directory / str(step))}
            publish_json(self._list_of(step), content)
            for file in self.directory.glob("*.json"):  # of checkpoints that are not kept
                if not file.with_suffix("").is_dir():
                    file.unlink()
        if self._on_saved is not None:
            self._on_saved(step, self._objectives)

    def _list_of(self, step: int) -> Location:
        return Location.of(self.directory) / f"{step}.json"

    def _check(self, step: int, trees: Iterable[str]) -> None:
        """Raises a `CheckpointError` where a file of some trees is not what was written."""
        where, damaged = self.directory / str(step), None
        skipped = tuple(f"{name}/" for name in {*TREES} - {*trees})
        if not self._list_of(step).is_file():  # killed before it was listed
            return
        try:
            listed = json.loads(self._list_of(step).read_text())["files"]
            found = _digests(where, skipped)
            meant = sorted(name for name in listed if not name.startswith(skipped))
            damaged = [name for name in meant if listed[name] != found.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError, DataError):
            raise CheckpointError(
                f"{self._list_of(step)} is damaged; remove it to use the checkpoint unchecked"
            ) from None
        if damaged:
            raise CheckpointError(
                f"{where}/{damaged[0]} is damaged: its checksum is another; remove {where} to go "
                "on from the checkpoint before it"
            )

    def wait(self) -> None:
        """Returns when all checkpoints are written, and `on_saved` has returned.

        Raises:
            CheckpointError: One could not be written.
        """
        with _failing_with(self._not_written):
            self._manager.wait_until_finished()
        if self._saved is not None:
            self._saved.result()

    def restore(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (trees, notes) of a checkpoint.

        Args:
            step: Its number.
            trees: By name, trees of `jax.ShapeDtypeStruct`; their shardings say where arrays go.
                Trees of the checkpoint that are not named are not read.
        """
        where = self.directory / str(step)

        def unreadable(line: str) -> str:
            return (
                f"{where}: cannot be read, it may be damaged: {line}; "
                "remove that directory to go on from the checkpoint before it"
            )

        self._check(step, trees)
        wanted = {name: by_path(tree) for name, tree in trees.items()}
        with _failing_with(unreadable):
            stored = self._manager.item_metadata(step)
            trees_stored = {name: stored[name].tree if stored[name] else {} for name in wanted}
        for name in wanted:
            shapes = {path: leaf.shape for path, leaf in trees_stored[name].items()}
            check_shapes(where, wanted[name], shapes)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        args = ocp.args.Composite(**items, **{_NOTES: ocp.args.JsonRestore()})
        with _failing_with(unreadable):
            read = self._manager.restore(step, args=args)
        restored = {}
        for name, tree in trees.items():
            leaves = [read[name][path] for path in wanted[name]]
            restored[name] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        notes = {name: value for name, value in read[_NOTES].items() if name != _OBJECTIVE}
        return restored, notes

    def _not_written(self, line: str) -> str:
        latest = self.latest()
        kept = "no earlier one exists" if latest is None else f"the one of step {latest} is intact"
        return f"{self.directory}: a checkpoint could not be written: {line}; {kept}"


def _digests(directory: Path, skipped: tuple[str, ...] = ()) -> dict[str, str]:
    """Returns the SHA-256 of the files below a directory but those whose names begin so."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    paths = {n: path for n, path in paths.items() if not n.startswith(skipped) and path.is_file()}
    stored = [StoredFile(Location.of(path), path.stat().st_size) for path in paths.values()]
    digests = digest_files(stored, shown=False)
    return {name: digest.sha256 for name, digest in zip(paths, digests, strict=True)}


def best_step(objectives: Mapping[int, float | None]) -> int:
    """Returns the step of the lowest objective, or the newest where none is known."""
    known = {step: value for step, value in objectives.items() if value is not None}
    return min(known, key=known.__getitem__) if known else max(objectives)


@contextlib.contextmanager
def _failing_with(message: Callable[[str], str]) -> Iterator[None]:
    """Makes any error a `CheckpointError`: a message about the first line of that error.

    Signals wait until the end: Orbax would take one for an error, or leave a save half done.
    """
    try:
        with signals_held():
            yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        lines = str(error).strip().splitlines()
        line = ": ".join([type(error).__name__, *(text[:300] for text in lines[:1])])
        raise CheckpointError(message(line)) from error
