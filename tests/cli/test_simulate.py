import json

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli

SMALL = ["--probes", "10", "--days", "1", "--measurements", "500"]


def run(*arguments):
    return CliRunner().invoke(cli, ["simulate", *map(str, arguments)])


def test_json_is_one_object_on_stdout_and_the_same_on_a_second_run(tmp_path):
    path = tmp_path / "s.parquet"
    first = run("--output", path, *SMALL, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["measurements"] == 500
    assert found["output"] == str(path)
    assert run("--output", path, *SMALL, "--json").stdout == first.stdout


def test_the_text_names_the_file(tmp_path):
    result = run("--output", tmp_path / "s.parquet", *SMALL)
    assert result.stdout.startswith("500 measurements")
    assert str(tmp_path / "s.parquet") in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output", "{tmp}/s.csv"], 1, "must be a name that ends in .parquet"),
        (["--output", "{tmp}/s.parquet", "--probes", "1"], 2, "probes=1 must be at least 2"),
        (["--output", "{tmp}/s.parquet", "--days", "nan"], 2, "days='nan' is not a finite number"),
        (["--output", "{tmp}/s.parquet", "--seed", "-1"], 2, "seed=-1 must be at least 0"),
        (
            ["--output", "{tmp}/s.parquet", "--measurements", "0"],
            2,
            "measurements=0 must be at least 1",
        ),
        (["--output", "{tmp}/s.parquet", "--probes", "x"], 2, "probes='x' is not a whole number"),
        (
            ["--output", "{tmp}/s.parquet", "--days", "long"],
            2,
            "days='long' is not a finite number",
        ),
        (["--output", "{tmp}/s.parquet", "--hosts", "3"], 2, "No such option"),
        ([], 2, "Missing option '--output'"),
    ],
)
def test_bad_arguments_have_one_clear_line_and_an_exit_code(tmp_path, arguments, code, message):
    result = run(*(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
