import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from tiny_runs import decoder, predictor, questions, write_run

from ping_llm import addresses, tokenizer
from ping_llm.cli import cli
from ping_llm.errors import CheckpointError, ConfigError, DataError
from ping_llm.prediction.joint import BYTES, Joint
from ping_llm.prediction.query import query

BANDS = ("failed", "0..12", "12.0000001..15", "15.0000001..1e12")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("query") / "run")


def by_dst(result):
    return {each.dst: each.probability for each in result.completions}


def token(byte):
    return tokenizer.BYTE_0 + byte


def only(*tokens):
    return np.isin(np.arange(tokenizer.VOCAB_SIZE), tokens)


def test_probabilities_of_all_completions_are_those_of_whole_sequences_and_add_up_to_1():
    """A world of 3 x 4 addresses of two bytes, each of which the plain decoder reads as a whole."""
    graphdef, params = decoder()
    joint = Joint(graphdef, params, np.array([tokenizer.MEASUREMENT_START]))
    places = [(1, 3, 9), (4, 5), (7, 8)]
    allowed = np.array([only(tokenizer.DST_IPV4), *(only(*map(token, each)) for each in places)])
    tails, log_p = joint.search(allowed, width=100)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-9)
    order = np.lexsort(tails.T[::-1])
    tails, log_p = tails[order], log_p[order]
    whole = [[0, tokenizer.DST_IPV4, *map(token, each)] for each in itertools.product(*places)]
    np.testing.assert_array_equal(tails, np.array(whole)[:, 1:])
    logits = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, jnp.array(whole, jnp.int32))
    log_softmax = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    by_hand = np.zeros(len(whole))
    for place, bytes_ in enumerate(places):
        here = log_softmax[:, place + 1]  # after the head, or after the byte before
        chosen = np.take_along_axis(here, np.array(whole)[:, place + 2, None], 1)[:, 0]
        by_hand += chosen - np.log(np.exp(here[:, [*map(token, bytes_)]]).sum(axis=1))
    np.testing.assert_allclose(log_p, by_hand, atol=1e-4)
    np.testing.assert_allclose(joint.score(tails, allowed), log_p, atol=1e-5)
    few, kept = joint.search(allowed, width=2)
    assert len(few) == 4
    known = dict(zip(map(tuple, tails), log_p, strict=True))
    for tail, each in zip(few, kept, strict=True):
        assert known[tuple(tail)] == pytest.approx(each, abs=1e-5)
    assert kept.max() <= log_p.max() + 1e-6


def test_under_a_prefix_all_addresses_are_weighed_and_a_longer_prefix_agrees(run):
    whole = query(run, "dst", src="10.0.0.1", dst="198.51.100.0/24", top=300)
    assert whole.weighed == len(whole.completions) == 256
    assert whole.covered == pytest.approx(1, abs=1e-9)
    assert sum(by_dst(whole).values()) == pytest.approx(1, abs=1e-9)
    part = by_dst(query(run, "dst", src="10.0.0.1", dst="198.51.100.64/27", top=300))
    assert len(part) == 32
    share = sum(by_dst(whole)[dst] for dst in part)
    for dst, probability in part.items():
        assert probability * share == pytest.approx(by_dst(whole)[dst], rel=1e-3)


def test_over_all_rtts_the_completions_of_each_add_up_to_those_of_none(run):
    """P(dst) = sum over RTTs of P(RTT) P(dst | RTT), and P(RTT) adds up to 1."""
    asked = {"src": "10.0.0.1", "dst": "10.0.1.0/28"}
    prior = by_dst(query(run, "dst", **asked, top=99))
    total, p_rtt = dict.fromkeys(prior, 0.0), 0.0
    for band in BANDS:
        result = query(run, "dst", **asked, rtt=band, top=99)
        assert sum(by_dst(result).values()) == pytest.approx(1, abs=1e-9)
        assert result.p_rtt is not None
        p_rtt += result.p_rtt
        for dst, probability in by_dst(result).items():
            total[dst] += result.p_rtt * probability
    assert p_rtt == pytest.approx(1, abs=1e-6)
    for dst, probability in prior.items():
        assert total[dst] == pytest.approx(probability, abs=1e-6)


def test_an_rtt_points_at_the_destinations_that_were_measured_so(run):
    """10.0.0.1 measured 10, 12, 14, 16, 18 and 20 ms to 10.0.1.1 and those after it."""
    prior = by_dst(query(run, "dst", src="10.0.0.1"))
    assert set(prior) == {f"10.0.1.{i}" for i in range(1, 7)}
    near = by_dst(query(run, "dst", src="10.0.0.1", rtt="12"))
    assert max(near, key=lambda dst: near[dst] / prior[dst]) == "10.0.1.2"


def test_the_rtt_of_a_pair_is_that_of_predict_and_of_a_source_its_mixture(run, tmp_path):
    one = query(run, "rtt", src="10.0.0.1", dst="10.0.1.1")
    (predicted,) = predictor().ask(questions(["10.0.0.1"], ["10.0.1.1"])).to_pylist()
    assert one.rtt_ms is not None
    assert one.rtt_ms["p50"] == pytest.approx(predicted["rtt_p50"], rel=1e-6)
    assert one.p_failed == pytest.approx(predicted["p_failed"], rel=1e-6)
    (tmp_path / "list").write_text("10.0.1.1\n10.0.1.9\n")
    mixed = query(run, "rtt", src="10.0.0.1", candidates=tmp_path / "list")
    weights = by_dst(mixed)
    each = {dst: query(run, "rtt", src="10.0.0.1", dst=dst).p_failed for dst in weights}
    expected = sum(weights[dst] * (each[dst] or 0) for dst in weights)
    assert mixed.p_failed == pytest.approx(expected, rel=1e-3)


def test_pairs_sources_and_hours_are_asked_too(run, tmp_path):
    pairs = query(run, "pair", rtt="12..14", top=99)
    assert pairs.weighed == 12
    assert sum(each.probability for each in pairs.completions) == pytest.approx(1)
    (tmp_path / "list").write_text("10.0.0.1\n\n10.0.0.7\n")
    sources = query(run, "src", dst="10.0.1.1", candidates=tmp_path / "list")
    assert {each.src for each in sources.completions} == {"10.0.0.1", "10.0.0.7"}
    hours = query(run, "time", src="10.0.0.1", dst="10.0.1.1", beam=16, top=24)
    assert {each.hour for each in hours.completions} <= set(range(24))
    assert sum(each.probability for each in hours.completions) == pytest.approx(1)


def test_the_probabilities_of_a_list_are_of_all_addresses():
    """The four values of an address's last byte, in a list, have the share of those four."""
    model = predictor().model
    given = np.array([tokenizer.MEASUREMENT_START, tokenizer.SRC_IPV4, *map(token, (10, 0, 0, 1))])
    joint = Joint(model.graphdef, model.params, given)
    tails = np.array([[tokenizer.DST_IPV4, *map(token, (10, 0, 1, i))] for i in range(256)])
    anything = np.array([only(tokenizer.DST_IPV4), *[BYTES] * 4])
    ends = only(*map(token, (10,))), only(token(0)), only(token(1)), BYTES
    under = np.array([only(tokenizer.DST_IPV4), *ends])
    everywhere, inside = joint.score(tails, anything), joint.score(tails, under)
    np.testing.assert_allclose(np.diff(everywhere - inside), 0, atol=1e-4)
    assert np.exp(inside).sum() == pytest.approx(1, abs=1e-6)
    assert np.exp(everywhere).sum() < 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ask": "dst"}, "--ask dst needs one address each as src"),
        ({"ask": "time", "src": "10.0.0.1"}, "needs one address each as"),
        ({"ask": "rtt", "rtt": "20"}, "exclude each other"),
        ({"ask": "pair", "rtt": "30..20"}, "'30..20' is no RTT"),
        ({"ask": "pair", "src": "10.0.0.0/24"}, "for both ends or for neither"),
        ({"ask": "dst", "src": "10.0.0.1", "dst": "10.0.0.1/24"}, "host bits set"),
        ({"ask": "dst", "src": "::ffff:10.0.0.1"}, "give it as IPv4"),
        ({"ask": "dst", "src": "2001:db8::1", "dst": "10.0.0.0/8"}, "different families"),
        ({"ask": "dst", "src": "2001:db8::1"}, "has no address of the family"),
        ({"ask": "dst", "src": "10.0.0.1", "time": "noon"}, "event_time is 'noon'"),
    ],
)
def test_what_does_not_fit_together_is_refused(run, asked, message):
    with pytest.raises((ConfigError, DataError), match=message):
        query(run, **asked)


def test_a_line_that_is_no_candidate_is_named(run, tmp_path):
    (tmp_path / "list").write_text("10.0.0.1\nelsewhere\n")
    with pytest.raises(DataError, match="list, line 2: 'elsewhere' is no address"):
        query(run, "dst", src="10.0.0.1", candidates=tmp_path / "list")
    (tmp_path / "list").write_text("10.0.0.1\n")
    with pytest.raises(DataError, match="line 1: expected 2 addresses"):
        query(run, "pair", candidates=tmp_path / "list")


def test_a_run_that_learnt_no_windows_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["train"]["grid_fraction"] = 1.0
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="smaller grid_fraction"):
        query(run, "dst", src="10.0.0.1")


def test_the_command_prints_completions_and_json(run):
    given = ["query", "--run", str(run), "--ask", "dst", "--src", "10.0.0.1", "--rtt", "10..30"]
    text = CliRunner().invoke(cli, given)
    assert text.exit_code == 0, text.output
    assert "10.0.0.1 -> 10.0.1." in text.stdout
    found = json.loads(CliRunner().invoke(cli, [*given, "--json"]).stdout)
    assert found["weighed"] == 6
    assert addresses.parse([found["completions"][0]["dst"]])[1].tolist() == [4]
    assert CliRunner().invoke(cli, ["query", "--run", str(run), "--ask", "weather"]).exit_code == 2
