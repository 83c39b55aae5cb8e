import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import SEQ_LEN, decoder

from ping_llm import tokenizer
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.fields import field_losses, token_table
from ping_llm.prediction.joint import BYTES, Joint

RESULTS = np.isin(np.arange(tokenizer.VOCAB_SIZE), [tokenizer.RTT_START, tokenizer.FAILED])
N = 60


def table(dst, rtt=20.0, n=N, timed=True):
    return MeasurementTable.from_arrow(
        {
            "src_addr": ["10.0.0.1"] * n,
            "dst_addr": [dst[i % len(dst)] for i in range(n)],
            "event_time": [1_700_000_000 + i if timed else None for i in range(n)],
            "rtt": [rtt] * n,
        }
    )


def one(tokens, field_order):
    found, _ = tokenizer.encode(
        tokens, segment_offsets=np.array([0, 1]), field_order=np.array([field_order], np.uint8)
    )
    return found.astype(np.int64)


@pytest.mark.parametrize("rtt", [20.0, -1.0])
def test_a_field_asked_last_and_first_is_what_the_joint_distribution_says(rtt):
    """The same log-probabilities by another way: a cache, and what may stand at each place."""
    measured = table(["10.0.1.7"], rtt, n=1)
    losses = field_losses(*decoder(), measured, measured)
    cyclic = {"source": [1, 2, 3, 0], "destination": [2, 3, 0, 1]}
    cyclic |= {"time": [3, 0, 1, 2], "rtt": [0, 1, 2, 3]}
    size = {"source": 5, "destination": 5, "time": 9, "rtt": 3 if rtt > 0 else 1}
    for name, order in cyclic.items():
        tokens = one(measured, order)
        head = RESULTS if name == "rtt" else np.arange(tokenizer.VOCAB_SIZE) == tokens[-size[name]]
        allowed = np.array([head, *[BYTES] * (size[name] - 1)])
        for which, given, asked in (
            ("last", tokens[: -size[name]], tokens[-size[name] :]),
            ("first", tokens[:1], one(measured, [order[3], *order[:3]])[1 : 1 + size[name]]),
        ):
            expected = -Joint(*decoder(), given).score(asked[None], allowed)[0]
            assert getattr(losses[name], which) == pytest.approx(expected, abs=1e-3), (name, which)


def test_marginal_and_constant_are_the_entropies_of_train():
    """Of two destinations that differ in two bytes the constant needs both, the marginal one."""
    train = table(["10.0.1.1", "10.0.2.2"], n=2000)
    losses = field_losses(*decoder(), table(["10.0.1.1", "10.0.2.2"]), train)
    assert losses["destination"].marginal == pytest.approx(np.log(2), abs=0.02)
    assert losses["destination"].constant == pytest.approx(2 * np.log(2), abs=0.04)
    assert losses["source"].marginal == pytest.approx(0, abs=0.02)
    half_failed = MeasurementTable.concat([train, table(["10.0.1.1"], -1.0, n=2000)])
    losses = field_losses(*decoder(), table(["10.0.1.1"]), half_failed)
    assert losses["rtt"].marginal == pytest.approx(np.log(2), abs=0.02)
    never = field_losses(*decoder(), table(["10.0.3.3"]), train)["destination"]
    assert np.log(2000) < never.marginal < 20


def test_measurements_without_a_time_have_no_loss_of_it():
    losses = field_losses(*decoder(), table(["10.0.1.1"], n=3, timed=False), table(["10.0.1.1"]))
    assert set(losses) == {"source", "destination", "rtt"}


def test_the_table_of_tokens_has_what_the_decoder_says_of_a_window():
    rows = table([f"10.0.1.{i}" for i in range(9)])
    found = token_table(*decoder(), rows, 40, longest=SEQ_LEN)
    assert [each["position"] for each in found] == list(range(1, 41))
    assert {each["field"] for each in found} == set(tokenizer.FIELDS)
    names = {tokenizer.token_name(i): i for i in range(tokenizer.VOCAB_SIZE)}
    ids = np.array([0, *(names[each["actual"]] for each in found)])
    measured, problems = tokenizer.decode(ids[: np.flatnonzero(ids == 0)[-1]])
    assert len(measured)
    assert not problems
    logits = np.asarray(nnx.merge(*decoder())(jnp.asarray(ids[None], jnp.int32))[0], np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    for i, each in enumerate(found):
        assert each["p_actual"] == pytest.approx(p[i, ids[i + 1]], rel=1e-3)
        assert names[each["predicted"]] == int(np.argmax(p[i]))
        assert each["p_predicted"] == pytest.approx(p[i].max(), rel=1e-3)
    assert len(token_table(*decoder(), rows, 40, longest=16)) == 16
