import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import math
import os
import tarfile

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from ping_llm.errors import DataError, PingLLMError, StorageError
from ping_llm.ingest import files, sources
from ping_llm.ingest.formats import lines as lines_format
from ping_llm.ingest.formats import parquet
from ping_llm.ingest.records import REASONS, REJECTED_SCHEMA
from ping_llm.measurements import MeasurementTable

T0 = 1_700_000_000
RTT_LIMIT_MS = 2047 * 2**31 / 1000


def table(**changes):
    """Returns a table of four good measurements, with some columns changed."""
    columns = {
        "event_time": pa.array([T0, T0 + 1, T0 + 2, T0 + 3], pa.timestamp("s", "UTC")),
        "src_addr": pa.array(["1.2.3.4", "1.2.3.4", "2001:db8::1", "1.2.3.4"]),
        "dst_addr": pa.array(["5.6.7.8", "9.9.9.9", "2001:db8::2", "5.6.7.8"]),
        "ip_version": pa.array([4, 4, 6, 4], pa.int8()),
        "rtt": pa.array([1.5, -1, 20, 0], pa.float32()),
    }
    return pa.table(columns | changes)


def ripe_lines(n=100):
    result = {"type": "ping", "af": 4, "from": "193.0.0.1", "dst_addr": "198.51.100.7"}
    return b"".join(
        json.dumps(result | {"timestamp": T0 + i, "min": i + 1}).encode() + b"\n" for i in range(n)
    )


def read(*inputs):
    """Returns all measurements and all rejected records."""
    rejected = []
    batches = list(sources.read_measurements([str(i) for i in inputs], on_rejected=rejected.append))
    return (
        MeasurementTable.concat(batches).to_arrow(),
        pa.Table.from_batches(rejected, REJECTED_SCHEMA),
    )


def write(path, data):
    if path.suffix == ".parquet":
        pq.write_table(data, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, data.schema) as writer:
            writer.write_table(data)
    elif isinstance(data, pa.Table):
        pc_csv.write_csv(data, path)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".csv"])
def test_every_format_of_measurements_gives_the_same(tmp_path, ending):
    found, rejected = read(write(tmp_path / f"x{ending}", table()))
    assert len(rejected) == 0
    assert found["event_time"].to_pylist() == [T0, T0 + 1, T0 + 2, T0 + 3]
    assert found["ip_version"].to_pylist() == [4, 4, 6, 4]
    assert found["rtt"].to_pylist() == [1.5, -1, 20, 0]
    assert found["src_addr"][0].as_py() == bytes(10) + b"\xff\xff\1\2\3\4"
    assert found["dst_addr"][2].as_py() == bytes.fromhex("20010db8" + "0" * 23 + "2")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kathmandu"])
def test_times_of_every_unit_and_zone_are_floored_to_seconds_utc(tmp_path, unit, zone):
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    ticks = [T0 * per_second, (T0 + 1) * per_second - 1, 0, -1]
    times = pa.array(ticks, pa.timestamp(unit, zone))
    found, rejected = read(write(tmp_path / "x.parquet", table(event_time=times)))
    assert found["event_time"].to_pylist() == [T0, T0, 0]
    assert rejected["reason"].to_pylist() == ["event_time outside 1970..2106"]


BAD_VALUES = [
    ("event_time", pa.array([T0, None, T0, T0], pa.timestamp("s")), "missing event_time"),
    ("event_time", pa.array([T0, 2**32, T0, T0], pa.timestamp("s")), REASONS[7]),
    ("event_time", pa.array([T0, -1, T0, T0], pa.timestamp("s")), REASONS[7]),
    ("src_addr", ["1.2.3.4", None, "::1", "1.2.3.4"], "missing src_addr"),
    ("src_addr", ["1.2.3.4", "", "::1", "1.2.3.4"], "missing src_addr"),
    ("src_addr", ["1.2.3.4", "1.2.3.400", "::1", "1.2.3.4"], "invalid src_addr"),
    ("src_addr", ["1.2.3.4", "localhost", "::1", "1.2.3.4"], "invalid src_addr"),
    ("dst_addr", ["1.2.3.4", None, "::1", "1.2.3.4"], "missing dst_addr"),
    ("dst_addr", ["1.2.3.4", "fe80::1%eth0", "::1", "1.2.3.4"], "invalid dst_addr"),
    ("dst_addr", ["1.2.3.4", "::2", "::1", "1.2.3.4"], "address family mismatch"),
    ("ip_version", pa.array([4, None, 6, 4]), "missing ip_version"),
    ("ip_version", pa.array([4, 5, 6, 4]), "invalid ip_version"),
    ("ip_version", pa.array([4, 6, 6, 4]), "address family mismatch"),
    ("rtt", [1.5, None, 1, 2], "missing rtt"),
    ("rtt", [1.5, math.nan, 1, 2], "non-finite rtt"),
    ("rtt", [1.5, math.inf, 1, 2], "non-finite rtt"),
    ("rtt", [1.5, -math.inf, 1, 2], "non-finite rtt"),
    ("rtt", [1.5, RTT_LIMIT_MS * 1.0001, 1, 2], "rtt beyond the largest code"),
    ("rtt", [1.5, 1e300, 1, 2], "rtt beyond the largest code"),
]


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".csv"])
@pytest.mark.parametrize(("column", "values", "reason"), BAD_VALUES)
def test_a_bad_record_is_rejected_with_its_place_reason_and_text(
    tmp_path, ending, column, values, reason
):
    path = write(tmp_path / f"x{ending}", table(**{column: values}))
    found, rejected = read(path)
    assert len(found) == 3
    (record,) = rejected.to_pylist()
    assert (record["file"], record["reason"]) == (str(path), reason)
    assert record["line"] == (3 if ending == ".csv" else 2)
    for name in table().column_names:
        if ending != ".csv":
            assert name in json.loads(record["record"])


def test_the_largest_rtt_is_taken_and_any_negative_one_is_a_failure(tmp_path):
    largest = float(np.nextafter(np.float32(RTT_LIMIT_MS), np.float32(0)))
    rtt = [largest, -1e-9, -5e6, 1e-30]
    found, rejected = read(write(tmp_path / "x.parquet", table(rtt=rtt)))
    assert len(rejected) == 0
    np.testing.assert_array_equal(
        found["rtt"].to_numpy(), np.array([largest, -1, -1, 1e-30], np.float32)
    )


def test_an_ipv4_mapped_address_counts_as_ipv4_and_never_as_ipv6(tmp_path):
    src = ["::ffff:1.2.3.4", "1.2.3.4", "::ffff:1.2.3.4", "1.2.3.4"]
    found, rejected = read(write(tmp_path / "x.parquet", table(src_addr=src)))
    assert found["src_addr"][0] == found["src_addr"][1]
    assert rejected["reason"].to_pylist() == ["address family mismatch"]


def test_csv_takes_iso_and_epoch_times_any_order_of_columns_quotes_and_more_columns(tmp_path):
    text = (
        '\ufeffrtt,"dst_addr",note,src_addr,ip_version,event_time\r\n'
        '1.5,5.6.7.8,"a, b",1.2.3.4,4,2023-11-14T22:13:20Z\r\n'
        "-3,5.6.7.8,,1.2.3.4,4,1700000000\r\n"
        '"2e1",5.6.7.8,"say ""hi""",1.2.3.4,4,2023-11-14 23:13:20.9+01:00\r\n'
        "\r\n"
        "0,5.6.7.8,x,1.2.3.4,4,1700000000.75"
    )
    found, rejected = read(write(tmp_path / "x.csv", text.encode()))
    assert len(rejected) == 0
    assert found["event_time"].to_pylist() == [T0] * 4
    assert found["rtt"].to_pylist() == [1.5, -1, 20, 0]


CSV_HEADER = b"event_time,src_addr,dst_addr,ip_version,rtt\n"
CSV_ROW = b"1700000000,1.2.3.4,5.6.7.8,4,1.5\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1700000000,1.2.3.4,5.6.7.8,4", REASONS[4]),
        (b"1700000000,1.2.3.4,5.6.7.8,4,1.5,6", REASONS[4]),
        (b'1700000000,1.2.3.4,"5.6.7.8,4,1.5', REASONS[4]),
        (b'1700000000,"1.2.3.4"x,5.6.7.8,4,1.5', REASONS[4]),
        (b"1700000000,1.2.3.4\r,5.6.7.8,4,1.5", REASONS[4]),
        (b'1700000000,1.2.3.4,5.6.7.8,4,1.5 "quick"', REASONS[4]),
        (b'1700000000,"1.2.3".4,5.6.7.8,4,1.5', REASONS[4]),
        (b"a line of text", REASONS[4]),
        (b"1700000000000,1.2.3.4,5.6.7.8,4,1.5", REASONS[7]),
        (b"2023-02-30T00:00:00,1.2.3.4,5.6.7.8,4,1.5", "invalid event_time"),
        (b"yesterday,1.2.3.4,5.6.7.8,4,1.5", "invalid event_time"),
        (b"2023-01-01,1.2.3.4,5.6.7.8,4,1.5", "invalid event_time"),
        (b"1700000000,1.2.3.4,5.6.7.8,IPv4,1.5", "invalid ip_version"),
        (b"1700000000,1.2.3.4,5.6.7.8,4.5,1.5", "invalid ip_version"),
        (b"1700000000,1.2.3.4,5.6.7.8,4,1.5ms", "invalid rtt"),
        (b"1700000000,1.2.3.4,5.6.7.8,4,True", "invalid rtt"),
        (b"1700000000,1.2.3.4,5.6.7.8,4,0x1F", "invalid rtt"),
        (b"1700000000,1.2.3.4,5.6.7.8,4,*", "invalid rtt"),
        (b"1700000000, 1.2.3.4,5.6.7.8,4,1", "invalid src_addr"),
        (b"1700000000,1.2.3.\xff,5.6.7.8,4,1", "not UTF-8 text"),
    ],
)
def test_a_bad_csv_line_is_rejected_and_its_neighbours_are_not(tmp_path, line, reason):
    data = CSV_HEADER + CSV_ROW * 2 + line + b"\n" + CSV_ROW * 3
    found, rejected = read(write(tmp_path / "x.csv", data))
    assert len(found) == 5
    (record,) = rejected.to_pylist()
    assert (record["line"], record["reason"]) == (4, reason)
    assert record["record"] == line.decode("utf-8", "backslashreplace")


def test_a_stray_quote_does_not_swallow_the_lines_up_to_the_next_one(tmp_path):
    stray = b'"' + CSV_ROW.strip() + b"\n"
    data = CSV_HEADER + CSV_ROW + stray + CSV_ROW * 4 + stray + CSV_ROW
    found, rejected = read(write(tmp_path / "x.csv", data))
    assert len(found) == 6
    assert rejected["line"].to_pylist() == [3, 8]


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_text_of_several_streams_is_read_to_the_end(tmp_path, ending):
    compress, lines = COMPRESS[ending], ripe_lines()
    ripe = write(tmp_path / f"x.ndjson{ending}", compress(lines) + compress(lines))
    assert len(read(ripe)[0]) == 200
    data = compress(CSV_HEADER + CSV_ROW * 9)
    assert len(read(write(tmp_path / f"x.csv{ending}", data))[0]) == 9


@pytest.mark.parametrize("ending", [e for e in COMPRESS if e])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data, more: data[:-5],
        lambda data, more: data + b"garbage that follows",
        lambda data, more: data + b"??" + more[2:],
        lambda data, more: data + more[:-5],
        lambda data, more: data[:40] + bytes(b ^ 0x55 for b in data[40:60]) + data[60:],
        lambda data, more: b"not compressed at all",
    ],
    ids=["cut", "tail", "second-header", "second-cut", "flipped", "plain"],
)
def test_a_damaged_compressed_file_is_an_error_and_never_a_shorter_file(tmp_path, ending, damage):
    compressed = COMPRESS[ending](ripe_lines())
    path = write(tmp_path / f"x.ndjson{ending}", damage(compressed, compressed))
    with pytest.raises(DataError, match=r"x\.ndjson.* cannot be read as"):
        read(path)


def test_a_ripe_dump_needs_no_ending_but_its_compression(tmp_path):
    path = write(tmp_path / "ping-2024-01-01T0000.bz2", bz2.compress(ripe_lines()))
    assert len(read(path)[0]) == 100
    assert len(read(write(tmp_path / "results", ripe_lines()))[0]) == 100


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000, 10**6])
def test_where_units_and_blocks_end_changes_nothing(tmp_path, monkeypatch, unit_bytes):
    lines = ripe_lines(40).splitlines(keepends=True)
    lines[7:7] = [b"broken\n", b"\n", b"\xff\n"]
    ripe = write(tmp_path / "x.ndjson", b"".join(lines)[:-1])
    csv = write(tmp_path / "x.csv", CSV_HEADER + CSV_ROW * 9 + b"broken\n" + CSV_ROW)
    expected = read(ripe, csv)
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(lines_format, "BLOCK_BYTES", unit_bytes)
    found = read(ripe, csv)
    assert found == expected
    assert expected[1]["line"].to_pylist() == [8, 10, 11]


def test_row_groups_and_record_batches_are_all_read_with_their_row_numbers(tmp_path, monkeypatch):
    rows = pa.concat_tables([table(), table(rtt=pa.array([1, math.nan, 2, 3], pa.float32()))] * 5)
    monkeypatch.setattr(parquet, "UNIT_ROWS", 7)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=3)
    with pa.ipc.new_file(tmp_path / "x.arrow", rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    for path in tmp_path.iterdir():
        found, rejected = read(path)
        assert len(found) == 35
        assert rejected["line"].to_pylist() == [6, 14, 22, 30, 38]


def test_directories_and_globs_give_their_data_files_in_order_of_names(tmp_path):
    for name in ("b/2.csv", "a/1.csv", "b/.hidden.csv", "_SUCCESS", "README.md", "c.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write(path, table() if name == "c.parquet" else CSV_HEADER + CSV_ROW)
    names = [f.location.url for f in files.find_files([str(tmp_path)])]
    assert names == [str(tmp_path / n) for n in ("a/1.csv", "b/2.csv", "c.parquet")]
    found = files.find_files([str(tmp_path / "*.parquet"), str(tmp_path / "*/*.csv")])
    assert [f.input_index for f in found] == [0, 1, 1]


def test_what_is_rejected_and_what_is_read_add_up_to_what_was_there(tmp_path):
    rng = np.random.default_rng(0)
    lines = ripe_lines(500).splitlines()
    for i in rng.choice(500, 120, replace=False):
        cut = rng.integers(0, len(lines[i]))
        lines[i] = lines[i][:cut] + bytes([rng.integers(33, 256)]) + lines[i][cut + 1 :]
    found, rejected = read(write(tmp_path / "x.ndjson", b"\n".join(lines)))
    assert len(found) + len(rejected) == 500
    assert set(rejected["reason"].to_pylist()) <= set(REASONS)
    assert max(collections.Counter(rejected["line"].to_pylist()).values()) == 1


def test_an_arrow_stream_is_read_as_a_file_is(tmp_path):
    with pa.ipc.new_file(tmp_path / "x.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    stream = sink.getvalue().to_pybytes()
    for name in ("y.arrow", "y.arrows", "y"):
        (tmp_path / name).write_bytes(stream)
        assert read(tmp_path / name) == read(tmp_path / "x.arrow")
    (tmp_path / "y.arrow").write_bytes(stream[:-300])
    with pytest.raises(DataError, match=r"y\.arrow cannot be read as arrow"):
        read(tmp_path / "y.arrow")


def test_strings_as_other_writers_store_them_are_read(tmp_path):
    expected, _ = read(write(tmp_path / "x.parquet", table()))
    delta = {"src_addr": "DELTA_LENGTH_BYTE_ARRAY", "dst_addr": "DELTA_BYTE_ARRAY"}
    for i, encoding in enumerate([delta, {"src_addr": "DELTA_BYTE_ARRAY"}]):
        path = tmp_path / f"{i}.parquet"
        dictionary = [name for name in table().schema.names if name not in encoding]
        pq.write_table(table(), path, use_dictionary=dictionary, column_encoding=encoding)
        found, rejected = read(path)
        assert found == expected
        assert not len(rejected)
    views = {name: table()[name].cast(pa.string_view()) for name in ("src_addr", "dst_addr")}
    for name, changes in (
        ("both", views),
        ("one", {"dst_addr": views["dst_addr"]}),
        ("large", {name: table()[name].cast(pa.large_string()) for name in views}),
    ):
        found, rejected = read(write(tmp_path / f"{name}.arrow", table(**changes)))
        assert found == expected
    path = tmp_path / "polars.arrow"
    pl.DataFrame(table()).with_columns(pl.col("src_addr").cast(pl.Categorical)).write_ipc(path)
    found, _ = read(path)
    assert found == expected
    texts = ["1.2.3.4", "1.2.3.4", "2001:db8::1", None]
    bad = {"src_addr": pa.array(texts, pa.string_view())}
    _, rejected = read(write(tmp_path / "bad.arrow", table(**bad)))
    assert rejected["reason"].to_pylist() == ["missing src_addr"]


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.uint32()])
def test_times_may_be_seconds_and_never_milliseconds(tmp_path, kind):
    expected, _ = read(write(tmp_path / "x.parquet", table()))
    seconds = pa.array([T0, T0 + 1, T0 + 2, T0 + 3]).cast(kind)
    found, _ = read(write(tmp_path / "s.parquet", table(event_time=seconds)))
    assert found == expected
    if kind != pa.uint32():
        thousands = pa.array([T0 * 1000, -1, T0, T0]).cast(kind)
        _, rejected = read(write(tmp_path / "ms.arrow", table(event_time=thousands)))
        assert set(rejected["reason"].to_pylist()) == {"event_time outside 1970..2106"}


def test_a_byte_order_mark_costs_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    for name, data in (("x.ndjson", ripe_lines(9)), ("x.csv", CSV_HEADER + CSV_ROW * 9)):
        found, rejected = read(write(tmp_path / name, b"\xef\xbb\xbf" + data))
        assert (len(found), len(rejected)) == (9, 0)


def tar_bytes(name="x.ndjson", data=b"{}\n" * 200):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


RESULTS = [json.loads(line) for line in ripe_lines(50).splitlines()]
MESSAGES = [["atlas_result", result] for result in RESULTS]
AS_JSON = {
    "array.json": json.dumps(RESULTS).encode(),
    "compact.json": json.dumps(RESULTS, separators=(",", ":")).encode(),
    "indented.json": json.dumps(RESULTS, indent=2).encode(),
    "array_by_line.json": b" [\n" + ripe_lines(50).replace(b"}\n", b"},\n")[:-2] + b"\n]\n",
    "pages.json": b"\n".join(json.dumps(RESULTS[i : i + 7]).encode() for i in range(0, 50, 7)),
    "objects.json": b"\n".join(json.dumps(result, indent=1).encode() for result in RESULTS),
    "messages.ndjson": b"\n".join(json.dumps(message).encode() for message in MESSAGES),
    "array_of_messages.json": json.dumps(MESSAGES, indent="\t").encode(),
    "marked.json": b"\xef\xbb\xbf" + json.dumps(RESULTS).encode(),
    "marked": b"\xef\xbb\xbf\n [" + json.dumps(RESULTS)[1:].encode(),
    "windows.json": json.dumps(RESULTS, indent=4).replace("\n", "\r\n").encode(),
    "packed.json.gz": gzip.compress(json.dumps(RESULTS).encode()),
    "archive.tar": tar_bytes("results/array.json", json.dumps(RESULTS).encode()),
    "archive.tgz": gzip.compress(tar_bytes(data=ripe_lines(50))),
    "twice.tar.bz2": bz2.compress(tar_bytes("a.json.gz", gzip.compress(ripe_lines(50)))),
}


@pytest.mark.parametrize("name", AS_JSON)
@pytest.mark.parametrize("block", [97, 4 << 20])
def test_results_are_read_alike_however_an_api_or_an_archive_gives_them(
    tmp_path, monkeypatch, name, block
):
    expected = read(write(tmp_path / "lines.ndjson", ripe_lines(50)))
    monkeypatch.setattr(lines_format, "BLOCK_BYTES", block)
    assert read(write(tmp_path / name, AS_JSON[name])) == expected


def test_a_bad_element_of_an_array_is_rejected_by_its_number_and_its_neighbours_are_not(tmp_path):
    texts = [json.dumps(result) for result in RESULTS[:5]]
    texts[1:1] = ['"atlas_result"', "[1, 2]"]
    texts[4] = '{"type": "ping",\n "x": }'
    table, rejected = read(write(tmp_path / "x.json", f"[{','.join(texts)}".encode()))
    assert len(table) == 4
    got = [(r["line"], r["reason"], r["record"]) for r in rejected.to_pylist()]
    assert got == [
        (2, "not a JSON object", '"atlas_result"'),
        (3, "not a JSON object", "[1, 2]"),
        (5, "not a JSON object", '{"type": "ping",  "x": }'),
        (8, "not a JSON object", "["),  # which does not end
    ]


@pytest.mark.parametrize("ending", ["ndjson", "csv", "parquet", "arrow"])
def test_small_files_read_together_are_read_as_each_alone(tmp_path, monkeypatch, ending):
    for i in range(9):
        some = table(rtt=[i + 1.0, math.inf, -1.0, i / 7])
        path = tmp_path / f"{i}.{ending}"
        if ending == "ndjson":
            write(path, ripe_lines(3) + b"{}\n" * (i % 3) + (b"\xff\n" if i == 4 else b""))
        elif ending == "csv":
            pc_csv.write_csv(some if i < 5 else some.select(some.column_names[::-1]), path)
        elif ending == "parquet":
            pq.write_table(some, path)
        else:
            if i > 6:
                some = some.set_column(1, "src_addr", some["src_addr"].dictionary_encode())
            with pa.ipc.new_file(path, some.schema) as writer:
                writer.write_table(some)
    together = read(tmp_path)
    assert len(sources.cut_into_units(files.find_files([str(tmp_path)]))) == 1
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    assert len(sources.cut_into_units(files.find_files([str(tmp_path)]))) == 9
    assert together == read(tmp_path)
    assert {r["file"] for r in together[1].to_pylist()} > {
        str(tmp_path / f"{i}.{ending}") for i in (1, 2, 8)
    }


def make(tmp_path, name, data):
    return [str(write(tmp_path / name, data))]


def link(path, target):
    path.symlink_to(target)
    return path


def pipe(path):
    os.mkfifo(path)
    return str(path)


def write_raw(directory, name, data):
    with open(os.path.join(os.fsencode(directory), name), "wb") as file:
        file.write(data)
    return True


def parquet_bytes(**changes):
    sink = pa.BufferOutputStream()
    pq.write_table(table(**changes), sink, compression="none")
    return sink.getvalue().to_pybytes()


def arrow_bytes():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table())
    return sink.getvalue().to_pybytes()


BROKEN = {
    "nothing": (lambda p: [str(p / "no-such-file.csv")], "does not exist"),
    "no match": (lambda p: [str(p / "*.csv")], "no file there"),
    "empty directory": (lambda p: [str(p)], "no file there"),
    "directory of others": (lambda p: [make(p, "a.txt", b"x") and str(p)], "ends in one of"),
    "no input": (lambda p: [], "no input was given"),
    "unknown scheme": (lambda p: ["ftp://host/x.csv"], "unknown scheme"),
    "empty file": (lambda p: make(p, "x.csv", b""), "is empty"),
    "empty parquet": (lambda p: make(p, "x.pq", b""), "is empty"),
    "unknown ending": (lambda p: make(p, "x.txt", b"hello"), "names no known format"),
    "parquet in gzip": (lambda p: make(p, "x.parquet.gz", b"PAR1"), "names no known format"),
    "twice": (lambda p: make(p, "x.csv", CSV_HEADER) * 2, "twice"),
    "probe rows": (
        lambda p: [make(p, "dataset.json", b"{}") and str(p)],
        "holds probe rows already",
    ),
    "text as parquet": (lambda p: make(p, "x.pq", CSV_HEADER), "cannot be read as parquet"),
    "cut parquet": (
        lambda p: make(p, "x.pq", parquet_bytes()[:-9]),
        "cannot be read as parquet",
    ),
    "headless parquet": (
        lambda p: make(p, "x.pq", parquet_bytes()[100:]),
        "cannot be read as parquet",
    ),
    "text as arrow": (lambda p: make(p, "x.feather", CSV_HEADER), "cannot be read as arrow"),
    "cut arrow": (lambda p: make(p, "x.feather", arrow_bytes()[:-9]), "cannot be read as arrow"),
    "no column": (
        lambda p: make(p, "x.parquet", table().drop_columns(["rtt", "src_addr"])),
        "no column src_addr, rtt",
    ),
    "no columns": (lambda p: make(p, "x.parquet", pa.table({})), "found none"),
    "boolean times": (
        lambda p: make(p, "x.parquet", table(event_time=[True] * 4)),
        "event_time is bool; expected a timestamp or seconds since 1970",
    ),
    "dates": (
        lambda p: make(p, "x.parquet", table(event_time=[datetime.date(2024, 1, 1)] * 4)),
        "event_time is date32",
    ),
    "text times": (
        lambda p: make(p, "x.arrow", table(event_time=["2024-01-01T00:00:00"] * 4)),
        "event_time is string",
    ),
    "integer addresses": (
        lambda p: make(p, "x.parquet", table(src_addr=[1, 2, 3, 4])),
        "src_addr is int64; expected a string",
    ),
    "binary addresses": (
        lambda p: make(p, "x.parquet", table(dst_addr=[b"1"] * 4)),
        "dst_addr is binary",
    ),
    "list addresses": (
        lambda p: make(p, "x.parquet", table(dst_addr=[["::1"]] * 4)),
        "dst_addr is list",
    ),
    "float version": (
        lambda p: make(p, "x.parquet", table(ip_version=[4.0] * 4)),
        "ip_version is double; expected an integer",
    ),
    "boolean version": (
        lambda p: make(p, "x.parquet", table(ip_version=[True] * 4)),
        "ip_version is bool",
    ),
    "boolean rtt": (
        lambda p: make(p, "x.parquet", table(rtt=[True] * 4)),
        "rtt is bool; expected a number",
    ),
    "text rtt": (lambda p: make(p, "x.parquet", table(rtt=["1"] * 4)), "rtt is string"),
    "duration rtt": (
        lambda p: make(p, "x.parquet", table(rtt=pa.array([1] * 4, pa.duration("ms")))),
        "rtt is duration",
    ),
    "csv without header": (lambda p: make(p, "x.csv", CSV_ROW * 3), "has no column event_time"),
    "csv of semicolons": (
        lambda p: make(p, "x.csv", CSV_HEADER.replace(b",", b";")),
        "has no column event_time",
    ),
    "csv with a column twice": (
        lambda p: make(p, "x.csv", b"rtt," + CSV_HEADER),
        "column rtt more than once",
    ),
    "csv header with an open quote": (
        lambda p: make(p, "x.csv", b'"event_time,rtt\n'),
        "is no CSV header",
    ),
    "csv header in latin-1": (lambda p: make(p, "x.csv", b"\xe9v\n"), "is no CSV header"),
    "feather of version 1": (
        lambda p: make(p, "x.feather", b"FEA1" + bytes(60) + b"FEA1"),
        "is Feather version 1; write it again",
    ),
    "utf-16 csv": (
        lambda p: make(p, "x.csv", CSV_HEADER.decode().encode("utf-16")),
        "is UTF-16 text",
    ),
    "gzip named json": (lambda p: make(p, "x.ndjson", gzip.compress(b"{}")), "end in .gz"),
    "bz2 named csv": (lambda p: make(p, "x.json", bz2.compress(b"{}")), "end in .bz2"),
    "xz named json": (lambda p: make(p, "x.json", lzma.compress(b"{}")), "end in .xz"),
    "parquet named json": (lambda p: make(p, "x.json", parquet_bytes()), "end in .parquet"),
    "utf-16 json": (lambda p: make(p, "x.json", "{}".encode("utf-16")), "is UTF-16 text"),
    "tar named json": (lambda p: make(p, "x.json", tar_bytes()), "is a tar archive; let its name"),
    "tar of nothing": (lambda p: make(p, "x.tar", tar_bytes("a.txt")), "no file of a known ending"),
    "tar of parquet": (
        lambda p: make(p, "x.tgz", gzip.compress(tar_bytes("a.parquet"))),
        "x.tgz/a.parquet is no text; unpack the archive",
    ),
    "tar that is cut off": (lambda p: make(p, "x.tar", tar_bytes()[:600]), "cannot be read as tar"),
    "dead link": (lambda p: [link(p / "b.ndjson", p / "gone") and str(p)], "b.ndjson is a link to"),
    "dead link by glob": (
        lambda p: [link(p / "b.ndjson", p / "gone") and str(p / "*.ndjson")],
        "b.ndjson is a link to nothing; fetch its content",
    ),
    "dead link below": (
        lambda p: [(p / "d").mkdir() or (link(p / "d" / "b.csv", p / "gone") and str(p))],
        "b.csv is a link to nothing",
    ),
    "pipe": (lambda p: [pipe(p / "x.ndjson")], "is a pipe or a device; give a regular file"),
    "pipe in a directory": (
        lambda p: [pipe(p / "x.ndjson") and str(p)],
        "is a pipe or a device; remove it",
    ),
    "name that is no utf-8": (
        lambda p: [write_raw(p, b"caf\xe9.ndjson", ripe_lines(1)) and str(p)],
        r"caf.udce9.ndjson: the path is not UTF-8; rename it",
    ),
    "one endless line": (
        lambda p: make(p, "x.json", b"[" + b" " * lines_format.LONGEST_LINE * 2),
        "holds a record of over",
    ),
    "endless line in bz2": (
        lambda p: make(p, "x.bz2", bz2.compress(b"[" + b" " * lines_format.LONGEST_LINE * 2)),
        "holds a record of over",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_input_is_one_clear_error(tmp_path, case):
    build, message = BROKEN[case]
    with pytest.raises(PingLLMError, match=message) as caught:
        read(*build(tmp_path))
    assert isinstance(caught.value, DataError | StorageError)
    assert "\n" not in str(caught.value)
