import dataclasses

import numpy as np
import pytest
from tiny_runs import SEQ_LEN, decoder, questions

from ping_llm import addresses, tokenizer
from ping_llm.errors import ConfigError
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.answers import Answerer
from ping_llm.prediction.generate import sample
from ping_llm.prediction.grammar import Grammar
from ping_llm.prediction.predictor import Predictor


def walk(lanes, steps, seed, timed):
    """Returns random allowed ids [lanes, steps]."""
    rng, grammar = np.random.default_rng(seed), Grammar(timed, np.zeros(lanes, np.uint8))
    # Structure far likelier than chance, so that all of it is met.
    logits = np.where(np.arange(tokenizer.VOCAB_SIZE) < tokenizer.BYTE_0, 3.0, 0.0)
    out = np.zeros((lanes, steps), np.int64)
    for i in range(steps):
        noise = rng.random((lanes, tokenizer.VOCAB_SIZE), np.float32)
        out[:, i] = np.argmax(np.where(grammar.allowed(), logits + noise, -1), axis=1)
        grammar.advance(out[:, i])
    return out


def test_a_million_tokens_respect_the_grammar():
    ids = walk(1000, 1000, seed=0, timed=np.zeros(1000, bool))
    heads, unnamed = set(), 0
    for lane in ids:
        end = np.flatnonzero(lane == tokenizer.MEASUREMENT_START)[-1]  # the last may be cut
        measurements, problems = tokenizer.decode(lane[:end])
        assert not problems
        starts = np.count_nonzero(lane[:end] == tokenizer.MEASUREMENT_START)
        assert len(measurements) == starts
        sources = np.isin(lane[:end], [tokenizer.SRC_IPV4, tokenizer.SRC_IPV6])
        unnamed += starts - np.count_nonzero(sources)
        assert measurements.time[measurements.has_time].min() >= 0
        heads |= set(lane[lane < tokenizer.BYTE_0].tolist())
    assert heads == set(range(tokenizer.BYTE_0)) - {tokenizer.GRID}
    assert unnamed > 1000  # measurements of the source before


def test_every_encoded_segment_is_allowed():
    """The grammar forbids nothing that training data hold."""
    rng, n = np.random.default_rng(0), 300
    version = rng.choice([4, 6], n).astype(np.int8)
    packed = rng.integers(0, 256, (2, n, 16)).astype(np.uint8)
    packed[0] = packed[0, rng.integers(0, 3, n) + 3 * (version == 6)]  # sources repeat
    packed[:, version == 4, :12] = np.frombuffer(addresses.MAPPED_PREFIX, np.uint8)
    times = 10**9 + np.cumsum(rng.choice([0, 3, 200, 10**5], n))
    times[100] = 5
    measurements = MeasurementTable(
        time=np.where(rng.random(n) < 0.7, times, NO_TIME),
        src=addresses.from_bytes(packed[0]),
        dst=addresses.from_bytes(packed[1]),
        family=version,
        rtt=rng.uniform(-5, 300, n).astype(np.float32),
    )
    order = np.array([rng.permutation(4) for _ in range(n)], np.uint8)
    ids, _ = tokenizer.encode(measurements, segment_offsets=np.array([0, n]), field_order=order)
    grammar = Grammar(np.zeros(1, bool), np.zeros(1, np.uint8))
    for token in ids:
        assert grammar.allowed()[0, token], tokenizer.token_name(int(token))
        grammar.advance(np.array([int(token)]))


def test_samples_are_as_many_as_asked_and_repeat_with_the_seed():
    predictor = Predictor(Answerer(*decoder()), max_tokens=96)
    first = sample(predictor, 70, history=MeasurementTable.empty(), seed=1)
    again = sample(predictor, 70, history=MeasurementTable.empty(), seed=1)
    assert len(first) == 70
    for name in ("time", "src", "rtt"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    other = sample(predictor, 70, history=MeasurementTable.empty(), seed=2)
    assert not np.array_equal(first.rtt, other.rtt)


def test_samples_go_on_from_a_history():
    """Times given as differences are counted from the last one of the history."""
    predictor = Predictor(Answerer(*decoder()), max_tokens=SEQ_LEN)
    history = questions(["10.0.0.1"] * 9, [f"10.0.1.{i}" for i in range(9)], [10**9] * 9)
    history = dataclasses.replace(history, rtt=np.full(9, 20, np.float32))
    found = sample(predictor, 100, history=history)
    near = found.has_time & (np.abs(found.time - 10**9) < 10**6)
    assert near.any()
    assert not (found.dst == history.dst[0]).any()  # not what was given


def test_sequences_too_short_to_sample_in_are_refused():
    predictor = Predictor(Answerer(*decoder()), max_tokens=40)
    with pytest.raises(ConfigError, match="40 tokens are too short"):
        sample(predictor, 1, history=MeasurementTable.empty())
