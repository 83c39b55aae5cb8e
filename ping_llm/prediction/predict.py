"""Answers for one pair, for a file of pairs, and for one source and many destinations."""

import hashlib
import json
import os
import shutil
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ping_llm import addresses
from ping_llm.columns import INVALID, MISSING, OK, parse_times, read_addresses, read_times
from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.rtt import LEVELS, Predictions, Predictor, questions
from ping_llm.progress import progress

BLOCK_PAIRS = 8192  # answered, then kept, at once
_KEY = b"ping_llm"  # of the settings and result among a Parquet file's metadata
_READ_ERRORS = (pa.ArrowInvalid, pa.ArrowKeyError, OSError)


def predict(
    run: str | Path,
    *,
    src: str | None = None,
    dst: str | None = None,
    time: str | None = None,
    pairs: str | Path | None = None,
    output: str | Path | None = None,
    rank: str | Path | None = None,
    history: str | Path | None = None,
) -> dict[str, Any]:
    """Returns RTT distributions and failure probabilities, fit for JSON.

    Three forms: one pair (`src` and `dst`), a file of pairs (`pairs` and `output`), or the
    addresses in a file as destinations, ordered by expected RTT (`src` and `rank`).

    Args:
        run: A run directory.
        src: Source address.
        dst: Destination address.
        time: When, as ISO 8601 (UTC where it has no zone) or seconds since 1970; None: any time.
        pairs: Parquet or CSV file with the columns `src_addr` and `dst_addr`, and `event_time`
            where times are known.
        output: Parquet file for the answers, row by row as in `pairs`. What is done is kept when
            the work is stopped; the same call goes on from there.
        rank: Text file with one destination address a line.
        history: Measurements to read first: of each question's own source, the newest that fit.

    Raises:
        ConfigError: The arguments are of no form, or `output` was begun with others.
        DataError: A file or an address cannot be read.
        CheckpointError: `run` is no run.
    """
    if pairs is not None and output is not None and not (src or dst or time or rank):
        return _predict_pairs(Path(run), Path(pairs), Path(output), history)
    if src is None or (dst is None) == (rank is None) or pairs is not None or output is not None:
        raise ConfigError(
            "give --src and --dst for one pair, --pairs and --output for a file of pairs, or --src "
            "and --rank for destinations in order"
        )
    when = None if time is None else _parse_time(time)
    destinations = [dst] if dst is not None else _read_lines(Path(str(rank)))
    queries = questions([src] * len(destinations), destinations, [when] * len(destinations))
    known = None if history is None else read_table([str(history)])
    predictor = Predictor.load(run)
    contexts = None if known is None else predictor.contexts(known, queries)
    if contexts is not None and not contexts.lengths().any():
        raise DataError(f"{history} holds no measurement from {src}; give some of that source")
    order, predictions = predictor.rank(queries, contexts)
    answers = [
        {"src": src, "dst": destinations[i], "time": when, **answer(predictions, i)} for i in order
    ]
    return answers[0] if dst is not None else {"ranked": answers}


def answer(predictions: Predictions, i: int) -> dict[str, Any]:
    """Returns one answer, fit for JSON."""
    named = {
        f"p{level * 100:.0f}": ms
        for level, ms in zip(LEVELS, predictions.quantiles_ms[i], strict=True)
    }
    unseen = None
    if predictions.unseen_src is not None and predictions.unseen_dst is not None:
        flags = {"src": predictions.unseen_src[i], "dst": predictions.unseen_dst[i]}
        unseen = [name for name, flag in flags.items() if flag]
    return {
        "rtt_ms": {**named, "mean": float(predictions.mean_ms[i])},
        "p_failed": float(predictions.p_failed[i]),
        "unseen": unseen,
        "history": int(predictions.history[i]),
    }


def _parse_time(text: str) -> int:
    seconds, problem = parse_times(pa.array([text]))
    if problem[0] != OK:
        raise DataError(f"time {text!r} is neither ISO 8601 nor seconds since 1970")
    return int(seconds[0])


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path} is empty; give one destination address a line")
    return found


# --- a file of pairs ---------------------------------------------------------------------------


def _predict_pairs(
    run: Path, pairs: Path, output: Path, history: str | Path | None
) -> dict[str, Any]:
    if output.suffix != ".parquet":
        raise ConfigError(f"output {output} must be a .parquet file")
    known = None if history is None else read_table([str(history)])
    predictor = Predictor.load(run)
    settings = {
        "model": _model_hash(predictor),
        "pairs": _file_hash(pairs),
        "history": None if history is None else _file_hash(Path(history)),
        "block_pairs": BLOCK_PAIRS,
    }
    if output.exists():
        return _finished(output, settings)
    total = _count(pairs)
    parts = output.with_name(output.name + ".parts")
    done, seconds, answered = 0, 0.0, 0
    with progress(f"predict {pairs.name}", total=total, unit="pairs") as bar:
        for i, block in enumerate(_read_blocks(pairs)):
            if i == 0:
                _open_parts(parts, settings)
            part = parts / f"{i:06d}.parquet"
            if not part.exists():
                started = clock.monotonic()
                contexts = None if known is None else predictor.contexts(known, block)
                table = _to_table(predictor.predict(block, contexts))
                _write(table, part)
                seconds += clock.monotonic() - started
                answered += len(block)
            done += len(block)
            bar.update(done=done)
    result = {
        "pairs": done,
        "output": str(output),
        "pairs_per_second": round(answered / seconds, 1) if seconds else None,
    }
    _join(parts, output, {"settings": settings, "result": result})
    return result


def _model_hash(predictor: Predictor) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(predictor.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _differences(stored: dict[str, Any], settings: dict[str, Any]) -> str:
    return ", ".join(name for name in settings if stored.get(name) != settings[name])


def _finished(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a finished output, if it is of these settings."""
    try:
        kept = json.loads((pq.read_schema(output).metadata or {})[_KEY])
    except (*_READ_ERRORS, KeyError, ValueError):
        raise ConfigError(f"{output} exists and is not ours; choose another output") from None
    if different := _differences(kept["settings"], settings):
        raise ConfigError(f"{output} was made with another {different}; choose another output")
    return kept["result"]


def _open_parts(parts: Path, settings: dict[str, Any]) -> None:
    path = parts / "settings.json"
    try:
        if path.exists():
            if different := _differences(json.loads(path.read_text()), settings):
                raise ConfigError(
                    f"{parts} was begun with another {different}; remove it or take another output"
                )
            return
        parts.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{parts} cannot be written: {error.strerror}") from None


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            wanted = {"src_addr", "dst_addr", "event_time"}
            columns = [name for name in file.schema_arrow.names if name in wanted]
            yield from file.iter_batches(BLOCK_PAIRS, columns=columns)
    else:
        names = ("src_addr", "dst_addr", "event_time")
        options = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        with pa_csv.open_csv(path, convert_options=options) as reader:
            yield from reader


def _count(path: Path) -> int | None:
    """Returns the number of rows, where that is known without reading them."""
    try:
        return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _read_blocks(path: Path) -> Iterator[MeasurementTable]:
    row = 0
    try:
        for batch in _read_batches(path):
            for start in range(0, len(batch), BLOCK_PAIRS):
                block = batch.slice(start, BLOCK_PAIRS)
                yield _to_questions(block, path, row)
                row += len(block)
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as a table of pairs: {error}") from None
    if row == 0:
        raise DataError(f"{path} holds no pairs")


def _to_questions(block: pa.RecordBatch, path: Path, row: int) -> MeasurementTable:
    for name in ("src_addr", "dst_addr"):
        if name not in block.schema.names:
            raise DataError(f"{path} has no column {name}; it has {', '.join(block.schema.names)}")

    def refuse(name: str, bad: np.ndarray, what: str) -> None:
        for i in np.flatnonzero(bad):
            value = block[name][int(i)].as_py()
            raise DataError(f"{path}, row {row + i + 1}: {name} {value!r} is no {what}")

    (src, no_src), (dst, no_dst) = (
        read_addresses(block[name]) for name in ("src_addr", "dst_addr")
    )
    refuse("src_addr", no_src, "address")
    refuse("dst_addr", no_dst, "address")
    families = addresses.family(src)
    mixed = np.flatnonzero(families != addresses.family(dst))
    if len(mixed):
        raise DataError(f"{path}, row {row + mixed[0] + 1}: addresses of different families")
    times = np.full(len(block), NO_TIME)
    if "event_time" in block.schema.names:
        times, problems = read_times(block["event_time"])
        refuse("event_time", problems == INVALID, "time")
        times = np.where(problems == MISSING, NO_TIME, times)
    rtt = np.full(len(block), -1, np.float32)
    return MeasurementTable(time=times, src=src, dst=dst, family=families, rtt=rtt)


def _to_table(predictions: Predictions) -> pa.Table:
    columns = {
        f"rtt_p{level * 100:.0f}": predictions.quantiles_ms[:, i] for i, level in enumerate(LEVELS)
    }
    columns |= {"rtt_mean": predictions.mean_ms, "p_failed": predictions.p_failed}
    for name, flags in (
        ("unseen_src", predictions.unseen_src),
        ("unseen_dst", predictions.unseen_dst),
    ):
        columns[name] = pa.nulls(len(predictions), pa.bool_()) if flags is None else flags
    return pa.table({**columns, "history": predictions.history.astype(np.int32)})


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None


def _join(parts: Path, output: Path, kept: dict[str, Any]) -> None:
    """Makes one file out of the parts, and removes them."""
    files = sorted(parts.glob("*.parquet"))
    schema = pq.read_schema(files[0]).with_metadata({_KEY: json.dumps(kept)})
    temporary = output.with_name(output.name + ".tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                writer.write_table(pq.read_table(file).replace_schema_metadata(schema.metadata))
        os.replace(temporary, output)
        shutil.rmtree(parts)
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror or error}") from None
