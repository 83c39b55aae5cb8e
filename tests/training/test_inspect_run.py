import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from tiny_runs import CONFIG, decoder, write_run

from ping_llm.checkpoints import Checkpoints
from ping_llm.cli import cli
from ping_llm.data.network import KNOWN
from ping_llm.data.rows import read_rows
from ping_llm.errors import CheckpointError
from ping_llm.prediction.predictor import Predictor
from ping_llm.runs import load_run
from ping_llm.training.export import export_run
from ping_llm.training.inspect_run import inspect_run

OPTIMIZER = {"count": jnp.zeros(())}


@pytest.fixture(scope="module")
def run(tmp_path_factory, probe_rows):
    """A run of steps 1, 2 and 3, each with weights of its own; the second is the best."""
    path = write_run(tmp_path_factory.mktemp("inspect") / "run", probe_rows)
    lines = [
        {"step": 2, "loss": 3.0, "valid_loss": 2.5, "tokens": 100, "seconds": 1.5},
        {"step": 3, "loss": 2.0, "tokens": 150, "seconds": 2.5, "skipped_steps": 1},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Checkpoints(path / "checkpoints", keep=3) as checkpoints:
        for step, objective in ((2, 0.5), (3, 0.7)):
            params = jax.tree.map(lambda leaf, by=step: leaf * by, decoder()[1])
            trees = {"params": params, "opt_state": OPTIMIZER}
            checkpoints.save(step, trees, {}, objective=objective)
        checkpoints.wait()
    return path


def scale_of(params):
    """Returns how many times the weights of step 1 these are."""
    ratio = [
        float(np.abs(a).sum() / np.abs(b).sum())
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(decoder()[1]), strict=True)
        if np.abs(b).sum()
    ]
    return round(np.median(ratio), 3)


def test_what_a_run_knows_has_the_checksum_of_its_six_columns(run):
    """As in the first runs that had one: a later column changes nothing where it is not there."""
    with pa.ipc.open_file(str(run / KNOWN)) as reader:
        checksum = reader.schema.metadata[b"checksum"].decode()
    (batch,) = read_rows(run / KNOWN)
    columns = (batch.src, batch.family, batch.offsets, batch.time, batch.dst, batch.rtt)
    content = b"".join(np.ascontiguousarray(each).tobytes() for each in columns)
    assert checksum == hashlib.sha256(content).hexdigest()


def test_each_step_is_loaded_and_without_one_the_best(run):
    assert scale_of(load_run(run).params) == 2
    for step in (1, 2, 3):
        assert scale_of(load_run(run, step).params) == step
        assert scale_of(Predictor.load(str(run), step).model.params) == step
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; it has 1, 2, 3"):
        load_run(run, 9)


def test_a_step_is_exported_and_an_export_has_no_steps(run, tmp_path):
    export_run(run, tmp_path / "export", step=3)
    assert scale_of(load_run(tmp_path / "export").params) == 3
    with pytest.raises(CheckpointError, match="leave step=3 out"):
        load_run(tmp_path / "export", 3)
    result = inspect_run(tmp_path / "export")
    assert (result.kind, result.checkpoints, result.losses) == ("export", [], [])
    assert result.bytes == sum(f.stat().st_size for f in (tmp_path / "export").iterdir())


def test_steps_losses_checkpoints_settings_and_data_are_told(run):
    result = inspect_run(run)
    assert (result.step, result.parameters) == (3, CONFIG.parameter_count())
    assert [row["step"] for row in result.losses] == [2, 3]
    assert [(c["step"], c["objective"], c["best"]) for c in result.checkpoints] == [
        (1, None, False),
        (2, 0.5, True),
        (3, 0.7, False),
    ]
    for each in result.checkpoints:
        files = (run / "checkpoints" / str(each["step"])).rglob("*")
        assert each["bytes"] == sum(f.stat().st_size for f in files if f.is_file()) > 0
    assert result.data["now"] == "same"
    assert "seq_len" in result.changed
    assert "untimed_fraction" not in result.changed  # which is that of the preset


def test_the_command_shows_what_the_result_holds(run, tmp_path):
    result = CliRunner().invoke(cli, ["inspect-run", str(run)])
    assert result.exit_code == 0, result.output
    assert "step 3 of 1, 1 skipped, 150 tokens" in result.stdout
    assert "valid objective 0.5000  (the best)" in result.stdout
    found = json.loads(CliRunner().invoke(cli, ["inspect-run", str(run), "--json"]).stdout)
    assert found["settings"]["seq_len"] == 256
    result = CliRunner().invoke(cli, ["inspect-run", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not a run" in result.stderr


def test_commands_answer_from_the_step_that_is_asked(run):
    pair = ["--src", "10.0.0.1", "--dst", "10.0.1.1", "--json"]
    answers = [
        CliRunner().invoke(cli, ["predict", "--run", str(run), *step, *pair]).stdout
        for step in ([], ["--step", "2"], ["--step", "3"])
    ]
    assert answers[0] == answers[1] != answers[2]
    given = ["generate", "--run", str(run), "--count", "1", "--step", "9"]
    assert "it has 1, 2, 3" in CliRunner().invoke(cli, given).stderr
    given = ["evaluate", "--pretrained", "--data", "rows", "--step", "1"]
    assert "--step is for a --run" in CliRunner().invoke(cli, given).stderr
