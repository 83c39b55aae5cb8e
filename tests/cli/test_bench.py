import json
import tempfile

import pytest
from click.testing import CliRunner
from hf_checkpoints import make_checkpoint
from tiny_runs import write_run

from ping_llm.bench import extraction
from ping_llm.cli import cli
from ping_llm.ingest.prepare import prepare_data
from ping_llm.simulation.simulate import simulate

KEYS = {
    "tokens_per_second",
    "real_tokens_per_second",
    "padding_fraction",
    "tokens_per_cpu_second",
    "first_batch_seconds",
    "batches",
    "seconds",
    "cpu_seconds",
    "peak_rss_bytes",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    source = directory / "s.parquet"
    simulate(source, probes=20, days=2.0, measurements=3000, seed=0)
    prepare_data([str(source)], output=str(directory / "rows"))
    return directory / "rows"


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", "loader", *map(str, arguments)])


def test_json_holds_every_figure_and_they_agree(rows):
    result = run("--data", rows, "--seconds", 0.3, "--seq-len", 256, "--batch-size", 4, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert set(figures) == KEYS | {"environment"}
    assert set(figures["environment"]) == {"memory_kept", "compilation_cache", "variables"}
    tokens = figures["batches"] * 4 * 256
    assert figures["tokens_per_second"] == pytest.approx(tokens / figures["seconds"])
    assert figures["real_tokens_per_second"] == pytest.approx(
        figures["tokens_per_second"] * (1 - figures["padding_fraction"])
    )
    assert 0 <= figures["padding_fraction"] < 1
    assert 0 < figures["first_batch_seconds"] <= figures["seconds"]
    assert figures["peak_rss_bytes"] > 10_000_000


def test_the_text_says_real_tokens_and_padding(rows):
    result = run("--data", rows, "--seconds", 0.1, "--seq-len", 256)
    assert "M real tokens/s" in result.stdout
    assert "padding" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "{tmp}"], 1, "has no dataset.json"),
        (["--data", "{rows}", "--seconds", "0"], 2, "seconds=0.0 must be above 0"),
        (["--data", "{rows}", "--seconds", "nan"], 2, "seconds='nan' is not a finite number"),
        (["--data", "{rows}", "--batch-size", "0"], 2, "batch_size=0 must be above 0"),
        (["--data", "{rows}", "--seq-len", "45"], 1, "seq_len=45 is too short"),
        (["--data", "{rows}", "--batch-size", "x"], 2, "batch_size='x' is not a whole number"),
        ([], 2, "--data"),
    ],
)
def test_bad_arguments_have_a_clear_message_and_exit_code(rows, tmp_path, arguments, code, message):
    result = run(*(a.format(tmp=tmp_path, rows=rows) for a in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_bench_prepare_counts_what_was_made_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = tmp_path / "m.parquet"
    simulate(source, probes=10, days=1.0, measurements=2000, seed=0)
    result = CliRunner().invoke(cli, ["bench", "prepare", str(source), "--json"])
    figures = json.loads(result.stdout)
    assert (figures["measurements"], figures["rejected"]) == (2000, 0)
    assert figures["input_bytes"] == source.stat().st_size
    assert figures["measurements_per_cpu_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_bench_prepare_of_nothing_is_a_clear_error(tmp_path):
    result = CliRunner().invoke(cli, ["bench", "prepare", str(tmp_path / "none.parquet")])
    assert result.exit_code == 1
    assert "none.parquet" in result.stderr


# --- train --------------------------------------------------------------------------------------

SHAPE = ["--n-layers", 1, "--d-model", 16, "--n-heads", 2, "--d-ff", 24, "--seq-len", 32]
SHAPE += ["--batch-size", 4, "--steps", 2]


def bench_train(*arguments):
    return CliRunner().invoke(cli, ["bench", "train", *map(str, [*SHAPE, *arguments])])


def test_a_step_is_timed_and_its_figures_agree():
    result = bench_train("--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["tokens_per_second"] == pytest.approx(4 * 32 / figures["step_seconds"])
    assert figures["fastest_step_seconds"] <= figures["step_seconds"]
    assert figures["parameters"] == 267 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    # 6 FLOPs a weight and token, 12 a pair of tokens and unit of width.
    weights, pairs = figures["parameters"] - 3 * 16, 4 * 32 * 33 / 2
    flops = 6 * weights * 4 * 32 + 12 * 16 * pairs
    assert figures["flops_per_second"] == pytest.approx(flops / figures["step_seconds"])
    assert figures["bare_jax"] is figures["pytorch"] is figures["pytorch_compiled"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--dtype", "float64"], 2, "'float64' is not one of 'float32', 'bfloat16'"),
        (["predict", "--run", "run", "--pairs", "0"], 2, "pairs=0 must be above 0"),
        (["extract", "--model", "m", "--sites", "attn,mlb"], 2, "did you mean mlp?"),
        (["extract", "--model", "m", "--min-length", "9", "--max-length", "8"], 1, "min_length=9"),
        (["extract", "--model", "m", "--output", "{tmp}/missing"], 1, "missing"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path, arguments, code, message
):
    words = [word.format(tmp=tmp_path) for word in arguments]
    result = CliRunner().invoke(cli, ["bench", *words])
    assert result.exit_code == code, result.output
    assert message in result.stderr


def test_a_shape_that_cannot_be_is_refused():
    result = bench_train("--n-heads", 3)
    assert result.exit_code == 1
    assert "n_heads=3 must divide d_model=16" in result.stderr


# --- predict and extract ------------------------------------------------------------------------


def test_predictions_are_timed(tmp_path):
    arguments = ["--run", str(write_run(tmp_path / "run")), "--pairs", "3", "--json"]
    result = CliRunner().invoke(cli, ["bench", "predict", *arguments])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["pairs_per_second"] > 0
    assert figures["pairs"] == 3


def test_an_extraction_is_timed_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "WRITTEN_BYTES", 1 << 20)
    (tmp_path / "out").mkdir()
    model = make_checkpoint(tmp_path / "model")
    words = ["--model", model, "--tokens", 60, "--min-length", 4, "--max-length", 8, "--compare"]
    words += ["--batch-tokens", 64, "--output", tmp_path / "out", "--json"]
    result = CliRunner().invoke(cli, ["bench", "extract", *map(str, words)])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert 10 * 4 <= figures["tokens"] <= 10 * 8
    assert figures["bytes"] >= figures["tokens"] * 3 * 32 * 4  # 3 layers of 32 float32 values
    rates = ("real_tokens_per_second", "write_bytes_per_second", "transformers_tokens_per_second")
    assert all(figures[name] > 0 for name in rates)
    assert list((tmp_path / "out").iterdir()) == []
