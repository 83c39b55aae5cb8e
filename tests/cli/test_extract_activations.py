import json

import pytest
from click.testing import CliRunner
from hf_checkpoints import add_tokenizer, make_checkpoint

from ping_llm.cli import cli
from ping_llm.models.config import END_SITES, SITES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("extract")
    (place / "model").mkdir()
    add_tokenizer(make_checkpoint(place / "model"))
    lines = [json.dumps({"text": f"the cat {i}"}) for i in range(20)]
    (place / "in.jsonl").write_text("\n".join(lines) + "\n")
    return place


def run(command, *arguments):
    result = CliRunner().invoke(cli, [command, *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def extract(place, *more, output="store"):
    arguments = ["--model", place / "model", "--input", place / "in.jsonl"]
    arguments += ["--output", place / output, "--batch-tokens", 256, "--max-length", 64]
    return run("extract-activations", *arguments, *more)


def test_json_has_what_was_promised_and_running_again_gives_the_same(place):
    first = extract(place, "--layers", "0,-1", "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    keys = "samples tokens seconds tokens_per_second bytes_written units_done peak_device_bytes"
    assert set(keys.split()) <= found.keys()
    assert found["samples"] == 20
    assert extract(place, "--layers", "0,-1", "--json").stdout == first.stdout


def test_the_store_is_inspected_and_damage_is_exit_code_1(place):
    assert extract(place, output="other").exit_code == 0
    shown = run("inspect-activations", place / "other", "--verify", "--json")
    found = json.loads(shown.stdout)
    keys = "samples tokens layers sites dtype complete errors"
    assert set(keys.split()) <= found.keys()
    assert (shown.exit_code, found["complete"], found["errors"]) == (0, True, [])
    assert "every checksum fits" in run("inspect-activations", place / "other", "--verify").stdout
    (chunk,) = (place / "other").glob("units/00000/*/residual.00001/c/0/0")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    shown = run("inspect-activations", place / "other", "--verify")
    assert shown.exit_code == 1
    assert "residual.00001/c/0/0 is damaged" in shown.stdout


def test_a_dry_run_writes_nothing_and_says_how_much_it_would_be(place):
    shown = extract(place, "--dry-run", "--json", output="dry")
    found = json.loads(shown.stdout)
    assert found["bytes"] == found["tokens"] * 3 * 32 * 4
    assert not (place / "dry").exists()
    assert "tokens in 1 units" in extract(place, "--dry-run", output="dry").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "7"], "layers: the model has 3, 0..2; 7 is none"),
        (["--layers", "x"], "layers='x'"),
        (["--sites", ""], "sites is empty; choose some of embed, q, k"),
        (["--batch-tokens", "10"], "batch_tokens=10 is less than max_length=64"),
        (["--arc-seed", "1"], "arc_seed=1 does not go with format='text'"),
        (["--mesh", "data=3"], "mesh"),
    ],
)
def test_a_setting_that_can_not_be_is_one_line_and_exit_code_1(place, arguments, message):
    result = extract(place, *arguments, output="never")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sites", "head"], "sites='head' is not one of embed, q, k, v, heads, attn"),
        (["--format", "poem"], "'poem' is not one of 'text', 'chat', 'tokens'"),
        (["--overlong", "drop"], "'drop' is not one of 'error', 'truncate-left'"),
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--limit", "0"], "limit=0 must be above 0"),
        (["--lease-seconds", "0"], "lease_seconds=0.0 must be above 0"),
    ],
)
def test_a_value_that_no_extraction_may_have_is_wrong_usage(place, arguments, message):
    result = extract(place, *arguments, output="never")
    assert result.exit_code == 2
    assert message in result.stderr


def test_parity_is_shown_by_site(place):
    result = run("verify-parity", "--model", place / "model", "--layers", "1", "--json")
    found = json.loads(result.stdout)
    assert set(found["by_site"]) == {f"{site}.1" for site in SITES} | {*END_SITES}
    assert found["max_relative_l2"] < 1e-5


def test_bench_extract_gives_its_figures(place):
    arguments = ["--model", place / "model", "--tokens", 600, "--min-length", 5]
    arguments += ["--max-length", 60, "--batch-tokens", 256, "--compare", "--json"]
    result = run("bench", "extract", *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["real_tokens_per_second"] <= found["tokens_per_second"]
    assert found["transformers_tokens_per_second"] > 0
    assert 0 <= found["padding_fraction"] < 1
