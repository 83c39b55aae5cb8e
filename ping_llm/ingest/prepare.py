"""Turns measurements into probe rows: checks, runs an engine, publishes what it made at once."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ping_llm import settings
from ping_llm.data import rows
from ping_llm.errors import DataError
from ping_llm.hashing import digest
from ping_llm.ingest.fetch import fetched
from ping_llm.ingest.files import InputFile
from ping_llm.ingest.local import Engine, LocalEngine
from ping_llm.ingest.settings import PrepareSettings
from ping_llm.outputs import claim, digest_files, publish_directory
from ping_llm.resources import PeakMemory
from ping_llm.storage import Location, StoredFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What `prepare_data` did; the keys of `ping-llm prepare-data --json`.

    Attributes:
        measurements: Measurements in the rows of all splits; those seen from both ends count twice.
        failed: How many of them failed.
        rejected: Number of rejected records by reason.
        probes: Distinct source addresses of the rows.
        rows: Rows of each split.
        split_measurements: Measurements of each split.
        seconds: How long it took.
        peak_rss_bytes: The most memory the process and its children held at once.
    """

    measurements: int
    failed: int
    rejected: dict[str, int]
    probes: int
    rows: dict[str, int]
    split_measurements: dict[str, int]
    seconds: float
    peak_rss_bytes: int


@settings.takes(PrepareSettings)
def prepare_data(chosen: PrepareSettings) -> PrepareResult:
    """Writes measurements as probe rows, and returns what they are.

    The rows depend on the content of the inputs and the stored settings alone. When the output
    holds just these rows already, nothing is done.

    Raises:
        ConfigError: A setting cannot be, or the output was made from other inputs or with other
            settings, or is another process's.
        DataError: An input is broken, or holds no measurement.
        StorageError: An input is absent, or the output cannot be written.
    """
    started = time.monotonic()
    with fetched(chosen.inputs, chosen.reading) as files:
        return _prepare(chosen, files, started)


def _prepare(chosen: PrepareSettings, files: Sequence[InputFile], started: float) -> PrepareResult:
    output = Location.of(chosen.output)
    workers = chosen.workers or len(os.sched_getaffinity(0))

    def stored() -> dict[str, Any] | None:
        return rows.read_metadata(output)["settings"] if rows.is_dataset(output) else None

    with claim(output, what="prepare-data", settings=chosen, stored=stored) as held:
        if (made_with := stored()) is not None:
            inputs = {"inputs": _shown(_digests(files, workers))}
            inputs |= _prefixes(chosen)
            made = {name: made_with.get(name) for name in inputs}
            made["inputs"] = _shown(made_with["inputs"])
            settings.refuse_changes(made, inputs, output)
            return _finished(output)
        with (
            publish_directory(output, last=rows.METADATA, claim=held) as directory,
            PeakMemory() as memory,
        ):
            digests = _digests(files, workers)
            facts = settings.to_json(chosen) | {"inputs": digests} | _prefixes(chosen)
            engine = _engine(chosen)(directory, chosen, workers)
            counts = engine.run(files)
            result = PrepareResult(
                **counts,
                rejected=dict(sorted(engine.rejected.items())),
                seconds=round(time.monotonic() - started, 3),
                peak_rss_bytes=memory.peak(),
            )
            _write_metadata(directory, facts, result)
    return result


def _engine(chosen: PrepareSettings) -> type[Engine]:
    if chosen.engine == "local":
        return LocalEngine
    from ping_llm.ingest.spark import SparkEngine

    return SparkEngine


def _digests(files: Sequence[InputFile], workers: int) -> list[list[dict[str, Any]]]:
    """Returns name, size and SHA-256 of each file, grouped by input; order does not matter."""
    digests = digest_files([StoredFile(f.location, f.size) for f in files], workers=workers)
    groups: list[list[dict[str, Any]]] = [[] for _ in range(files[-1].input_index + 1)]
    for file, content in zip(files, digests, strict=True):
        groups[file.input_index].append(content._asdict())
    groups = [sorted(group, key=lambda each: each["sha256"]) for group in groups]
    return sorted(groups, key=lambda group: [each["sha256"] for each in group])


def _prefixes(chosen: PrepareSettings) -> dict[str, str]:
    """Returns {prefixes: a hash of the file}; nothing where there is none."""
    if chosen.prefixes is None:
        return {}
    content = Location.of(chosen.prefixes).read_bytes()
    return {"prefixes": hashlib.sha256(content).hexdigest()[:16]}


def _shown(digests: list[list[dict[str, Any]]]) -> str:
    """Returns inputs as an error names them: the first names, and a hash of all."""
    names = [each["name"] for group in digests for each in group]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} (hash {digest(digests)[:8]})"


def _finished(output: Location) -> PrepareResult:
    metadata = rows.read_metadata(output)
    names = [field.name for field in dataclasses.fields(PrepareResult)]
    try:
        return PrepareResult(**{name: metadata[name] for name in names})
    except KeyError as error:
        raise DataError(f"{output}/{rows.METADATA} lacks {error}; delete {output}") from None


def _write_metadata(directory: Path, stored: dict[str, Any], result: PrepareResult) -> None:
    metadata = {
        "schema_version": rows.SCHEMA_VERSION,
        "settings": stored,
        "split": stored["split"],
        "seed": stored["seed"],
        **dataclasses.asdict(result),
        "format": {
            "rows": "Arrow IPC file, one row a source and part, see rows.row_schema",
            "files": {s: len(list(directory.glob(f"{s}-*.arrow"))) for s in rows.SPLITS},
            "rejected": "rejected.parquet: file, line or row, reason, record",
        },
    }
    files = [StoredFile(Location.of(p), p.stat().st_size) for p in sorted(directory.iterdir())]
    metadata["sha256"] = {file.name: file.sha256 for file in digest_files(files)}
    metadata["fingerprint"] = rows.fingerprint(metadata)
    (directory / rows.METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
