"""Finds input files and tells their formats apart."""

import dataclasses
import lzma
import os
import tarfile
from collections.abc import Sequence

import pyarrow as pa

from ping_llm.data.rows import is_dataset
from ping_llm.errors import DataError
from ping_llm.storage import Location, StoredFile

ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}
ENDINGS |= {".csv": "csv", ".ndjson": "ripe", ".jsonl": "ripe", ".json": "ripe", ".tar": "tar"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}
READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, pa.ArrowException)
READ_ERRORS += (tarfile.TarError,)


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One file to read.

    Attributes:
        location: Where it is.
        input_index: Which INPUT argument it belongs to.
        format: "parquet", "arrow", "csv", "ripe" or "tar".
        compression: "gzip", "bz2", "zstd" or "xz"; None for none.
        size: Bytes on disk.
        traceroutes: What is taken of traceroutes: "hops", "end" or "no".
    """

    location: Location
    input_index: int
    format: str
    compression: str | None
    size: int
    traceroutes: str = "hops"


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker reads: a share of a file, or several small files whole.

    Attributes:
        files: The files, all of one input.
        start: The first byte of text, or row group.
        stop: Behind the last one; None reads to the end.
        size: Bytes on disk it stands for.
    """

    files: tuple[InputFile, ...]
    start: int
    stop: int | None
    size: int


def find_files(inputs: Sequence[str], *, traceroutes: str = "hops") -> list[InputFile]:
    """Returns the files of `inputs`: files, directories and globs, each in order of names.

    A directory means the files at any depth, and a glob those it matches, whose endings are known.

    Raises:
        DataError: A file is empty, of no known format, or named twice.
        StorageError: An input names nothing.
    """
    if not inputs:
        raise DataError("no input was given; name a file, a directory or a glob")
    found: dict[str, InputFile] = {}
    for index, location in enumerate(map(Location.of, inputs)):
        if is_dataset(location):
            raise DataError(
                f"{location} holds probe rows already; give the measurements they are from"
            )
        files = location.find()
        if not location.is_file():  # a directory or glob, where a README is no input
            files = [file for file in files if format_of(file.location.name)[0]]
        if not files:
            endings = ", ".join((*ENDINGS, *COMPRESSIONS))
            raise DataError(f"{location}: no file there ends in one of {endings}")
        for file in files:
            url = str(file.location)
            key = os.path.realpath(url) if file.location.is_local else url
            if key in found:
                raise DataError(f"{file.location} is in the inputs twice; each file counts once")
            found[key] = dataclasses.replace(_describe(file, index), traceroutes=traceroutes)
    return list(found.values())


def format_of(name: str) -> tuple[str | None, str | None]:
    """Returns (format, compression) by a file's name; RIPE Atlas dumps end in `.bz2` alone."""
    stem, ending = os.path.splitext(name.lower())
    stem, ending = os.path.splitext(stem + _SHORT.get(ending, ending))
    compression = COMPRESSIONS.get(ending)
    format_ = ENDINGS.get(os.path.splitext(stem)[1] if compression else ending)
    return format_ or ("ripe" if compression else None), compression


def _describe(file: StoredFile, index: int) -> InputFile:
    format_, compression = format_of(file.location.name)
    if file.size == 0:
        raise DataError(f"{file.location} is empty (0 bytes)")
    if format_ is None:
        with file.location.open_input() as opened:
            head = opened.read(64)
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        format_ = "ripe" if text.startswith((b"{", b"[")) else None
    if format_ is None or (format_ in ("parquet", "arrow") and compression):
        raise DataError(
            f"{file.location}: its ending names no known format; expected one of "
            f"{', '.join(ENDINGS)}, text also with {', '.join(COMPRESSIONS)}"
        )
    return InputFile(file.location, index, format_, compression, file.size)
