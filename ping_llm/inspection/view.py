"""What `inspect-data` found, for people: as text of a terminal and as an HTML page."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm import addresses, tokenizer
from ping_llm.report import COLOURS, Html, figure, log_axis, markup, page, picture, span, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ping_llm.inspection.checks import Check
    from ping_llm.inspection.dataset import InspectResult, Sample

FAMILY_NAMES = {"ipv4": "IPv4", "ipv6": "IPv6"}
SAMPLE_LINES = 8  # measurements of a context that are listed
TOKEN_LINES = 2  # measurements whose tokens are spelled out
BLOCKS = " ▁▂▃▄▅▆▇█"
# What a field looks like in a terminal: numbers of ANSI colours, 2 is dim.
FIELD_COLOURS: dict[str, int] = {
    "structure": 2,
    "source": 36,
    "destination": 32,
    "time": 33,
    "rtt": 35,
}
FIELD_STYLES: dict[str, str] = dict(
    zip(tokenizer.FIELDS, ("#777", "#0072B2", "#00734f", "#a05a00", "#a0307a"), strict=True)
)


# --- the same cells for both ----------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _summary(result: "InspectResult") -> list[tuple[str, str]]:
    def count(name: str) -> str:
        about = "about " if name in result.estimated else ""
        return f"{about}{getattr(result, name):,}"

    lines = [
        ("measurements", count("measurements")),
        ("failed", _percent(result.failed_fraction)),
        ("IPv6", _percent(result.ipv6_fraction)),
        ("probes (sources)", count("probes")),
        ("destinations", count("destinations")),
        ("address pairs", count("pairs")),
        ("duplicates", count("duplicates")),
        ("from", result.time_first or "-"),
        ("to", result.time_last or "-"),
    ]
    if result.kind == "rows":
        for split, rows in result.rows.items():
            held = result.measurements_by_split[split]
            lines.append((f"{split} rows", f"{rows:,} with {held:,} measurements"))
    if result.rejected:
        lines.append(("rejected", f"{sum(result.rejected.values()):,}"))
    return lines


FAMILY_HEADERS = ("RTT in ms", "measurements", "failed", "p5", "p25", "p50", "p75", "p95")


def _families(result: "InspectResult") -> list[list[str]]:
    lines = [("all", result.measurements, result.failed_fraction, result.rtt_ms)]
    for key, family in result.families.items():
        values = (family["measurements"], family["failed_fraction"], family["rtt_ms"])
        lines.append((FAMILY_NAMES[key], *values))
    return [
        [name, f"{count:,}", _percent(failed), *(_ms(v) for v in rtt_ms.values())]
        for name, count, failed, rtt_ms in lines
    ]


def _quantile_headers(what: str) -> list[str]:
    return [what, "p5", "p25", "p50", "p75", "p95"]


def _spread(result: "InspectResult") -> list[list[str]]:
    """Returns lines of quantiles over probes and over windows."""
    lines = []
    per_probe = result.distributions["measurements_per_probe"]
    if per_probe["quantiles"]:
        counts, failed = per_probe["quantiles"].values(), per_probe["failed_fraction"].values()
        lines.append(["measurements of a probe", *(f"{v:,.0f}" for v in counts)])
        lines.append(["failed of a probe", *map(_percent, failed)])
    if result.windows:
        for name in ("measurements", "tokens"):
            values = result.windows[name].values()
            lines.append([f"{name} of a window", *(f"{v:,.0f}" for v in values)])
    return lines


def _windows_text(found: dict[str, Any]) -> str:
    return (
        f"{found['visits']:,} of {found['visits_per_epoch']:,} windows of an epoch, packed into "
        f"sequences of {found['seq_len']:,} tokens: {found['windows_per_sequence']:.1f} to a "
        f"sequence, {_percent(found['padding_fraction'])} padding"
    )


TOP_HEADERS = ("measurements", "failed", "mean ms")


def _top_line(entry: dict[str, Any]) -> list[str]:
    failed, mean = _percent(entry["failed_fraction"]), _ms(entry["mean_rtt_ms"])
    return [entry["address"], f"{entry['measurements']:,}", failed, mean]


def _sample_title(index: int, sample: "Sample") -> str:
    found, problems = tokenizer.decode(sample.tokens)
    timed = int(np.count_nonzero(found.has_time))
    where = f"{sample.split} row of {sample.source}" if sample.split else sample.source
    bad = f", {len(problems)} problems" if problems else ""
    return (
        f"context {index}: {where}, {len(found)} measurements, {timed} with a time, "
        f"{len(sample.tokens)} tokens{bad}"
    )


SAMPLE_HEADERS = ("time", "destination", "RTT in ms")


def _sample_lines(sample: "Sample") -> tuple[list[list[str]], int]:
    """Returns the first measurements, and how many more there are."""
    from ping_llm.inspection.dataset import time_text

    found, _ = tokenizer.decode(sample.tokens)
    lines = []
    shown = found.slice(0, SAMPLE_LINES)
    for i, destination in enumerate(addresses.to_text(shown.dst)):
        when = time_text(found.time[i]) if found.has_time[i] else "unknown"
        rtt = "failed" if found.rtt[i] < 0 else f"{found.rtt[i]:.3f}"
        lines.append([when, destination, rtt])
    return lines, len(found) - len(lines)


def _token_lines(sample: "Sample", colour: Callable[[str, str], str] | None) -> list[str]:
    starts = np.flatnonzero(np.array(sample.tokens) == tokenizer.MEASUREMENT_START)
    stop = int(starts[TOKEN_LINES]) if len(starts) > TOKEN_LINES else len(sample.tokens)
    return tokenizer.format_tokens(sample.tokens[:stop], colour).splitlines()


# --- terminal -------------------------------------------------------------------------------------


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
        at = round((decade - low) / (high - low) * length)
        label = f"{10.0**decade:g} ms" if decade < 3 else f"{10.0 ** (decade - 3):g} s"
        if at >= len(line) and at + len(label) < length:
            line = f"{line:<{at}}|{label} "
    return line


def terminal_text(result: "InspectResult", *, width: int, colour: bool) -> str:
    """Returns the result as lines of at most `width` characters, with ANSI colours or without."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    written = io.StringIO()
    console = Console(
        file=written,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
    )

    def show_table(headers: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> None:
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for i, header in enumerate(headers):
            justify = "left" if i < left else "right"
            shown.add_column(Text(header), justify=justify, overflow="fold")
        for line in lines:
            shown.add_row(*(Text(cell) for cell in line))
        console.print(shown)

    def show_bars(title: str, counts: Sequence[float] | np.ndarray, height: int) -> int:
        console.print(Text(title, "bold"))
        lines = bars(counts, width=width - 2, height=height)
        for line in lines:
            console.print(Text(line, "cyan"))
        return len(lines[0])

    def show_times(title: str, counts: Sequence[float] | np.ndarray, height: int) -> None:
        length = show_bars(title, counts, height)
        start, end = result.time_first or "", result.time_last or ""
        gap = max(length - len(start) - len(end), 3)
        console.print(Text(f"{start}{' ' * gap}{end}\n", "dim"))

    console.print(Text(f"{result.path}: {result.kind}", "bold"), overflow="fold")
    console.print()
    for name, value in _summary(result):
        console.print(Text.assemble((f"{name:<20}", "dim"), value), overflow="fold")
    show_table(FAMILY_HEADERS, _families(result))

    console.print(Text("checks", "bold"))
    grid = Table.grid(padding=(0, 1))
    for check in result.checks:
        mark = Text("✓", "green") if check.ok else Text("✗", "bold red")
        grid.add_row(mark, Text(check.name), Text(check.detail, "dim" if check.ok else ""))
    console.print(grid)
    for reason, count in sorted(result.rejected.items()):
        console.print(Text(f"    {count:>12,}  {reason}"))
    console.print()

    rtt, over_time = result.distributions["rtt_ms"], result.distributions["time"]
    if rtt["edges"]:
        both = np.add(rtt["ipv4"], rtt["ipv6"])
        length = show_bars("RTT, log scale", both, 5)
        console.print(Text(f"{_decades(rtt['edges'], length)}\n", "dim"))
    if over_time["ipv4"]:
        show_times("measurements over time", np.add(over_time["ipv4"], over_time["ipv6"]), 3)
        if sum(over_time["failed"]):
            show_times("failures over time", over_time["failed"], 2)
    if spread := _spread(result):
        show_table(_quantile_headers("spread"), spread)
    if result.windows:
        console.print(Text(_windows_text(result.windows)))
    for title, entries in (
        ("top sources", result.top_sources),
        ("top destinations", result.top_destinations),
    ):
        if entries:
            show_table((title, *TOP_HEADERS), [_top_line(entry) for entry in entries[:5]])

    def paint(text: str, field: str) -> str:
        return f"\x1b[{FIELD_COLOURS[field]}m{text}\x1b[0m"

    for index, sample in enumerate(result.samples, 1):
        console.print(Text(_sample_title(index, sample), "bold"))
        lines, more = _sample_lines(sample)
        show_table(SAMPLE_HEADERS, lines, left=2)
        for line in _token_lines(sample, paint if colour else None):
            console.print(Text.from_ansi(line), overflow="fold")
        if more:
            console.print(Text(f"... and {more} more measurements", "dim"))
        console.print()
    text = written.getvalue()
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


# --- HTML -----------------------------------------------------------------------------------------


def html_page(result: "InspectResult") -> str:
    """Returns the result as one HTML page with everything in it."""
    rtt, over_time = result.distributions["rtt_ms"], result.distributions["time"]
    blocks = [
        Html(
            f'<p class="quiet">{"probe rows" if result.kind == "rows" else "measurements"}, as '
            "<code>ping-llm inspect-data</code> found them</p>"
        ),
        table(("", ""), _summary(result)),
        _heading("Checks"),
        table(("", "", ""), [_check_line(check) for check in result.checks]),
    ]
    if result.rejected:
        blocks.append(
            table(("rejected records", "count"), sorted(result.rejected.items()), numbers="-n")
        )
    blocks += [
        _heading("Round-trip times"),
        table(FAMILY_HEADERS, _families(result), numbers="-nnnnnnn"),
    ]
    if rtt["edges"]:
        blocks.append(picture(_rtt_figure(rtt), "histogram of round-trip times in log scale"))
    if over_time["ipv4"]:
        blocks += [
            _heading("Over time"),
            picture(_time_figure(over_time), "measurements and failures over time"),
        ]
    blocks += [
        _heading("Sources and destinations"),
        table(("top sources", *TOP_HEADERS), map(_top_line, result.top_sources), numbers="-nnn"),
        table(
            ("top destinations", *TOP_HEADERS),
            map(_top_line, result.top_destinations),
            numbers="-nnn",
        ),
    ]
    per_probe = result.distributions["measurements_per_probe"]
    if per_probe["edges"]:
        blocks.append(picture(_probe_figure(per_probe), "distribution of measurements per probe"))
    if spread := _spread(result):
        blocks += [_heading("Spread"), table(_quantile_headers(""), spread, numbers="-nnnnn")]
    if result.windows:
        blocks.append(Html(f"<p>{markup(_windows_text(result.windows))}</p>"))
    if result.samples:
        blocks.append(_heading("Sample contexts"))
    for index, sample in enumerate(result.samples, 1):
        lines, more = _sample_lines(sample)
        blocks += [
            Html(f"<h3>{markup(_sample_title(index, sample))}</h3>"),
            table(SAMPLE_HEADERS, lines, numbers="--n"),
            Html(f"<pre>{'<br>'.join(_token_lines(sample, _token_span))}</pre>"),
        ]
        if more:
            blocks.append(Html(f'<p class="quiet">... and {more} more measurements</p>'))
    return page(result.path, blocks)


def _heading(text: str) -> Html:
    return Html(f"<h2>{markup(text)}</h2>")


def _check_line(check: "Check") -> tuple[Html, str, str]:
    mark = span("\u2713", "good") if check.ok else span("\u2717", "bad")
    return mark, check.name, check.detail


def _token_span(text: str, field: str) -> str:
    return f'<span style="color:{FIELD_STYLES[field]}">{markup(text)}</span>'


def _rtt_figure(rtt: dict[str, Any]) -> "Figure":
    fig, (ax,) = figure(width=9, height=3.4)
    for (key, name), colour in zip(FAMILY_NAMES.items(), COLOURS, strict=False):
        total = sum(rtt[key])
        if total:
            share = 100 * np.array(rtt[key]) / total  # the rarer family would vanish in counts
            ax.stairs(share, rtt["edges"], color=colour, fill=True, alpha=0.2)
            ax.stairs(share, rtt["edges"], color=colour, label=name)
    log_axis(ax)
    ax.set_xlabel("round-trip time in ms")
    ax.set_ylabel("% of the family's RTTs")
    ax.legend(frameon=False)
    return fig


def _time_figure(over_time: dict[str, Any]) -> "Figure":
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    fig, axes = figure(columns=2, width=11, height=3.2)
    n = len(over_time["ipv4"])
    seconds = over_time["start"] + over_time["width"] * np.arange(n + 1)
    edges = seconds.astype("datetime64[s]")
    total = np.add(over_time["ipv4"], over_time["ipv6"])
    for (key, name), colour in zip(FAMILY_NAMES.items(), COLOURS, strict=False):
        if sum(over_time[key]):
            axes[0].stairs(over_time[key], edges, color=colour, label=name, baseline=None)
    axes[0].set_title("measurements")
    counts = np.array([over_time["ipv4"], over_time["ipv6"]])
    if counts.max() > 1000 * counts[counts > 0].min():  # a few would vanish beside the many
        axes[0].set_yscale("log")
        axes[0].set_ylim(0.5, 8 * counts.max())
    else:
        axes[0].set_ylim(0, 1.25 * counts.max())
    axes[0].legend(frameon=False, ncols=2, loc="upper right")
    failed = np.divide(over_time["failed"], total, out=np.zeros(n), where=total > 0)
    axes[1].stairs(100 * failed, edges, color=COLOURS[1], baseline=None)
    axes[1].set_title("failed, %")
    axes[1].set_ylim(bottom=0)
    for ax in axes:
        locator = AutoDateLocator(minticks=3, maxticks=7)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return fig


def _probe_figure(per_probe: dict[str, Any]) -> "Figure":
    fig, (ax,) = figure(width=9, height=2.8)
    ax.stairs(per_probe["probes"], per_probe["edges"], fill=True, color=COLOURS[2], alpha=0.6)
    log_axis(ax)
    ax.set_xlabel("measurements of a probe")
    ax.set_ylabel("probes")
    return fig
