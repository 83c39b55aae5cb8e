"""What may be wrong with measurements and with probe rows, each as one named check."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.hashing import hash_addresses
from ping_llm.inspection.result import Check
from ping_llm.inspection.statistics import IMPLAUSIBLE_RTT_MS, Statistics


def _none(name: str, count: int, bad: str, good: str = "none") -> Check:
    """Returns a check that wants a count of 0; `bad` has `{n}` where it says the count."""
    return Check(name, count == 0, count, bad.replace("{n}", f"{count:,}") if count else good)


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
    fraction = stats.records.fraction
    exact = "" if fraction == 1 else f" (estimated from 1 in {1 / fraction:.0f})"
    zero, huge, nan = (problems[name] for name in ("rtt_zero", "rtt_huge", "rtt_not_finite"))
    longest = f"{IMPLAUSIBLE_RTT_MS / 1000:.0f} s"
    rtts = f"{zero:,} are 0 ms, {huge:,} above {longest}, {nan:,} no number"
    order = "{n} stand behind a later one of the same source"
    in_order = _none("time order", problems["backwards"], order, "in order")
    if not ordered and not in_order.ok:
        detail = f"{in_order.detail}; prepare-data sorts them"
        in_order = dataclasses.replace(in_order, ok=True, detail=detail)
    mixed = "{n} have an address of the other family than ip_version"
    jumps = "{n} steps of more than a year within one source"
    years = "{n} before 1990 or in the future"
    return [
        Check("not empty", total > 0, 0, f"{total:,} measurements"),
        _none("records usable", sum(rejected.values()), reasons, "none was rejected"),
        _none("no duplicates", stats.records.repeats(), "{n} repeat another in full" + exact),
        _none("RTTs plausible", zero + huge + nan, rtts, f"all within 0 to {longest}"),
        _none("times plausible", problems["time"], years, "all from 1990 to now"),
        _none("no clock jumps", problems["jumps"], jumps),
        in_order,
        _none("families agree", problems["family"], mixed, "every address is of the family stated"),
        _none("no self-pings", problems["self"], "{n} have the same source and destination"),
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
    empty, lower, apart = np.sum([_row_problems(rows) for rows in splits], axis=0).tolist()
    stated, n = metadata.get("measurements"), int(stats.measurements.sum())
    counts = f"dataset.json says {stated} measurements, the files hold {n}"
    together = "each source's rows stand together"
    order = "{n} stand before a row of a lower family or address", "by family, then address"
    return [
        _none("rows not empty", empty, "{n} rows hold no measurement"),
        _none(
            "one source a row", apart, "{n} rows stand apart from others of their source", together
        ),
        _none("rows in order", lower, *order),
        _none("counts match", int(stated != n), counts, "files and dataset.json agree"),
        split_leakage(stats, metadata),
    ]


def _row_problems(rows: ProbeRows) -> list[int]:
    """Returns how many rows are empty, before a lower one, and apart from others of a source."""
    if len(rows) == 0:
        return [0, 0, 0]
    sources = np.concatenate([batch.src for batch in rows.batches])
    high, low = addresses.words(sources)
    same = high[1:] == high[:-1]
    descends = (high[1:] < high[:-1]) | (same & (low[1:] < low[:-1]))
    runs = 1 + int(np.count_nonzero(~same | (low[1:] != low[:-1])))
    empty = int(np.count_nonzero(rows.n_measurements == 0))
    apart = runs - len(np.unique(hash_addresses(sources)))
    return [empty, int(np.count_nonzero(descends)), apart]


def split_leakage(stats: Statistics, metadata: Mapping[str, Any]) -> Check:
    """Returns whether the splits are as far apart as `metadata["split"]` promises."""
    kind, bad = metadata.get("split"), ""
    if kind == "pair":
        in_splits = (stats.pairs.sums[stats.pairs.sampled()] > 0).sum(axis=1)
        count = int(np.count_nonzero(in_splits > 1) / stats.pairs.fraction)
        bad, good = "{n} unordered address pairs are in two splits", "no pair in two splits"
    elif kind in ("probe", "asn", "region"):
        count = stats.both_in_train
        bad = "{n} held-out measurements have both addresses in train"
        good = "each held-out measurement has an address unknown in train"
    elif kind != "time":
        return Check("splits apart", False, 0, f"dataset.json has no known split, but {kind!r}")
    elif len(metadata.get("settings", {}).get("inputs", ())) == 1:
        used = stats.measurements > 0
        count = int(np.sum(stats.last_time[used][:-1] > stats.first_time[used][1:]))
        bad = "an earlier split reaches into the time of a later one"
        good = "each ends before the next begins"
    else:
        count, good = 0, "by time within each input, which rows do not tell apart"
    return _none("splits apart", count, bad, good)
