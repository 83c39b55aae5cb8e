"""Weights & Biases, for those who want it: one run there for each run here, however often resumed.

The only file that imports wandb, and only where it is asked for: the import takes a second.
"""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ping_llm.errors import ConfigError
from ping_llm.outputs import publish_text
from ping_llm.storage import Location

PROJECT = "ping-llm"  # WANDB_PROJECT overrides it, as WANDB_ENTITY and the others do theirs


class Tracker:
    """Sends what a run says of itself to Weights & Biases; a context manager.

    Its files are in `RUN/wandb/`. The id of the run there is made once and kept in
    `RUN/wandb/id.txt`, so that a resumed run goes on with the same one.
    """

    def __init__(self, run: Path, *, mode: str, config: Mapping[str, Any]):
        """Begins or goes on with the run of the directory `run`.

        Args:
            run: The run directory.
            mode: As `TrainSettings.wandb`; `disabled` makes everything here do nothing.
            config: The settings to show.

        Raises:
            ConfigError: Weights & Biases cannot be used as asked.
        """
        self._run: Any = None
        if mode == "disabled":
            return
        import wandb

        id_file = run / "wandb" / "id.txt"
        if not id_file.exists():
            new_id = f"{time.strftime('%Y%m%d')}-{secrets.token_hex(6)}\n"
            publish_text(Location.of(id_file), new_id)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.absolute().name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=str(run),
                mode="online" if mode == "online" else "offline",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"wandb={mode}: {reason}; log in with `wandb login`, or use offline or disabled"
            ) from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a line of `metrics.jsonl` under its step."""
        if self._run is not None:
            known = {name: value for name, value in row.items() if value is not None}
            self._run.log(known, step=row["step"])

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
