import json

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from hf_checkpoints import add_tokenizer, make_checkpoint
from tiny_runs import write_run

from ping_llm.cli import cli
from ping_llm.ingest.sources import read_table
from ping_llm.models import huggingface
from ping_llm.prediction.text import sample


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


PROMPT = "the then"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories of two checkpoints, by the name of their family."""
    root = tmp_path_factory.mktemp("checkpoints")
    settings = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    made = {
        "qwen2": make_checkpoint(root / "qwen2", **settings),
        "llama": make_checkpoint(root / "llama", model_type="llama"),
    }
    return {name: add_tokenizer(directory) for name, directory in made.items()}


@pytest.mark.parametrize(("name", "prompt"), [("qwen2", PROMPT), ("llama", "t")])
def test_the_likeliest_text_is_that_of_transformers(name, prompt, checkpoints):
    directory = checkpoints[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        whole = model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    arguments = ("--model", directory, "--prompt", prompt, "--max-tokens", 40)
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [*found["prompt_tokens"], *found["tokens"]] == whole.tolist()
    assert found["text"] == tokenizer.decode(whole, skip_special_tokens=True)
    assert not found["ended"]
    shown = invoke(*arguments).stdout
    assert shown.startswith(prompt)
    assert "\x1b" not in shown


def test_a_text_ends_where_the_checkpoint_says(checkpoints, tmp_path):
    directory = tmp_path / "ends"
    transformers.AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).save_pretrained(
        directory
    )
    add_tokenizer(directory)
    arguments = ("--model", directory, "--prompt", PROMPT, "--json")
    free = json.loads(invoke(*arguments).stdout)["tokens"]
    first = next(i for i in range(1, 64) if free[i] not in free[:i])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[first]]}))
    found = json.loads(invoke(*arguments).stdout)
    assert found["tokens"] == free[: first + 1]
    assert found["ended"]


def test_tokens_are_drawn_as_the_model_says(checkpoints):
    directory = checkpoints["llama"]
    prompt = np.array([70, 71, 72], np.int32)
    model = huggingface.load(directory)
    logits = np.asarray(model(prompt[None]))[0, -1].astype(np.float64) / 4.0
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    draws = [sample(model, prompt, max_tokens=1, temperature=4.0, seed=s)[0] for s in range(400)]
    top = int(expected.argmax())
    error = np.sqrt(expected[top] * (1 - expected[top]) / len(draws))
    assert abs(draws.count(top) / len(draws) - expected[top]) < 4 * error
    assert len(set(draws)) > 1
    assert draws[7] == sample(model, prompt, max_tokens=1, temperature=4.0, seed=7)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 1], "give either --run and --count, or --model and --prompt"),
        (["--run", "run", "--model", "model", "--count", 1], "give either"),
        (["--run", "run"], "--run needs --count"),
        (["--model", "model"], "--model needs --prompt"),
        (["--model", "model", "--prompt", "a", "--count", 1], "--count belongs to --run"),
        (["--run", "run", "--count", 1, "--max-tokens", 9], "--max-tokens belongs to --model"),
        (["--run", "model", "--count", 1], "is no run but a checkpoint of llama; give it as"),
        (["--model", "run", "--prompt", "a"], "run is a run; give it as --run, with --count"),
        (["--model", "model", "--prompt", ""], "the prompt has no token"),
        (["--model", "nowhere", "--prompt", "a"], "neither a directory nor a hub id"),
    ],
)
def test_a_run_and_a_language_model_are_told_apart(
    arguments, message, run, checkpoints, monkeypatch
):
    monkeypatch.chdir(run.parent)
    paths = {"run": run, "model": checkpoints["llama"]}
    result = invoke(*(paths.get(each, each) for each in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
