"""What may be wrong with measurements and with probe rows, each as one named check."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.hashing import hash_addresses
from ping_llm.inspection.result import Check
from ping_llm.inspection.statistics import IMPLAUSIBLE_RTT_MS, Statistics


def _none(name: str, count: int, bad: str, good: str = "none") -> Check:
    """Returns a check that wants a count of zero."""
    return Check(name, count == 0, count, f"{count:,} {bad}" if count else good)


def measurement_checks(
    stats: Statistics, rejected: Mapping[str, int], *, ordered: bool
) -> list[Check]:
    """Returns the checks that any measurements must pass, whatever they are stored in.

    Args:
        stats: Statistics of all of them.
        rejected: Records that were no measurements, by reason.
        ordered: Whether each source's measurements should come in time order.
    """
    problems, total = stats.problems, int(stats.measurements.sum())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(rejected.items()))
    n_rejected = sum(rejected.values())
    fraction = stats.records.fraction
    exact = "" if fraction == 1 else f" (estimated from 1 in {1 / fraction:.0f})"
    zero, huge, nan = (problems[name] for name in ("rtt_zero", "rtt_huge", "rtt_not_finite"))
    rtts = f"{zero:,} are 0 ms, {huge:,} above {IMPLAUSIBLE_RTT_MS / 1000:.0f} s, {nan:,} no number"
    rtts_ok = zero + huge + nan == 0
    backwards = problems["backwards"]
    order = f"{backwards:,} stand behind a later one of the same source"
    order += "" if ordered else "; prepare-data sorts them"
    return [
        Check("not empty", total > 0, 0, f"{total:,} measurements"),
        Check("records usable", n_rejected == 0, n_rejected, reasons or "none was rejected"),
        _none("no duplicates", stats.records.repeats(), f"repeat another in full{exact}"),
        Check(
            "RTTs plausible",
            rtts_ok,
            zero + huge + nan,
            "all within 0 to 60 s" if rtts_ok else rtts,
        ),
        _none(
            "times plausible",
            problems["time"],
            "before 1990 or in the future",
            "all from 1990 to now",
        ),
        _none("no clock jumps", problems["jumps"], "steps of more than a year within one source"),
        Check(
            "time order", not (ordered and backwards), backwards, order if backwards else "in order"
        ),
        _none(
            "families agree",
            problems["family"],
            "have an address of the other family than ip_version",
            "every address is of the family stated",
        ),
        _none("no self-pings", problems["self"], "have the same source and destination"),
    ]


def row_checks(
    splits: Iterable[ProbeRows], stats: Statistics, metadata: Mapping[str, Any]
) -> list[Check]:
    """Returns the checks of probe rows.

    Args:
        splits: The rows of each split.
        stats: Statistics of their measurements.
        metadata: The content of `dataset.json`.
    """
    empty, out_of_order, apart = np.sum([_row_problems(rows) for rows in splits], axis=0).tolist()
    stated, held = metadata.get("measurements"), int(stats.measurements.sum())
    counts = f"dataset.json says {stated} measurements, the files hold {held}"
    match = stated == held
    return [
        _none("rows not empty", empty, "rows hold no measurement"),
        _none(
            "one source a row",
            apart,
            "rows stand apart from others of their source",
            "each source's rows stand together",
        ),
        _none(
            "rows in order",
            out_of_order,
            "stand before a row of a lower family or address",
            "by family, then address",
        ),
        Check(
            "counts match",
            match,
            int(not match),
            "files and dataset.json agree" if match else counts,
        ),
        split_leakage(stats, metadata),
    ]


def _row_problems(rows: ProbeRows) -> tuple[int, int, int]:
    """Returns how many rows are empty, before a lower one, and apart from others of a source."""
    if len(rows) == 0:
        return 0, 0, 0
    sources = np.concatenate([batch.src_addr for batch in rows.batches])
    high, low = addresses.words(sources)
    same = high[1:] == high[:-1]
    descends = (high[1:] < high[:-1]) | (same & (low[1:] < low[:-1]))
    runs = 1 + np.count_nonzero(~same | (low[1:] != low[:-1]))
    apart = runs - len(np.unique(hash_addresses(sources)))
    return np.count_nonzero(rows.n_measurements == 0), np.count_nonzero(descends), apart


def split_leakage(stats: Statistics, metadata: Mapping[str, Any]) -> Check:
    """Returns whether the splits are as far apart as `metadata["split"]` promises."""
    kind, name = metadata.get("split"), "splits apart"
    if kind == "pair":
        in_splits = (stats.pairs.sums[stats.pairs.sampled()] > 0).sum(axis=1)
        count = int(np.count_nonzero(in_splits > 1) / stats.pairs.fraction)
        bad = "unordered address pairs are in two splits"
        return _none(name, count, bad, "no pair in two splits")
    if kind == "probe":
        bad = "held-out measurements have both addresses in train"
        good = "each held-out measurement has an address unknown in train"
        return _none(name, stats.both_in_train, bad, good)
    if kind == "time":
        if len(metadata.get("settings", {}).get("inputs", ())) != 1:
            return Check(name, True, 0, "by time within each input, which rows do not tell apart")
        used = stats.measurements > 0
        first, last = stats.first_time[used], stats.last_time[used]
        overlaps = int(np.count_nonzero(last[:-1] > first[1:]))
        bad = "an earlier split reaches into the time of a later one"
        return Check(
            name, overlaps == 0, overlaps, bad if overlaps else "each ends before the next begins"
        )
    return Check(name, False, 0, f"dataset.json has no known split, but {kind!r}")
