"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere.

It goes to standard error, which leaves standard output to results.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

PLAIN_INTERVAL_S = 10.0


class Progress:
    """How far a piece of work is. `update` is cheap enough to call at every step."""

    def __init__(self, title: str, total: float | None, unit: str, initial: float = 0.0):
        self.title, self.total, self.unit = title, total, unit
        self.initial = self.done = initial
        self.note = ""
        self.started = self._printed = time.monotonic()

    def update(self, advance: float = 0.0, *, done: float | None = None, note: str = "") -> None:
        """Moves on by `advance`, or to `done`; `note` is what stands at the end of the line."""
        self.done = self.done + advance if done is None else done
        self.note = note or self.note
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Returns one plain line: title, amount, rate, time left, note."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.initial) / elapsed
        total = f"/{self.total:,.0f} ({self.done / self.total:.0%})" if self.total else ""
        parts = [f"{self.title}: {self.done:,.0f}{total} {self.unit}", f"{rate:,.1f}/s"]
        if self.total and rate > 0:
            left = int(max(self.total - self.done, 0.0) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return "  ".join([*parts, self.note] if self.note else parts)

    def close(self) -> None:
        """Ends the display."""


class _Bar(Progress):
    """The same on a terminal, drawn by rich."""

    def __init__(self, title: str, total: float | None, unit: str, initial: float = 0.0):
        super().__init__(title, total, unit, initial)
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[amount]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task(
            title, total=total, completed=int(initial), amount="", note=""
        )
        self._bar.start()

    def _show(self) -> None:
        total = f"/{self.total:,.0f}" if self.total else ""
        amount = f"{self.done:,.0f}{total} {self.unit}"
        self._bar.update(self._task, completed=self.done, amount=amount, note=self.note)

    def close(self) -> None:
        self._bar.stop()


@contextlib.contextmanager
def progress(
    title: str, *, total: float | None = None, unit: str = "", initial: float = 0.0
) -> Iterator[Progress]:
    """Yields a `Progress` for work of `total` units (None: unknown), shown as stderr allows.

    `initial` units were done before, and do not count in the rate.
    """
    shown = (_Bar if sys.stderr.isatty() else Progress)(title, total, unit, initial)
    try:
        yield shown
    finally:
        shown.close()
