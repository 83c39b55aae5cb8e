"""Plots, and one self-contained HTML page made of figures and tables.

matplotlib is used through its objects, never through `pyplot`: no global state, no display.
"""

import base64
import hashlib
import html
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ping_llm.outputs import Claim, publish_file, publish_text
from ping_llm.storage import Location
from ping_llm.text import safe_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")


def figure(
    *, columns: int = 1, width: float = 8.0, height: float = 4.0
) -> "tuple[Figure, list[Axes]]":
    """Returns a figure in inches, with a row of plain axes in it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    fig = Figure(figsize=(width, height), layout="constrained")
    axes = list(fig.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.grid(True, color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    return fig, axes


def log_axis(ax: "Axes") -> None:
    """Gives `ax` a log scale to the right, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    ax.set_xscale("log")
    low, high = ax.dataLim.intervalx
    # Within one or two decades the powers of ten alone would be too few labels.
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    ax.minorticks_off()


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values of the lines that have a finite number under `key`."""
    points = [(line["step"], line.get(key)) for line in metrics]
    kept = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def loss_plot(metrics: Sequence[Mapping[str, Any]], location: str | Path | Location) -> None:
    """Writes a PNG of a run's losses against its steps.

    Args:
        metrics: Lines of `metrics.jsonl`: `step`, and where present `loss`, `valid_loss` and the
            losses of single fields, `loss_<field>`. A line may lack any of the losses.
        location: The file, local or remote; an older one is replaced in one move.
    """
    from matplotlib.ticker import MaxNLocator

    keys = dict.fromkeys(key for line in metrics for key in line)
    fields = [key for key in keys if key.startswith("loss_") and _series(metrics, key)[0]]
    fig, axes = figure(columns=2 if fields else 1, width=11 if fields else 7, height=4.2)

    curves = [(axes[0], "loss", "train", COLOURS[0]), (axes[0], "valid_loss", "valid", COLOURS[1])]
    for key, colour in zip(fields, itertools.cycle(COLOURS), strict=False):
        curves.append((axes[-1], key, key.removeprefix("loss_"), colour))
    for ax, key, label, colour in curves:
        steps, values = _series(metrics, key)
        if steps:
            # A marker only where points are few: a single one would not be seen.
            marker = "o" if len(steps) <= 30 else None
            ax.plot(steps, values, color=colour, marker=marker, markersize=4, label=label)
    axes[0].set_title("Loss")
    if fields:
        axes[1].set_title("Training loss by field")
    for ax in axes:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("nats per token")
        ax.set_ylim(bottom=0.0)
        if ax.lines:
            ax.legend(frameon=False)
    with publish_file(Location.of(location)) as path:
        fig.savefig(path, format="png", dpi=130)


# --- one HTML page -------------------------------------------------------------------------------

# Nothing may be fetched, not even by mistake; pictures are inside the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1000px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .18rem 1.1rem .18rem 0; vertical-align: top;
         border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
td { min-width: 3.5em; } td:first-child { min-width: 7.5em; } td.number { min-width: 0; }
th { color: #666; font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; }
pre { overflow-x: auto; background: #f7f7f7; padding: .7rem; font-size: 13px; }
table.sortable th { cursor: pointer; vertical-align: bottom; white-space: normal;
                    overflow-wrap: normal; }
table.sortable th, table.sortable td { padding-right: .6rem; min-width: 0; }
table.sortable td:not(.number) { min-width: 9em; }
th[data-order=down]::after { content: " \\2193"; } th[data-order=up]::after { content: " \\2191"; }
.good { color: #00734f; } .bad { color: #b23c00; font-weight: 600; } .quiet { color: #666; }
"""


class Html(str):
    """Text that is markup already; anything else is escaped where it enters a page."""


def markup(value: object) -> Html:
    """Returns `value` as markup: itself where it is `Html`, else its text, made safe."""
    return value if isinstance(value, Html) else Html(safe_html(value))


def span(text: object, css_class: str) -> Html:
    """Returns `text` in a span of that class."""
    return Html(f'<span class="{html.escape(css_class)}">{markup(text)}</span>')


def table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: str = ""
) -> Html:
    """Returns a table; `numbers` has an "n" for each column to align to the right, else a "-"."""
    kinds = [' class="number"' if c == "n" else "" for c in numbers.ljust(len(headers), "-")]

    def line(cells: Sequence[object], tag: str) -> str:
        pairs = zip(cells, kinds, strict=True)
        return "".join(f"<{tag}{kind}>{markup(cell)}</{tag}>" for cell, kind in pairs)

    head = f"<tr>{line(headers, 'th')}</tr>" if any(headers) else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return Html(f"<table>{head}{body}</table>")


def picture(fig: "Figure", description: str) -> Html:
    """Returns a figure as an image inside the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ping-llm"}):  # ids inside are random otherwise
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return Html(f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">')


# Sorts a table by the column whose header is clicked, and the other way round at the next click.
_SORTING = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.querySelectorAll('th')];
  heads.forEach((head, column) => head.addEventListener('click', () => {
    const down = head.dataset.order !== 'down';
    heads.forEach(each => delete each.dataset.order);
    head.dataset.order = down ? 'down' : 'up';
    const text = row => row.children[column].textContent;
    const number = row => parseFloat(text(row).replace(/[,#]/g, ''));
    const rows = [...table.querySelectorAll('tr')].slice(1);
    const numeric = rows.every(row => !text(row) || !isNaN(number(row)));
    rows.sort((a, b) => numeric ? (number(b) || 0) - (number(a) || 0)
                                : text(a).localeCompare(text(b)));
    table.append(...(down ? rows : rows.reverse()));
  }));
}
"""


def sortable(content: Html) -> Html:
    """Returns a table of `table` that is sorted by the column whose header is clicked."""
    return Html(content.replace("<table>", '<table class="sortable">', 1))


def page(title: str, blocks: Iterable[Html]) -> str:
    """Returns a whole HTML page that needs nothing outside itself."""
    blocks, policy, script = list(blocks), _POLICY, ""
    if any('<table class="sortable">' in block for block in blocks):
        known = base64.b64encode(hashlib.sha256(_SORTING.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{known}'"  # this script and no other
        script = f"<script>{_SORTING}</script>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{markup(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{markup(title)}</h1>\n" + "\n".join(blocks) + f"\n{script}</body></html>\n"
    )


# --- files ---------------------------------------------------------------------------------------


def write_page(text: str, location: str | Path | Location, *, claim: Claim | None = None) -> None:
    """Writes a page to a local or remote file; an older one is replaced in one move.

    Raises:
        ConfigError: `location` is a directory.
        StorageError: It cannot be written.
    """
    publish_text(Location.of(location), text, claim=claim)
