import json
import re

import numpy as np
import torch
import transformers
from click.testing import CliRunner
from flax import nnx
from tiny_runs import CONFIG, decoder, write_run

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


def test_transformers_computes_what_the_run_does_from_an_export(tmp_path, monkeypatch):
    run, output = write_run(tmp_path / "run"), tmp_path / "checkpoint"
    for _ in range(2):
        result = invoke("export", "--run", run, "--output", output, "--format", "hf")
        assert result.exit_code == 0, result.output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = np.random.default_rng(0).integers(0, 267, (2, 100)).astype(np.int32)
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = np.asarray(nnx.merge(*decoder())(tokens))
    np.testing.assert_allclose(logits, ours, atol=1e-5)
    # It goes on after any id, for none of them ends a text.
    assert theirs.generate(torch.zeros((1, 1), dtype=int), max_length=9).shape == (1, 9)
    card = (output / "README.md").read_text()
    assert f"{CONFIG.parameter_count():,} parameters" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(output)
    scope = {}
    exec(program, scope)
    assert scope["logits"].shape == (1, len(scope["tokens"]), 267)


def test_a_checkpoint_does_not_replace_an_export_of_a_run(tmp_path):
    run, output = write_run(tmp_path / "run"), tmp_path / "export"
    assert invoke("export", "--run", run, "--output", output).exit_code == 0
    result = invoke("export", "--run", run, "--output", output, "--format", "hf")
    assert result.exit_code == 1
    assert "exists and is not empty" in result.stderr
