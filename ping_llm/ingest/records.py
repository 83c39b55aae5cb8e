"""What a measurement is, and what a record must be to become one; the same for every format."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.addresses import ADDRESS
from ping_llm.columns import INVALID, MISSING, OK, parse_addresses
from ping_llm.data.rows import MEASURED
from ping_llm.errors import DataError
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
)
REASON_CODES = {reason: np.uint8(code) for code, reason in enumerate(REASONS)}


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a file.

    Attributes:
        table: The good ones.
        rejected: The others, of `REJECTED_SCHEMA`; lines count from the start of the part.
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
    n = len(verdict.codes)
    absent = np.zeros(n), np.full(n, MISSING)
    values = {
        name: _optional(verdict, name, *fields.get(name, absent))
        for name in {*READ, *fields} - {*NEEDED}
    }
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
    verdict.reject((problems == INVALID) | (given & ~accepted), f"invalid {column.arrow}")
    return np.where(given & accepted, values, column.missing).astype(column.dtype)


def check_columns(arrays: Mapping[str, pa.Array]) -> tuple[MeasurementTable, Verdict]:
    """Returns the good records of a table, given as its columns by name, and what is wrong."""
    fields: dict[str, Any] = {}
    for name in READ:
        column = COLUMNS[name]
        if column.arrow in arrays:
            read = parse_addresses if column.dtype == ADDRESS else column.read
            fields[name] = read(arrays[column.arrow])
    verdict = Verdict(len(arrays["rtt"]))
    return check(verdict, **fields), verdict


def names_to_read(path: object, names: Sequence[str]) -> list[str]:
    """Returns which columns of a table are read, of all its `names`.

    Raises:
        DataError: One is missing, or there twice.
    """
    needed = [COLUMNS[name].arrow for name in NEEDED]
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; expected {', '.join(needed)}, "
            f"found {', '.join(names)[:200] or 'none'}"
        )
    read = [COLUMNS[name].arrow for name in READ if COLUMNS[name].arrow in names]
    if repeated := [name for name in read if names.count(name) > 1]:
        raise DataError(f"{path} has column {repeated[0]} more than once")
    return read


def rejected_batch(
    file: object, lines: np.ndarray, codes: np.ndarray, records: list[str]
) -> pa.RecordBatch:
    """Returns rejected records as a batch of `REJECTED_SCHEMA`."""
    columns = {
        "file": [str(file)] * len(records),
        "line": lines,
        "reason": [REASONS[code] for code in codes],
        "record": records,
    }
    return pa.RecordBatch.from_pydict(columns, schema=REJECTED_SCHEMA)
