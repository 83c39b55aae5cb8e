import datetime
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm import addresses
from ping_llm.errors import DataError
from ping_llm.measurements import COLUMNS, NO_TIME, MeasurementTable

UTC = datetime.UTC
SMALL = {
    "event_time": [5, None, 0],
    "src_addr": ["10.0.0.2", "2001:db8::1", "10.0.0.1"],
    "dst_addr": ["10.0.0.9", "2001:db8::1", "10.0.0.2"],
    "rtt": [1.5, -1.0, 20.25],
}
ADDRESSES = {
    4: st.ip_addresses(v=4),
    6: st.ip_addresses(v=6).filter(lambda each: each.ipv4_mapped is None),
}
OPTIONAL = {"kind": [0, 2, 1], "loss": [0.0, None, 1.0], "spread": [None, 0.5, 3.0]}


@st.composite
def tables(draw, max_size=12, optional=True):
    n = draw(st.integers(0, max_size))
    families = draw(st.lists(st.sampled_from([4, 6]), min_size=n, max_size=n))
    few = {v: st.sampled_from(draw(st.lists(ADDRESSES[v], min_size=2, max_size=3)))
           for v in (4, 6)}  # fmt: skip
    src, dst = ([draw(few[v]) for v in families] for _ in range(2))
    times = st.none() | st.integers(0, 3) | st.integers(0, 2**32 - 1)
    rtt = st.just(-1.0) | st.floats(0, 1e6, width=32)
    data = {
        "event_time": pa.array([draw(times) for _ in range(n)], pa.int64()),
        "src_addr": pa.array([str(each) for each in src], pa.string()),
        "dst_addr": pa.array([str(each) for each in dst], pa.string()),
        "rtt": pa.array([draw(rtt) for _ in range(n)], pa.float32()),
    }
    if optional and draw(st.booleans()):
        kind = [draw(st.integers(0, 2)) for _ in range(n)]
        loss = [draw(st.none() | st.floats(0, 1, width=32)) for _ in range(n)]
        data |= {"kind": pa.array(kind, pa.uint8()), "loss": pa.array(loss, pa.float32())}
    return MeasurementTable.from_arrow(data)


def assert_equal(found, expected):
    for name in COLUMNS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, name)


@settings(max_examples=30)
@given(tables(), st.data())
def test_a_table_survives_arrow_pandas_and_polars_whole_and_sliced(table, data):
    start = data.draw(st.integers(0, len(table)))
    stop = data.draw(st.integers(start, len(table)))
    part = table.slice(start, stop)
    assert_equal(MeasurementTable.from_arrow(table.to_arrow().slice(start, stop - start)), part)
    assert_equal(MeasurementTable.from_arrow(part), part)
    assert_equal(MeasurementTable.from_arrow(pl.DataFrame(part)), part)
    assert_equal(MeasurementTable.from_arrow(pa.table(part).to_pandas()), part)
    batches = pa.table(table).to_reader(max_chunksize=2)
    assert_equal(MeasurementTable.from_arrow(batches), table)


def test_other_libraries_see_text_and_times():
    table = MeasurementTable.from_arrow(SMALL | OPTIONAL)
    frame = pl.DataFrame(table)
    assert frame["src_addr"].to_list() == SMALL["src_addr"]
    assert frame["event_time"].to_list() == [
        datetime.datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC), None,
        datetime.datetime(1970, 1, 1, tzinfo=UTC),
    ]  # fmt: skip
    assert frame["ip_version"].to_list() == [4, 6, 4]
    assert frame["loss"].to_list() == OPTIONAL["loss"]
    assert pa.table(table).to_pandas()["event_time"].dt.year.iloc[0] == 1970
    assert pl.DataFrame(MeasurementTable.empty()).shape == (0, 5)


def test_the_compact_form_is_binary_and_shares_memory():
    table = MeasurementTable.from_arrow(SMALL).take(np.array([0, 2]))
    compact = table.to_arrow()
    assert compact.schema == pa.schema(
        [("event_time", pa.int64()), ("src_addr", pa.binary(16)), ("dst_addr", pa.binary(16)),
         ("ip_version", pa.int8()), ("rtt", pa.float32())]
    )  # fmt: skip
    assert np.shares_memory(MeasurementTable.from_arrow(compact).src, table.src)


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_every_column_may_be_text_of_any_encoding(kind):
    texts = {
        "event_time": ["1970-01-01T00:00:05Z", "", "0.5"],
        "src_addr": SMALL["src_addr"], "dst_addr": SMALL["dst_addr"],
        "ip_version": ["4", "6", "4"], "rtt": ["1.5", "-1", "2.025e1"],
    }  # fmt: skip
    columns = {name: pa.array(values).cast(kind) for name, values in texts.items()}
    # One row too many in front, sliced off: offsets must be respected.
    columns = {n: pa.concat_arrays([c[2:], c]).slice(1) for n, c in columns.items()}
    assert_equal(MeasurementTable.from_arrow(columns), MeasurementTable.from_arrow(SMALL))
    categories = pl.DataFrame(SMALL).with_columns(pl.col("src_addr").cast(pl.Categorical))
    assert_equal(MeasurementTable.from_arrow(categories), MeasurementTable.from_arrow(SMALL))


@pytest.mark.parametrize(
    "times",
    [
        pa.array([5.9, None, 0.1]),
        pa.array([5900, None, 999], pa.timestamp("ms")),
        pa.array([5 * 10**9, None, 1], pa.timestamp("ns", "Europe/Madrid")),
        pa.array([5, None, 0], pa.int16()),
    ],
    ids=lambda array: str(array.type),
)
def test_times_of_any_type_are_floored_to_seconds(times):
    table = MeasurementTable.from_arrow(SMALL | {"event_time": times})
    assert table.time.tolist() == [5, NO_TIME, 0]
    assert table.has_time.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_addr": ["10.0.0.2", "::1", "x"]}, "row 3: src_addr is 'x'; expected an address"),
        ({"dst_addr": ["10.0.0.9", None, ""]}, "row 2: dst_addr is missing"),
        ({"dst_addr": ["10.0.0.9", "1.2.3.4", "::1"]}, "row 2: 2001:db8::1, 1.2.3.4 and ip_ver"),
        ({"ip_version": [4, 6, 6]}, "row 3: 10.0.0.1, 10.0.0.2 and ip_version 6 are of different"),
        ({"ip_version": [4, 5, 6]}, "row 2: ip_version is 5; expected 4 or 6"),
        ({"event_time": ["1", "2024-01-01", "2"]}, "row 2: event_time is '2024-01-01'; expected"),
        ({"event_time": [0.0, 1.0, float("nan")]}, "row 3: event_time is nan"),
        ({"rtt": [1.0, None, 2.0]}, "row 2: rtt is missing; expected ms"),
        ({"rtt": ["1", "2", "1e39"]}, "row 3: rtt is '1e39'"),
        ({"rtt": [1.0, float("nan"), 2.0]}, "row 2: rtt is nan"),
        ({"kind": [0, 1, 3]}, "row 3: kind is 3; expected 0 for ping"),
        ({"loss": [0, 1.5, 0]}, "row 2: loss is 1.5; expected a fraction"),
        ({"spread": [0, -1, 0]}, "row 2: spread is -1"),
        ({"src_addr": [1, 2, 3]}, "no table of measurements"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_row_column_and_value(change, message):
    table = pa.table(SMALL | change)
    with pytest.raises(DataError, match=message):
        MeasurementTable.from_arrow(table)
    with pytest.raises(DataError, match=message):  # rows count through all batches
        MeasurementTable.from_arrow(table.to_reader(max_chunksize=1))


@pytest.mark.parametrize("data", [5, {"a": [1], "b": [1, 2]}])
def test_what_is_no_table_is_refused(data):
    with pytest.raises(DataError, match="this is no table: "):
        MeasurementTable.from_arrow(data)


def test_what_a_frame_lacks_is_named_beside_what_it_has():
    with pytest.raises(DataError, match="no column src_addr; it has a, a"):
        MeasurementTable.from_arrow(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_text_that_is_not_utf_8_is_refused():
    raw = pa.array([b"\xff"]).cast(pa.binary()).view(pa.string())
    with pytest.raises(DataError, match=r"no table of measurements: .*utf-8"):
        MeasurementTable.from_arrow({"src_addr": raw, "dst_addr": raw, "rtt": [1.0]})


def test_only_a_table_of_questions_may_lack_rtts():
    pairs = {name: SMALL[name] for name in ("src_addr", "dst_addr")}
    with pytest.raises(DataError, match="no column rtt; it has src_addr, dst_addr"):
        MeasurementTable.from_arrow(pd.DataFrame(pairs))
    table = MeasurementTable.from_arrow(pd.DataFrame(pairs), questions=True)
    assert table.rtt.tolist() == [-1, -1, -1]
    assert not table.has_time.any()
    empty = MeasurementTable.from_arrow(pd.DataFrame(pairs)[:0], questions=True)
    assert_equal(empty, MeasurementTable.empty())


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(2, np.float32), np.zeros((3, 1), "f4")])
def test_a_column_of_another_dtype_or_length_is_refused(values):
    table = MeasurementTable.from_arrow(SMALL)
    with pytest.raises(DataError, match=r"column rtt is .* expected float32 \[3\]"):
        MeasurementTable(
            time=table.time, src=table.src, dst=table.dst, family=table.family, rtt=values
        )


def key(table, i):
    src, dst = (
        addresses.as_bytes(table.src)[i].tobytes(),
        addresses.as_bytes(table.dst)[i].tobytes(),
    )
    return table.family[i], src, table.time[i], dst, max(table.rtt[i], -1)


@settings(max_examples=50)
@given(tables())
def test_sorted_is_the_order_of_family_source_time_destination_and_rtt(table):
    ordered = table.sorted()
    keys = [key(ordered, i) for i in range(len(table))]
    assert keys == sorted(key(table, i) for i in range(len(table)))


@settings(max_examples=50)
@given(tables())
def test_mirrored_twice_leaves_out_only_measurements_to_oneself(table):
    apart = addresses.as_bytes(table.src) != addresses.as_bytes(table.dst)
    assert_equal(table.mirrored().mirrored(), table.take(apart.any(axis=1)))
    np.testing.assert_array_equal(table.mirrored().src, table.dst[apart.any(axis=1)])


@settings(max_examples=20)
@given(st.lists(tables(max_size=4, optional=False), max_size=4))
def test_concat_is_undone_by_slices(parts):
    whole = MeasurementTable.concat(parts)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    for part, start, stop in zip(parts, ends, ends[1:], strict=False):
        assert_equal(whole.slice(start, stop), part)


def test_a_column_that_only_some_tables_have_is_filled_in():
    plain, more = (MeasurementTable.from_arrow(data) for data in (SMALL, SMALL | OPTIONAL))
    whole = MeasurementTable.concat([plain, more])
    assert whole.kind.tolist() == [0, 0, 0, 0, 2, 1]
    np.testing.assert_array_equal(whole.loss, np.float32([*[np.nan] * 3, 0, np.nan, 1]))
    assert_equal(MeasurementTable.concat([plain, plain]).slice(3, 6), plain)


def test_the_table_loads_without_jax():
    code = "import sys, ping_llm.measurements; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
