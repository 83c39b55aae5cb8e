import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.quickstart import run
from ping_llm.simulation.simulate import simulate


@pytest.mark.slow
@pytest.mark.parametrize("own_data", [False, True])
def test_every_step_runs_once_and_a_second_run_changes_nothing(tmp_path, monkeypatch, own_data):
    sizes = {"MEASUREMENTS": 3000, "PROBES": 20, "SCORED": 5, "EXTRACTED": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(run, name, size)
    monkeypatch.setitem(run.TRAINING, "steps", 2)
    output, data = tmp_path / "out", []
    if own_data:
        data = ["--data", str(tmp_path / "pings.parquet")]
        simulate(data[1], probes=20, days=1.0, measurements=3000, seed=0)
    results = []
    for _ in range(2):
        result = CliRunner().invoke(cli, ["quickstart", "--output", str(output), "--json", *data])
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
    assert results[0] == results[1]
    assert set(results[0]) == {"output", "loss_first", "loss_last", "errors", "files"}
    assert 2 < results[0]["loss_first"] < 10
    assert {"model", "model_pretrained", "wmedian"} <= set(results[0]["errors"])
    for path in results[0]["files"].values():
        assert output in Path(path).parents
        assert Path(path).stat().st_size > 0
