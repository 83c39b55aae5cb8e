"""`ping-llm detect`."""

from typing import TYPE_CHECKING

from ping_llm.cli.options import settings_command
from ping_llm.prediction.settings import DetectSettings

if TYPE_CHECKING:
    from ping_llm.prediction.detect import Event

SHOWN = 5  # addresses of an event


@settings_command("detect", DetectSettings)
def command(chosen: DetectSettings) -> tuple[object, str]:
    """Runs the command."""
    from ping_llm.prediction.detect import detect

    result = detect(chosen)
    summary = (
        f"{len(result.events):,} events, {result.alarms:,} alarms in {result.source_days:,.1f} "
        f"days of sources, {result.measurements:,} measurements"
    )
    return result, "\n".join([*map(_line, result.events), summary])


def _line(event: "Event") -> str:
    what = f"{event.failed:.0%} failed" if event.failed else ""
    if event.slower is not None:
        what += f"{', ' if what else ''}RTT x {event.slower:.2f}"
    return (
        f"{event.start} to {event.end}  {_names(event.sources)} -> {_names(event.destinations)}  "
        f"{event.measurements} strange, {what}"
    )


def _names(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more
