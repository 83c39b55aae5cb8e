"""Tables whose columns are named, measured and spelt otherwise."""

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from ping_llm.data.rows import ProbeRows
from ping_llm.errors import PingLLMError
from ping_llm.ingest.prepare import prepare_data

ALL_TRAIN = {"valid_fraction": 0.0, "test_fraction": 0.0}
NAMES = "src=source ip, dst=target,rtt=latency,time=ts"
T0 = 1_700_000_000


def table(latency, **more):
    n = len(latency)
    columns = {"ts": pa.array([T0 + i for i in range(n)]), "source ip": ["192.0.2.1"] * n}
    columns |= {"target": ["198.51.100.7", "2001:db8::1"][:1] * n, "latency": latency}
    return pa.table(columns | more)


def prepare(tmp_path, content, ending, **options):
    path = tmp_path / f"x.{ending}"
    if ending == "csv":
        pc_csv.write_csv(content, path)
    elif ending == "parquet":
        pq.write_table(content, path)
    else:
        with pa.ipc.new_file(path, content.schema) as writer:
            writer.write_table(content)
    result = prepare_data([str(path)], tmp_path / "rows", **ALL_TRAIN, **options)
    return ProbeRows(tmp_path / "rows", "train").to_table(), result


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow"])
@pytest.mark.parametrize(("unit", "factor"), [("ms", 1.0), ("s", 1000.0), ("us", 0.001)])
def test_columns_have_the_names_and_units_that_are_told(tmp_path, ending, unit, factor):
    content = table([1.5, -1.0, 2.25], rtt=["not this"] * 3)
    read, _ = prepare(tmp_path, content, ending, columns=NAMES, rtt_unit=unit)
    assert read.time.tolist() == [T0, T0 + 1, T0 + 2]
    assert read.rtt.tolist() == pytest.approx([1.5 * factor, -1.0, 2.25 * factor])
    assert read.family.tolist() == [4, 4, 4]  # told by the addresses


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow"])
def test_what_stands_for_a_failure_is_one(tmp_path, ending):
    content = table(["1.5", "Timeout", " * ", "nan", "x"])
    options = {"columns": NAMES, "failed_values": "timeout,*,NaN"}
    read, result = prepare(tmp_path, content, ending, **options)
    assert read.rtt.tolist() == [1.5, -1.0, -1.0, -1.0]
    assert result.rejected == {"invalid rtt": 1}


@pytest.mark.parametrize("failed", [None, "nan"])
def test_a_number_that_is_none_is_rejected_until_it_means_a_failure(tmp_path, failed):
    content = table([1.5, float("nan")])
    read, result = prepare(tmp_path, content, "parquet", columns=NAMES, failed_values=failed)
    assert read.rtt.tolist() == [1.5, -1.0][: 1 + bool(failed)]
    assert result.rejected == ({} if failed else {"non-finite rtt": 1})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("src", "'src' is not one of time, src, dst"),
        ("source=a", "'source' is not one of"),
        ("src=a,src=b", "is not one of .*, once"),
        ("src=a", "has no column a, which --columns names; it has ts, source ip"),
        ("src=source ip", "has no column event_time, dst_addr, rtt"),
    ],
)
def test_names_that_do_not_fit_are_told(tmp_path, columns, message):
    with pytest.raises(PingLLMError, match=message):
        prepare(tmp_path, table([1.0]), "csv", columns=columns)
