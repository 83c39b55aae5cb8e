"""What `inspect-data` returns; its views take nothing else."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """One question put to the data.

    Attributes:
        name: What is asked.
        ok: Whether the answer is as it should be.
        count: How many offend, or 0.
        detail: The answer in words.
    """

    name: str
    ok: bool
    count: int
    detail: str


@dataclasses.dataclass(frozen=True)
class SampleContext:
    """One context, as a model sees it.

    Attributes:
        source: Source address.
        split: Split of the row; None for a raw file.
        tokens: Token ids.
    """

    source: str
    split: str | None
    tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectDataResult:
    """What a data set holds. Quantiles of RTTs are within 0.03 % of the true ones.

    Attributes:
        path: What was inspected.
        kind: "measurements" or "rows".
        measurements: How many there are.
        failed_fraction: Fraction of them that failed; None where there are none.
        ipv6_fraction: Fraction of them that are IPv6; None where there are none.
        probes: Distinct source addresses.
        destinations: Distinct destination addresses.
        pairs: Distinct unordered pairs of addresses.
        duplicates: Records that repeat another one in full.
        estimated: Which of the last four are estimates from a fair sample, as they are beyond a
            million addresses or pairs, or four million records.
        time_first: Earliest time, ISO 8601 UTC; None where there is none.
        time_last: Latest time.
        rtt_ms: p5, p25, p50, p75 and p95 of the RTTs; None each where there are none.
        families: `measurements`, `failed_fraction` and `rtt_ms` of "ipv4" and "ipv6".
        kinds: Measurements by what they are: "ping", "hop" (of a traceroute: a router, whose
            replies may be slow or rate-limited) and "end" (its destination).
        rows: Rows of each split; empty for raw files.
        measurements_by_split: Measurements of each split; empty for raw files.
        rejected: Records that are no measurements, by reason.
        checks: The quality checks: `name`, `ok`, `count`, `detail`.
        distributions: Histograms `rtt_ms`, `time` and `measurements_per_probe`.
        top_sources: The sources with most measurements: `address`, `measurements`,
            `failed_fraction`, `mean_rtt_ms`.
        top_destinations: The same for destinations.
        places: With a list of prefixes: `known_fraction`, the part of the measurements whose source
            is under one, and what it tells of the largest `asn` and `country` of sources, with
            `name` in place of `address`; else None.
        windows: Sizes of training windows and padding once packed; None for raw files.
        samples: Contexts drawn as in training.
    """

    path: str
    kind: str
    measurements: int
    failed_fraction: float | None
    ipv6_fraction: float | None
    probes: int
    destinations: int
    pairs: int
    duplicates: int
    estimated: list[str]
    time_first: str | None
    time_last: str | None
    rtt_ms: dict[str, float | None]
    families: dict[str, dict[str, Any]]
    kinds: dict[str, int]
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    measurements_by_split: dict[str, int] = dataclasses.field(default_factory=dict)
    rejected: dict[str, int]
    checks: list[Check]
    distributions: dict[str, Any]
    top_sources: list[dict[str, Any]]
    top_destinations: list[dict[str, Any]]
    places: dict[str, Any] | None = None
    windows: dict[str, Any] | None = None
    samples: list[SampleContext]


def time_text(seconds: int) -> str:
    """Returns seconds since 1970 as ISO 8601, UTC."""
    return f"{np.datetime64(int(seconds), 's')}Z"
