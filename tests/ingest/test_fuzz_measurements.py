"""Mutated inputs: an error or a verdict on every record, and never what a slow reader denies.

PING_LLM_FUZZ sets how many inputs are tried in all.
"""

import bz2
import csv
import gzip
import ipaddress
import json
import lzma
import math
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutations import TOKENS, mutate

from ping_llm.errors import PingLLMError
from ping_llm.ingest.records import REJECTED_SCHEMA
from ping_llm.ingest.sources import read_measurements
from ping_llm.measurements import MeasurementTable

CASES = int(os.environ.get("PING_LLM_FUZZ", "600"))
T0 = 1_700_000_000
RTT_LIMIT_US = 2047 * 2**31
PREFIX = bytes(10) + b"\xff\xff"

RIPE = [
    {"type": "ping", "timestamp": T0, "af": 4, "from": "193.0.0.1", "src_addr": "10.0.0.1",
     "dst_addr": "198.51.100.7", "rcvd": 3, "sent": 3, "min": 10.5,
     "result": [{"rtt": 11.0, "ttl": 5}, {"rtt": 10.5}, {"x": "*"}]},
    {"type": "ping", "timestamp": str(T0), "from": "193.0.0.2", "addr": "198.51.100.7",
     "name": "a.example", "min": "9.25", "rcvd": "3"},
    {"type": "ping", "timestamp": T0 + 60, "af": 6, "from": "2001:db8::1", "min": -1, "rcvd": 0,
     "dst_addr": "2001:db8::2", "result": [{"x": "*"}, {"error": "unreachable"}]},
    {"type": "ping", "timestamp": T0, "af": 6, "src_addr": "2001:db8::1", "min": -1, "rcvd": 1,
     "dst_addr": "2001:db8::2", "result": [{"rtt": 4, "dup": 1}, {"rtt": "6.5"}, {"late": 1}]},
]  # fmt: skip
RIPE_BYTES = b"".join(json.dumps(r).encode() + b"\n" for r in RIPE * 3)
CSV_BYTES = b"event_time,src_addr,dst_addr,ip_version,rtt\n" + b"".join(
    (
        b"1700000000,1.2.3.4,5.6.7.8,4,1.5\n",
        b"2023-11-14T22:13:20Z,1.2.3.4,5.6.7.8,4,-1\n",
        b'1700000000.5,"2001:db8::1",2001:db8::2,6,"2e1"\n',
        b"2023-11-14 23:13:20.25+01:00,1.2.3.4,5.6.7.8,4,0\n",
    )
    * 3
)
TABLE = pa.table(
    {
        "event_time": pa.array(np.arange(200) + T0, pa.timestamp("s")),
        "src_addr": ["1.2.3.4", "2001:db8::1"] * 100,
        "dst_addr": [a for i in range(100) for a in (f"5.6.7.{i}", f"2001:db8::{i}")],
        "ip_version": pa.array([4, 6] * 100, pa.int8()),
        "rtt": pa.array([1.5, -1.0] * 100, pa.float32()),
    }
)


def seeds():
    found = {"x.ndjson": RIPE_BYTES, "y.csv": CSV_BYTES}
    for name, options in {
        "plain.parquet": {"compression": "none"},
        "sum.parquet": {"compression": "zstd", "write_page_checksum": True},
        "flat.parquet": {"compression": "snappy", "use_dictionary": False},
    }.items():
        sink = pa.BufferOutputStream()
        pq.write_table(TABLE, sink, row_group_size=60, **options)
        found[name] = sink.getvalue().to_pybytes()
    for name, table in {"x.arrow": TABLE, "y.arrow": TABLE.unify_dictionaries()}.items():
        if name == "y.arrow":
            table = table.set_column(1, "src_addr", table["src_addr"].dictionary_encode())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=60)
        found[name] = sink.getvalue().to_pybytes()
    found["x.ndjson.gz"] = gzip.compress(RIPE_BYTES, mtime=0)
    found["x.ndjson.bz2"] = bz2.compress(RIPE_BYTES)
    found["x.ndjson.xz"] = lzma.compress(RIPE_BYTES)
    found["x.csv.zst"] = pa.compress(CSV_BYTES, "zstd", asbytes=True)
    return found


SEEDS = seeds()


def packed(text):
    """Returns (family, 16 bytes) of an address by the standard library."""
    address = ipaddress.ip_address(text)
    if address.version == 4:
        return 4, PREFIX + address.packed
    if "%" in text:
        raise ValueError(text)
    return (4 if address.ipv4_mapped else 6), address.packed


def number(value):
    """Returns a JSON number, or text of one, as float; None where absent."""
    if value is None or value == "":
        return None
    if isinstance(value, bool | list | dict):
        raise ValueError(value)
    text = str(value)
    if text != text.strip() or "_" in text or not text.isascii():
        raise ValueError(value)
    return float(text)


def checked(time, src, dst, version, rtt):
    """Returns a measurement if it may be one."""
    if time is None or rtt is None or math.isnan(rtt) or math.isinf(rtt):
        raise ValueError
    stored = np.float32(-1 if rtt < 0 else rtt)
    if not 0 <= math.floor(time) < 2**32 or float(stored) * 1000 > RTT_LIMIT_US:
        raise ValueError
    if not src[0] == dst[0] == version:
        raise ValueError
    return math.floor(time), src[1], dst[1], int(version), float(stored)


def slow_ripe(line):
    """Returns the measurement of one RIPE Atlas line by the law, read with the json module."""
    r = json.loads(line)
    if r["type"] != "ping":
        raise ValueError
    if r.get("dst_addr") not in (None, ""):
        dst = packed(r["dst_addr"])
    else:
        try:
            dst = packed(r["addr"])
        except (ValueError, KeyError):
            dst = packed(r["name"])
    version = number(r.get("af"))
    version = dst[0] if version is None else version
    public, private = r.get("from"), r.get("src_addr")
    src = packed(public if public not in (None, "") else private)
    if src[0] != version:
        src = packed(private)
    least = number(r.get("min"))
    if least is not None and not least <= 0:
        return checked(number(r.get("timestamp")), src, dst, version, least)
    replies = r.get("result")
    replies = replies if isinstance(replies, list) else []
    unset = (None, 0, "0", "", False)
    rtts = [
        number(x["rtt"])
        for x in replies
        if isinstance(x, dict)
        and x.get("rtt") is not None
        and x.get("late") in unset
        and x.get("dup") in unset
    ]
    if any(x is None or x < 0 for x in rtts):
        raise ValueError
    try:
        received = number(r.get("rcvd"))
    except ValueError:
        received = None
    none_came = received == 0 or (least is not None and least < 0)
    if not rtts and not none_came and not (replies and isinstance(replies[0], dict)):
        raise ValueError
    return checked(number(r.get("timestamp")), src, dst, version, min(rtts, default=-1.0))


def slow_csv(line, header):
    """Returns the measurement of one CSV line with an epoch time, or "iso" for another."""
    (fields,) = csv.reader([line], strict=True)
    if len(fields) != len(header):
        raise ValueError
    row = dict(zip(header, fields, strict=True))
    version, rtt = number(row["ip_version"]), number(row["rtt"])
    iso = "-" in row["event_time"][1:] and ":" in row["event_time"]
    time = T0 if iso else number(row["event_time"])
    return checked(time, packed(row["src_addr"]), packed(row["dst_addr"]), version, rtt), iso


def read(path):
    rejected = []
    batches = list(read_measurements([str(path)], on_rejected=rejected.append))
    found = MeasurementTable.concat(batches).to_arrow()
    return found, pa.Table.from_batches(rejected, REJECTED_SCHEMA)


def rows_of(table):
    names = ("event_time", "src_addr", "dst_addr", "ip_version", "rtt")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def assert_possible(table):
    """Every measurement is one that could be."""
    for time, src, dst, version, rtt in rows_of(table):
        assert 0 <= time < 2**32
        assert [4 if a.startswith(PREFIX) else 6 for a in (src, dst)] == [version, version]
        assert rtt == -1 or 0 <= rtt * 1000 <= RTT_LIMIT_US


@pytest.mark.parametrize("name", SEEDS)
def test_a_mutated_file_is_an_error_or_gives_possible_measurements(tmp_path, name):
    rng = np.random.default_rng(sum(name.encode()))
    text = name in ("x.ndjson", "y.csv")
    path, messages = tmp_path / name, []
    for case in range(CASES // len(SEEDS)):
        path.write_bytes(mutate(SEEDS[name], rng, TOKENS if text else None))
        try:
            found, rejected = read(path)
        except PingLLMError as error:
            messages.append(str(error))
            continue
        assert_possible(found)
        if text:
            lines = path.read_bytes().split(b"\n")[name == "y.csv" :]
            # One byte of white space or none is no record, such as the \r of an empty CRLF line.
            records = sum(len(line) > 1 or bool(line.strip()) for line in lines)
            assert len(found) + len(rejected) == records, (case, path.read_bytes())
    assert all(str(path) in message and "\n" not in message for message in messages)


def expectation(slow, line):
    """Returns what `slow` makes of a line, or None where it rejects it."""
    try:
        return slow(line.decode())
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error, RecursionError):
        return None


def ambiguous(line):
    """JSON that readers differ about: a trailing comma, half a character, or one name twice."""
    if re.search(rb",\s*[]}]", line) or b"\\ud800" in line:
        return True
    try:
        twice = []
        json.loads(line, object_pairs_hook=lambda p: twice.append(len(dict(p)) != len(p)) or p)
    except ValueError:
        return False
    return any(twice)


def test_a_mutated_ripe_line_is_read_as_the_slow_reader_reads_it_or_rejected(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.ndjson"
    lines = [line for line in RIPE_BYTES.splitlines() if line]
    for _ in range(max(CASES // 20, 1)):
        batch = [mutate(lines[rng.integers(len(lines))], rng, TOKENS) for _ in range(100)]
        batch = [b for b in batch if b.strip() and b"\n" not in b and not ambiguous(b)]
        path.write_bytes(b"\n".join(batch) + b"\n")
        found, rejected = read(path)
        expected = [expectation(slow_ripe, line) for line in batch]
        bad = set(rejected["line"].to_pylist())
        good = [
            (e, b) for i, (e, b) in enumerate(zip(expected, batch, strict=True)) if i + 1 not in bad
        ]
        for measurement, (e, line) in zip(rows_of(found), good, strict=True):
            assert measurement == e, line
        for line_number, reason in zip(
            rejected["line"].to_pylist(), rejected["reason"].to_pylist(), strict=True
        ):
            assert expected[line_number - 1] is None, (batch[line_number - 1], reason)


def test_a_mutated_csv_line_is_read_as_the_slow_reader_reads_it_or_rejected(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.csv"
    head, *lines = CSV_BYTES.splitlines()
    header = head.decode().split(",")
    for _ in range(max(CASES // 20, 1)):
        batch = [mutate(lines[rng.integers(len(lines))], rng, TOKENS) for _ in range(100)]
        batch = [b for b in batch if b.strip() and b"\n" not in b]
        path.write_bytes(head + b"\n" + b"\n".join(batch) + b"\n")
        found, rejected = read(path)
        expected = [expectation(lambda x: slow_csv(x, header), line) for line in batch]
        bad = set(rejected["line"].to_pylist())
        good = [
            (e, b) for i, (e, b) in enumerate(zip(expected, batch, strict=True)) if i + 2 not in bad
        ]
        for measurement, (e, line) in zip(rows_of(found), good, strict=True):
            assert e is not None, line
            (values, iso) = e
            assert measurement[iso:] == values[iso:], line
        for line_number, reason in zip(
            rejected["line"].to_pylist(), rejected["reason"].to_pylist(), strict=True
        ):
            e = expected[line_number - 2]
            # Python takes a quote inside a plain field, RFC 4180 does not.
            stray_quote = "CSV row" in reason and b'"' in batch[line_number - 2]
            other_time = e is not None and e[1] and "event_time" in reason
            assert e is None or stray_quote or other_time, (batch[line_number - 2], reason)
