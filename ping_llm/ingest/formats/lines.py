"""The lines of text files, plain or compressed, a block at a time."""

import io
import lzma
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ping_llm.errors import DataError
from ping_llm.ingest.files import InputFile, Unit
from ping_llm.ingest.records import Part, Verdict, rejected_batch
from ping_llm.measurements import MeasurementTable

BLOCK_BYTES = 4 << 20
LONGEST_LINE = 16 << 20


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
    if file.compression is None:
        text = raw
    elif file.compression == "xz":
        text = _XzReader(raw)
    else:  # Arrow refuses garbage behind a stream, which Python's bz2 silently ignores
        text = pa.CompressedInputStream(raw, file.compression)
    return raw, io.BufferedReader(text, 1 << 20)  # pyright: ignore[reportArgumentType]


def line_blocks(text: BinaryIO, path: object, start: int, stop: int | None) -> Iterator[bytes]:
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


class Lines:
    """Some lines of a unit.

    Attributes:
        texts: Those that are UTF-8 and not blank, a `string` array.
    """

    def __init__(self, unit: Unit, block: bytes, done: float):
        self._unit, self._done = unit, done
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + 1
        offsets = np.append(0, ends).astype(np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block)]
        self.raw = pa.Array.from_buffers(pa.binary(), len(ends), buffers)
        self.verdict = Verdict(len(ends))
        blank = np.diff(offsets) <= 2
        blank[blank] = [not self.raw[int(i)].as_py().strip() for i in np.flatnonzero(blank)]
        texts = self.raw.view(pa.string())
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid:
            # Decoding drops what is not UTF-8.
            kept = [line.decode(errors="ignore").encode() == line for line in self.raw.to_pylist()]
            self.verdict.reject(~np.array(kept), "not UTF-8 text")
        self.usable = np.flatnonzero((self.verdict.codes == 0) & ~blank)
        self.texts = texts if len(self.usable) == len(ends) else texts.take(pa.array(self.usable))

    def part(self, table: MeasurementTable, verdict: Verdict) -> Part:
        """Returns the part of these lines, given the good ones and the verdict over `texts`."""
        codes = self.verdict.codes
        codes[self.usable] = verdict.codes
        bad = np.flatnonzero(codes)
        raw = self.raw.take(pa.array(bad)).to_pylist()
        records = [decode(line.rstrip(b"\r\n")) for line in raw]
        rejected = rejected_batch(self._unit.file.location, bad + 1, codes[bad], records)
        return Part(table, rejected, len(codes), self._done)


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
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _check_beginning(file: InputFile, block: bytes) -> None:
    """Raises a `DataError` where a text file begins with what is no text, or no line by line."""
    found = next((what for start, what in _BEGINNINGS.items() if block.startswith(start)), None)
    if block[257:262] == b"ustar":
        found = "a tar archive; unpack it"
    if file.format == "ripe" and found is None:
        first, _, second = block.lstrip().partition(b"\n")
        if first.startswith(b"["):
            found = "a JSON array; give one result a line (from RIPE Atlas: format=txt)"
        elif first.rstrip() == b"{" and second.strip():
            found = "JSON over several lines; give one result a line (from RIPE Atlas: format=txt)"
    if found:
        raise DataError(f"{file.location} is {found}")


def read_lines(unit: Unit, *, header: bool = False) -> Iterator[Lines]:
    """Yields the lines of a unit, some at a time; the first of a file is left blank if `header`."""
    raw, text = open_text(unit.file)
    header = header and unit.start == 0
    first = unit.start == 0
    with text:
        for block in line_blocks(text, unit.file.location, unit.start, unit.stop):
            if first:
                block = block.removeprefix(_BYTE_ORDER_MARK)
                _check_beginning(unit.file, block)
                first = False
            if header:
                block = b"\n" + block.split(b"\n", 1)[1]  # so that the others keep their numbers
                header = False
            yield Lines(unit, block, min((raw.tell() - unit.start) / unit.size, 1.0))
