import dataclasses
import json

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_tables import make_table

from ping_llm.cli import cli
from ping_llm.ingest.prepare import PrepareResult, prepare_data

LINE = {"type": "ping", "timestamp": 1_700_000_000, "from": "1.2.3.4", "dst_addr": "5.6.7.8"}


def run(*arguments):
    return CliRunner().invoke(cli, ["prepare-data", *map(str, arguments)])


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(make_table(500), path)
    return path


def test_json_is_one_object_on_stdout_and_the_same_on_a_second_run(parquet, tmp_path):
    first = run(parquet, "--output", tmp_path / "rows", "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert set(found) == {field.name for field in dataclasses.fields(PrepareResult)}
    assert found["measurements"] == 500
    assert set(found["rows"]) == {"train", "valid", "test"}
    assert run(parquet, "--output", tmp_path / "rows", "--json").stdout == first.stdout


def test_the_command_and_the_function_make_the_same(parquet, tmp_path):
    flags = ["--split", "time", "--valid-fraction", "0.1", "--test-fraction", "0.2", "--seed", "3"]
    flags += ["--row-cap-mb", "1", "--memory-limit", "1GiB", "--workers", "1", "--engine", "local"]
    flags += ["--both-ends"]
    assert run(parquet, "--output", tmp_path / "rows", *flags).exit_code == 0
    settings = {"split": "time", "valid_fraction": 0.1, "test_fraction": 0.2, "seed": 3}
    settings |= {"row_cap_mb": 1, "both_ends": True}
    result = prepare_data([str(parquet)], output=tmp_path / "rows", **settings)
    assert result.measurements == 500 + result.split_measurements["train"] // 2


def test_the_text_counts_what_was_rejected_and_says_where_it_is(tmp_path):
    lines = [json.dumps(LINE | {"min": 5}), "broken", json.dumps(LINE | {"type": "dns"})]
    (tmp_path / "x.ndjson").write_text("\n".join(lines))
    result = run(tmp_path / "x.ndjson", "--output", tmp_path / "rows")
    assert result.stdout.startswith("1 measurements (0 failed) of 1 probes in ")
    assert "rejected: 1 x not a JSON object" in result.stdout
    assert f"{tmp_path / 'rows'}/rejected.parquet" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/no.parquet", "--output", "{tmp}/rows"], 1, "does not exist"),
        (["{tmp}/*.csv", "--output", "{tmp}/rows"], 1, "no file there"),
        (["{tmp}/m.parquet", "--output", "{tmp}"], 1, "exists and is not empty"),
        (["{tmp}/m.parquet", "--output", "{tmp}/m.parquet"], 1, "exists and is not a directory"),
        (["{tmp}/m.parquet", "--output", "ftp://x/rows"], 1, "unknown scheme"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--memory-limit", "much"], 1, "is not a size"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--memory-limit", "9"], 1, "at least"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--workers", "0"], 2, "workers=0"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--test-fraction", "1"], 2, "test_fraction=1"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--valid-fraction", "nan"], 2, "='nan'"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--row-cap-mb", "-1"], 2, "row_cap_mb=-1"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--seed", "-1"], 2, "seed=-1"),
        (
            ["{tmp}/m.parquet", "--output", "{tmp}/r", "--seed", "x"],
            2,
            "seed='x' is not a whole number",
        ),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--split", "day"], 2, "is not one of"),
        (["{tmp}/m.parquet", "--output", "{tmp}/r", "--engine", "dask"], 2, "is not one of"),
        (["{tmp}/m.parquet"], 2, "Missing option '--output'"),
        (["--output", "{tmp}/rows"], 2, "Missing argument"),
    ],
)
def test_a_flag_that_cannot_be_is_one_clear_line(parquet, tmp_path, arguments, code, message):
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]
