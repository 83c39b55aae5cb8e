import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import SEQ_LEN, questions, write_run

from ping_llm import addresses
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import ConfigError
from ping_llm.estimators.pairs import pair_keys
from ping_llm.ingest.prepare import prepare_data
from ping_llm.prediction import baselines, predictor, protocols
from ping_llm.prediction.contexts import newest_before, random_of_source
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


def task_of(data, **given):
    location = Location.of(data)
    return protocols.load_task(
        location, trained_on=location, max_rows=None, max_tokens=200, **given
    )


def test_contexts_of_a_pair_split_are_training_rows_of_the_source_without_the_pair(prepared):
    task = task_of(prepared["pair"])
    ((questions, contexts),) = task.conditions[None]().prompts
    asked, given = pair_keys(task.rows), pair_keys(contexts.measurements)
    assert (contexts.of_query >= 0).any()
    for i in np.flatnonzero(contexts.of_query >= 0)[::20]:
        c = contexts.of_query[i]
        part = slice(contexts.offsets[c], contexts.offsets[c + 1])
        assert (contexts.measurements.src[part] == task.rows.src[i]).all()
        assert asked[i] not in given[part]
    assert not contexts.measurements.has_time.any()
    assert not questions.has_time.any()


def test_of_several_contexts_every_second_is_of_the_destination_where_both_ends_are_known(
    raw, prepared, tmp_path
):
    prepare_data([str(raw)], output=tmp_path / "both", both_ends=True, workers=1)
    for data, both_ends in ((prepared["pair"], False), (tmp_path / "both", True)):
        task = task_of(data, n_contexts=3)
        prompts = task.conditions[None]().prompts
        ((_, first),) = task_of(data).conditions[None]().prompts
        np.testing.assert_array_equal(prompts[0][1].measurements.dst, first.measurements.dst)
        assert len(prompts) == 3
        for i, (queries, contexts) in enumerate(prompts[1:]):
            turned = both_ends and i == 0
            source = task.rows.dst if turned else task.rows.src
            np.testing.assert_array_equal(queries.src, source)
            asked, given = pair_keys(queries), pair_keys(contexts.measurements)
            np.testing.assert_array_equal(asked, pair_keys(task.rows))
            assert (contexts.of_query >= 0).any()
            for q in np.flatnonzero(contexts.of_query >= 0)[::20]:
                c = contexts.of_query[q]
                part = slice(contexts.offsets[c], contexts.offsets[c + 1])
                assert (contexts.measurements.src[part] == queries.src[q]).all()
                assert asked[q] not in given[part]
        drawn = prompts[2][1].measurements.dst
        assert drawn.shape != first.measurements.dst.shape or np.any(
            drawn != first.measurements.dst
        )


def test_several_contexts_are_for_pairs_only(run, prepared):
    with pytest.raises(ConfigError, match=r"contexts=2: .*probe was prepared with --split probe"):
        evaluate(run, prepared["probe"], contexts=2)


def test_sources_of_a_probe_split_are_new_and_their_context_pairs_are_not_scored(prepared):
    task = task_of(prepared["probe"])
    train = ProbeRows(prepared["probe"], "train").to_table()
    seen = {row.tobytes() for row in np.r_[train.src, train.dst]}
    assert not any(row.tobytes() in seen for row in task.rows.src)
    scored = pair_keys(task.rows)
    before = None
    for history in protocols.HISTORIES:
        condition = task.conditions[history]()
        contexts = condition.prompts[0][1]
        given = pair_keys(contexts.measurements)
        assert len(set(given.tolist())) == len(given)
        assert not set(given.tolist()) & set(scored.tolist())
        assert contexts.lengths().max(initial=0) <= history
        # Each context is that of the condition before, and more; all methods are given the same.
        assert before is None or before <= set(given.tolist())
        assert len(condition.train) == len(train) + len(given)
        before = set(given.tolist())
    assert before


def test_contexts_in_time_are_the_newest_of_the_source_before_the_question(prepared):
    task = task_of(prepared["time"])
    condition = task.conditions[None]()
    online, everything = condition.online, condition.history
    assert online is not None
    for i in range(0, len(task.rows), 25):
        c = online.of_query[i]
        part = slice(online.offsets[c], online.offsets[c + 1])
        times = online.measurements.time[part]
        same = everything.src == task.rows.src[i]
        earlier = same & (everything.time < task.rows.time[i])
        expected = np.sort(everything.time[earlier])[-len(times) :]
        np.testing.assert_array_equal(times, expected)
        assert (online.measurements.src[part] == task.rows.src[i]).all()
    train_end = ProbeRows(prepared["time"], "train").to_table().time.max()
    assert condition.prompts[0][1].measurements.time.max() <= train_end
    # Questions with the same past share a context, which a model reads once.
    assert len(condition.prompts[0][1].offsets) < len(online.offsets)


def test_measurements_without_a_time_count_as_the_oldest_and_questions_without_one_have_no_past():
    history = questions(["10.0.0.1"] * 4, ["10.0.9.9"] * 4, [200, None, 100, None])
    history = dataclasses.replace(history, rtt=np.arange(4, dtype=np.float32))
    asked = questions(["10.0.0.1"] * 3, ["10.0.9.9"] * 3, [150, 300, None])
    contexts = newest_before(history, asked, max_tokens=200)
    assert contexts.lengths().tolist() == [3, 4, 0]
    assert contexts.measurements.rtt.tolist() == [1, 3, 2, 1, 3, 2, 0]


def test_a_context_before_the_first_measurement_is_none(prepared):
    train = ProbeRows(prepared["pair"], "train").to_table()
    query = train.take(np.array([int(np.argmin(train.time))]))
    assert newest_before(train, query, max_tokens=100).of_query.tolist() == [-1]
    stranger = dataclasses.replace(query, src=addresses.from_packed([b"\a" * 16]))
    assert random_of_source(train, stranger, max_tokens=100, seed=0).of_query.tolist() == [-1]


def test_the_result_has_every_method_on_the_same_rows(run, prepared, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    loads = []
    load_run = predictor.load_run
    monkeypatch.setattr(predictor, "load_run", lambda run: loads.append(run) or load_run(run))
    result = evaluate(run, prepared["pair"], max_rows=60, contexts=2, report=page)
    assert loads == [str(run)]  # the weights once
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


@pytest.mark.slow
def test_new_sources_are_scored_with_growing_contexts(run, prepared):
    result = evaluate(run, prepared["probe"], max_rows=20, baselines="vivaldi")
    assert list(result.history) == [str(history) for history in protocols.HISTORIES]
    assert result.methods == result.history["16"]
    assert SEQ_LEN >= 16 * 14
