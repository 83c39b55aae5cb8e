import json

import pytest
from click.testing import CliRunner

from ping_llm import outputs
from ping_llm.cli import cli
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "s.parquet"
    simulate(path, probes=10, days=1.0, measurements=2000, seed=0)
    return path


def run(*arguments):
    return CliRunner().invoke(cli, ["inspect-data", *map(str, arguments)])


def test_json_is_one_object_with_the_keys_of_the_contract(raw, tmp_path):
    result = run(raw, "--json", "--samples", 2, "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    keys = "measurements failed_fraction ipv6_fraction probes time_first time_last rtt_ms checks"
    assert set(keys.split()) <= set(found)
    assert found["measurements"] == 2000
    assert {"p5", "p50", "p95"} <= set(found["rtt_ms"])
    assert set(found["checks"][0]) == {"name", "ok", "count", "detail"}
    assert len(found["samples"]) == 2
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_the_text_fits_80_columns(raw):
    result = run(raw, "--samples", 2)
    assert result.exit_code == 0
    assert "checks" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/none.parquet"], 1, "does not exist"),
        (["{tmp}"], 1, "{tmp}"),
        (["{raw}", "--report", "{tmp}"], 1, "report={tmp} is a directory; name a file"),
        (["{raw}", "--samples", "-1"], 2, "samples=-1 must be at least 0"),
        (["{raw}", "--samples", "x"], 2, "samples='x' is not a whole number"),
        (["{raw}", "--html", "x"], 2, "No such option"),
        ([], 2, "Missing argument 'PATH'"),
    ],
)
def test_bad_arguments_have_one_clear_line_and_an_exit_code(
    raw, tmp_path, arguments, code, message
):
    result = run(*(a.format(tmp=tmp_path, raw=raw) for a in arguments))
    assert result.exit_code == code
    assert message.format(tmp=tmp_path) in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_report_that_another_process_writes_is_refused_at_once(raw, tmp_path):
    report = tmp_path / "report.html"
    with outputs.claim(Location.of(report), what="test"):
        result = run(raw, "--report", report)
    assert result.exit_code == 1
    assert "is being written by another process" in result.stderr
    assert not report.exists()
