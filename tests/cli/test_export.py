import json

from click.testing import CliRunner
from tiny_runs import CONFIG, write_run

from ping_llm.cli import cli


def invoke(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)])


def test_an_export_answers_as_the_run_does(tmp_path):
    write_run(tmp_path / "run")
    result = invoke("export", "--run", tmp_path / "run", "--output", tmp_path / "export", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parameters"] == CONFIG.parameter_count()
    question = ["--src", "10.0.0.1", "--dst", "10.0.1.1", "--json"]
    answers = [
        invoke("predict", "--run", tmp_path / name, *question).stdout for name in ("run", "export")
    ]
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["rtt_ms"]


def test_what_is_no_run_is_refused(tmp_path):
    result = invoke("export", "--run", tmp_path, "--output", tmp_path / "export")
    assert result.exit_code == 1
    assert "is not a run" in result.stderr
    assert not (tmp_path / "export").exists()


def test_exporting_again_what_is_there_changes_nothing(tmp_path):
    run, output = write_run(tmp_path / "run"), tmp_path / "export"
    output.mkdir()
    (output / ".ping-llm.lock").write_text("")  # as on a mount point, beside its lost+found
    (output / "lost+found").mkdir()
    for _ in range(2):
        result = invoke("export", "--run", run, "--output", output)
        assert result.exit_code == 0, result.output
    assert {"config.json", "model.safetensors"} < {path.name for path in output.iterdir()}
