import gzip
import json
import shutil

import pytest
from tiny_tables import files_of, make_table

pytest.importorskip("pyspark")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java", allow_module_level=True)

import pyarrow.parquet as pq

from ping_llm.errors import DataError
from ping_llm.ingest.formats import parquet
from ping_llm.ingest.prepare import prepare_data

pytestmark = [
    pytest.mark.slow,
    # Java is started by a fork; other tests of this process have imported JAX, which warns of it.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def spark():
    import os
    import sys

    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    yield session
    session.stop()


@pytest.mark.parametrize(
    ("split", "both_ends"), [("pair", False), ("time", False), ("probe", False), ("time", True)]
)
def test_spark_makes_the_files_of_the_local_engine(spark, tmp_path, monkeypatch, split, both_ends):
    settings = {"split": split, "both_ends": both_ends, "row_cap_mb": 0.002}
    monkeypatch.setattr(parquet, "UNIT_ROWS", 1000)
    inputs = []
    for i in range(2):
        inputs.append(str(tmp_path / f"{i}.parquet"))
        pq.write_table(make_table(4000, seed=i, days=1 + i), inputs[-1], row_group_size=500)
    good = {"type": "ping", "from": "1.2.3.4", "dst_addr": "5.6.7.8", "min": 3}
    lines = [json.dumps(good | {"timestamp": i}) for i in range(50)]
    lines[10:10] = ["broken", "{}"]
    (tmp_path / "c.ndjson").write_text("\n".join(lines))
    inputs.append(str(tmp_path / "c.ndjson"))
    results = []
    for engine in ("local", "spark"):
        output = tmp_path / engine
        result = prepare_data(inputs, output=output, engine=engine, **settings)
        results.append({**vars(result), "seconds": 0, "peak_rss_bytes": 0})
    assert results[0] == results[1]
    assert results[0]["rejected"] == {"not a JSON object": 1, "not a ping or traceroute result": 1}
    assert files_of(tmp_path / "spark") == files_of(tmp_path / "local")
    # Either engine takes the other's output as finished.
    prepare_data(inputs, output=tmp_path / "spark", **settings)


def test_spark_finds_no_measurement_where_there_is_none(spark, tmp_path):
    (tmp_path / "x.ndjson").write_text("x\n{}\n")
    with pytest.raises(DataError, match="every record was rejected"):
        prepare_data([str(tmp_path / "x.ndjson")], output=tmp_path / "rows", engine="spark")
    assert not (tmp_path / "rows").exists()


def test_a_file_that_breaks_midway_is_the_same_clear_error_as_in_the_local_engine(spark, tmp_path):
    path = tmp_path / "x.ndjson.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 100)[:-5])
    messages = []
    for engine in ("local", "spark"):
        with pytest.raises(DataError, match="cannot be read as gzip ripe") as caught:
            prepare_data([str(path)], output=tmp_path / "rows", engine=engine)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.ndjson.gz"]
