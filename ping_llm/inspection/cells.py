"""What the terminal and the page show alike, as text: tables are (headers, lines of cells)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ping_llm import addresses, tokenizer
from ping_llm.inspection.result import InspectDataResult, SampleContext, time_text

FAMILY_NAMES = {"ipv4": "IPv4", "ipv6": "IPv6"}
SAMPLE_LINES = 8  # measurements of a context that are listed
TOKEN_LINES = 2  # measurements whose tokens are spelled out
_QUANTILES = ("p5", "p25", "p50", "p75", "p95")

TextTable = tuple[tuple[str, ...], list[list[str]]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def summary(result: InspectDataResult) -> list[tuple[str, str]]:
    """Returns (name, value) of the main figures."""

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
    if result.kinds["ping"] < result.measurements:
        names = {"ping": "pings", "hop": "routers on the way", "end": "ends of traceroutes"}
        lines[1:1] = [(names[kind], f"{n:,}") for kind, n in result.kinds.items() if n]
    for split, rows in result.rows.items():
        n = result.measurements_by_split[split]
        lines.append((f"{split} rows", f"{rows:,} with {n:,} measurements"))
    if result.places is not None:
        lines.append(("of known sources", _percent(result.places["known_fraction"])))
    if result.rejected:
        lines.append(("rejected", f"{sum(result.rejected.values()):,}"))
    return lines


def rtts(result: InspectDataResult) -> TextTable:
    """Returns failures and quantiles of RTTs, of all measurements and by family."""
    lines = [("all", result.measurements, result.failed_fraction, result.rtt_ms)]
    lines += [(FAMILY_NAMES[key], *values.values()) for key, values in result.families.items()]
    return ("RTT in ms", "measurements", "failed", *_QUANTILES), [
        [name, f"{count:,}", _percent(failed), *map(_ms, quantiles.values())]
        for name, count, failed, quantiles in lines
    ]


def spread(result: InspectDataResult) -> TextTable:
    """Returns quantiles over probes and over windows; no lines where there are neither."""

    def counts(name: str, quantiles: dict[str, float]) -> list[str]:
        return [name, *(f"{value:,.0f}" for value in quantiles.values())]

    lines = []
    per_probe = result.distributions["measurements_per_probe"]
    if per_probe["quantiles"]:
        lines.append(counts("measurements of a probe", per_probe["quantiles"]))
        failed = per_probe["failed_fraction"].values()
        lines.append(["failed of a probe", *map(_percent, failed)])
    if result.windows:
        for name in ("measurements", "tokens"):
            lines.append(counts(f"{name} of a window", result.windows[name]))
    return ("spread", *_QUANTILES), lines


def windows_text(windows: dict[str, Any]) -> str:
    """Returns `result.windows` as a sentence."""
    return (
        f"{windows['visits']:,} of {windows['visits_per_epoch']:,} windows of an epoch, packed "
        f"into sequences of {windows['seq_len']:,} tokens: {windows['windows_per_sequence']:.1f} "
        f"to a sequence, {_percent(windows['padding_fraction'])} padding"
    )


def tops(result: InspectDataResult) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns (title, entries) of what has most measurements, where there is something."""
    places = result.places or {}
    named = [
        ("top sources", result.top_sources),
        ("top destinations", result.top_destinations),
        ("top ASNs of sources", places.get("asn")),
        ("top countries of sources", places.get("country")),
    ]
    return [(title, entries) for title, entries in named if entries]


def top(title: str, entries: list[dict[str, Any]]) -> TextTable:
    """Returns the addresses, ASNs or countries with most measurements."""
    return (title, "measurements", "failed", "mean ms"), [
        [
            entry.get("address") or entry["name"],
            f"{entry['measurements']:,}",
            _percent(entry["failed_fraction"]),
            _ms(entry["mean_rtt_ms"]),
        ]
        for entry in entries
    ]


def sample_title(index: int, sample: SampleContext) -> str:
    """Returns what sample context number `index` is."""
    table, problems = tokenizer.decode(sample.tokens)
    timed = int(np.count_nonzero(table.has_time))
    name = f"{sample.split} row of {sample.source}" if sample.split else sample.source
    bad = f", {len(problems)} problems" if problems else ""
    return (
        f"context {index}: {name}, {len(table)} measurements, {timed} with a time, "
        f"{len(sample.tokens)} tokens{bad}"
    )


def sample_measurements(sample: SampleContext) -> tuple[TextTable, int]:
    """Returns the first measurements of a context, and how many more there are."""
    table, _ = tokenizer.decode(sample.tokens)
    shown, lines = table.slice(0, SAMPLE_LINES), []
    for i, destination in enumerate(addresses.to_text(shown.dst)):
        when = time_text(shown.time[i]) if shown.has_time[i] else "unknown"
        rtt = "failed" if shown.rtt[i] < 0 else f"{shown.rtt[i]:.3f}"
        lines.append([when, destination, rtt])
    return (("time", "destination", "RTT in ms"), lines), len(table) - len(shown)


def token_lines(sample: SampleContext, colour: Callable[[str, str], str] | None) -> list[str]:
    """Returns the tokens of the first measurements, `colour` applied as in `format_tokens`."""
    starts = np.flatnonzero(np.array(sample.tokens) == tokenizer.MEASUREMENT_START)
    stop = int(starts[TOKEN_LINES]) if len(starts) > TOKEN_LINES else len(sample.tokens)
    return tokenizer.format_tokens(sample.tokens[:stop], colour).splitlines()
