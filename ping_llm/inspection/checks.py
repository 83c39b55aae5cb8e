"""What may be wrong with measurements and with probe rows, each as one named check."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.hashing import hash_addresses
from ping_llm.inspection.statistics import IMPLAUSIBLE_RTT_MS, Statistics

EARLIEST_PLAUSIBLE = 631_152_000  # 1990-01-01: a clock that was never set says 1970


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


def _none(name: str, count: int, bad: str, good: str = "none") -> Check:
    """Returns a check that wants a count of zero."""
    return Check(name, count == 0, count, bad if count else good)


def duplicates(stats: Statistics) -> int:
    """Returns how many records repeat another in every field; an estimate beyond the capacity."""
    kept = stats.records.sampled()
    repeats = int(stats.records.sums[kept].sum()) - int(np.count_nonzero(kept))
    return round(repeats / stats.records.fraction)


def measurement_checks(
    stats: Statistics, rejected: Mapping[str, int], *, now: int, ordered: bool
) -> list[Check]:
    """Returns the checks that any measurements must stand, whatever they are stored in.

    Args:
        stats: Statistics of all of them.
        rejected: Records that were no measurements, by reason.
        now: Present time, in seconds since 1970.
        ordered: Whether each source's measurements ought to come in time order.
    """
    problems, total = stats.problems, int(stats.measurements.sum())
    n_rejected = sum(rejected.values())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(rejected.items()))
    n_duplicates = duplicates(stats)
    fraction = stats.records.fraction
    exact = "" if fraction == 1 else f" (estimated from 1 in {1 / fraction:.0f})"
    rtts = problems["rtt_zero"] + problems["rtt_huge"] + problems["rtt_not_finite"]
    early_late = implausible_times(stats, now)
    backwards = problems["backwards"]
    order = f"{backwards:,} stand behind a later one of the same source"
    order = (order if ordered else f"{order}; prepare-data sorts them") if backwards else "in order"
    return [
        Check("not empty", total > 0, 0, f"{total:,} measurements"),
        _none("records usable", n_rejected, reasons, "none was rejected"),
        _none("no duplicates", n_duplicates, f"{n_duplicates:,} repeat another in full{exact}"),
        _none(
            "RTTs plausible",
            rtts,
            f"{problems['rtt_zero']:,} are 0 ms, {problems['rtt_huge']:,} above "
            f"{IMPLAUSIBLE_RTT_MS / 1000:.0f} s, {problems['rtt_not_finite']:,} no number",
            "all within 0 to 60 s",
        ),
        _none(
            "times plausible",
            early_late,
            f"{early_late:,} before 1990 or in the future",
            "all from 1990 to now",
        ),
        _none(
            "no clock jumps",
            problems["jumps"],
            f"{problems['jumps']:,} steps of more than a year within one source",
        ),
        Check("time order", not (ordered and backwards), backwards, order),
        _none(
            "families agree",
            problems["family"],
            f"{problems['family']:,} have an address of the other family than ip_version",
            "every address is of the family stated",
        ),
        _none(
            "no self-pings",
            problems["self"],
            f"{problems['self']:,} have the same source and destination",
        ),
    ]


def implausible_times(stats: Statistics, now: int) -> int:
    """Returns how many measurements lie before 1990 or after `now`, by the bins of the histogram.

    A bin counts where all of it is implausible; the ends of the time range are looked at exactly.
    """
    histogram = stats.time
    starts = (histogram.first + np.arange(len(histogram.counts))) * float(histogram.width)
    outside = (starts + histogram.width <= EARLIEST_PLAUSIBLE) | (starts > now)
    count = int(histogram.counts[outside].sum())
    ranges = [r for r in stats.time_range if r]
    ends_outside = any(low < EARLIEST_PLAUSIBLE or high > now for low, high in ranges)
    return max(count, int(ends_outside))


class RowChecks:
    """Checks of probe rows that need the rows themselves; feed it each split once."""

    def __init__(self) -> None:
        self._measurements = 0
        self._empty = self._out_of_order = self._apart = 0

    def add(self, rows: ProbeRows) -> None:
        """Looks at the rows of one split, but not at their measurements."""
        self._measurements += int(rows.n_measurements.sum())
        self._empty += int(np.count_nonzero(rows.n_measurements == 0))
        if len(rows) == 0:
            return
        src = np.concatenate([batch.src_addr for batch in rows.batches])
        key = (rows.ip_version, *addresses.words(src))
        changes, ascends = np.zeros(len(rows) - 1, bool), np.zeros(len(rows) - 1, bool)
        for column in key:
            ascends |= ~changes & (column[1:] > column[:-1])
            changes |= column[1:] != column[:-1]
        self._out_of_order += int(np.count_nonzero(changes & ~ascends))
        runs = 1 + int(np.count_nonzero(changes))
        self._apart += runs - len(np.unique(hash_addresses(src)))

    def checks(self, stats: Statistics, metadata: Mapping[str, Any]) -> list[Check]:
        """Returns the checks, once every split was added and `stats` is finished."""
        stated = metadata.get("measurements")
        return [
            _none("rows not empty", self._empty, f"{self._empty:,} rows hold no measurement"),
            _none(
                "one source a row",
                self._apart,
                f"{self._apart:,} rows stand apart from others of their source",
                "each source's rows stand together",
            ),
            _none(
                "rows in order",
                self._out_of_order,
                f"{self._out_of_order:,} stand before a row of a lower family or address",
                "by family, then address",
            ),
            _none(
                "counts match",
                int(stated != self._measurements),
                f"dataset.json says {stated} measurements, the files hold {self._measurements}",
                "files and dataset.json agree",
            ),
            split_leakage(stats, metadata),
        ]


def split_leakage(stats: Statistics, metadata: Mapping[str, Any]) -> Check:
    """Returns whether the splits are apart in the way that `metadata["split"]` promises."""
    kind, name = metadata.get("split"), "splits apart"
    if kind == "pair":
        in_splits = (stats.pairs.sums[stats.pairs.sampled()] > 0).sum(axis=1)
        count = int((in_splits > 1).sum() / stats.pairs.fraction)
        bad, good = f"{count:,} unordered address pairs are in two splits", "no pair in two splits"
        return _none(name, count, bad, good)
    if kind == "probe":
        count = stats.known_ends
        bad = f"{count:,} held-out measurements have both addresses in train"
        return _none(name, count, bad, "each held-out measurement has an address unknown in train")
    if kind == "time":
        if len(metadata.get("settings", {}).get("inputs", ())) != 1:
            return Check(name, True, 0, "by time within each input, which rows do not tell apart")
        known = [r for r in stats.time_range if r]
        overlaps = [a for a, b in itertools.pairwise(known) if a[1] > b[0]]
        bad = "an earlier split reaches into the time of a later one"
        return _none(name, len(overlaps), bad, "each ends before the next begins")
    return Check(name, False, 0, f"dataset.json has no known split, but {kind!r}")
