import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.quickstart import run


@pytest.mark.slow
def test_every_step_runs_once_and_a_second_run_changes_nothing(tmp_path, monkeypatch):
    sizes = {"MEASUREMENTS": 3000, "PROBES": 20, "SCORED": 5, "EXTRACTED": 5}
    for name, size in sizes.items():
        monkeypatch.setattr(run, name, size)
    monkeypatch.setitem(run.TRAINING, "steps", 2)
    output = tmp_path / "out"
    results = []
    for _ in range(2):
        result = CliRunner().invoke(cli, ["quickstart", "--output", str(output), "--json"])
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
    assert results[0] == results[1]
    assert set(results[0]) == {"output", "loss_first", "loss_last", "errors", "files"}
    assert 2 < results[0]["loss_first"] < 8
    assert {"model", "model_pretrained", "wmedian"} <= set(results[0]["errors"])
    for path in results[0]["files"].values():
        assert output in Path(path).parents
        assert Path(path).stat().st_size > 0
