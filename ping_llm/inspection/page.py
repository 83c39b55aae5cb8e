"""The result of `inspect-data` as one HTML page."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.inspection import cells
from ping_llm.inspection.result import InspectDataResult
from ping_llm.report import COLOURS, Html, figure, log_axis, markup, page, picture, span, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOKEN_COLOURS = dict(
    structure="#777", source="#0072B2", destination="#00734f", time="#a05a00", rtt="#a0307a"
)


def html_page(result: InspectDataResult) -> str:
    """Returns the result as one HTML page that needs nothing outside itself."""
    rtt, over_time = result.distributions["rtt_ms"], result.distributions["time"]
    what = "probe rows" if result.kind == "rows" else "measurements"
    marks = span("\u2717", "bad"), span("\u2713", "good")
    checks = [(marks[check.ok], check.name, check.detail) for check in result.checks]
    blocks = [
        Html(f'<p class="quiet">{what}, as <code>ping-llm inspect-data</code> sees them</p>'),
        table(("", ""), cells.summary(result)),
        _heading("Checks"),
        table(("", "", ""), checks),
    ]
    if result.rejected:
        blocks.append(_numbers(("rejected records", "count"), sorted(result.rejected.items())))
    blocks += [_heading("Round-trip times"), _numbers(*cells.rtts(result))]
    if rtt["edges"]:
        blocks.append(picture(_rtt_figure(rtt), "histogram of round-trip times in log scale"))
    if over_time["ipv4"]:
        blocks.append(_heading("Over time"))
        blocks.append(picture(_time_figure(over_time), "measurements and failures over time"))
    blocks.append(_heading("Sources and destinations"))
    blocks += [_numbers(*cells.top(*each)) for each in cells.tops(result)]
    per_probe = result.distributions["measurements_per_probe"]
    if per_probe["edges"]:
        blocks.append(picture(_probe_figure(per_probe), "distribution of measurements per probe"))
    (_, *quantiles), lines = cells.spread(result)
    if lines:
        blocks += [_heading("Spread"), _numbers(("", *quantiles), lines)]
    if result.windows:
        blocks.append(Html(f"<p>{markup(cells.windows_text(result.windows))}</p>"))
    if result.samples:
        blocks.append(_heading("Sample contexts"))
    for index, sample in enumerate(result.samples, 1):
        measurements, more = cells.sample_measurements(sample)
        blocks += [
            Html(f"<h3>{markup(cells.sample_title(index, sample))}</h3>"),
            table(*measurements, numbers="--n"),
            Html(f"<pre>{'<br>'.join(cells.token_lines(sample, _token_span))}</pre>"),
        ]
        if more:
            blocks.append(Html(f'<p class="quiet">... and {more} more measurements</p>'))
    return page(result.path, blocks)


def _heading(text: str) -> Html:
    return Html(f"<h2>{markup(text)}</h2>")


def _numbers(headers: tuple[str, ...], lines: Any) -> Html:
    """Returns a table of which all columns but the first are numbers."""
    return table(headers, lines, numbers="-" + "n" * (len(headers) - 1))


def _token_span(text: str, field: str) -> str:
    return f'<span style="color:{_TOKEN_COLOURS[field]}">{markup(text)}</span>'


def _rtt_figure(rtt: dict[str, Any]) -> "Figure":
    fig, (ax,) = figure(width=9, height=3.4)
    for (key, name), colour in zip(cells.FAMILY_NAMES.items(), COLOURS, strict=False):
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
    for (key, name), colour in zip(cells.FAMILY_NAMES.items(), COLOURS, strict=False):
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
