import json

import numpy as np
import pytest
from tiny_runs import write_run

from ping_llm.data.rows import ProbeRows
from ping_llm.estimators.pairs import pair_keys
from ping_llm.ingest.prepare import prepare_data
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import baselines, predictor, protocols
from ping_llm.prediction.evaluate import evaluate
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "pings.parquet"
    simulate(path, probes=30, days=2.0, measurements=4000, seed=0)
    return path


@pytest.fixture(scope="module")
def prepared(raw):
    """Returns data sets by split."""
    found = {}
    for split in ("pair", "probe", "time"):
        found[split] = raw.parent / split
        fraction = 0.3 if split == "probe" else 0.1
        prepare_data(
            [str(raw)], output=found[split], split=split, test_fraction=fraction, workers=1
        )
    return found


@pytest.fixture(scope="module")
def run(raw, prepared):
    return write_run(raw.parent / "run", prepared["pair"])


def task_of(data):
    location = Location.of(data)
    return protocols.load_task(location, known=MeasurementTable.empty(), max_rows=None)


def test_questions_of_a_pair_split_are_of_pairs_that_training_has_not_seen(prepared):
    task = task_of(prepared["pair"])
    asked, known = pair_keys(task.rows), pair_keys(task.conditions[None]().train)
    assert len(asked)
    assert not set(asked.tolist()) & set(known.tolist())


def test_sources_of_a_probe_split_are_new_and_what_is_known_of_them_is_not_scored(prepared):
    task = task_of(prepared["probe"])
    train = ProbeRows(prepared["probe"], "train").to_table()
    seen = {row.tobytes() for row in np.r_[train.src, train.dst]}
    assert not any(row.tobytes() in seen for row in task.rows.src)
    scored = set(pair_keys(task.rows).tolist())
    before: set[int] = set()
    for history in protocols.HISTORIES:
        condition = task.conditions[history]()
        given = condition.train.slice(len(train), len(condition.train))
        keys = pair_keys(given).tolist()
        assert len(set(keys)) == len(keys)
        assert not set(keys) & scored
        assert np.unique(given.src, return_counts=True)[1].max(initial=0) <= history
        assert before <= set(keys)  # each condition is the one before, and more
        before = set(keys)
    assert before


def test_in_time_static_methods_know_the_train_rows_and_online_ones_all(prepared):
    task = task_of(prepared["time"])
    condition = task.conditions[None]()
    train = ProbeRows(prepared["time"], "train").to_table()
    assert len(condition.train) == len(train)
    assert condition.history is not None
    assert condition.history.time.max() > train.time.max()
    assert task.rows.time.min() >= train.time.max()


def test_the_result_has_every_method_on_the_same_rows(run, prepared, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    loads = []
    load_run = predictor.load_run
    monkeypatch.setattr(
        predictor, "load_run", lambda *given: loads.append(given) or load_run(*given)
    )
    result = evaluate(run, prepared["pair"], max_rows=60, report=page)
    assert len(loads) == 1  # the weights once
    assert list(result.methods) == ["model", *baselines.STATIC]
    assert result.protocol == "pair"
    assert result.n + result.n_failed == 60
    assert result.trained_on_this_data
    for scores in result.methods.values():
        for name in ("median_abs_ms", "mae_ms", "median_rel", "p90_rel"):
            low, high = scores["intervals"][name]
            assert low <= scores[name] <= high
    assert set(result.calibration["coverage"]) == {"50", "80", "95"}
    assert {"model", *baselines.FAILURES} <= set(result.failures)
    assert set(result.loss_per_field) == {
        "all",
        "structure",
        "source",
        "destination",
        "time",
        "rtt",
    }
    by_band = result.by["rtt_band"].values()
    assert sum(group["n"] for group in by_band) == result.n
    json.dumps(result.to_json(), allow_nan=False)
    text = page.read_text()
    for word in ("biased_mf", "Calibration", "IPv4", "Brier"):
        assert word in text


def test_time_has_online_methods_and_raw_files_take_the_runs_own_training_rows(run, prepared, raw):
    in_time = evaluate(run, prepared["time"], max_rows=20, baselines="last_value,ema")
    kinds = {name: scores["kind"] for name, scores in in_time.methods.items()}
    assert kinds == {
        "model": "static",
        "model_online": "online",
        "last_value": "online",
        "ema": "online",
    }
    assert not in_time.trained_on_this_data
    result = evaluate(run, raw, max_rows=20, baselines="prefix")
    assert result.protocol == "raw"
    assert result.rows_available == 4000


def test_pairs_of_many_measurements_are_compared_with_what_is_predicted(run, tmp_path):
    simulate(tmp_path / "few.parquet", probes=4, days=1.0, measurements=400, seed=0)
    page = tmp_path / "report.html"
    result = evaluate(run, tmp_path / "few.parquet", max_rows=5, baselines="none", report=page)
    assert result.divergence["pairs"] >= 2
    for which in ("kl", "wasserstein"):
        assert set(result.divergence[which]) == {"half", "with_time", "without_time"}
        assert min(result.divergence[which].values()) >= 0
    # An untrained decoder does not know the RTTs of these pairs.
    assert result.divergence["wasserstein"]["half"] < result.divergence["wasserstein"]["with_time"]
    assert "the other half of the measurements" in page.read_text()


def test_fields_tokens_and_places_are_told_where_asked(run, raw, tmp_path):
    """Data prepared by AS: new sources, all systems in two countries; IPv6 is not known."""
    (tmp_path / "prefixes.csv").write_text(
        "prefix,asn,country,latitude,longitude\n"
        + "".join(
            f"10.{block}.{i}.0/22,{block + i},{'NL' if block else 'US'},{i / 3},{block}\n"
            for block in (0, 85, 170)
            for i in range(0, 256, 4)
        )
    )
    given = {"prefixes": tmp_path / "prefixes.csv"}
    prepare_data(
        [raw], output=tmp_path / "rows", split="asn", test_fraction=0.3, workers=1, **given
    )
    result = evaluate(
        run,
        tmp_path / "rows",
        max_rows=40,
        baselines="prefix",
        report=tmp_path / "report.html",
        field_orders=True,
        tokens=25,
        **given,
    )
    assert result.protocol == "asn"
    assert list(result.history) == [str(history) for history in protocols.HISTORIES]
    for name in ("asn", "country", "distance"):
        groups = result.by[name]
        assert sum(group["n"] for group in groups.values()) == result.n
        assert "not known" in groups
    assert set(result.by["country"]) - {"NL", "US"} == {"not known"}
    assert len(result.tokens) == 25
    assert set(result.field_orders) == {"source", "destination", "time", "rtt"}
    json.dumps(result.to_json(), allow_nan=False)
    text = (tmp_path / "report.html").read_text()
    for word in ("By autonomous system", "best constant", "Tokens, actual and expected"):
        assert word in text


@pytest.mark.slow
def test_new_sources_are_scored_with_ever_more_known_of_them(run, prepared):
    result = evaluate(run, prepared["probe"], max_rows=20, baselines="vivaldi")
    assert list(result.history) == [str(history) for history in protocols.HISTORIES]
    assert result.methods == result.history["16"]
