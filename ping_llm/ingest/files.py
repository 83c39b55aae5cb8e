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
ENDINGS |= {".arrows": "arrow"}
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
        reading: How its records are read.
        url: Where it was fetched from; None where it was not.
    """

    location: Location
    input_index: int
    format: str
    compression: str | None
    size: int
    reading: "Reading" = dataclasses.field(default_factory=lambda: Reading())
    url: str | None = None

    @property
    def name(self) -> str:
        """What it is called: where it came from."""
        return self.url or str(self.location)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read whose columns are not named or spelt as ours.

    Attributes:
        traceroutes: What is taken of traceroutes: "hops", "end" or "no".
        columns: Pairs of our name of a column and the file's.
        rtt_scale: How many ms a unit of the RTTs is.
        failed: Texts, or "nan", that stand for a failure where an RTT should be.
    """

    traceroutes: str = "hops"
    columns: tuple[tuple[str, str], ...] = ()
    rtt_scale: float = 1.0
    failed: tuple[str, ...] = ()

    def ours(self, names: Sequence[str], where: object) -> list[str]:
        """Returns our name of each column of a file; another name where it is not read.

        Raises:
            DataError: A column that was named is not there.
        """
        if missing := [theirs for _, theirs in self.columns if theirs not in names]:
            raise DataError(
                f"{where} has no column {', '.join(missing)}, which --columns names; it has "
                f"{', '.join(names)[:200]}"
            )
        of_theirs = {theirs: ours for ours, theirs in self.columns}
        taken = set(of_theirs.values())
        return [of_theirs.get(n, f"other {n}" if n in taken else n) for n in names]


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


def find_files(inputs: Sequence[str], reading: Reading | None = None) -> list[InputFile]:
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
            found[key] = dataclasses.replace(_describe(file, index), reading=reading or Reading())
    return list(found.values())


def format_of(name: str) -> tuple[str | None, str | None]:
    """Returns (format, compression) by a file's name; RIPE Atlas dumps end in `.bz2` alone."""
    stem, ending = os.path.splitext(name.lower())
    stem, ending = os.path.splitext(stem + _SHORT.get(ending, ending))
    compression = COMPRESSIONS.get(ending)
    format_ = ENDINGS.get(os.path.splitext(stem)[1] if compression else ending)
    return format_ or ("ripe" if compression else None), compression


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}


def _format_of_text(head: bytes) -> str | None:
    """Returns the format of a file that begins so, if it is known."""
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):  # the last: an Arrow stream
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"{", b"[")):
        return "ripe"
    header = text.partition(b"\n")[0]
    return "csv" if b"," in header and header.isascii() else None


def _describe(file: StoredFile, index: int) -> InputFile:
    format_, compression = format_of(file.location.name)
    if file.size == 0:
        raise DataError(f"{file.location} is empty (0 bytes)")
    if format_ is None:
        with file.location.open_input() as opened:
            head = opened.read(1 << 16)
        compression = next((c for start, c in _MAGIC.items() if head.startswith(start)), None)
        format_ = "ripe" if compression else _format_of_text(head)
    if format_ is None or (format_ in ("parquet", "arrow") and compression):
        raise DataError(
            f"{file.location}: its ending names no known format; expected one of "
            f"{', '.join(ENDINGS)}, text also with {', '.join(COMPRESSIONS)}"
        )
    return InputFile(file.location, index, format_, compression, file.size)
