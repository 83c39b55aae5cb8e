"""What a measurement is, and what a record must be to become one; the same for every format."""

import dataclasses

import numpy as np
import pyarrow as pa

from ping_llm.addresses import as_bytes, from_bytes
from ping_llm.columns import INVALID, MISSING, OK, Addresses
from ping_llm.measurements import MeasurementTable

REJECTED_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),  # line of a text file, row of another; from 1
        ("reason", pa.string()),
        ("record", pa.string()),  # as it stood in the file
    ]
)
LARGEST_RTT_US = 2047 * 2**31  # the largest code of the token language
END_OF_TIME = 2**32  # in 2106

REASONS = (
    "",
    "not UTF-8 text",
    "not a JSON object",
    "not a ping result",
    "not a CSV row of the header's columns",
    "missing event_time",
    "invalid event_time",
    "event_time outside 1970..2106",
    "missing src_addr",
    "invalid src_addr",
    "missing dst_addr",
    "invalid dst_addr",
    "missing ip_version",
    "invalid ip_version",
    "address family mismatch",
    "missing rtt",
    "invalid rtt",
    "non-finite rtt",
    "rtt beyond the largest code",
)
REASON_CODES = {reason: np.uint8(code) for code, reason in enumerate(REASONS)}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Good measurements, in the order of the file, addresses dictionary-encoded.

    Attributes:
        event_time: Seconds since 1970 UTC [n], int64.
        src_values: Distinct source addresses [S, 16], uint8; IPv4 as IPv4-mapped IPv6.
        src_codes: Which of `src_values` [n], int32.
        dst_values: Distinct destination addresses [D, 16], uint8.
        dst_codes: Which of `dst_values` [n], int32.
        ip_version: 4 or 6 [n], int8.
        rtt: Milliseconds, -1 = failed [n], float32.
    """

    event_time: np.ndarray
    src_values: np.ndarray
    src_codes: np.ndarray
    dst_values: np.ndarray
    dst_codes: np.ndarray
    ip_version: np.ndarray
    rtt: np.ndarray

    def __len__(self) -> int:
        return len(self.event_time)

    def mirrored(self) -> "Chunk":
        """Returns the measurements as if made from their destinations, less those to oneself."""
        src, dst = self.src_values[self.src_codes], self.dst_values[self.dst_codes]
        apart = (src != dst).any(axis=1)
        return Chunk(
            event_time=self.event_time[apart],
            src_values=self.dst_values,
            src_codes=self.dst_codes[apart],
            dst_values=self.src_values,
            dst_codes=self.src_codes[apart],
            ip_version=self.ip_version[apart],
            rtt=self.rtt[apart],
        )

    def to_table(self) -> MeasurementTable:
        """Returns the measurements as a table."""
        return MeasurementTable(
            time=self.event_time,
            src=from_bytes(self.src_values)[self.src_codes],
            dst=from_bytes(self.dst_values)[self.dst_codes],
            family=self.ip_version,
            rtt=self.rtt,
        )


@dataclasses.dataclass(frozen=True)
class Column:
    """Numbers of n records, beside OK, MISSING or INVALID for each."""

    values: np.ndarray
    problems: np.ndarray


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


def check(
    verdict: Verdict, *, src: Addresses, dst: Addresses, time: Column, version: Column, rtt: Column
) -> Chunk:
    """Returns the good records; adds to `verdict` what is wrong with the others."""
    verdict.reject_problems(time.problems, "event_time")
    out_of_range = (time.values < 0) | (time.values >= END_OF_TIME)
    verdict.reject(out_of_range, "event_time outside 1970..2106")
    verdict.reject_problems(src.problems(), "src_addr")
    verdict.reject_problems(dst.problems(), "dst_addr")
    known = (version.values == 4) | (version.values == 6)
    verdict.reject_problems(
        np.where((version.problems == OK) & ~known, INVALID, version.problems), "ip_version"
    )
    mixed = src.family_of_records() != version.values
    mixed |= dst.family_of_records() != version.values
    verdict.reject(mixed, "address family mismatch")
    verdict.reject_problems(rtt.problems, "rtt")
    verdict.reject(~np.isfinite(rtt.values), "non-finite rtt")
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.where(rtt.values < 0, -1.0, np.abs(rtt.values)).astype(np.float32)
        verdict.reject(stored.astype(np.float64) * 1000 > LARGEST_RTT_US, REASONS[-1])
    good = np.flatnonzero(verdict.codes == 0)
    return Chunk(
        event_time=time.values[good],
        src_values=as_bytes(src.values),
        src_codes=src.codes[good],
        dst_values=as_bytes(dst.values),
        dst_codes=dst.codes[good],
        ip_version=version.values[good].astype(np.int8),
        rtt=stored[good],
    )


def rejected_batch(
    file: str, lines: np.ndarray, codes: np.ndarray, records: list[str]
) -> pa.RecordBatch:
    """Returns rejected records as a batch of `REJECTED_SCHEMA`."""
    columns = [
        pa.array([file] * len(records), pa.string()),
        pa.array(lines, pa.int64()),
        pa.array([REASONS[code] for code in codes], pa.string()),
        pa.array(records, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=REJECTED_SCHEMA)
