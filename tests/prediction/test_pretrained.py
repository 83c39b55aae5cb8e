"""The model in the box, on a network that it has never seen."""

import dataclasses

import numpy as np
import pytest

from ping_llm.estimators.pairs import Nodes, Training, pair_keys
from ping_llm.hashing import scramble
from ping_llm.ingest.sources import read_table
from ping_llm.prediction import baselines
from ping_llm.prediction.predictor import Predictor
from ping_llm.prediction.protocols import without_times
from ping_llm.simulation.simulate import simulate


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Returns (known measurements, measurements of other pairs) of a simulated network."""
    path = tmp_path_factory.mktemp("pretrained") / "pings.parquet"
    simulate(path, probes=60, days=2.0, measurements=40_000, seed=5)
    table = read_table([str(path)])
    left_out = scramble(pair_keys(table)) % np.uint64(8) == 0
    asked = table.take(left_out & (table.rtt >= 0))
    asked = asked.take(np.arange(0, len(asked), len(asked) // 400))
    return table.take(~left_out), without_times(asked)  # at any time: all that is known counts


@pytest.fixture(scope="module")
def predictor():
    return Predictor.pretrained()


@pytest.fixture(scope="module")
def answers(network, predictor):
    known, asked = network
    return predictor.predict(asked, history=known)


def test_it_is_ahead_of_all_but_the_best_classical_methods_without_training(network, answers):
    known, asked = network
    errors = {"model": np.abs(answers["rtt_mode"].to_numpy() / asked.rtt - 1)}
    train = Training.of(known)
    for name in ("src_median", "additive", "vivaldi", "coordinates", "wmedian"):
        errors[name] = np.abs(baselines.predict(name, asked, train) / asked.rtt - 1)
    median = {name: np.median(each) for name, each in errors.items()}
    assert median["model"] < min(median[name] for name in ("src_median", "additive", "vivaldi"))
    assert median["model"] < 1.15 * min(median["wmedian"], median["coordinates"])


def test_its_intervals_hold_on_a_network_that_it_calibrates_itself_on(network, answers):
    _, asked = network
    inside = (asked.rtt > answers["rtt_p5"].to_numpy()) & (
        asked.rtt < answers["rtt_p95"].to_numpy()
    )
    assert 0.8 < inside.mean() < 0.98


def test_ten_times_all_rtts_are_ten_times_the_answers(network, predictor, answers):
    known, asked = network
    scaled = dataclasses.replace(known, rtt=np.where(known.rtt < 0, -1, known.rtt * 10))
    again = predictor.predict(asked, history=scaled)
    ratio = again["rtt_p50"].to_numpy() / answers["rtt_p50"].to_numpy()
    assert np.quantile(np.abs(ratio / 10 - 1), 0.95) < 0.005


def test_rtts_of_what_is_asked_change_nothing(network, predictor, answers):
    known, asked = network
    blind = dataclasses.replace(asked, rtt=np.full(len(asked), 1.0, np.float32))
    assert predictor.predict(blind, history=known)["rtt_mode"].equals(answers["rtt_mode"])


def test_a_network_by_other_addresses_has_the_same_answers_but_for_prefixes(
    network, predictor, answers
):
    known, asked = network
    nodes = Nodes(known.src, known.dst, asked.src, asked.dst)
    turned = np.arange(len(nodes))
    for family in (4, 6):
        of_family = np.isin(
            nodes.addresses,
            np.r_[known.src[known.family == family], known.dst[known.family == family]],
        )
        turned[of_family] = np.random.default_rng(0).permutation(turned[of_family])
    renamed, questions = (
        dataclasses.replace(
            table,
            src=nodes.addresses[turned[nodes.lookup(table.src)]],
            dst=nodes.addresses[turned[nodes.lookup(table.dst)]],
        )
        for table in (known, asked)
    )
    again = predictor.predict(questions, history=renamed)
    apart = np.abs(again["rtt_p50"].to_numpy() / answers["rtt_p50"].to_numpy() - 1)
    assert np.median(apart) < 0.02


def test_a_run_can_start_from_it_and_another_shape_cannot(tmp_path):
    from ping_llm import train
    from ping_llm.errors import ConfigError
    from ping_llm.ingest.prepare import prepare_data

    simulate(tmp_path / "pings.parquet", probes=10, days=1.0, measurements=2000, seed=0)
    prepare_data([str(tmp_path / "pings.parquet")], output=tmp_path / "rows", workers=1)
    settings = {"steps": 1, "batch_size": 4, "overrides": ["learning_rate=1e-9", "eval_batches=1"]}
    from_box = train(tmp_path / "rows", tmp_path / "run", **settings)
    random = train(tmp_path / "rows", tmp_path / "random", init="random", **settings)
    assert from_box.loss < random.loss - 0.5
    assert Predictor.load(tmp_path / "run").known is not None
    again = train(tmp_path / "rows", tmp_path / "again", init=str(tmp_path / "run"), **settings)
    assert again.loss == pytest.approx(from_box.loss, abs=1e-3)
    small = [*settings["overrides"], "model.n_layers=2"]
    with pytest.raises(ConfigError, match=r"init=pretrained has model\.n_layers=4, this run 2"):
        train(
            tmp_path / "rows",
            tmp_path / "small",
            init="pretrained",
            **{**settings, "overrides": small},
        )
