import json

import pytest
from click.testing import CliRunner
from tiny_runs import write_run

from ping_llm.cli import cli
from ping_llm.ingest.sources import read_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("generate") / "run")


def invoke(*arguments):
    return CliRunner().invoke(cli, ["generate", *map(str, arguments)])


def test_measurements_are_printed_as_csv_and_as_json(run, tmp_path):
    result = invoke("--run", run, "--count", 5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["measurements"]
    assert len(found) == 5
    lines = invoke("--run", run, "--count", 5).stdout.splitlines()
    assert lines[0] == "event_time,src_addr,dst_addr,ip_version,rtt"
    # A random model may add differences up to times that prepare-data does not take.
    timed = [line for line in lines[1:] if "1970" <= line[:4] < "2106"]
    (tmp_path / "sampled.csv").write_text("\n".join([lines[0], *timed]) + "\n")
    assert [line.split(",")[1] for line in lines[1:]] == [each["src_addr"] for each in found]
    if timed:
        assert len(read_table([str(tmp_path / "sampled.csv")])) == len(timed)


def test_a_count_or_a_history_that_cannot_be_is_refused(run, tmp_path):
    assert invoke("--run", run, "--count", 0).exit_code == 2
    (tmp_path / "history.csv").write_text("a,b\n1,2\n")
    result = invoke("--run", run, "--count", 1, "--history", tmp_path / "history.csv")
    assert result.exit_code == 1
    assert "history.csv" in result.stderr
