import json

import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.training import loop


def invoke(*arguments):
    return CliRunner().invoke(cli, ["train", *map(str, arguments)])


def test_flags_reach_the_library_function_by_their_names(monkeypatch, tmp_path):
    seen = {}
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
    monkeypatch.setattr(loop, "train", lambda **arguments: seen.update(arguments) or result)
    flags = ["--data", tmp_path, "--output", tmp_path / "run", "--steps", 3, "--set", "a=1"]
    said = invoke(*flags, "--set", "b=2", "--mesh", "fsdp=2", "--json")
    assert said.exit_code == 0
    given = {name: value for name, value in seen.items() if value is not None}
    assert given == {
        "data": str(tmp_path),
        "output": tmp_path / "run",
        "steps": 3,
        "overrides": ("a=1", "b=2"),
        "mesh": "fsdp=2",
    }
    assert json.loads(said.stdout)["step"] == 3
    assert "loss 1.5000" in invoke(*flags).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "preset='huge' is not one of tiny, small, base, large"),
        (["--steps", "0"], "steps=0 must be above 0"),
        (["--batch-size", "-1"], "batch_size=-1 must be above 0"),
        (["--seq-len", "0"], "seq_len=0 must be above 0"),
        (["--seed", "-3"], "seed=-3 must not be negative"),
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


def test_flags_that_are_no_numbers_are_usage_errors(tmp_path):
    assert invoke("--data", tmp_path, "--output", tmp_path, "--steps", "many").exit_code == 2
    assert invoke("--output", tmp_path).exit_code == 2
