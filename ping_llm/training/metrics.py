"""What a run says about itself: numbers gathered step by step, and the lines of `metrics.jsonl`."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ping_llm import sharding, tokenizer
from ping_llm.errors import StorageError, TrainingError
from ping_llm.outputs import publish_text
from ping_llm.storage import Location
from ping_llm.training import flops
from ping_llm.training.settings import TrainSettings

# Steps the host may run ahead of the devices: enough to keep them busy, few enough that the batches
# waiting there stay small.
MAX_IN_FLIGHT = 4


class Meter:
    """Gathers the metrics of steps, and fetches them from the devices only when asked.

    Attributes:
        tokens_per_second: Real tokens a second between the last two fetches.
        note: The same and the newest loss, for a progress bar; empty before the first fetch.
    """

    def __init__(self, cfg: TrainSettings, saved: Mapping[str, Any] | None = None):
        """Starts from nothing, or from what `state` gave when a checkpoint was written."""
        nothing = {"seconds": 0.0, "tokens": 0.0, "flops": 0.0, "skipped": 0, "skipped_in_a_row": 0}
        saved = saved or {"window": [], "totals": nothing}
        self._cfg = cfg
        self._window = deque(saved["window"], maxlen=cfg.log_every)
        self._totals: dict[str, float] = dict(saved["totals"])
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._clock = time.monotonic()
        self.tokens_per_second, self.note = 0.0, ""

    def start_clock(self) -> None:
        """Leaves out the time since the last fetch, which did not go into steps."""
        self._clock = time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes note of the metrics of a step, which may still be under way."""
        self._pending.append((step, metrics))
        if len(self._pending) >= MAX_IN_FLIGHT:
            self._pending[-MAX_IN_FLIGHT][1]["loss"].block_until_ready()

    def fetch(self) -> None:
        """Waits for every step so far and adds up what they gave.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        fetched = jax.device_get(self._pending)
        now, tokens = time.monotonic(), 0.0
        for step, metrics in fetched:
            values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
            tokens += values["tokens"]
            work = flops.training_flops(self._cfg.model, values["tokens"], values["pairs"])
            self._totals["flops"] += work
            if values["skipped"]:
                self._note_skipped(step, values["loss"], values["grad_norm"])
            else:
                self._totals["skipped_in_a_row"] = 0
                self._window.append(values)
        if self._pending:
            self._totals["tokens"] += tokens
            self._totals["seconds"] += now - self._clock
            self.tokens_per_second = tokens / (now - self._clock)
            loss = self._window[-1]["loss"] if self._window else math.nan
            self.note = f"loss {loss:.4f}  {self.tokens_per_second:,.0f} tokens/s"
        self._pending.clear()
        self._clock = now

    def _note_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self._totals["skipped"] += 1
        self._totals["skipped_in_a_row"] += 1
        shown = f"{loss=:.4g}, {grad_norm=:.4g}"
        print(f"step {step} skipped, nothing was changed: {shown}", file=sys.stderr, flush=True)
        if (count := self._totals["skipped_in_a_row"]) >= self._cfg.max_skipped_steps:
            larger = f"a larger spike_factor than {self._cfg.spike_factor}, or "
            raise TrainingError(
                f"step {step} is number {count:.0f} in a row that was skipped: {shown}; the "
                f"checkpoints before are kept; try {larger if math.isfinite(grad_norm) else ''}"
                f"a smaller learning_rate than {self._cfg.learning_rate}"
            )

    def row(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Returns the line of `metrics.jsonl` for a step whose metrics were fetched.

        Raises:
            TrainingError: No step so far was anything but skipped.
        """
        if not self._window:
            raise TrainingError(
                f"each of the first {step} steps was skipped; try a smaller learning_rate than "
                f"{self._cfg.learning_rate}"
            )
        sums = [(values["field_nll"], values["field_count"]) for values in self._window]
        positions = step * self._cfg.batch_size * self._cfg.seq_len
        totals, peak = self._totals, flops.peak_of_devices()
        seconds = totals["seconds"]
        return {
            "step": step,
            "loss": float(np.mean([values["loss"] for values in self._window])),
            **by_field("loss_", *np.sum(sums, axis=0)),
            "grad_norm": self._window[-1]["grad_norm"],
            "learning_rate": learning_rate,
            "real_tokens_per_second": self.tokens_per_second,
            "skipped_steps": totals["skipped"],
            "tokens": int(totals["tokens"]),
            "padding_fraction": 1 - totals["tokens"] / positions,
            "flops": totals["flops"],
            "mfu": totals["flops"] / seconds / peak if peak and seconds else None,
            "peak_device_bytes": sharding.peak_device_bytes(),
            "seconds": seconds,
        }

    def state(self) -> dict[str, Any]:
        """Returns what the next `Meter` of this run needs, as JSON values."""
        return {"window": list(self._window), "totals": dict(self._totals)}


def by_field(prefix: str, nll: np.ndarray, count: np.ndarray) -> dict[str, float | None]:
    """Returns the mean NLL of each field, named with `prefix`; None for a field without targets."""
    return {
        f"{prefix}{name}": float(nll[i] / count[i]) if count[i] else None
        for i, name in enumerate(tokenizer.FIELDS)
    }


class RunLog:
    """The lines of a run's `metrics.jsonl`, each step once.

    Attributes:
        rows: The lines so far.
    """

    def __init__(self, path: Path, *, last_step: int):
        """Reads the lines up to `last_step`; what comes after it is cut off before the next."""
        self._path = path
        self.rows = [row for row in read_whole_lines(path) if row["step"] <= last_step]

    def cut(self) -> None:
        """Makes the file hold `rows`, and nothing after them that a killed process left."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
        publish_text(Location.of(self._path), text)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line, and writes it where this is the process that writes."""
        self.rows.append(row)
        if jax.process_index() == 0:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
            except OSError as error:
                raise StorageError(f"{self._path}: cannot be written: {error.strerror}") from None


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`; damaged ones are told and left out."""
    rows = []
    lines = (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    )
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline, a kill has torn
        try:
            row = json.loads(line)
            _ = row["step"] < 0, {**row}
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            said = f"{path}: line {number} is damaged and left out"
            print(said, file=sys.stderr, flush=True)
    return rows
