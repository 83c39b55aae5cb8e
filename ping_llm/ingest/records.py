"""What a measurement is, and what a record must be to become one; the same for every format."""

# pyarrow.compute makes its functions when it is imported:
# pyright: reportAttributeAccessIssue=false
import abc
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ping_llm.addresses import ADDRESS
from ping_llm.columns import INVALID, MISSING, OK, is_text, parse_addresses
from ping_llm.data.rows import MEASURED
from ping_llm.errors import DataError
from ping_llm.ingest.files import Reading
from ping_llm.measurements import COLUMNS, MeasurementTable
from ping_llm.tokenizer import MAX_RTT_MS

# `line` is a line of a text file, a row of another, from 1; `record` is as it stood in the file.
REJECTED_SCHEMA = pa.schema(
    {"file": pa.string(), "line": pa.int64(), "reason": pa.string(), "record": pa.string()}
)
END_OF_TIME = 2**32  # in 2106
NEEDED = ("time", "src", "dst", "family", "rtt")
READ = (*NEEDED, *(name for name in MEASURED if name not in NEEDED))

REASONS = (
    "",
    "not UTF-8 text",
    "not a JSON object",
    "not a ping result",
    "not a CSV row of the header's columns",
    "missing event_time",
    "invalid event_time",
    "event_time outside 1970..2106",
    *(f"{what} {COLUMNS[name].arrow}" for name in NEEDED[1:] for what in ("missing", "invalid")),
    "address family mismatch",
    "non-finite rtt",
    "rtt beyond the largest code",
    *(f"invalid {COLUMNS[name].arrow}" for name in COLUMNS if name not in NEEDED),
    "not a ping or traceroute result",
    "malformed traceroute",
)
REASON_CODES = {reason: np.uint8(code) for code, reason in enumerate(REASONS)}


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records, checked.

    Attributes:
        table: The good ones.
        rejected: The others, of `REJECTED_SCHEMA`; lines count from the start of the unit.
        lines: How many lines or rows were read.
        done: How much of the unit is read by now, 0 to 1.
    """

    table: MeasurementTable
    rejected: pa.RecordBatch
    lines: int
    done: float


class Verdict:
    """The first thing that is wrong with each of n records; 0 where nothing is.

    Attributes:
        codes: Index into `REASONS` [n], uint8.
    """

    def __init__(self, n: int):
        self.codes = np.zeros(n, np.uint8)

    def reject(self, where: np.ndarray, reason: str) -> None:
        """Gives the records of mask `where` that `reason`, unless they have one."""
        self.codes[where & (self.codes == 0)] = REASON_CODES[reason]

    def reject_problems(self, problems: np.ndarray, field: str) -> None:
        """Rejects records whose value of `field` is MISSING or INVALID."""
        self.reject(problems == MISSING, f"missing {field}")
        self.reject(problems == INVALID, f"invalid {field}")

    def split(self, counts: Iterable[int]) -> list[np.ndarray]:
        """Returns the codes of each of consecutive groups of so many records."""
        return np.split(self.codes, np.cumsum(list(counts))[:-1])


Field = tuple[np.ndarray, np.ndarray]  # values, and OK, MISSING or INVALID for each


def check(verdict: Verdict, **fields: Any) -> MeasurementTable:
    """Returns the good records; adds to `verdict` what is wrong with the others.

    Args:
        verdict: What is wrong with them so far.
        fields: The values by column: `Addresses` for src and dst, else a `Field`; those `NEEDED`,
            and any others.
    """
    src, dst, (seconds, problems) = fields["src"], fields["dst"], fields["time"]
    verdict.reject_problems(problems, "event_time")
    out_of_range = (seconds < 0) | (seconds >= END_OF_TIME)
    verdict.reject(out_of_range, "event_time outside 1970..2106")
    verdict.reject_problems(src.problems(), "src_addr")
    verdict.reject_problems(dst.problems(), "dst_addr")
    versions, problems = fields["family"]
    neither = (problems == OK) & (versions != 4) & (versions != 6)
    verdict.reject_problems(np.where(neither, INVALID, problems), "ip_version")
    for end in (src, dst):
        verdict.reject(end.family_of_records() != versions, "address family mismatch")
    ms, problems = fields["rtt"]
    verdict.reject_problems(problems, "rtt")
    verdict.reject(~np.isfinite(ms), "non-finite rtt")
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.where(ms < 0, -1.0, np.abs(ms)).astype(np.float32)
    verdict.reject(stored > np.float64(MAX_RTT_MS), "rtt beyond the largest code")
    values = {name: _optional(verdict, name, *fields[name]) for name in {*fields} - {*NEEDED}}
    good = np.flatnonzero(verdict.codes == 0)
    return MeasurementTable(
        time=seconds[good],
        src=src.values[src.codes[good]],
        dst=dst.values[dst.codes[good]],
        family=versions[good].astype(np.int8),
        rtt=stored[good],
        **{name: column[good] for name, column in values.items()},
    )


def _optional(verdict: Verdict, name: str, values: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """Returns the values of a column that records need not have; rejects those that cannot be."""
    column = COLUMNS[name]
    accepted = column.accepts(values)
    given = problems == OK
    unknown = np.isnan(values) if column.dtype.kind == "f" else ~given
    verdict.reject(
        (problems == INVALID) | (given & ~accepted & ~unknown), f"invalid {column.arrow}"
    )
    return np.where(given & accepted, values, column.missing).astype(column.dtype)


def check_columns(
    arrays: Mapping[str, pa.Array], reading: Reading
) -> tuple[MeasurementTable, Verdict]:
    """Returns the good records of a table, given as its columns by our names, and what is wrong."""
    fields: dict[str, Any] = {}
    for name in READ:
        column = COLUMNS[name]
        if column.arrow in arrays:
            read = parse_addresses if column.dtype == ADDRESS else column.read
            array = arrays[column.arrow]
            fields[name] = read(_with_failures(array, reading.failed) if name == "rtt" else array)
    verdict = Verdict(len(arrays["rtt"]))
    rtt, problems = fields["rtt"]
    fields["rtt"] = np.where(rtt < 0, rtt, rtt * reading.rtt_scale), problems
    if "family" not in fields:
        fields["family"] = fields["dst"].family_of_records(), np.full(len(rtt), OK)
    return check(verdict, **fields), verdict


def _with_failures(rtt: pa.Array, failed: Sequence[str]) -> pa.Array:
    """Returns RTTs in which -1 stands for each value that means a failure."""
    if not failed:
        return rtt
    if pa.types.is_dictionary(rtt.type):
        rtt = rtt.dictionary_decode()
    if is_text(rtt.type):
        texts = pc.utf8_trim_whitespace(rtt.cast(pa.string()))
        is_failed = pc.is_in(pc.utf8_lower(texts), pa.array([text.lower() for text in failed]))
        return pc.if_else(is_failed, "-1", texts)
    if "nan" in map(str.lower, failed) and pa.types.is_floating(rtt.type):
        return pc.if_else(pc.is_nan(rtt), pa.scalar(-1, rtt.type), rtt)
    return rtt


class RawRecords(abc.ABC):
    """Consecutive records of one file as they stand in it, not yet checked.

    Attributes:
        file: What the file is called.
        before: How many records stand before them in the unit.
        done: How much of the file is read with them, 0 to 1.
        size: About how many bytes they are.
    """

    def __init__(self, file: object, before: int, done: float, size: int):
        self.file, self.before, self.done, self.size = file, before, done, size

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """What must be equal for records to be checked together."""

    @staticmethod
    @abc.abstractmethod
    def check(group: "Sequence[Any]") -> tuple[MeasurementTable, np.ndarray]:
        """Returns the good ones of records of one kind, and `Verdict.codes` of all."""

    @abc.abstractmethod
    def texts(self, which: np.ndarray) -> list[str]:
        """Returns how the records `which` stand in the file."""

    def rejected(self, codes: np.ndarray) -> pa.RecordBatch:
        """Returns those that `codes` reject, of `REJECTED_SCHEMA`."""
        bad = np.flatnonzero(codes)
        columns = {
            "file": [str(self.file)] * len(bad),
            "line": self.before + bad + 1,
            "reason": [REASONS[code] for code in codes[bad]],
            "record": self.texts(bad),
        }
        return pa.RecordBatch.from_pydict(columns, schema=REJECTED_SCHEMA)


# Each check costs some milliseconds however few its records are, so small files share one.
_TOGETHER_BYTES, _TOGETHER = 4 << 20, 1024


def check_records(records: Iterable[RawRecords]) -> Iterator[Part]:
    """Yields records checked, those of many small files together."""
    group: list[RawRecords] = []
    for each in records:
        if group and (each.kind != group[0].kind or len(group) == _TOGETHER):
            yield _check_group(group)
            group = []
        group.append(each)
        if sum(other.size for other in group) >= _TOGETHER_BYTES:
            yield _check_group(group)
            group = []
    if group:
        yield _check_group(group)


def _check_group(group: Sequence[RawRecords]) -> Part:
    table, codes = group[0].check(group)
    ends = np.cumsum([len(records) for records in group])
    each = zip(group, np.split(codes, ends[:-1]), strict=True)
    batches = [records.rejected(some) for records, some in each if some.any()]
    rejected = pa.Table.from_batches(batches, REJECTED_SCHEMA).combine_chunks().to_batches()
    empty = pa.RecordBatch.from_pylist([], schema=REJECTED_SCHEMA)
    return Part(table, rejected[0] if rejected else empty, len(codes), group[-1].done)


def names_to_read(path: object, names: Sequence[str]) -> list[str]:
    """Returns which columns of a table are read, of all its `names`.

    Raises:
        DataError: One is missing, or there twice.
    """
    needed = [COLUMNS[name].arrow for name in NEEDED if name != "family"]  # which ends tell
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; expected {', '.join(needed)}, "
            f"found {', '.join(names)[:200] or 'none'}; --columns says which are which"
        )
    read = [COLUMNS[name].arrow for name in READ if COLUMNS[name].arrow in names]
    if repeated := [name for name in read if names.count(name) > 1]:
        raise DataError(f"{path} has column {repeated[0]} more than once")
    return read
