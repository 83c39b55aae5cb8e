"""How far a run is: `inspect-run`."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from ping_llm import runs, settings
from ping_llm.data.network import KNOWN
from ping_llm.data.rows import data_fingerprint
from ping_llm.errors import CheckpointError, PingLLMError
from ping_llm.storage import Location
from ping_llm.training.metrics import read_whole_lines
from ping_llm.training.settings import InspectRunSettings, TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectRunResult:
    """How far a run is.

    Attributes:
        run: The run.
        kind: "run" or "export".
        parameters: Of its decoder.
        step: The last step that was logged; 0 where none was.
        steps: How many it is to have.
        seconds: Time spent on training steps so far.
        tokens: Real tokens seen so far.
        skipped_steps: Steps that changed nothing.
        losses: Of each logged step that was evaluated, and of the last, the line of metrics.jsonl.
        checkpoints: `step`, `bytes`, `objective` on the valid split, and whether it is the `best`,
            which is what commands take without --step.
        bytes: Size of all files.
        model: Shape of its decoder.
        settings: What it is trained with.
        changed: Names of the settings that are not those of its preset.
        data: `path` and `fingerprint` of its data, and what is at that path now: `same`, `other` or
            `not found`.
        known_bytes: Size of what it answers from.
    """

    run: str
    kind: str
    parameters: int
    step: int
    steps: int
    seconds: float
    tokens: int
    skipped_steps: int
    losses: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    bytes: int
    model: dict[str, Any]
    settings: dict[str, Any]
    changed: list[str]
    data: dict[str, Any]
    known_bytes: int


@settings.takes(InspectRunSettings)
def inspect_run(chosen: InspectRunSettings) -> InspectRunResult:
    """Returns how far a run is, or what an export holds; neither is changed.

    Raises:
        CheckpointError: It is no run, or is damaged.
        StorageError: It cannot be read.
    """
    run = Location.of(chosen.run)
    config = runs.read_config(run)
    try:
        parameters, steps = int(config["parameters"]), int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run / 'config.json'} is damaged ({error!r}); restore it") from None
    rows = _metrics(run / "metrics.jsonl")
    last = rows[-1] if rows else {}
    checkpoints = runs.stored_checkpoints(run)
    known = run / KNOWN
    return InspectRunResult(
        run=str(run),
        kind="export" if (run / runs.EXPORTED).is_file() else "run",
        parameters=parameters,
        step=last.get("step", 0),
        steps=steps,
        seconds=last.get("seconds", 0.0),
        tokens=last.get("tokens", 0),
        skipped_steps=last.get("skipped_steps", 0),
        losses=[row for row in rows if "valid_loss" in row or row is last],
        checkpoints=[
            {**dataclasses.asdict(each), "best": each.step == _best(checkpoints)}
            for each in checkpoints
        ],
        bytes=run.total_bytes(),
        model=config["model"],
        settings=config["train"],
        changed=_changed(config),
        data={**config["data"], "now": _state(config["data"])},
        known_bytes=known.size() if known.is_file() else 0,
    )


def _metrics(metrics: Location) -> list[dict[str, Any]]:
    if not metrics.is_file():
        return []
    with tempfile.TemporaryDirectory(prefix="ping-llm-") as temporary:
        local = metrics.path if metrics.is_local else Path(temporary) / metrics.name
        if not metrics.is_local:
            metrics.download(local)
        return read_whole_lines(local)


def _best(checkpoints: list[runs.StoredCheckpoint]) -> int | None:
    from ping_llm.checkpoints import best_step

    return best_step({each.step: each.objective for each in checkpoints}) if checkpoints else None


def _changed(config: dict[str, Any]) -> list[str]:
    """Returns the settings that are not those of the run's preset."""
    stored = config["train"] | {"model": config["model"]}
    given = {"data": "", "output": "", "preset": stored.get("preset", "tiny")}
    preset = settings.load(TrainSettings, flags=given)
    usual = settings.to_json(preset)
    return [name for name, value in stored.items() if usual.get(name) != value]


def _state(data: dict[str, Any]) -> str:
    try:
        return "same" if data_fingerprint(data["path"]) == data["fingerprint"] else "other"
    except PingLLMError:  # it is elsewhere, or no longer a data set
        return "not found"
