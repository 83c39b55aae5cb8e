"""The result of `inspect-data` as text of a terminal."""

import io
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ping_llm.inspection import cells
from ping_llm.inspection.result import InspectDataResult
from ping_llm.text import safe

BLOCKS = " ▁▂▃▄▅▆▇█"
# Numbers of ANSI colours by field of a token; 2 is dim.
FIELD_COLOURS = {"structure": 2, "source": 36, "destination": 32, "time": 33, "rtt": 35}


def bars(counts: Sequence[float] | np.ndarray, *, width: int, height: int) -> list[str]:
    """Returns a bar chart as `height` lines of at most `width` characters, top line first."""
    values = np.asarray(counts, float)
    if len(values) > width:
        # A bar takes its share of each value that it covers in part.
        edges = np.linspace(0, len(values), width + 1)
        values = np.diff(np.interp(edges, np.arange(len(values) + 1), np.cumsum([0, *values])))
    steps = np.ceil(values / (values.max(initial=0) or 1) * height * 8).astype(int)
    levels = [np.clip(steps - 8 * row, 0, 8) for row in range(height - 1, -1, -1)]
    return ["".join(BLOCKS[i] for i in level) for level in levels]


def _decades(edges: Sequence[float], length: int) -> str:
    """Returns the line below a chart with a log axis of times in ms: a label at each decade."""
    low, high = np.log10(edges[0]), np.log10(edges[-1])
    line = ""
    for decade in range(int(np.ceil(low)), int(np.floor(high)) + 1):
        column = round((decade - low) / (high - low) * length)
        label = f"{10.0**decade:g} ms" if decade < 3 else f"{10.0 ** (decade - 3):g} s"
        if column >= len(line) and column + len(label) < length:
            line = f"{line:<{column}}|{label} "
    return line


def terminal_text(result: InspectDataResult, *, width: int, colour: bool) -> str:
    """Returns the result as lines of at most `width` characters, with ANSI colours or without."""
    written = io.StringIO()
    system = "standard" if colour else None
    console = Console(
        file=written, width=width, force_terminal=colour, color_system=system, highlight=False
    )

    def show(text: str, style: str = "") -> None:
        console.print(Text(safe(text), style), overflow="fold")

    def show_table(table: cells.TextTable, left: int = 1) -> None:
        headers, lines = table
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for i, header in enumerate(headers):
            justify = "left" if i < left else "right"
            shown.add_column(Text(header), justify=justify, overflow="fold")
        for line in lines:
            shown.add_row(*(Text(safe(cell)) for cell in line))
        console.print(shown)

    def show_bars(title: str, counts: Sequence[float] | np.ndarray, height: int) -> int:
        show(title, "bold")
        lines = bars(counts, width=width - 2, height=height)
        for line in lines:
            show(line, "cyan")
        return len(lines[0])

    def show_times(title: str, counts: Sequence[float] | np.ndarray, height: int) -> None:
        length = show_bars(title, counts, height)
        start, end = result.time_first or "", result.time_last or ""
        show(f"{start}{end:>{max(length - len(start), len(end) + 3)}}", "dim")
        console.print()

    show(f"{result.path}: {result.kind}", "bold")
    console.print()
    for name, value in cells.summary(result):
        console.print(Text.assemble((f"{name:<20}", "dim"), value), overflow="fold")
    show_table(cells.rtts(result))

    show("checks", "bold")
    grid = Table.grid(padding=(0, 1))
    for check in result.checks:
        mark = Text("✓", "green") if check.ok else Text("✗", "bold red")
        grid.add_row(mark, check.name, Text(safe(check.detail), "dim" if check.ok else ""))
    console.print(grid)
    for reason, count in sorted(result.rejected.items()):
        show(f"    {count:>12,}  {reason}")
    console.print()

    rtt, over_time = result.distributions["rtt_ms"], result.distributions["time"]
    if rtt["edges"]:
        length = show_bars("RTT, log scale", np.add(rtt["ipv4"], rtt["ipv6"]), 5)
        show(_decades(rtt["edges"], length), "dim")
        console.print()
    if over_time["ipv4"]:
        show_times("measurements over time", np.add(over_time["ipv4"], over_time["ipv6"]), 3)
        if sum(over_time["failed"]):
            show_times("failures over time", over_time["failed"], 2)
    spread = cells.spread(result)
    if spread[1]:
        show_table(spread)
    if result.windows:
        console.print(Text(cells.windows_text(result.windows)))
    for title, entries in cells.tops(result):
        show_table(cells.top(title, entries[:5]))

    def paint(text: str, field: str) -> str:
        return f"\x1b[{FIELD_COLOURS[field]}m{text}\x1b[0m"

    for index, sample in enumerate(result.samples, 1):
        show(cells.sample_title(index, sample), "bold")
        measurements, more = cells.sample_measurements(sample)
        show_table(measurements, left=2)
        for line in cells.token_lines(sample, paint if colour else None):
            console.print(Text.from_ansi(line), overflow="fold")
        if more:
            show(f"... and {more} more measurements", "dim")
        console.print()
    text = written.getvalue()
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))
