"""Turns measurements into probe rows: checks, runs an engine, publishes what it made at once.

The work goes on in a directory beside the output, which a rename makes the output when everything
is in it. So a data set is there as a whole or not at all, whenever the process dies.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from ping_llm import storage
from ping_llm.data.rows import SCHEMA_VERSION, SPLITS, is_dataset, read_metadata
from ping_llm.errors import ConfigError, DataError, StorageError
from ping_llm.ingest.files import InputFile, find_files
from ping_llm.ingest.local import LocalEngine
from ping_llm.ingest.splits import SplitRule
from ping_llm.resources import PeakMemory

ENGINES = ("local", "spark")
SMALLEST_MEMORY = 500_000_000
_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MULTIPLES |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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


def prepare_data(
    inputs: Sequence[str],
    *,
    output: str | Path,
    split: str = "pair",
    valid_fraction: float = 0.05,
    test_fraction: float = 0.1,
    both_ends: bool = False,
    row_cap_mb: float = 8,
    memory_limit: str | int = "4GB",
    workers: int | None = None,
    engine: str = "local",
    seed: int = 0,
) -> PrepareResult:
    """Writes the measurements of `inputs` as probe rows to the directory `output`.

    The rows depend on the inputs, `split`, the fractions, `both_ends`, `row_cap_mb` and `seed`
    alone. When `output` holds just these rows already, nothing is done.

    Args:
        inputs: Files, directories or globs; each is one input to the *time* split.
        output: The directory to make.
        split: How valid and test are held out: by "pair", "time" or "probe".
        valid_fraction: Share held out for choices.
        test_fraction: Share held out for reporting.
        both_ends: Whether each train measurement also stands in a row of its destination, as one
            from there: right where RTTs are about the same either way and sources are few.
        row_cap_mb: Largest size of a row, in units of 1e6 bytes.
        memory_limit: What the process may hold at once, in bytes or like "4GB" or "512MiB".
        workers: Threads; by default one a CPU.
        engine: "local", or "spark" (extra `[spark]`), which makes the same files.
        seed: Key of the hashes that hold out pairs and probes.

    Raises:
        ConfigError: A setting cannot be, or differs from the one `output` was made with.
        DataError: An input is missing or broken, or holds no measurement.
        StorageError: The output cannot be written.
    """
    rule = SplitRule(
        split=split, valid_fraction=valid_fraction, test_fraction=test_fraction, seed=seed
    )
    if not 0.001 <= row_cap_mb <= 1000:
        raise ConfigError(f"row_cap_mb={row_cap_mb} must be between 0.001 and 1000")
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} is not one of {', '.join(ENGINES)}")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    limit = parse_size(memory_limit)
    if limit < SMALLEST_MEMORY:
        raise ConfigError(f"memory_limit={memory_limit} must be at least {SMALLEST_MEMORY:,} bytes")
    started = time.monotonic()
    output = str(output)
    done = is_dataset(output)
    publish = _published_remotely if storage.is_remote(output) else _published
    if publish is _published and not done and not _is_absent_or_empty(Path(output)):
        raise ConfigError(f"output {output} exists and is no data set; choose another --output")
    files = find_files(inputs)
    settings = {**dataclasses.asdict(rule), "row_cap_mb": float(row_cap_mb)}
    settings["both_ends"] = both_ends
    settings["inputs"] = _fingerprints(files, workers)
    if done:
        return _finished(output, settings)
    if engine == "spark":
        from ping_llm.ingest.spark import SparkEngine as Engine
    else:
        Engine = LocalEngine
    with PeakMemory() as memory, publish(output) as directory:
        made = Engine(
            directory,
            rule,
            row_cap_bytes=int(row_cap_mb * 1e6),
            memory_limit=limit,
            both_ends=both_ends,
        )
        made.run(files, workers=workers)
        result = PrepareResult(
            measurements=sum(made.measurements.values()),
            failed=made.failed,
            rejected=dict(sorted(made.rejected.items())),
            probes=made.probes,
            rows=made.rows,
            split_measurements=made.measurements,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=memory.peak(),
        )
        _write_metadata(directory, settings, result)
    return result


def parse_size(text: str | int) -> int:
    """Returns a number of bytes from text like "4GB" (4e9), "512MiB" (512 * 2**20) or "1000".

    Raises:
        ConfigError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", str(text).strip().upper())
    if match is None:
        raise ConfigError(f"memory_limit={text!r} is no size; expected one like 4GB or 512MiB")
    return int(float(match[1]) * _MULTIPLES[match[2] or ""])


def _is_absent_or_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _fingerprints(files: Sequence[InputFile], workers: int) -> list[list[dict[str, Any]]]:
    """Returns name, size and SHA-256 of each file, grouped by input; order does not matter."""
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(_sha256, [file.path for file in files])
        known = [
            (file.input_index, {"name": Path(file.path).name, "size": file.size, "sha256": sha256})
            for file, sha256 in zip(files, hashes, strict=True)
        ]
    groups = [
        sorted((each for i, each in known if i == index), key=lambda each: each["sha256"])
        for index in range(max(file.input_index for file in files) + 1)
    ]
    return sorted(groups, key=lambda group: [each["sha256"] for each in group])


def _sha256(path: str) -> str:
    try:
        with storage.open_input(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _finished(output: str, settings: dict[str, Any]) -> PrepareResult:
    """Returns the result that `output` holds, if it was made with these settings."""
    metadata = read_metadata(output)
    made_with = metadata.get("settings", {})
    for name, value in settings.items():
        if made_with.get(name) == value:
            continue
        if name == "inputs":
            raise ConfigError(
                f"{output} was prepared from other inputs; choose another --output or delete it"
            )
        raise ConfigError(
            f"{output} was prepared with {name}={made_with.get(name)}, not {name}={value}; "
            "choose another --output or delete it"
        )
    try:
        names = [field.name for field in dataclasses.fields(PrepareResult)]
        return PrepareResult(**{name: metadata[name] for name in names})
    except KeyError as error:
        raise DataError(f"{output}/dataset.json lacks {error}; delete {output}") from None


def _write_metadata(directory: Path, settings: dict[str, Any], result: PrepareResult) -> None:
    described = {"schema_version": SCHEMA_VERSION, "settings": settings}
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    metadata = {
        **described,
        # Of what decides the rows, so that data made again count as the same data.
        "fingerprint": fingerprint,
        "split": settings["split"],
        "seed": settings["seed"],
        **dataclasses.asdict(result),
        "format": {
            "rows": "Arrow IPC file, one row a source and part, see rows.ROW_SCHEMA",
            "files": {s: len(list(directory.glob(f"{s}-*.arrow"))) for s in SPLITS},
            "rejected": "rejected.parquet: file, line or row, reason, record",
        },
    }
    (directory / "dataset.json").write_text(json.dumps(metadata, indent=1) + "\n")


@contextlib.contextmanager
def _published(output: str) -> Iterator[Path]:
    """Yields an empty directory that becomes `output` if all goes well, and else is removed."""
    target = Path(output).absolute()
    with _workplace(target.parent / f".{target.name}.preparing", output) as directory:
        yield directory
        if is_dataset(output):
            raise ConfigError(f"output {output} was made by another process meanwhile")
        directory.rename(target)


@contextlib.contextmanager
def _published_remotely(output: str) -> Iterator[Path]:
    """Yields an empty local directory that is copied to `output`, `dataset.json` last."""
    key = hashlib.sha256(output.encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"ping-llm-{key}.preparing"
    with _workplace(place, output) as directory:
        yield directory
        names = {path.name for path in directory.iterdir()}
        with contextlib.suppress(StorageError):  # nothing there
            foreign = {PurePath(file.url).name for file in storage.find(output)} - names
            if foreign:  # names of the same data, cut short before, are written again
                raise ConfigError(
                    f"output {output} holds other files, like {min(foreign)}; choose another"
                )
        storage.upload_directory(directory, output, last="dataset.json")


@contextlib.contextmanager
def _workplace(place: Path, output: str) -> Iterator[Path]:
    """Yields an empty directory in `place`, which no other process uses and is removed at the end.

    What an earlier process left there when it was killed is removed; a living one is respected.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / "lock").open("w")
    except OSError as error:
        raise StorageError(f"output {output} cannot be written: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another prepare-data is writing {output}; let it finish") from None
        try:
            shutil.rmtree(place / "rows", ignore_errors=True)
            (place / "rows").mkdir()
            yield place / "rows"
        except OSError as error:
            raise StorageError(
                f"output {output} cannot be written: {error}; free some space or choose another"
            ) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
