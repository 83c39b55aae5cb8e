import json
import subprocess
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tiny_runs
from tiny_runs import SEQ_LEN, questions, write_run

import ping_llm
from ping_llm import MeasurementTable, Predictor
from ping_llm.errors import CheckpointError, DataError
from ping_llm.prediction import predictor as predictor_module
from ping_llm.prediction import reading
from ping_llm.prediction.predictor import _as_of

PAIRS = {"src_addr": ["10.0.0.1", "10.0.0.2"], "dst_addr": ["10.0.9.9"] * 2, "note": ["a", "b"]}
HISTORY = {
    "src_addr": ["10.0.0.1"] * 3,
    "dst_addr": ["10.0.1.1", "10.0.1.2", "10.0.1.3"],
    "event_time": [100, 200, None],
    "rtt": [7.0, 9.0, -1.0],
}
ANSWERS = ["rtt_p5", "rtt_p25", "rtt_p50", "rtt_p75", "rtt_p95", "rtt_mode", "rtt_mean", "p_failed"]
ANSWERS += ["unseen_src", "unseen_dst", "history", "later"]


@pytest.fixture(scope="module")
def predictor():
    return tiny_runs.predictor()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pd.DataFrame, pd.DataFrame),
        (pl.DataFrame, pl.DataFrame),
        (pa.table, pa.Table),
        (dict, pa.Table),
        (lambda table: MeasurementTable.from_arrow(table, questions="rtt" not in table), pa.Table),
    ],
    ids=["pandas", "polars", "Arrow", "lists", "MeasurementTable"],
)
def test_a_table_of_any_library_comes_back_as_one_with_the_same_answers(predictor, make, kind):
    answers = predictor.predict(make(PAIRS), history=make(HISTORY))
    assert type(answers) is kind
    table = pa.table(answers)
    assert table.schema.names[-len(ANSWERS) :] == ANSWERS
    expected = predictor.predict(PAIRS, history=HISTORY)
    assert table.select(ANSWERS).to_pylist() == expected.select(ANSWERS).to_pylist()
    assert table["src_addr"].to_pylist() == PAIRS["src_addr"]
    assert "note" not in table.schema.names or table["note"].to_pylist() == PAIRS["note"]
    assert min(table["history"].to_pylist()) > 0
    quantiles = np.stack([table[name].to_numpy() for name in ANSWERS[:5]], 1)
    assert np.all(np.diff(quantiles, axis=1) >= 0)


def test_an_index_that_repeats_stays_and_old_answers_are_replaced(predictor):
    frame = pd.DataFrame(PAIRS, index=["x", "x"])
    once = predictor.predict(frame)
    assert once.index.tolist() == ["x", "x"]
    assert list(frame) == list(PAIRS)
    told = predictor.predict(pa.table(PAIRS), history=HISTORY)
    for again in (once, pl.DataFrame(once), pa.table(once)):
        answers = pa.table(predictor.predict(again, history=HISTORY))
        assert answers.schema.names.count("history") == 1
        answers = answers.select([*ANSWERS])
        assert answers.equals(told.select([*ANSWERS]))
        assert not answers.equals(pa.table(again).select([*ANSWERS]))


def test_rtts_of_questions_are_not_looked_at(predictor):
    unknown = predictor.predict({**PAIRS, "rtt": [float("nan"), None]})
    assert unknown["rtt_p50"].equals(predictor.predict(PAIRS)["rtt_p50"])


def test_no_questions_have_no_answers(predictor):
    answers = predictor.predict(pd.DataFrame(PAIRS)[:0])
    assert len(answers) == 0
    assert list(answers)[-len(ANSWERS) :] == ANSWERS


def test_columns_that_nobody_asks_for_may_be_of_any_type(predictor):
    frame = pd.DataFrame(PAIRS).assign(tags=[{"a": 1}, object()])
    answered = predictor.predict(frame)
    assert answered["rtt_p50"].tolist() == predictor.predict(PAIRS)["rtt_p50"].to_pylist()
    assert answered["tags"].tolist() == frame["tags"].tolist()


def test_a_stream_of_batches_is_a_table(predictor):
    answered = predictor.predict(pa.table(PAIRS).to_reader())
    assert answered.equals(predictor.predict(pa.table(PAIRS)))


def test_numbers_that_no_column_holds_are_refused():
    with pytest.raises(DataError, match="this is no table"):
        MeasurementTable.from_arrow({**HISTORY, "rtt": [10**30] * 3})


def test_a_bad_value_is_named_with_its_row_and_table(predictor):
    with pytest.raises(DataError, match=r"^row 2: dst_addr is '10\.0\.0'; expected an address"):
        predictor.predict({**PAIRS, "dst_addr": ["10.0.0.1", "10.0.0"]})
    with pytest.raises(DataError, match=r"^history: the table has no column rtt"):
        predictor.predict(PAIRS, history=PAIRS)
    with pytest.raises(DataError, match="no column dst_addr; it has src_addr"):
        predictor.predict(pd.DataFrame({"src_addr": ["10.0.0.1"]}))


def test_a_measurement_scores_as_its_failure_or_rtt_surprises_after_the_past_of_its_pair(predictor):
    pair = {"src_addr": ["10.0.0.1"] * 4, "dst_addr": ["10.0.1.1"] * 4}
    measured = {**pair, "event_time": [20_000, 20_001, 20_002, 20_003]}
    scores = predictor.score({**measured, "rtt": [10.0, 10.0, 90.0, -1.0]})
    assert scores.shape == (4,)
    # The last one's is that of a failure after the three before it.
    past = {name: values[:3] for name, values in measured.items()}
    question = {name: values[3:] for name, values in measured.items()}
    answer = predictor.predict(question, history={**past, "rtt": [10.0, 10.0, 90.0]})
    np.testing.assert_allclose(scores[3], -np.log(answer["p_failed"][0].as_py()), rtol=1e-4)
    assert scores[2] > scores[1]


def test_predictors_of_one_structure_share_their_compiled_programs(predictor):
    predictor.predict(PAIRS)
    compiled = reading._ask._cache_size()
    tiny_runs.predictor().predict(PAIRS)
    assert reading._ask._cache_size() == compiled


def test_the_public_names_are_there_and_load_nothing_before_they_are_asked_for(tmp_path):
    assert {getattr(ping_llm, name).__name__ for name in ping_llm.__all__} == set(ping_llm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ping_llm.Nothing
    code = "import sys, ping_llm, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert not {"numpy", "jax", "pyarrow", "msgspec"} & set(json.loads(done.stdout))


def test_a_run_is_loaded_with_what_it_was_trained_on(tmp_path):
    loaded = Predictor.load(write_run(tmp_path / "run"))
    assert loaded.max_tokens == SEQ_LEN
    answers = loaded.predict(PAIRS)  # though its data set is gone
    assert answers["unseen_src"].to_pylist() == [False, False]
    assert answers["unseen_dst"].to_pylist() == [True, True]


def test_a_run_that_learnt_no_grids_refuses_to_answer(tmp_path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["train"]["grid_fraction"] = 0.05  # of a batch of 8: none
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has learnt no grids"):
        Predictor.load(run).predict(PAIRS)


def test_what_is_later_than_a_question_does_not_count_for_it():
    rng = np.random.default_rng(0)
    ends = np.sort(np.array([rng.choice(9, 2, replace=False) for _ in range(200)]), axis=1)
    history = pa.table(
        {
            "src_addr": [f"10.0.0.{i}" for i in ends[:, 0]],
            "dst_addr": [f"10.0.0.{i}" for i in ends[:, 1]],
            "event_time": rng.integers(1000, 2000, 200),
            "rtt": rng.uniform(5, 90, 200),
        }
    )
    predictor = Predictor.pretrained()
    times = [1200, 1500, 1500, None, 999_999, 1900]
    asked = {"src_addr": ["10.0.0.1"] * 6, "dst_addr": ["10.0.0.7"] * 6, "event_time": times}
    together = predictor.predict(asked, history=history).to_pylist()
    for i, time in enumerate(times):
        one = {name: values[i : i + 1] for name, values in asked.items()}
        so_far = history if time is None else history.filter(pc.field("event_time") <= time)
        (alone,) = predictor.predict(one, history=so_far).to_pylist()
        assert together[i].pop("later") == len(history) - len(so_far)
        assert alone.pop("later") == 0
        assert [together[i][name] for name in ANSWERS[:-1]] == pytest.approx(
            [alone[name] for name in ANSWERS[:-1]], rel=1e-4
        )


def test_questions_at_many_times_are_asked_of_a_past_that_is_theirs(monkeypatch):
    history = questions([f"10.0.0.{i % 7}" for i in range(100)], ["10.1.0.1"] * 100, range(1, 101))
    asked = history.take(np.random.default_rng(0).permutation(100))
    groups = list(_as_of(asked, history))
    assert len(groups) == predictor_module.TIME_GROUPS
    assert sorted(np.concatenate([rows for rows, _ in groups])) == list(range(100))
    for rows, known in groups:
        assert known.time.max() == asked.time[rows].min()


@pytest.mark.parametrize("time", [-5, 2**32, 1_700_000_000_000, 1e18])
def test_times_that_cannot_be_are_refused_with_a_hint(time, predictor):
    asked = {"src_addr": ["10.0.0.1"], "dst_addr": ["10.0.0.2"], "event_time": [time]}
    with pytest.raises(DataError, match="seconds since 1970, not milliseconds, up to 2106"):
        predictor.predict(asked)
