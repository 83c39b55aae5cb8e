import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import SEQ_LEN, decoder, questions

from ping_llm import tokenizer
from ping_llm.estimators.pairs import Nodes
from ping_llm.measurements import NO_TIME
from ping_llm.prediction import predictor as predictor_module
from ping_llm.prediction import rtt as rtt_module
from ping_llm.prediction.contexts import encode_prompts, from_groups, no_contexts
from ping_llm.prediction.distribution import VALUE_OF_CODE, VALUES_MS
from ping_llm.prediction.predictor import Predictor
from ping_llm.tokenizer import BYTE_0, FAILED, RTT_START


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*decoder(), max_tokens=SEQ_LEN)


def asked(n, *, six=False, times=None):
    host = "2001:db8::{}" if six else "10.0.0.{}"
    src = [host.format(1 + i % 3) for i in range(n)]
    return questions(src, [host.format(100 + i) for i in range(n)], times)


def measured(n, *, first=1_600_000_000, timed=True):
    table = asked(n)
    rtt = np.linspace(5, 50, n, dtype=np.float32)
    rtt[n // 2] = -1
    times = first + 60 * np.arange(n)
    return dataclasses.replace(table, rtt=rtt, time=times if timed else np.full(n, NO_TIME))


def whole_model(tokens):
    graphdef, params = decoder()
    padded = np.zeros((len(tokens), SEQ_LEN), np.int32)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids
    run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    return np.asarray(run(params, jnp.asarray(padded)), np.float64)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_the_distribution_is_the_products_of_the_whole_models_probabilities(predictor, monkeypatch):
    monkeypatch.setattr(rtt_module, "TAIL", 0.0)
    history, query = measured(4), asked(1, times=[1_600_000_600])
    contexts = predictor.contexts(history, query)
    assert contexts.lengths().tolist() == [2]  # of the source 10.0.0.1
    ((_, found),) = predictor.distributions(query, contexts)

    order = np.tile(np.arange(4, dtype=np.uint8), (3, 1))
    both = [history.rtt[[0, 3]], np.float32([10])]
    whole = dataclasses.replace(
        history.take(np.array([0, 3, 0])),
        time=np.r_[history.time[[0, 3]], query.time],
        dst=np.r_[history.dst[[0, 3]], query.dst],
        rtt=np.concatenate(both),
    )
    ids, _ = tokenizer.encode(whole, segment_offsets=np.array([0, 3]), field_order=order)
    asked_ids = ids[:-2].astype(int)
    assert asked_ids[-1] == RTT_START
    firsts = np.arange(256)
    logits = whole_model([[*asked_ids, BYTE_0 + first] for first in firsts])
    at = len(asked_ids)
    p_failed = softmax(logits[0, at - 2, [FAILED, RTT_START]])[0]
    p1 = softmax(logits[0, at - 1, BYTE_0:])
    p2 = np.stack([softmax(row) for row in logits[:, at, BYTE_0:]])
    expected = np.zeros(2**16)
    expected[:] = (p1[:, None] * p2).ravel()
    np.testing.assert_allclose(found.p_failed, p_failed, rtol=1e-4)
    by_value = np.bincount(VALUE_OF_CODE, expected)
    np.testing.assert_allclose(found.probabilities[0], by_value, atol=1e-7)


def test_probabilities_sum_to_one(predictor):
    for _, found in predictor.distributions(asked(5)):
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-9)
        assert np.all((found.p_failed > 0) & (found.p_failed < 1))


def test_answers_do_not_depend_on_what_else_is_asked_nor_on_the_order(predictor):
    queries = asked(20, times=[None, 1_600_000_000] * 10)
    history = measured(9).take(np.arange(9) % 3 != 2)  # the third source has none
    order = np.random.default_rng(0).permutation(20)
    together = predictor.ask(queries, history)
    mixed = queries.take(order)
    shuffled = predictor.ask(mixed, history)
    names = ("rtt_p5", "rtt_p50", "rtt_p95", "rtt_mean", "p_failed", "history")
    for name in names:
        np.testing.assert_allclose(
            shuffled[name].to_numpy(), together[name].to_numpy()[order], rtol=1e-5, err_msg=name
        )
    for i in (0, 7):
        single = queries.take(np.array([i]))
        alone = predictor.ask(single, history)
        for name in names:
            assert alone[name][0].as_py() == pytest.approx(together[name][i].as_py(), rel=1e-5)


def test_second_bytes_of_some_questions_are_those_of_all(predictor):
    rng, seen = np.random.default_rng(0), 0
    query, history = asked(70), measured(9)
    contexts = predictor.contexts(history, query)
    some_without = dataclasses.replace(
        contexts, of_query=np.where(np.arange(70) % 5 == 0, -1, contexts.of_query)
    )
    prompts = encode_prompts(some_without, query)
    for plan in rtt_module._plan(prompts):
        batch = rtt_module._Batch(predictor.graphdef, predictor.params, prompts, plan)
        n = len(batch.rows)
        first = rng.integers(0, 256, (n, 3))
        whole = batch.second_bytes(np.arange(n), first)
        for part in (np.array([n - 1]), np.flatnonzero(rng.random(n) < 0.3)):
            if len(part):
                found = batch.second_bytes(part, first[part])
                np.testing.assert_allclose(found, whole[part], atol=1e-6)
                seen += len(part)
    assert seen > 10


def test_mixtures_are_means_of_the_answers_whatever_is_asked_together(predictor, monkeypatch):
    query, history = asked(7), measured(9)
    turned = dataclasses.replace(query, src=query.dst, dst=query.src)
    prompts = [(query, predictor.contexts(history, query)), (turned, no_contexts(7))]

    def probability(answers):
        # P(answered, RTT = value) [n, values]
        whole = np.zeros((7, len(VALUES_MS)))
        for rows, part in answers:
            at = np.searchsorted(VALUES_MS, part.values_ms)
            whole[rows[:, None], at] = part.probabilities * (1 - part.p_failed)[:, None]
        return whole

    expected = sum(probability(predictor.distributions(*each)) for each in prompts) / 2
    np.testing.assert_allclose(probability(predictor.mixtures(prompts)), expected, atol=1e-6)
    monkeypatch.setattr(predictor_module, "_POOLED", 3)
    np.testing.assert_allclose(probability(predictor.mixtures(prompts)), expected, atol=1e-6)


def test_the_likelihood_of_a_measurement_is_its_probability(predictor, monkeypatch):
    monkeypatch.setattr(rtt_module, "TAIL", 0.0)
    table = dataclasses.replace(asked(3), rtt=np.array([12.5, -1, 300], np.float32))
    ((_, found),) = predictor.distributions(table)
    likelihood = predictor.log_likelihood(table)
    assert likelihood[1] == pytest.approx(np.log(found.p_failed[1]), rel=1e-4)
    # Other codes of the same value have a share that is not the measurement's.
    code = tokenizer.encode_rtt(table.rtt[[0]])
    at = np.searchsorted(found.values_ms, tokenizer.decode_rtt(code)[0])
    assert likelihood[0] <= np.log(found.probabilities[0, at] * (1 - found.p_failed[0])) + 1e-6


def test_a_context_keeps_the_newest_measurements_that_fit(predictor):
    history = measured(60).take(np.arange(0, 60, 3))  # 20 of the first source
    query = asked(1, times=[1_600_009_999])
    contexts = predictor.contexts(history, query)
    room = SEQ_LEN - rtt_module.QUESTION_TOKENS
    assert contexts.lengths().tolist() == [(room - 5 - 4) // (9 + 5)]
    assert contexts.measurements.time.max() == history.time.max()


def test_a_question_in_another_family_than_its_history_or_without_a_time_is_answered(predictor):
    query = asked(2, six=True)
    contexts = from_groups(measured(6), np.zeros(6, int), np.array([0, -1]))
    assert contexts.lengths().tolist() == [6, 0]
    for _, found in predictor.distributions(query, contexts):
        assert np.isfinite(found.quantiles(np.array([0.95]))).all()


def test_addresses_outside_training_are_flagged():
    known = asked(2)
    predictor = Predictor(*decoder(), max_tokens=SEQ_LEN, seen=Nodes(known.src, known.dst))
    unseen = predictor.unseen(asked(4))
    assert unseen is not None
    assert unseen[:, 0].tolist() == [False, False, True, False]
    assert unseen[:, 1].tolist() == [False, False, True, True]
    assert Predictor(*decoder(), max_tokens=SEQ_LEN).unseen(known) is None


def test_unseen_sources_are_asked_as_hidden_and_only_by_what_they_measured():
    def answers(asker, *, hide):
        query = questions([asker] * 2, ["10.0.0.100", "10.0.0.101"])
        history = dataclasses.replace(query.slice(0, 1), rtt=np.array([7.0], np.float32))
        known = questions(["10.0.0.1"], ["10.0.0.100"])
        nodes = Nodes(known.src, known.dst)
        predictor = Predictor(*decoder(), max_tokens=SEQ_LEN, seen=nodes, hide_unseen=hide)
        predictions = predictor.ask(query, history)
        assert predictions["history"].to_pylist() == [1, 1]
        assert predictions["unseen_src"].to_pylist() == [asker != "10.0.0.1"] * 2
        return predictions["rtt_mean"].to_numpy()

    first = answers("10.0.0.7", hide=True)
    np.testing.assert_array_equal(first, answers("10.0.0.8", hide=True))
    np.testing.assert_array_equal(first, answers("0.0.0.0", hide=False))
    assert np.all(first != answers("10.0.0.7", hide=False))
    np.testing.assert_array_equal(answers("10.0.0.1", hide=True), answers("10.0.0.1", hide=False))
