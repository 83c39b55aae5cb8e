"""What may be wrong with measurements and with probe rows, each as one named check."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.hashing import hash_addresses
from ping_llm.inspection.result import Check
from ping_llm.inspection.statistics import IMPLAUSIBLE_RTT_MS, Statistics

# Of a check that wants a count of 0: what is counted, and what is said where there is none.
_TEXTS = {
    "no duplicates": ("repeat another in full", "none"),
    "times plausible": ("before 1990 or in the future", "all from 1990 to now"),
    "no clock jumps": ("steps of more than a year within one source", "none"),
    "families agree": (
        "have an address of the other family than ip_version",
        "every address is of the family stated",
    ),
    "no self-pings": ("have the same source and destination", "none"),
    "rows not empty": ("rows hold no measurement", "none"),
    "one source a row": (
        "rows stand apart from others of their source",
        "each source's rows stand together",
    ),
    "rows in order": ("stand before a row of a lower family or address", "by family, then address"),
}


def _none(name: str, count: int, more: str = "") -> Check:
    bad, good = _TEXTS[name]
    return Check(name, count == 0, count, f"{count:,} {bad}{more}" if count else good)


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
    n_rejected, fraction = sum(rejected.values()), stats.records.fraction
    exact = "" if fraction == 1 else f" (estimated from 1 in {1 / fraction:.0f})"
    zero, huge, nan = (problems[name] for name in ("rtt_zero", "rtt_huge", "rtt_not_finite"))
    n_rtts, longest = zero + huge + nan, f"{IMPLAUSIBLE_RTT_MS / 1000:.0f} s"
    rtts = f"{zero:,} are 0 ms, {huge:,} above {longest}, {nan:,} no number"
    rtts = rtts if n_rtts else f"all within 0 to {longest}"
    backwards = problems["backwards"]
    order = f"{backwards:,} stand behind a later one of the same source"
    order += "" if ordered else "; prepare-data sorts them"
    in_order = not (ordered and backwards)
    return [
        Check("not empty", total > 0, 0, f"{total:,} measurements"),
        Check("records usable", n_rejected == 0, n_rejected, reasons or "none was rejected"),
        _none("no duplicates", stats.records.repeats(), exact),
        Check("RTTs plausible", n_rtts == 0, n_rtts, rtts),
        _none("times plausible", problems["time"]),
        _none("no clock jumps", problems["jumps"]),
        Check("time order", in_order, backwards, order if backwards else "in order"),
        _none("families agree", problems["family"]),
        _none("no self-pings", problems["self"]),
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
    stated, n = metadata.get("measurements"), int(stats.measurements.sum())
    counts = f"dataset.json says {stated} measurements, the files hold {n}"
    counts = "files and dataset.json agree" if stated == n else counts
    return [
        _none("rows not empty", empty),
        _none("one source a row", apart),
        _none("rows in order", out_of_order),
        Check("counts match", stated == n, int(stated != n), counts),
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
    kind, count = metadata.get("split"), 0
    if kind == "pair":
        in_splits = (stats.pairs.sums[stats.pairs.sampled()] > 0).sum(axis=1)
        count = int(np.count_nonzero(in_splits > 1) / stats.pairs.fraction)
        bad, good = f"{count:,} unordered address pairs are in two splits", "no pair in two splits"
    elif kind == "probe":
        count = stats.both_in_train
        bad = f"{count:,} held-out measurements have both addresses in train"
        good = "each held-out measurement has an address unknown in train"
    elif kind == "time":
        if len(metadata.get("settings", {}).get("inputs", ())) == 1:
            used = stats.measurements > 0
            count = int(np.sum(stats.last_time[used][:-1] > stats.first_time[used][1:]))
            good = "each ends before the next begins"
        else:
            good = "by time within each input, which rows do not tell apart"
        bad = "an earlier split reaches into the time of a later one"
    else:
        return Check("splits apart", False, 0, f"dataset.json has no known split, but {kind!r}")
    return Check("splits apart", count == 0, count, bad if count else good)
