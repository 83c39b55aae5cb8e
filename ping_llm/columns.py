"""Text to numbers, whole columns at once: addresses, times and decimals as tables spell them.

Each function returns values beside a code per value that says what is wrong with it, if anything;
nothing is guessed. Python runs once per distinct value at most, and only for rare spellings.
"""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import dataclasses
import datetime
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm import addresses

OK, MISSING, INVALID = 0, 1, 2

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NUMBER = r"(?i)^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)$"
_ISO_8601 = (
    r"^(?P<base>[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2})?)"
    r"(?:[.,][0-9]+)?(?P<zone>Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?$"
)


@dataclasses.dataclass(frozen=True)
class Addresses:
    """A column of addresses, dictionary-encoded.

    Attributes:
        values: The distinct addresses [U], `addresses.ADDRESS`.
        family: 4 or 6; 0 where the text is no address [U], int8.
        codes: Which of `values` a record has; -1 where it has none [n], int32.
    """

    values: np.ndarray
    family: np.ndarray
    codes: np.ndarray

    def family_of_records(self) -> np.ndarray:
        """Returns `family` of each record, 0 also where the address is missing [n], int8."""
        return np.append(self.family, np.int8(0))[self.codes]

    def problems(self) -> np.ndarray:
        """Returns OK, MISSING or INVALID for each record [n], uint8."""
        invalid = np.where(self.family == 0, INVALID, OK).astype(np.uint8)
        return np.append(invalid, np.uint8(MISSING))[self.codes]


def _text_buffers(array: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns start and length [n] of each string of a `binary` array, and all bytes."""
    _, offsets, data = array.buffers()
    offsets = np.frombuffer(offsets or bytes(4), np.int32)  # an empty array may have none
    bounds = offsets[array.offset : array.offset + len(array) + 1]
    return bounds[:-1], np.diff(bounds), np.frombuffer(data or b"", np.uint8)


def parse_addresses(column: pa.Array) -> Addresses:
    """Returns a column of strings, or a dictionary of strings, as `addresses.parse_texts` does."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column.cast(pa.binary()))
    texts = column.dictionary.cast(pa.binary())
    indices = pc.fill_null(column.indices.cast(pa.int32()), -1).to_numpy()
    if len(indices) and not -1 <= indices.min() <= indices.max() < len(texts):
        raise pa.ArrowInvalid("a dictionary index is out of range")  # Arrow reads such Parquet
    if texts.null_count:  # a dictionary may hold null as a value
        null = np.append(texts.is_null(), False)
        indices = np.where(null[indices], -1, indices).astype(np.int32)
        texts = pc.fill_null(texts, b"")
    starts, lengths, data = _text_buffers(texts)
    values, family = addresses.parse_texts(starts, lengths, data)
    empty = np.append(lengths == 0, False)
    codes = np.where(empty[indices], -1, indices).astype(np.int32)
    return Addresses(values, family, codes)


def to_numpy(column: pa.Array) -> np.ndarray:
    """Returns the values of a column without nulls [n], `addresses.ADDRESS` where it is binary.

    Without a copy where it is numbers or fixed_size_binary(16).
    """
    if pa.types.is_binary(column.type):
        column = column.cast(pa.binary(16))
    if column.type != pa.binary(16):
        return column.to_numpy()
    data = column.buffers()[1] or b""
    return np.frombuffer(data, addresses.ADDRESS, len(column), 16 * column.offset)


def from_numpy(values: np.ndarray) -> pa.Array:
    """Returns `values` [n] as an array, addresses as fixed_size_binary(16).

    Without a copy where they are contiguous.
    """
    if values.dtype != addresses.ADDRESS:
        return pa.array(values)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(values), [None, buffer])


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Returns whether a column of type `kind` holds strings of any encoding."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _missing(column: pa.Array) -> np.ndarray:
    return np.where(column.is_null(), MISSING, OK).astype(np.uint8)


def read_addresses(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns (addresses [n], problem [n]) of fixed_size_binary(16), or of any kind of text."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind == pa.binary(16):
        column = _plain(column)
        return to_numpy(column), _missing(column)
    parsed = parse_addresses(column)
    values = np.append(parsed.values, np.zeros(1, addresses.ADDRESS))
    return values[parsed.codes], parsed.problems()


def read_times(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epoch seconds int64 [n], problem [n]) of timestamps, numbers or any kind of text.

    Fractions are floored away. A time without a zone is UTC; a date alone is no time.
    """
    column = _plain(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_integer(column.type):
        ticks = pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
        unit = column.type.unit if pa.types.is_timestamp(column.type) else "s"
        return ticks // _PER_SECOND[unit], _missing(column)
    if pa.types.is_floating(column.type):
        return to_seconds(*read_numbers(column))
    return parse_times(column.cast(pa.string()))


def read_numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns (float64 [n], problem [n]) of numbers or any kind of text; NaN is a number here."""
    column = _plain(column)
    if is_text(column.type):
        return parse_floats(column.cast(pa.string()))
    numbers = column.cast(pa.float64(), safe=False)
    return pc.fill_null(numbers, 0.0).to_numpy(), _missing(column)


def parse_floats(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns (float64 [n], OK / MISSING / INVALID [n]) of decimals as text; "" is missing.

    "nan" and "inf" are numbers here, so that who uses them can say what is wrong with them.
    """
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    problem = _missing(column)
    try:
        numbers = column.cast(pa.float64())
    except pa.ArrowInvalid:  # some text is no number; which, only a slower search tells
        is_number = pc.fill_null(pc.match_substring_regex(column, _NUMBER), True)
        problem[~np.asarray(is_number)] = INVALID
        column = pc.if_else(is_number, column, pa.scalar(None, pa.string()))
        numbers = _each_distinct(column, float, pa.float64())
    return pc.fill_null(numbers, 0.0).to_numpy(), problem


def to_seconds(numbers: np.ndarray, problem: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 epoch times floored to whole seconds int64 [n], and their problems."""
    usable = np.abs(numbers) < 2**53  # false for nan
    seconds = np.floor(np.where(usable, numbers, 0)).astype(np.int64)
    return seconds, np.where((problem == OK) & ~usable, INVALID, problem)


def parse_times(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epoch seconds int64 [n], problem [n]) of epoch seconds or ISO 8601 text.

    Fractions are floored away. A time without a zone is UTC; a date alone is no time.
    """
    numbers, problem = parse_floats(column)
    rest = np.flatnonzero(problem == INVALID)
    seconds, problem = to_seconds(numbers, problem)
    if len(rest):
        parts = pc.extract_regex(column.take(pa.array(rest)), _ISO_8601)
        base, zone = (pc.struct_field(parts, name) for name in ("base", "zone"))
        texts = pc.binary_join_element_wise(base, zone, "")
        utc = _each_distinct(texts, _epoch_seconds, pa.int64())
        rest = rest[np.asarray(utc.is_valid())]
        seconds[rest], problem[rest] = utc.drop_null().to_numpy(), OK
    return seconds, problem


def _each_distinct(column: pa.Array, parse: Callable[[str], object], to: pa.DataType) -> pa.Array:
    """Returns `parse` of each value, computed once per distinct value; null stays null."""
    encoded = pc.dictionary_encode(column)
    parsed = pa.array([parse(text) for text in encoded.dictionary.to_pylist()], to)
    return parsed.take(encoded.indices)


def _epoch_seconds(text: str) -> int | None:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:  # the 30th of February
        return None
    return int(moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp())
