import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ping_llm.cli import cli
from ping_llm.prediction.calibration import Calibration, _weights
from ping_llm.prediction.distribution import Distribution
from ping_llm.prediction.predictor import Predictor
from ping_llm.prediction.reading import _codes

SMALL = ["--set", "model.d_model=32", "--set", "model.n_layers=2", "--set", "model.d_ff=64"]


def run(*words: object):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (rows, run, answers to eight pairs by the CLI) of a small run that learnt grids."""
    directory = tmp_path_factory.mktemp("grids")
    pings, rows, output = (directory / name for name in ("pings.parquet", "rows", "run"))
    run("simulate", "--output", pings, "--probes", 12, "--days", 2, "--measurements", 3000)
    run("prepare-data", pings, "--output", rows)
    small = ["--steps", 4, "--batch-size", 4, "--seq-len", 208, "--set", "eval_batches=1", *SMALL]
    run("train", "--data", rows, "--output", output, *small, "--set", "grid_fraction=0.5")
    return directory, rows, output


def test_a_run_that_learnt_grids_answers_from_any_directory_without_its_rows(trained, tmp_path):
    directory, rows, output = trained
    asked = pq.read_table(directory / "pings.parquet", columns=["src_addr", "dst_addr"]).slice(0, 6)
    before = Predictor.load(str(output)).predict(asked)
    moved = tmp_path / "elsewhere"
    run("export", "--run", output, "--output", moved)
    rows.rename(directory / "hidden")
    try:
        after = Predictor.load(str(moved)).predict(asked)
    finally:
        (directory / "hidden").rename(rows)
    assert before.equals(after)
    assert (np.array(before["rtt_p5"]) <= np.array(before["rtt_p95"])).all()
    assert min(before["history"].to_pylist()) > 0


def test_evaluate_scores_the_grids_beside_the_baselines(trained):
    _, rows, output = trained
    words = ("evaluate", "--run", output, "--data", rows, "--max-rows", 60)
    result = json.loads(run(*words, "--baselines", "wmedian", "--json").stdout)
    assert set(result["methods"]) == {"model", "wmedian"}
    # Hardly trained, its answers are near the weighted median that they are told against.
    assert result["methods"]["model"]["median_rel"] < 1


def test_an_answer_does_not_depend_on_what_else_is_asked(trained):
    directory, _, output = trained
    asked = pq.read_table(directory / "pings.parquet", columns=["src_addr", "dst_addr"]).slice(0, 5)
    predictor = Predictor.load(str(output))
    together, alone = predictor.predict(asked), predictor.predict(asked.slice(3, 1))
    for name in ("rtt_p50", "p_failed"):
        assert together[name][3].as_py() == pytest.approx(alone[name][0].as_py(), rel=1e-4)


def test_codes_are_ascending_and_keep_the_mass_of_each_first_byte():
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(256), 3), rng.dirichlet(np.ones(256), (3, 2))
    chosen = np.argsort(-first, axis=1)[:, :2]
    codes, probabilities = _codes(first, chosen, second)
    assert (np.diff(codes, axis=1) > 0).all()
    for row in range(3):
        mass = np.bincount(codes[row] >> 8, probabilities[row], 256)
        np.testing.assert_allclose(mass, first[row], atol=1e-12)


def test_a_calibrated_answer_has_the_levels_that_proved_right():
    values = np.linspace(1, 2, 1001)[None]
    plain = Distribution(values, np.full((1, 1001), 1 / 1001), np.zeros(1))
    # Half of the actual RTTs fell below the 20 % quantiles.
    levels = np.concatenate([np.linspace(0, 0.2, 500), np.linspace(0.2, 1, 500)])
    calibration = Calibration({"network": levels})
    bent = calibration.apply(plain, "network").quantiles(np.array([0.5]))[0, 0]
    assert bent == pytest.approx(1.2, abs=0.01)
    assert calibration.apply(plain, "history") is plain


def test_a_damaged_or_uncached_calibration_is_made_again(trained, monkeypatch, tmp_path):
    directory, _, output = trained
    asked = pq.read_table(directory / "pings.parquet", columns=["src_addr", "dst_addr"]).slice(0, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = Predictor.load(str(output)).predict(asked)
    (cached,) = (tmp_path / "ping-llm" / "calibrations").iterdir()
    assert Predictor.load(str(output)).predict(asked).equals(before)  # from the cache
    cached.write_text("{")
    assert Predictor.load(str(output)).predict(asked).equals(before)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert Predictor.load(str(output)).predict(asked).equals(before)


def test_known_failures_tell_how_far_the_log_odds_of_model_and_logistic_count():
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 400)
    failed = rng.random(400) < 1 / (1 + np.exp(-odds))
    noise = rng.normal(0, 2, 400)
    model, classical, constant = _weights(noise, odds, failed)  # the model knows nothing
    assert model < 0.2 < 0.7 < classical
    assert abs(constant) < 0.5
    assert _weights(noise[:1], odds[:1], failed[:1]) == pytest.approx((0.5, 0.5, 0), abs=0.1)
    plain = Distribution(np.ones((1, 1)), np.ones((1, 1)), np.array([0.5]))
    calibration = Calibration({}, (0.0, 1.0, 0.0), 400)
    assert calibration.apply(plain, "network", np.array([0.9])).p_failed == pytest.approx(0.9)
    assert calibration.apply(plain, "history", np.array([0.9])).p_failed == 0.5
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
