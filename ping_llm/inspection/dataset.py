"""What a data set holds and what is wrong with it: `inspect-data`.

One streaming pass over measurements in any input format, or over a directory of probe rows.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm import addresses, packing, storage, tokenizer
from ping_llm.data import windows
from ping_llm.data.rows import SPLITS, ProbeRows, is_dataset, read_metadata
from ping_llm.errors import ConfigError, DataError
from ping_llm.hashing import hash_addresses
from ping_llm.ingest.files import find_files
from ping_llm.ingest.sources import cut_into_units, read_unit
from ping_llm.inspection.checks import (
    Check,
    RowChecks,
    duplicates,
    measurement_checks,
)
from ping_llm.inspection.statistics import HashTable, Statistics, rtt_of_bin, rtt_quantile
from ping_llm.measurements import MeasurementTable
from ping_llm.progress import Progress, progress

CHUNK = 1 << 18  # measurements looked at together
BINS_PER_DECADE = 20
TIME_POINTS = 120
TOP = 10
QUANTILES = (5, 25, 50, 75, 95)
WINDOW_VISITS, WINDOW_SEQ_LEN, SAMPLE_SEED = 2048, 1024, 0
_SAMPLE_FITS = WINDOW_SEQ_LEN // tokenizer.MAX_MEASUREMENT_TOKENS
_IPV4, _IPV6 = slice(0, 2), slice(2, 4)  # classes of the time histogram


@dataclasses.dataclass(frozen=True)
class Sample:
    """One context, as a model sees it.

    Attributes:
        source: Source address.
        split: Split of the row; None for a raw file.
        tokens: Token ids.
    """

    source: str
    split: str | None
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class InspectResult:
    """What a data set holds. Quantiles of RTTs are within 0.03 % of the true ones.

    Attributes:
        path: What was inspected.
        kind: "measurements" or "rows".
        measurements: How many there are.
        failed_fraction: Part of them that failed; None where there are none.
        ipv6_fraction: Part of them that are IPv6; None where there are none.
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
        rows: Rows of each split; empty for raw files.
        measurements_by_split: Measurements of each split; empty for raw files.
        rejected: Records that are no measurements, by reason.
        checks: The quality checks: `name`, `ok`, `count`, `detail`.
        distributions: Histograms `rtt_ms`, `time` and `measurements_per_probe`.
        top_sources: The sources with most measurements: `address`, `measurements`,
            `failed_fraction`, `mean_rtt_ms`.
        top_destinations: The same for destinations.
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
    rows: dict[str, int]
    measurements_by_split: dict[str, int]
    rejected: dict[str, int]
    checks: list[Check]
    distributions: dict[str, Any]
    top_sources: list[dict[str, Any]]
    top_destinations: list[dict[str, Any]]
    windows: dict[str, Any] | None
    samples: list[Sample]


def inspect_data(
    path: str | Path, *, samples: int = 0, report: Path | None = None
) -> InspectResult:
    """Returns what `path` holds and what is wrong with it.

    Args:
        path: Measurements in any input format (a file, directory or glob), or probe rows.
        samples: How many contexts to show.
        report: Where to write the same as one HTML page; None writes none.

    Raises:
        ConfigError: `samples` or `report` cannot be.
        DataError: `path` cannot be read.
        StorageError: `path` is not there, or `report` cannot be written.
    """
    if samples < 0:
        raise ConfigError(f"{samples=} must be 0 or more")
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise ConfigError(f"report={report}: there is no directory {Path(report).parent}")
    if is_dataset(path):
        result = _inspect_rows(path, samples)
    else:
        result = _inspect_measurements(path, samples)
    if report is not None:
        from ping_llm.inspection.view import html_page
        from ping_llm.report import write_page

        write_page(html_page(result), Path(report))
    return result


# --- measurements in files ----------------------------------------------------------------------


def _inspect_measurements(path: str | Path, samples: int) -> InspectResult:
    stats, rejected, contexts = Statistics(), Counter(), []
    files = find_files([str(path)])
    with progress("inspect", total=sum(f.size for f in files), unit="bytes") as shown:
        done = 0
        for file in files:
            for unit in cut_into_units(file):
                for part in read_unit(unit):
                    table = part.chunk.to_table()
                    stats.add(table)
                    rejected.update(part.rejected["reason"].to_pylist())
                    if len(contexts) < samples:
                        contexts += _first_contexts(table, samples - len(contexts))
                    shown.update(done=done + part.done * unit.size)
                done += unit.size
    stats.finish()
    checks = measurement_checks(stats, rejected, now=int(time.time()), ordered=False)
    return _result(path, "measurements", stats, dict(rejected), checks, samples=contexts)


def _first_contexts(table: MeasurementTable, count: int) -> list[Sample]:
    """Returns the first measurements of the first sources of a table, in time order."""
    found = []
    hashes = hash_addresses(table.src)
    _, first = np.unique(hashes, return_index=True)
    for i in np.sort(first)[:count]:
        mine = table.take(np.flatnonzero(hashes == hashes[i])[:_SAMPLE_FITS])
        mine = mine.take(np.argsort(mine.time, kind="stable"))
        order = np.tile(np.arange(4, dtype=np.uint8), (len(mine), 1))
        offsets = np.array([0, len(mine)])
        tokens, _ = tokenizer.encode(mine, segment_offsets=offsets, field_order=order)
        found.append(Sample(addresses.to_text(mine.src[:1])[0], None, tokens.tolist()))
    return found


# --- probe rows ---------------------------------------------------------------------------------


def _inspect_rows(path: str | Path, samples: int) -> InspectResult:
    directory = storage.local_directory(path, identity="dataset.json")
    metadata = read_metadata(directory)
    stats, row_checks = Statistics(), RowChecks()
    rows = {split: ProbeRows(directory, split) for split in SPLITS}
    total = sum(int(r.n_measurements.sum()) for r in rows.values())
    with progress("inspect", total=total, unit="measurements") as shown:
        for index, split in enumerate(SPLITS):
            row_checks.add(rows[split])
            for table in _tables(rows[split], shown):
                stats.add(table, split=index)
    stats.finish()
    rejected = dict(metadata.get("rejected", {}))
    checks = measurement_checks(stats, rejected, now=int(time.time()), ordered=True)
    checks += row_checks.checks(stats, metadata)
    split = next((s for s in SPLITS if len(rows[s])), None)
    found, window_stats = [], None
    if split is not None:
        try:
            found, window_stats = _windows(rows[split], split, samples)
        except DataError as error:
            checks.append(Check("rows encode", False, 0, str(error)))
    return _result(
        path,
        "rows",
        stats,
        rejected,
        checks,
        rows={split: len(rows[split]) for split in SPLITS},
        windows=window_stats,
        samples=found,
    )


def _tables(rows: ProbeRows, shown: Progress) -> Iterator[MeasurementTable]:
    """Yields the measurements of rows, about CHUNK at a time, however long or short a row is."""
    parts: list[MeasurementTable] = []
    held = 0
    for batch in rows.batches:
        table = batch.to_table()
        for start in range(0, len(table), CHUNK):
            parts.append(table.slice(start, start + CHUNK))
            held += len(parts[-1])
            if held >= CHUNK:
                yield MeasurementTable.concat(parts)
                shown.update(held)
                parts, held = [], 0
    if parts:
        yield MeasurementTable.concat(parts)
        shown.update(held)


def _windows(rows: ProbeRows, split: str, samples: int) -> tuple[list[Sample], dict[str, Any]]:
    """Returns contexts of `rows` as training would draw them, and what windows are like."""
    order = windows.VisitOrder(rows.n_measurements, SAMPLE_SEED)
    n_visits = min(order.per_epoch, WINDOW_VISITS)
    visits = order[np.arange(n_visits)]
    length = WINDOW_SEQ_LEN + 1
    tokens, offsets = windows.encode_visits(rows, visits, seed=SAMPLE_SEED, length=length)
    lengths = np.diff(offsets)
    counts = np.add.reduceat(tokens == tokenizer.MEASUREMENT_START, offsets[:-1])
    n_sequences = len(packing.best_fit(lengths, length))
    found = []
    for i in range(min(samples, n_visits)):
        row = int(visits.row[i])
        at = rows.row_in_batch[row]
        (src,) = addresses.to_text(rows.batches[rows.batch_index[row]].src_addr[at : at + 1])
        found.append(Sample(src, split, tokens[offsets[i] : offsets[i + 1]].tolist()))
    return found, {
        "visits": n_visits,
        "visits_per_epoch": order.per_epoch,
        "seq_len": WINDOW_SEQ_LEN,
        "measurements": _quantiles(counts),
        "tokens": _quantiles(lengths),
        "windows_per_sequence": n_visits / n_sequences,
        "padding_fraction": 1 - float(lengths.sum()) / (n_sequences * length),
    }


# --- the result ---------------------------------------------------------------------------------


def _result(
    path: str | Path,
    kind: str,
    stats: Statistics,
    rejected: dict[str, int],
    checks: list[Check],
    *,
    rows: dict[str, int] | None = None,
    windows: dict[str, Any] | None = None,
    samples: list[Sample],
) -> InspectResult:
    total = int(stats.measurements.sum())
    ranges = [r for r in stats.time_range if r]
    tables = {
        "probes": stats.sources,
        "destinations": stats.destinations,
        "pairs": stats.pairs,
        "duplicates": stats.records,
    }
    return InspectResult(
        path=str(path),
        kind=kind,
        measurements=total,
        failed_fraction=_ratio(stats.failed.sum(), total),
        ipv6_fraction=_ratio(stats.by_family[1], total),
        probes=stats.sources.distinct(),
        destinations=stats.destinations.distinct(),
        pairs=stats.pairs.distinct(),
        duplicates=duplicates(stats),
        estimated=[name for name, table in tables.items() if table.fraction < 1],
        time_first=time_text(min(low for low, _ in ranges)) if ranges else None,
        time_last=time_text(max(high for _, high in ranges)) if ranges else None,
        rtt_ms=_rtt_quantiles(stats.rtt.sum(axis=0)),
        families={
            name: {
                "measurements": int(stats.by_family[i]),
                "failed_fraction": _ratio(stats.failed[i], stats.by_family[i]),
                "rtt_ms": _rtt_quantiles(stats.rtt[i]),
            }
            for i, name in enumerate(("ipv4", "ipv6"))
        },
        rows=rows or {},
        measurements_by_split=(
            dict(zip(SPLITS, stats.measurements.tolist(), strict=True)) if rows else {}
        ),
        rejected=rejected,
        checks=checks,
        distributions={
            "rtt_ms": _rtt_distribution(stats.rtt),
            "time": _time_distribution(stats),
            "measurements_per_probe": _per_probe(stats.sources),
        },
        top_sources=_top(stats.sources),
        top_destinations=_top(stats.destinations),
        windows=windows,
        samples=samples,
    )


def time_text(seconds: int) -> str:
    """Returns a time as ISO 8601, UTC."""
    return f"{np.datetime64(int(seconds), 's')}Z"


def _ratio(part: np.integer, whole: np.integer | int) -> float | None:
    return float(part / whole) if whole else None


def _rtt_quantiles(histogram: np.ndarray) -> dict[str, float | None]:
    return {f"p{q}": rtt_quantile(histogram, q / 100) for q in QUANTILES}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, np.array(QUANTILES) / 100, method="inverted_cdf")
    return {f"p{q}": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _log_histogram(values: np.ndarray, weights: np.ndarray, per_decade: int):
    """Returns (edges, counts [..., bins]) of positive values in bins of equal width in the log."""
    low = int(np.floor(np.log10(values.min()) * per_decade))
    high = int(np.floor(np.log10(values.max()) * per_decade)) + 1
    index = np.clip(np.floor(np.log10(values) * per_decade).astype(int) - low, 0, high - low - 1)
    rows = [np.bincount(index, row, high - low) for row in np.atleast_2d(weights)]
    return 10.0 ** (np.arange(low, high + 1) / per_decade), np.rint(rows).astype(np.int64)


def _rtt_distribution(histograms: np.ndarray) -> dict[str, list[float]]:
    """Returns a histogram in log scale by family; an RTT of 0, which is wrong, is left out."""
    used = np.flatnonzero(histograms[:, 1:].sum(axis=0)) + 1
    if len(used) == 0:
        return {"edges": [], "ipv4": [], "ipv6": []}
    edges, counts = _log_histogram(rtt_of_bin(used), histograms[:, used], BINS_PER_DECADE)
    names = ("edges", "ipv4", "ipv6")
    return dict(zip(names, [edges.tolist(), *counts.tolist()], strict=True))


def _time_distribution(stats: Statistics) -> dict[str, Any]:
    """Returns measurements over time: `start` and `width` of bins in seconds, counts in each."""
    histogram = stats.time
    n, factor = len(histogram.counts), max(-(-len(histogram.counts) // TIME_POINTS), 1)
    bins = np.add.reduceat(histogram.counts, np.arange(0, n, factor)) if n else histogram.counts
    return {
        "start": histogram.first * histogram.width,
        "width": histogram.width * factor,
        "ipv4": bins[:, _IPV4].sum(axis=1).tolist(),
        "ipv6": bins[:, _IPV6].sum(axis=1).tolist(),
        "failed": bins[:, 1::2].sum(axis=1).tolist(),
    }


def _per_probe(sources: HashTable) -> dict[str, Any]:
    """Returns how many measurements a source has: quantiles, and a histogram in log scale."""
    kept = sources.sampled()
    counts = sources.sums[kept, 0]
    if len(counts) == 0:
        return {"quantiles": {}, "failed_fraction": {}, "edges": [], "probes": []}
    edges, probes = _log_histogram(counts, np.ones_like(counts) / sources.fraction, BINS_PER_DECADE)
    return {
        "quantiles": _quantiles(counts),
        "failed_fraction": _quantiles(sources.sums[kept, 1] / counts),
        "edges": edges.tolist(),
        "probes": probes[0].tolist(),
    }


def _top(table: HashTable) -> list[dict[str, Any]]:
    found, top = [], table.top(TOP)
    texts = addresses.to_text(addresses.from_bytes(table.labels[top]))
    for i, text in zip(top, texts, strict=True):
        count, failed, total_ms = table.sums[i, :3].tolist()
        found.append(
            {
                "address": text,
                "measurements": int(count),
                "failed_fraction": failed / count,
                "mean_rtt_ms": total_ms / (count - failed) if count > failed else None,
            }
        )
    return found
