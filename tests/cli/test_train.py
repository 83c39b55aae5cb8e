import json

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.training import loop


def invoke(*arguments):
    return CliRunner().invoke(cli, ["train", *map(str, arguments)])


def test_flags_reach_the_library_function(monkeypatch, tmp_path):
    seen = []
    result = loop.TrainResult(
        step=3,
        loss=1.5,
        valid_loss=None,
        real_tokens_per_second=1000.0,
        padding_fraction=0.01,
        mfu=None,
        peak_device_bytes=5,
        parameters=7,
        seconds=2.0,
        output="run",
    )
    monkeypatch.setattr(loop, "train", lambda settings: seen.append(settings) or result)
    flags = ["--data", tmp_path, "--output", tmp_path / "run", "--steps", 3, "--set", "z_loss=1"]
    said = invoke(*flags, "--set", "model.d_ff=8", "--mesh", "fsdp=2", "--preset=small", "--json")
    assert said.exit_code == 0, said.output
    (cfg,) = seen
    assert (cfg.data, cfg.output) == (str(tmp_path), str(tmp_path / "run"))
    assert (cfg.steps, cfg.z_loss, cfg.mesh, cfg.preset) == (3, 1.0, "fsdp=2", "small")
    assert (cfg.model.d_ff, cfg.model.n_layers, cfg.optimizer) == (8, 8, "muon")
    assert json.loads(said.stdout)["step"] == 3
    assert "loss 1.5000" in invoke(*flags).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "cubes=3"], "mesh axis 'cubes'"),
        (["--set", "steps"], "expected key=value"),
        (["--config", "absent.toml"], "absent.toml: cannot be read"),
        ([], "is not a complete data set"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_1(tmp_path, flags, message):
    said = invoke("--data", tmp_path / "absent", "--output", tmp_path / "run", *flags)
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1
    assert message in said.stderr
    assert said.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "'huge' is not one of 'tiny', 'small', 'base', 'large'"),
        (["--steps", "0"], "steps=0 must be above 0"),
        (["--steps", "many"], "steps='many' is not a whole number"),
        (["--batch-size", "-1"], "batch_size=-1 must be above 0"),
        (["--seq-len", "0"], "seq_len=0 must be above 0"),
        (["--seed", "-3"], "seed=-3 must be at least 0"),
        (["--wandb", "loud"], "'loud' is not one of 'disabled', 'offline', 'online'"),
    ],
)
def test_a_value_that_a_flag_cannot_have_is_wrong_usage(tmp_path, flags, message):
    said = invoke("--data", tmp_path, "--output", tmp_path / "run", *flags)
    assert said.exit_code == 2
    assert message in said.stderr


def test_data_and_output_are_needed(tmp_path):
    assert invoke("--output", tmp_path).exit_code == 2
    assert invoke("--data", tmp_path).exit_code == 2
