"""Finds input files, tells their formats apart, and streams text out of compressed ones."""

import dataclasses
import io
import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa

from ping_llm import storage
from ping_llm.errors import DataError

ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".ndjson": "ripe",
    ".jsonl": "ripe",
    ".json": "ripe",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
BLOCK_BYTES = 4 << 20
LONGEST_LINE = 16 << 20
READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, pa.ArrowException)


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One file to read.

    Attributes:
        path: Path or URL.
        input_index: Which INPUT argument it belongs to.
        format: "parquet", "arrow", "csv" or "ripe".
        compression: "gzip", "bz2", "zstd" or "xz"; None for none.
        size: Bytes on disk.
    """

    path: str
    input_index: int
    format: str
    compression: str | None
    size: int


def find_files(inputs: Sequence[str]) -> list[InputFile]:
    """Returns the files of `inputs`: files, directories and globs, each in order of names.

    A directory means the files at any depth, and a glob those it matches, whose endings are known.

    Raises:
        DataError: A file is empty, of no known format, or named twice.
        StorageError: An input names nothing.
    """
    if not inputs:
        raise DataError("no input was given; name a file, a directory or a glob")
    found: dict[str, InputFile] = {}
    for index, spec in enumerate(inputs):
        if storage.exists(storage.join(spec, "dataset.json")):
            raise DataError(f"{spec} holds probe rows already; give the measurements they are from")
        files = storage.find(spec)
        if not storage.exists(spec):  # a directory or glob, where a README is no input
            files = [file for file in files if _format_of(file.url)[0]]
        if not files:
            endings = ", ".join((*ENDINGS, *COMPRESSIONS))
            raise DataError(f"{spec}: no file there ends in one of {endings}")
        for file in files:
            key = file.url if storage.is_remote(file.url) else os.path.realpath(file.url)
            if key in found:
                raise DataError(f"{file.url} is in the inputs twice; each file counts once")
            found[key] = _describe(file, index)
    return list(found.values())


def _format_of(url: str) -> tuple[str | None, str | None]:
    """Returns (format, compression) by the name; RIPE Atlas dumps end in `.bz2` alone."""
    name = PurePath(url)
    compression = COMPRESSIONS.get(name.suffix.lower())
    known = ENDINGS.get((name.with_suffix("") if compression else name).suffix.lower())
    return known or ("ripe" if compression else None), compression


def _describe(file: storage.StoredFile, index: int) -> InputFile:
    format_, compression = _format_of(file.url)
    if file.size == 0:
        raise DataError(f"{file.url} is empty (0 bytes)")
    if format_ is None:
        with storage.open_input(file.url) as opened:
            head = opened.read(64)
        format_ = "ripe" if head.lstrip().startswith(b"{") else None
    if format_ is None or (format_ in ("parquet", "arrow") and compression):
        raise DataError(
            f"{file.url}: its ending names no known format; expected one of {', '.join(ENDINGS)}, "
            f"text also with {', '.join(COMPRESSIONS)}"
        )
    return InputFile(file.url, index, format_, compression, file.size)


class _XzReader(io.RawIOBase):
    """Streams an .xz file; unlike `lzma.open` it takes no garbage between or after streams."""

    def __init__(self, raw: Any):
        self._raw, self._rest = raw, b""
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while True:
            if self._decompressor.eof:
                rest = self._decompressor.unused_data or self._raw.read(BLOCK_BYTES)
                if not rest:
                    return 0
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self._decompressor.needs_input:
                rest = self._raw.read(BLOCK_BYTES)
                if not rest:
                    raise EOFError("truncated compressed stream")
            else:
                rest = b""
            data = self._decompressor.decompress(rest, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


def open_text(file: InputFile) -> tuple[Any, BinaryIO]:
    """Returns (the raw file, whose `tell` says how much of it was read; its text)."""
    raw = storage.open_input(file.path)
    if file.compression is None:
        text = raw
    elif file.compression == "xz":
        text = _XzReader(raw)
    else:  # Arrow refuses garbage behind a stream, which Python's bz2 silently ignores
        text = pa.CompressedInputStream(raw, file.compression)
    return raw, io.BufferedReader(text, 1 << 20)  # pyright: ignore[reportArgumentType]


def line_blocks(text: BinaryIO, path: str, start: int, stop: int | None) -> Iterator[bytes]:
    """Yields blocks of the lines whose first byte lies in [start, stop); None: all the rest.

    Raises:
        DataError: A line is longer than any record can be.
    """
    if start:
        text.seek(start - 1)
        text.readline(LONGEST_LINE)
    while stop is None or text.tell() < stop:
        size = BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - text.tell())
        block = text.read(size)
        if not block:
            return
        if not block.endswith(b"\n"):
            rest = text.readline(LONGEST_LINE + 1)
            if len(rest) > LONGEST_LINE:
                raise DataError(
                    f"{path} holds a line of over {LONGEST_LINE:,} bytes; expected one record "
                    "a line (from RIPE Atlas: format=txt, not a JSON array)"
                )
            block += rest
        yield block if block.endswith(b"\n") else block + b"\n"
