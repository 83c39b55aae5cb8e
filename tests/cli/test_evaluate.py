import json

import pytest
from click.testing import CliRunner
from tiny_runs import write_run

from ping_llm import outputs
from ping_llm.cli import cli
from ping_llm.ingest.prepare import prepare_data
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    simulate(place / "pings.parquet", probes=10, days=1.0, measurements=500, seed=0)
    raw = [str(place / "pings.parquet")]
    prepare_data(raw, output=place / "rows", workers=1)
    prepare_data(raw, output=place / "no_test", test_fraction=0.0, workers=1)
    prepare_data(raw, output=place / "probes", split="probe", test_fraction=0.0, workers=1)
    write_run(place / "run", place / "rows")
    return place


def invoke(*arguments):
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def test_the_table_and_the_json_name_the_same_methods(made):
    given = ["--run", made / "run", "--data", made / "rows", "--baselines", "prefix,additive"]
    given += ["--max-rows", "20"]
    result = invoke(*given, "--json")
    assert result.exit_code == 0, result.output
    methods = json.loads(result.stdout)["methods"]
    assert list(methods) == ["model", "prefix", "additive"]
    text = invoke(*given).stdout
    assert all(f"\n{name} " in text for name in methods)
    assert max(map(len, text.splitlines())) <= 100


def test_data_and_report_may_be_remote(made, bucket):
    (bucket / "pings.parquet").upload(made / "pings.parquet")
    for file in Location.of(made / "rows").find():
        (bucket / "rows" / file.location.name).upload(file.location.path)
    for name in ("pings.parquet", "rows"):
        report = bucket / f"{name}.html"
        given = ["--run", made / "run", "--baselines", "none", "--max-rows", 5, "--json"]
        results = []
        for place in (bucket, Location.of(made)):
            result = invoke(*given, "--data", place / name, "--report", report)
            assert result.exit_code == 0, result.output
            results.append(json.loads(result.stdout) | {"seconds": 0})
        assert results[0] == results[1]
        assert "Calibration" in report.read_text()


BAD = {
    "a baseline beside all": (
        ["--data", "rows", "--baselines", "all,prefix"],
        "give all alone, or names of methods",
    ),
    "online baseline of pairs": (
        ["--data", "rows", "--baselines", "median9"],
        "baseline 'median9' is for data prepared with --split time; this is pair",
    ),
    "no test rows": (["--data", "no_test"], "no_test has no test rows"),
    "no test rows of new probes": (["--data", "probes"], "probes has no test rows"),
    "no data": (["--data", "nowhere"], "nowhere does not exist"),
    "data of no format": (["--data", "words.txt"], "words.txt"),
    "empty data": (["--data", "empty.csv"], "empty.csv"),
    "no run": (["--data", "rows", "--run", "rows"], "rows is not a run"),
    "no prefixes": (["--data", "rows", "--prefixes", "words.txt"], "words.txt, line 1"),
    "no such step": (["--data", "rows", "--step", "7"], "run has no checkpoint of step 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_message(made, case, monkeypatch):
    monkeypatch.chdir(made)
    (made / "words.txt").write_text("hello\n")
    (made / "empty.csv").write_text("")
    arguments, words = BAD[case]
    result = invoke("--run", "run", *arguments)
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_usage_errors_exit_with_2(made):
    given = ["--run", made / "run", "--data", made / "rows"]
    assert invoke(*given, "--max-rows", 0).exit_code == 2
    refused = invoke(*given, "--baselines", "magic")
    assert refused.exit_code == 2
    assert "baselines='magic' is not one of all, none, global_median" in refused.stderr


def test_the_model_in_the_box_stands_beside_a_run_or_alone(made):
    given = ["--data", made / "rows", "--baselines", "none", "--max-rows", "20", "--pretrained"]
    result = invoke(*given, "--run", made / "run", "--json")
    assert result.exit_code == 0, result.output
    both = json.loads(result.stdout)
    assert list(both["methods"]) == ["model", "model_pretrained"]
    alone = json.loads(invoke(*given, "--json").stdout)
    assert list(alone["methods"]) == ["model_pretrained"]
    assert alone["methods"]["model_pretrained"] == both["methods"]["model_pretrained"]
    assert alone["calibration"] == alone["calibration_pretrained"] == both["calibration_pretrained"]
    assert set(both["calibrated_on"]) == {"model", "model_pretrained"}
    refused = invoke("--pretrained", "--data", made / "pings.parquet")
    assert refused.exit_code == 1
    assert "nothing is known to answer from" in refused.stderr
    assert "give --run, --pretrained, or both" in invoke("--data", made / "rows").stderr


def test_a_report_that_another_process_writes_is_refused_at_once(made, tmp_path):
    report = tmp_path / "report.html"
    with outputs.claim(Location.of(report), what="test"):
        result = invoke("--run", made / "run", "--data", made / "rows", "--report", report)
    assert result.exit_code == 1
    assert "is being written by another process" in result.stderr
    assert not report.exists()
