"""What a data set holds and what is wrong with it: `inspect-data`.

One streaming pass over measurements in any input format, or over a directory of probe rows.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ping_llm import addresses, outputs, packing, settings, tokenizer
from ping_llm.data import windows
from ping_llm.data.rows import SPLITS, ProbeRows, is_dataset, read_metadata, verify_files
from ping_llm.errors import ConfigError, DataError
from ping_llm.hashing import hash_addresses
from ping_llm.ingest.sources import read_measurements
from ping_llm.inspection.checks import measurement_checks, row_checks
from ping_llm.inspection.located import LocatedStatistics
from ping_llm.inspection.result import Check, InspectDataResult, SampleContext, time_text
from ping_llm.inspection.settings import InspectDataSettings
from ping_llm.inspection.statistics import HashTable, Statistics, rtt_of_bin, rtt_quantile
from ping_llm.measurements import KINDS, MeasurementTable
from ping_llm.places import Places
from ping_llm.progress import progress
from ping_llm.storage import Location

CHUNK = 1 << 18  # measurements looked at together
BINS_PER_DECADE = 20
TIME_POINTS = 120
TOP = 10
QUANTILES = (5, 25, 50, 75, 95)
WINDOWS, WINDOW_SEQ_LEN, WINDOW_SEED = 2048, 1024, 0
_MEASUREMENTS_THAT_FIT = WINDOW_SEQ_LEN // tokenizer.MAX_MEASUREMENT_TOKENS
_IPV4, _IPV6 = slice(0, 2), slice(2, 4)  # classes of the time histogram


@settings.takes(InspectDataSettings)
def inspect_data(chosen: InspectDataSettings) -> InspectDataResult:
    """Returns what a data set holds and what is wrong with it.

    Raises:
        ConfigError: A setting has a value that cannot be.
        DataError: The data cannot be read.
        StorageError: They are absent, or the report cannot be written.
    """
    inspect = _inspect_rows if is_dataset(chosen.path) else _inspect_measurements
    if chosen.verify:
        if not is_dataset(chosen.path):
            raise ConfigError(f"verify: {chosen.path} is no directory of probe rows")
        directory = Location.of(chosen.path).local_copy(identity="dataset.json")
        verify_files(directory, read_metadata(directory))
    located = chosen.prefixes and LocatedStatistics(Places.read(chosen.prefixes))
    if chosen.report is None:
        return inspect(chosen.path, chosen.samples, located or None)
    from ping_llm.inspection.page import html_page
    from ping_llm.report import write_page

    report = Location.of(chosen.report)
    if report.is_dir():
        raise ConfigError(f"{report=!s} is a directory; name a file")
    with outputs.claim(report, what="inspect-data") as claim:
        result = inspect(chosen.path, chosen.samples, located or None)
        write_page(html_page(result), report, claim=claim)
        return result


# --- measurements in files ----------------------------------------------------------------------


def _inspect_measurements(
    path: str, samples: int, located: LocatedStatistics | None
) -> InspectDataResult:
    stats, rejected, contexts = Statistics(), Counter[str](), []
    tables = read_measurements(
        [path], on_rejected=lambda batch: rejected.update(batch["reason"].to_pylist())
    )
    with progress("inspect", unit="measurements") as shown:
        for table in tables:
            stats.add(table)
            if located is not None:
                located.add(table)
            if len(contexts) < samples:
                contexts += _first_contexts(table, samples - len(contexts))
            shown.update(len(table))
    stats.finish()
    checks = measurement_checks(stats, rejected, ordered=False)
    return _result(stats, path, dict(rejected), checks, contexts, located)


def _first_contexts(table: MeasurementTable, count: int) -> list[SampleContext]:
    """Returns the first measurements of the first sources of a table, in time order."""
    contexts = []
    hashes = hash_addresses(table.src)
    _, first = np.unique(hashes, return_index=True)
    for i in np.sort(first)[:count]:
        chosen = table.take(np.flatnonzero(hashes == hashes[i])[:_MEASUREMENTS_THAT_FIT])
        chosen = chosen.take(np.argsort(chosen.time, kind="stable"))
        order = np.tile(np.arange(4, dtype=np.uint8), (len(chosen), 1))
        offsets = np.array([0, len(chosen)])
        tokens, _ = tokenizer.encode(chosen, segment_offsets=offsets, field_order=order)
        (source,) = addresses.to_text(chosen.src[:1])
        contexts.append(SampleContext(source, None, tokens.tolist()))
    return contexts


# --- probe rows ---------------------------------------------------------------------------------


def _inspect_rows(path: str, samples: int, located: LocatedStatistics | None) -> InspectDataResult:
    directory = Location.of(path).local_copy(identity="dataset.json")
    metadata = read_metadata(directory)
    stats = Statistics()
    rows = {split: ProbeRows(directory, split) for split in SPLITS}
    total = sum(int(r.n_measurements.sum()) for r in rows.values())
    with progress("inspect", total=total, unit="measurements") as shown:
        for index, split in enumerate(SPLITS):
            for table in _tables(rows[split]):
                stats.add(table, split=index)
                if located is not None:
                    located.add(table)
                shown.update(len(table))
    stats.finish()
    rejected = metadata.get("rejected", {})
    checks = measurement_checks(stats, rejected, ordered=True)
    checks += row_checks(rows.values(), stats, metadata)
    split = next((split for split in SPLITS if len(rows[split])), None)
    contexts, window_statistics = [], None
    if split is not None:
        try:
            contexts, window_statistics = _windows(rows[split], split, samples)
        except DataError as error:
            checks.append(Check("rows encode", False, 0, str(error)))
    counts = {split: len(rows[split]) for split in SPLITS}
    by_split = dict(zip(SPLITS, stats.measurements.tolist(), strict=True))
    of_rows = {"rows": counts, "measurements_by_split": by_split, "windows": window_statistics}
    return _result(stats, path, rejected, checks, contexts, located, **of_rows)


def _tables(rows: ProbeRows) -> Iterator[MeasurementTable]:
    """Yields the measurements of rows, about CHUNK at a time, however long or short a row is."""
    pending: list[MeasurementTable] = []
    for batch in rows.batches:
        table = batch.to_table()
        for start in range(0, len(table), CHUNK):
            pending.append(table.slice(start, start + CHUNK))
            if sum(map(len, pending)) >= CHUNK:
                yield MeasurementTable.concat(pending)
                pending = []
    if pending:
        yield MeasurementTable.concat(pending)


def _windows(
    rows: ProbeRows, split: str, samples: int
) -> tuple[list[SampleContext], dict[str, Any]]:
    """Returns contexts of `rows` as training would draw them, and statistics of windows."""
    order = windows.WindowOrder(rows.n_measurements, WINDOW_SEED)
    n_windows = min(order.per_epoch, WINDOWS)
    drawn = order[np.arange(n_windows)]
    length = WINDOW_SEQ_LEN + 1
    tokens, offsets = windows.encode_windows(rows, drawn, seed=WINDOW_SEED, length=length)
    lengths = np.diff(offsets)
    counts = np.add.reduceat(tokens == tokenizer.MEASUREMENT_START, offsets[:-1])
    n_sequences = len(packing.best_fit(lengths, length))
    contexts = []
    for i, row in enumerate(drawn.row[:samples].tolist()):
        batch, index = rows.batches[rows.batch_index[row]], rows.row_in_batch[row]
        (source,) = addresses.to_text(batch.src[index : index + 1])
        contexts.append(SampleContext(source, split, tokens[offsets[i] : offsets[i + 1]].tolist()))
    return contexts, {
        "visits": n_windows,
        "visits_per_epoch": order.per_epoch,
        "seq_len": WINDOW_SEQ_LEN,
        "measurements": _quantiles(counts),
        "tokens": _quantiles(lengths),
        "windows_per_sequence": n_windows / n_sequences,
        "padding_fraction": 1 - float(lengths.sum()) / (n_sequences * length),
    }


# --- the result ---------------------------------------------------------------------------------


def _result(
    stats: Statistics,
    path: str,
    rejected: dict,
    checks: list[Check],
    samples: list,
    located: LocatedStatistics | None,
    **of_rows: Any,
) -> InspectDataResult:
    by_outcome = stats.time.counts.sum(axis=0).reshape(2, 2)  # [family, answered or failed]
    by_family, failed, total = by_outcome.sum(axis=1), by_outcome[:, 1], int(by_outcome.sum())
    tables = {"probes": stats.sources, "destinations": stats.destinations, "pairs": stats.pairs}
    sampled = [name for name, table in tables.items() if table.fraction < 1]
    sampled += ["duplicates"] if stats.records.fraction < 1 else []
    return InspectDataResult(
        path=path,
        kind="rows" if of_rows else "measurements",
        measurements=total,
        failed_fraction=_ratio(failed.sum(), total),
        ipv6_fraction=_ratio(by_family[1], total),
        **{name: table.distinct() for name, table in tables.items()},
        duplicates=stats.records.repeats(),
        estimated=sampled,
        time_first=time_text(stats.first_time.min()) if total else None,
        time_last=time_text(stats.last_time.max()) if total else None,
        rtt_ms=_rtt_quantiles(stats.rtt.sum(axis=0)),
        families={
            name: {
                "measurements": int(by_family[i]),
                "failed_fraction": _ratio(failed[i], by_family[i]),
                "rtt_ms": _rtt_quantiles(stats.rtt[i]),
            }
            for i, name in enumerate(("ipv4", "ipv6"))
        },
        kinds=dict(zip(KINDS, stats.kinds.tolist(), strict=True)),
        distributions={
            "rtt_ms": _rtt_distribution(stats.rtt),
            "time": _time_distribution(stats),
            "measurements_per_probe": _per_probe(stats.sources),
        },
        top_sources=_top(stats.sources),
        top_destinations=_top(stats.destinations),
        rejected=rejected,
        checks=checks + (located.checks() if located else []),
        places=located.result(TOP) if located else None,
        samples=samples,
        **of_rows,
    )


def _ratio(part: np.integer, whole: np.integer | int) -> float | None:
    return float(part / whole) if whole else None


def _rtt_quantiles(histogram: np.ndarray) -> dict[str, float | None]:
    return {f"p{q}": rtt_quantile(histogram, q / 100) for q in QUANTILES}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if len(values) == 0:
        return {}
    quantiles = np.quantile(values, np.array(QUANTILES) / 100, method="inverted_cdf")
    return {f"p{q}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}


def _log_histogram(values: np.ndarray, weights: np.ndarray) -> tuple[list, list[list[int]]]:
    """Returns (edges, counts for each row of `weights`) of positive values in bins of the log."""
    if len(values) == 0:
        return [], [[] for _ in weights]
    bins = np.floor(np.log10(values) * BINS_PER_DECADE).astype(int)
    low, n = int(bins.min()), int(np.ptp(bins)) + 1
    counts = [np.rint(np.bincount(bins - low, row, n)).astype(int).tolist() for row in weights]
    return (10.0 ** (np.arange(low, low + n + 1) / BINS_PER_DECADE)).tolist(), counts


def _rtt_distribution(histograms: np.ndarray) -> dict[str, list]:
    """Returns a histogram in log scale by family; an RTT of 0, which is wrong, is left out."""
    used = np.flatnonzero(histograms[:, 1:].sum(axis=0)) + 1
    edges, (ipv4, ipv6) = _log_histogram(rtt_of_bin(used), histograms[:, used])
    return {"edges": edges, "ipv4": ipv4, "ipv6": ipv6}


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
    edges, (probes,) = _log_histogram(counts, np.full((1, len(counts)), 1 / sources.fraction))
    return {
        "quantiles": _quantiles(counts),
        "failed_fraction": _quantiles(sources.sums[kept, 1] / counts),
        "edges": edges,
        "probes": probes,
    }


def _top(table: HashTable) -> list[dict[str, Any]]:
    top = table.top(TOP)
    texts = addresses.to_text(addresses.from_bytes(table.labels[top]))
    return [
        {
            "address": text,
            "measurements": int(count),
            "failed_fraction": failed / count,
            "mean_rtt_ms": total_ms / (count - failed) if count > failed else None,
        }
        for text, (count, failed, total_ms) in zip(texts, table.sums[top, :3].tolist(), strict=True)
    ]
