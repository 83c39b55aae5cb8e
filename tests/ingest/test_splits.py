import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.errors import ConfigError
from ping_llm.hashing import keyed_hash_addresses
from ping_llm.ingest.splits import TEST, TRAIN, VALID, SplitRule


def rule(split="pair", **changes):
    settings = {"valid_fraction": 0.05, "test_fraction": 0.1, "seed": 0} | changes
    return SplitRule(split=split, **settings)


def addresses(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16), dtype=np.uint8)


def assigned(rule_, src, dst):
    return rule_.by_addresses(*(keyed_hash_addresses(ends, rule_.seed) for ends in (src, dst)))


@given(st.integers(0, 2**63 - 1))
def test_a_pair_is_the_same_pair_from_either_end(seed):
    src, dst = addresses(100), addresses(100, 1)
    one = rule(seed=seed)
    np.testing.assert_array_equal(assigned(one, src, dst), assigned(one, dst, src))


@pytest.mark.parametrize("split", ["pair", "probe"])
def test_a_split_depends_on_the_record_alone_and_on_the_seed(split):
    src, dst = addresses(1000), addresses(1000, 1)
    whole = assigned(rule(split), src, dst)
    np.testing.assert_array_equal(whole[::7], assigned(rule(split), src[::7], dst[::7]))
    assert (whole != assigned(rule(split, seed=1), src, dst)).any()


def test_pairs_are_held_out_in_the_shares_asked_for():
    split = assigned(rule(), addresses(200_000), addresses(200_000, 1))
    shares = np.bincount(split) / len(split)
    np.testing.assert_allclose(shares, [0.85, 0.05, 0.10], atol=0.003)


def test_addresses_that_differ_in_one_bit_are_dealt_out_independently():
    base = np.repeat(addresses(1), 65536, 0)
    base[:, 14:] = np.arange(65536, dtype=">u2").view(np.uint8).reshape(-1, 2)
    split = assigned(rule(), base, base[:1].repeat(65536, 0))
    np.testing.assert_allclose(np.bincount(split) / 65536, [0.85, 0.05, 0.10], atol=0.005)


def test_a_held_out_probe_is_nowhere_in_train_nor_a_test_probe_in_valid():
    nodes = addresses(300)
    src, dst = (np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300))
    split = assigned(rule("probe"), nodes[src], nodes[dst])
    one_end = assigned(rule("probe"), nodes, nodes)  # of a node with itself
    for code in (TRAIN, VALID, TEST):
        mine = split == code
        ends = np.maximum(one_end[src[mine]], one_end[dst[mine]])
        assert (ends == code).all()
    assert {TRAIN, VALID, TEST} == set(split.tolist())


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1),
    st.floats(0, 0.49),
    st.floats(0, 0.5),
)
def test_time_holds_out_the_end_of_the_span_and_never_all_of_it(times, valid, test):
    one = rule("time", valid_fraction=valid, test_fraction=test)
    times = np.sort(np.array(times))
    cuts = np.tile(one.time_cuts(int(times[0]), int(times[-1])), (len(times), 1))
    split = one.by_time(times, cuts)
    assert (np.diff(split) >= 0).all()
    assert split[0] == TRAIN
    span = int(times[-1] - times[0])
    late = times > times[-1] - int(test * span)
    np.testing.assert_array_equal(split == TEST, late)


def test_time_shares_are_shares_of_the_span():
    times = np.arange(1000)
    one = rule("time")
    split = one.by_time(times, np.tile(one.time_cuts(0, 999), (1000, 1)))
    assert np.bincount(split).tolist() == [852, 49, 99]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "source"}, "split='source'"),
        ({"valid_fraction": -0.1}, "valid_fraction=-0.1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"test_fraction": float("nan")}, "test_fraction=nan"),
        ({"test_fraction": 0.5, "valid_fraction": 0.5}, "leave nothing to train on"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        rule(**changes)
