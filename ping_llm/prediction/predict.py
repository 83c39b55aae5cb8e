"""Answers for one pair, for a file of pairs, and for one source and many destinations."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ping_llm import outputs, settings
from ping_llm.errors import ConfigError, DataError
from ping_llm.ingest.files import READ_ERRORS, InputFile, find_files
from ping_llm.ingest.formats.lines import open_text
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.explain import Evidence
from ping_llm.prediction.predictor import LEVELS, Predictor, not_later
from ping_llm.prediction.settings import PredictSettings
from ping_llm.progress import progress
from ping_llm.storage import Location

BLOCK_PAIRS = 8192  # answered, then kept, at once
_COLUMNS = ("src_addr", "dst_addr", "event_time")
_KEY = b"ping_llm"  # of the settings and result among a Parquet file's metadata


@dataclasses.dataclass(frozen=True)
class PairAnswer:
    """What the model says about one pair.

    Attributes:
        src: Source address.
        dst: Destination address.
        time: When, in seconds since 1970 UTC; None: at any time.
        rtt_ms: Quantiles `p5` to `p95`, `mode` and `mean` of the RTT in ms, given that there is an
            answer.
        p_failed: Probability that there is none.
        unseen: Of which of `src` and `dst` nothing is known.
        history: Measurements that the answer was drawn from.
        later: Measurements of `--history` that were left out as later than the question.
        calibrated_on: On how many measurements the model calibrated itself, by kind of question.
        explained: With `explain`, those that counted most; else None.
    """

    src: str
    dst: str
    time: int | None
    rtt_ms: dict[str, float]
    p_failed: float
    unseen: list[str]
    history: int
    later: int
    calibrated_on: dict[str, int]
    explained: list[Evidence] | None = None


@dataclasses.dataclass(frozen=True)
class RankingResult:
    """Destinations in the order of their expected RTT.

    Attributes:
        ranked: The answers, shortest mean first.
    """

    ranked: list[PairAnswer]


@dataclasses.dataclass(frozen=True)
class PairsResult:
    """What became of a file of pairs.

    Attributes:
        pairs: Number of pairs.
        output: The file of answers.
        pairs_per_second: Answered in a second; None where nothing was left to answer.
    """

    pairs: int
    output: str
    pairs_per_second: float | None


@settings.takes(PredictSettings)
def predict(chosen: PredictSettings) -> PairAnswer | RankingResult | PairsResult:
    """Returns RTT distributions and failure probabilities.

    There are three forms: one pair (`src` and `dst`), a file of pairs (`pairs` and `output`), or
    the addresses in a file as destinations, ordered by expected RTT (`src` and `rank`).

    Raises:
        ConfigError: The settings are of no form, or `output` was begun with others or is being
            written by another process.
        DataError: A file or an address cannot be read.
        StorageError: A file is absent, or `output` cannot be written.
        CheckpointError: `run` is no run.
    """
    if chosen.pairs is not None:
        return _predict_pairs(chosen)
    questions, destinations = _read_questions(chosen)
    history = None if chosen.history is None else read_table([chosen.history])
    predictor = _predictor(chosen)
    known = not_later(history, int(questions.time[0]))  # all are asked at one time
    if history is not None and known is not None and not len(known) and not len(predictor.known):
        raise DataError(f"{chosen.history}: all measurements are later than the question")
    explained = predictor.explain(questions, known) if chosen.explain else None
    calibrated_on = predictor.calibrated_on(known)
    when = None if questions.time[0] == NO_TIME else int(questions.time[0])
    rows = zip(destinations, predictor.ask(questions, history).to_pylist(), strict=True)
    answers = [
        PairAnswer(
            src=str(chosen.src),
            dst=dst,
            time=when,
            rtt_ms={name: row[f"rtt_{name}"] for name in (*LEVELS, "mode", "mean")},
            p_failed=row["p_failed"],
            unseen=[end for end in ("src", "dst") if row[f"unseen_{end}"]],
            history=row["history"],
            later=row["later"],
            calibrated_on=calibrated_on,
            explained=explained,
        )
        for dst, row in sorted(rows, key=lambda each: each[1]["rtt_mean"])
    ]
    return RankingResult(answers) if chosen.rank is not None else answers[0]


def _predictor(chosen: PredictSettings) -> Predictor:
    return Predictor.pretrained() if chosen.run is None else Predictor.load(chosen.run, chosen.step)


def _read_questions(chosen: PredictSettings) -> tuple[MeasurementTable, list[str]]:
    """Returns the questions of one pair or of one source, and their destinations as text."""
    if chosen.rank is None:
        destinations, where = [str(chosen.dst)], ""
    else:
        lines = Location.of(chosen.rank).read_text().splitlines()
        destinations, where = [line.strip() for line in lines if line.strip()], f"{chosen.rank}, "
        if not destinations:
            raise DataError(f"{chosen.rank} is empty; give one destination address a line")
    n = len(destinations)
    columns = dict(zip(_COLUMNS, ([chosen.src] * n, destinations, [chosen.time] * n), strict=True))
    try:
        return MeasurementTable.from_arrow(columns, questions=True), destinations
    except DataError as error:
        text = f"{where}{error}"
        raise DataError(text if where else text.removeprefix("row 1: ")) from None


# --- a file of pairs ---------------------------------------------------------------------------


def _predict_pairs(chosen: PredictSettings) -> PairsResult:
    pairs, output = Location.of(str(chosen.pairs)), Location.of(str(chosen.output))
    files = find_files([str(pairs)])
    history = None if chosen.history is None else read_table([chosen.history])
    predictor = _predictor(chosen)
    facts = {
        "model": predictor.model.digest(),
        "pairs": outputs.content_fingerprint(pairs),
        "history": chosen.history and outputs.content_fingerprint(Location.of(chosen.history)),
        "block_pairs": BLOCK_PAIRS,
    }
    blocks = output.parent / f"{output.name}.parts"

    def stored() -> dict[str, Any] | None:
        if output.exists():
            return _read_metadata(output)["settings"]
        begun = blocks / "settings.json"
        return json.loads(begun.read_text()) if begun.is_file() else None

    with outputs.claim(output, what="predict", settings=facts, stored=stored) as claim:
        finished = {name.partition("-")[0] for name in blocks.names()}
        if output.exists() or "settings.json" not in finished:
            blocks.remove()  # left by a process that was killed when it had joined them
            finished = set()
        if output.exists():
            return PairsResult(**_read_metadata(output)["result"])
        total, done, answered, seconds = _count(files), 0, 0, 0.0
        with progress(f"predict {output.name}", total=total, unit="pairs") as bar:
            for i, questions in enumerate(_read_blocks(files, pairs)):
                if f"{i:06d}" not in finished:
                    started = time.monotonic()
                    answers = predictor.ask(questions, history)
                    if "settings.json" not in finished:
                        outputs.publish_json(blocks / "settings.json", facts, claim=claim)
                        finished.add("settings.json")
                    block = pa.BufferOutputStream()
                    pq.write_table(answers, block)
                    content = block.getvalue().to_pybytes()
                    name = f"{i:06d}-{_digest(content)}.parquet"
                    with outputs.publish_file(blocks / name, claim=claim) as path:
                        path.write_bytes(content)
                    seconds += time.monotonic() - started
                    answered += len(questions)
                done += len(questions)
                bar.update(done=done)
        rate = round(answered / seconds, 1) if seconds else None
        result = PairsResult(done, str(output), rate)
        _join(blocks, output, {"settings": facts, "result": dataclasses.asdict(result)}, claim)
        return result


def _read_metadata(output: Location) -> dict[str, Any]:
    """Returns what `_join` wrote beside the answers."""
    try:
        with output.open_input() as source:
            return json.loads((pq.read_schema(source).metadata or {})[_KEY])
    except (*READ_ERRORS, KeyError, ValueError):
        raise ConfigError(f"{output} exists and is not ours; choose another output") from None


def _join(blocks: Location, output: Location, kept: dict[str, Any], claim: outputs.Claim) -> None:
    """Makes one file out of the blocks, and removes them."""
    files = [blocks / name for name in blocks.names() if name.endswith(".parquet")]
    with outputs.publish_file(output, claim=claim) as path:
        writer = None
        for file in files:
            content = file.read_bytes()
            if file.name != f"{file.name[:6]}-{_digest(content)}.parquet":
                raise DataError(f"{file} is damaged; remove it and run the same command again")
            table = pq.read_table(pa.BufferReader(content))
            table = table.replace_schema_metadata({_KEY: json.dumps(kept)})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    blocks.remove()


def _digest(content: bytes) -> str:
    """Returns what is in the name of a block, by which a damaged one is known."""
    return hashlib.sha256(content).hexdigest()[:16]


def _count(files: list[InputFile]) -> int | None:
    """Returns the number of pairs, where it is known without reading them."""
    if any(file.format != "parquet" for file in files):
        return None
    total = 0
    for file in files:
        with _named(file), file.location.open_input() as source:
            total += pq.read_metadata(source).num_rows
    return total


def _read_blocks(files: list[InputFile], pairs: Location) -> Iterator[MeasurementTable]:
    empty = True
    for file in files:
        row = 1
        with _named(file):
            for batch in _read_batches(file):
                for start in range(0, len(batch), BLOCK_PAIRS):
                    block = batch.slice(start, BLOCK_PAIRS)
                    yield MeasurementTable.from_arrow(block, questions=True, first_row=row)
                    row += len(block)
        empty &= row == 1
    if empty:
        raise DataError(f"{pairs} holds no pairs")


def _read_batches(file: InputFile) -> Iterator[pa.RecordBatch]:
    """Yields the columns of a file that make questions, some rows at a time."""
    raw, text = open_text(file)
    with text:
        if file.format == "parquet":
            with pq.ParquetFile(raw) as parquet:
                names = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
                yield from parquet.iter_batches(BLOCK_PAIRS, columns=names)
        elif file.format == "arrow":
            with pa.ipc.open_file(raw) as reader:
                yield from map(reader.get_batch, range(reader.num_record_batches))
        elif file.format == "csv":
            as_text = pa_csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string()))
            with pa_csv.open_csv(text, convert_options=as_text) as reader:
                yield from reader
        else:
            raise DataError("it is no table; give Parquet, Arrow or CSV")


@contextlib.contextmanager
def _named(file: InputFile) -> Iterator[None]:
    """Makes the errors of a reader name the file."""
    try:
        yield
    except READ_ERRORS as error:
        raise DataError(f"{file.location} cannot be read as {file.format}: {error}") from None
    except DataError as error:
        raise DataError(f"{file.location}, {error}") from None
