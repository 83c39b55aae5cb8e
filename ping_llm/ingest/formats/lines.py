"""The lines of text files, plain or compressed, a block at a time."""

import dataclasses
import io
import lzma
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile
from ping_llm.ingest.records import RawRecords, Verdict
from ping_llm.measurements import MeasurementTable

BLOCK_BYTES = 4 << 20
LONGEST_LINE = 16 << 20
L = TypeVar("L", bound="Lines")


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
    raw = file.location.open_input()
    return raw, decompressed(raw, file.compression)


def decompressed(raw: IO[bytes], compression: str | None) -> BinaryIO:
    """Returns the text of an open file."""
    if compression is None:
        text = raw
    elif compression == "xz":
        text = _XzReader(raw)
    else:  # Arrow refuses garbage behind a stream, which Python's bz2 silently ignores
        text = pa.CompressedInputStream(raw, compression)
    return io.BufferedReader(text, 1 << 20)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass
class Text:
    """A share of a text file: the lines whose first byte lies in [start, stop); None: all the rest.

    Attributes:
        file: The file.
        name: What it is called; a file in an archive has a name of its own.
        stream: Its text.
        read: Returns how many bytes of the file on disk are read.
        start: The first byte.
        stop: Behind the last byte.
        head: The first block of the file, without a byte order mark; of a later share, nothing.
    """

    file: InputFile
    name: str
    stream: BinaryIO
    read: Callable[[], int]
    start: int = 0
    stop: int | None = None
    head: bytes = b""

    def __post_init__(self) -> None:
        if self.start == 0:
            size = BLOCK_BYTES if self.stop is None else min(BLOCK_BYTES, self.stop)
            self.head = self.stream.read(size).removeprefix(b"\xef\xbb\xbf")
            _check_beginning(self.name, self.head)

    @property
    def done(self) -> float:
        """How much of the share is read, 0 to 1."""
        size = (self.file.size if self.stop is None else self.stop) - self.start
        return min((self.read() - self.start) / max(size, 1), 1.0)

    def line_blocks(self) -> Iterator[bytes]:
        """Yields blocks of whole lines.

        Raises:
            DataError: A line is longer than any record can be.
        """
        if self.start:
            self.stream.seek(self.start - 1)
            self.stream.readline(LONGEST_LINE)
        for block in self.blocks():
            if not block.endswith(b"\n"):
                rest = self.stream.readline(LONGEST_LINE + 1)
                if len(rest) > LONGEST_LINE:
                    raise DataError(f"{self.name} holds a line of over {LONGEST_LINE:,} bytes")
                block += rest
            yield block if block.endswith(b"\n") else block + b"\n"

    def blocks(self) -> Iterator[bytes]:
        """Yields all of the share, cut anywhere."""
        if self.head:
            yield self.head
        while self.stop is None or self.stream.tell() < self.stop:
            left = BLOCK_BYTES if self.stop is None else self.stop - self.stream.tell()
            block = self.stream.read(min(BLOCK_BYTES, left))
            if not block:
                return
            yield block

    def lines(self, blocks: Iterator[bytes], make: "Callable[..., L]") -> "Iterator[L]":
        """Yields the lines of `blocks`, each block as `make` makes it."""
        before = 0
        for block in blocks:
            lines = make(self.name, block, before, self.done)
            before += len(lines)
            yield lines


class Lines(RawRecords):
    """Some lines of a text file.

    Attributes:
        usable: Which are UTF-8 and not blank.
        text: Those, a `string` array.
    """

    def __init__(self, file: object, block: bytes, before: int, done: float):
        super().__init__(file, before, done, len(block))
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        self._raw = pa.Array.from_buffers(pa.binary(), len(ends), buffers)
        self._verdict = Verdict(len(ends))
        blank = np.diff(offsets) <= 2
        blank[blank] = [not self._raw[int(i)].as_py().strip() for i in np.flatnonzero(blank)]
        texts = self._raw.view(pa.string())
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid:
            # Decoding drops what is not UTF-8.
            kept = [line.decode(errors="ignore").encode() == line for line in self._raw.to_pylist()]
            self._verdict.reject(~np.array(kept), "not UTF-8 text")
        self.usable = np.flatnonzero((self._verdict.codes == 0) & ~blank)
        self.text = texts if len(self.usable) == len(ends) else texts.take(pa.array(self.usable))

    def __len__(self) -> int:
        return len(self._raw)

    def texts(self, which: np.ndarray) -> list[str]:
        """Returns the lines `which`, without their ends."""
        raw = self._raw.take(pa.array(which)).to_pylist()
        return [decode(line.rstrip(b"\r\n")) for line in raw]

    @staticmethod
    def checked(
        group: "Sequence[Lines]", read: Callable[[pa.Array], tuple[MeasurementTable, Verdict]]
    ) -> tuple[MeasurementTable, np.ndarray]:
        """Returns what `RawRecords.check` does, given what reads usable lines."""
        texts = [lines.text for lines in group]
        table, verdict = read(pa.concat_arrays(texts) if len(texts) > 1 else texts[0])
        codes = [lines._verdict.codes for lines in group]
        each = zip(group, codes, verdict.split(map(len, texts)), strict=True)
        for lines, of_lines, found in each:
            of_lines[lines.usable] = found
        return table, np.concatenate(codes)


def decode(data: bytes) -> str:
    """Returns `data` as text, what is not UTF-8 escaped."""
    return data.decode("utf-8", "backslashreplace")


# What a file begins with that is no text: what it is, and what to do.
_BEGINNINGS = {
    b"\x1f\x8b": "compressed with gzip; let its name end in .gz",
    b"BZh": "compressed with bzip2; let its name end in .bz2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; let its name end in .zst",
    b"\xfd7zXZ": "compressed with xz; let its name end in .xz",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"ARROW1": "Arrow; let its name end in .arrow",
}


def _check_beginning(file: object, block: bytes) -> None:
    """Raises a `DataError` where a text file begins with what is no text."""
    found = next((what for start, what in _BEGINNINGS.items() if block.startswith(start)), None)
    if block[257:262] == b"ustar":
        found = "a tar archive; let its name end in .tar"
    if found:
        raise DataError(f"{file} is {found}")
