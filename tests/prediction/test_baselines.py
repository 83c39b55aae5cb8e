import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.addresses import from_packed
from ping_llm.errors import DataError
from ping_llm.estimators import neighbours
from ping_llm.estimators.pairs import Nodes, grouped_median, training_table
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import baselines

N = 60


def measurements(src, dst, rtt, time=None, network=0):
    """Node i is 10.<network>.i.1: a /24 each, unless `i` holds three bytes."""
    return MeasurementTable(
        time=np.arange(len(src)) if time is None else np.asarray(time),
        src=from_packed(bytes([10, network, int(i), 1]) for i in src),
        dst=from_packed(bytes([10, network, int(i), 1]) for i in dst),
        family=np.full(len(src), 4, np.int8),
        rtt=np.asarray(rtt, np.float32),
    )


def split_of(matrix, seed=0):
    """Returns (training, held-out) measurements of the pairs of a symmetric matrix."""
    a, b = np.triu_indices(len(matrix), 1)
    flip = np.random.default_rng(seed).random(len(a)) < 0.5
    a, b = np.where(flip, b, a), np.where(flip, a, b)
    everything = measurements(a, b, matrix[a, b])
    held = np.random.default_rng(seed + 1).random(len(a)) < 0.1
    return everything.take(~held), everything.take(held)


def relative_error(name, matrix):
    train, test = split_of(matrix)
    predicted = baselines.fit(name, training_table(train))(test)
    return np.median(np.abs(predicted - test.rtt) / test.rtt)


@pytest.mark.parametrize(
    "name", ["prefix", "additive", "src_median", "biased_mf", "dmfsgd", "neighbours"]
)
def test_static_methods_do_not_change_when_each_measurement_is_seen_from_both_ends(name):
    rng = np.random.default_rng(0)
    src, dst = rng.integers(0, 12, (2, 300))
    src, dst = src[src != dst], dst[src != dst]
    train = measurements(src, dst, rng.gamma(3, 20, len(src)))
    mirrored = dataclasses.replace(train, src=train.dst, dst=train.src)
    queries = measurements(*rng.integers(0, 14, (2, 50)), np.zeros(50))
    one, both = (
        baselines.fit(name, training_table(table))(queries)
        for table in (train, MeasurementTable.concat([train, mirrored]))
    )
    np.testing.assert_array_equal(one, both)


@pytest.fixture(scope="module")
def plane():
    """Distances of points in a plane, with a height each."""
    rng = np.random.default_rng(0)
    points, height = rng.uniform(0, 200, (N, 2)), rng.uniform(1, 20, N)
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    return apart + height[:, None] + height


@pytest.fixture(scope="module")
def low_rank():
    rng = np.random.default_rng(0)
    factors = rng.uniform(0.5, 2, (N, 3))
    return 20 * factors @ factors.T


def test_additive_recovers_a_sum_in_the_logarithm():
    part = np.random.default_rng(0).normal(0, 0.5, N)
    assert relative_error("additive", np.exp(3 + part[:, None] + part)) < 1e-3


def test_vivaldi_recovers_distances_with_heights(plane):
    assert relative_error("vivaldi", plane) < 0.03


def test_matrix_factorisations_recover_a_low_rank(low_rank):
    assert relative_error("dmfsgd", low_rank) < 0.05
    assert relative_error("biased_mf", low_rank) < 0.02


def test_neighbours_find_the_hosts_of_one_site(plane):
    site = np.repeat(np.arange(N // 2), 2)  # two hosts each, which measure alike
    matrix = plane[np.ix_(site, site)]
    noise = np.exp(np.random.default_rng(2).normal(0, 0.005, matrix.shape))
    assert relative_error("neighbours", matrix * np.sqrt(noise * noise.T)) < 0.01
    # Alone, a host's neighbours are those around it.
    assert relative_error("neighbours", plane) < 0.15


def test_neighbours_have_no_answer_where_none_of_those_near_was_measured(monkeypatch):
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 2)  # itself and one more
    # 0 and 1 measure 2 to 5 alike, 6 and 7 measure 8 and 9 alike; nothing joins the two groups.
    one, other = [0] * 4 + [1] * 4 + [6] * 2 + [7] * 2, [2, 3, 4, 5] * 2 + [8, 9] * 2
    rtt = [10, 30, 50, 70] * 2 + [200, 400] * 2
    train = training_table(measurements(one, other, rtt))
    node = [train.nodes.lookup(measurements([i], [i], [1]).src) for i in range(10)]
    predict = neighbours.fit_neighbours(train)
    np.testing.assert_allclose(predict(node[0], node[2]), 10)  # measured
    assert np.isnan(predict(node[0], node[6]))
    held_out = training_table(measurements(one[1:], other[1:], rtt[1:]))
    predict = neighbours.fit_neighbours(held_out)
    np.testing.assert_allclose(predict(node[0], node[2]), 10)  # as 1 did


def test_neighbours_of_many_nodes_are_of_those_that_measured_most(monkeypatch, plane):
    monkeypatch.setattr(neighbours, "COMPARISONS", 1)
    monkeypatch.setattr(neighbours, "NEIGHBOURS", N // 2)
    assert relative_error("neighbours", plane) < 0.3
    train, _ = split_of(plane)
    table = training_table(train)
    one, other, rtt = table.directed
    near, distance = neighbours._neighbours(one, other, np.log(rtt), N)
    most = np.argsort(-np.bincount(one), kind="stable")[: N // 2]
    assert near[:, 0].tolist() == list(range(N))
    assert set(near[:, 1:].ravel()) <= set(most)
    assert all(len(set(row)) == len(row) for row in near)
    assert np.all(np.diff(distance, axis=1) >= 0)


def test_biased_mf_recovers_a_low_rank_of_the_logarithm():
    rng = np.random.default_rng(0)
    factors, bias = rng.normal(0, 0.4, (N, 3)), rng.normal(0, 0.3, N)
    assert (
        relative_error("biased_mf", np.exp(3 + bias[:, None] + bias + factors @ factors.T)) < 0.05
    )


def test_medians_are_of_pairs_and_either_end():
    train = training_table(measurements([0, 0, 1, 2], [1, 1, 0, 0], [10, 20, 30, 7]))
    query = measurements([0, 1, 2, 5], [9, 9, 9, 2], [1, 1, 1, 1])
    # Pairs: 0-1 has the median 20, 0-2 has 7.
    np.testing.assert_allclose(baselines.fit("src_median", train)(query)[:3], [13.5, 20, 7])
    np.testing.assert_allclose(baselines.fit("global_median", train)(query), 13.5)
    # An unknown source: the destination's median stands in.
    assert baselines.fit("vivaldi", train)(query)[3] == 7


def test_prefix_backs_off_from_the_pair_to_its_networks():
    train = measurements([1, 1, 2], [3, 3, 3], [10, 10, 50])
    seen = baselines.fit("prefix", training_table(train))
    same_24 = dataclasses.replace(
        measurements([1], [3], [1]), dst=from_packed([bytes([10, 0, 3, 77])])
    )
    assert seen(measurements([3], [1], [1]))[0] == 10  # the other direction
    assert seen(same_24)[0] == 10
    assert seen(measurements([8], [9], [1]))[0] == 10  # same /16s: the median of all three
    assert seen(measurements([8], [9], [1], network=5))[0] == 30  # nothing: the median of pairs


@pytest.mark.parametrize("name", baselines.STATIC)
def test_every_method_answers_for_anything_it_is_asked(name):
    train = training_table(measurements([0, 1], [1, 2], [10, 20]))
    queries = measurements([0, 0, 50, 50, 1], [1, 50, 1, 51, 1], [1] * 5)
    predicted = baselines.fit(name, train)(queries)
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3, st.integers(-1, 50)), min_size=2, max_size=60))
def test_online_methods_see_the_pairs_own_past_and_nothing_else(rows):
    src, dst, time, rtt = (np.array(column) for column in zip(*rows, strict=True))
    history = measurements(src, dst, rtt, time)
    last, median = (method(history, history) for method in baselines.ONLINE.values())
    for i in range(len(rows)):
        same = (src == src[i]) & (dst == dst[i]) & (time < time[i]) & (rtt >= 0)
        past = rtt[same][np.argsort(time[same], kind="stable")][-9:]
        if len(past):
            assert last[i] == past[-1]
            assert median[i] == np.median(past)
        else:
            assert np.isnan(last[i])
            assert np.isnan(median[i])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99)), min_size=1, max_size=50))
def test_grouped_medians_are_numpys(rows):
    keys, values = np.array(rows).T
    found_keys, medians = grouped_median(keys, values.astype(float))
    np.testing.assert_array_equal(found_keys, np.unique(keys))
    np.testing.assert_allclose(medians, [np.median(values[keys == key]) for key in found_keys])


def test_nodes_know_their_addresses_and_no_others():
    table = measurements(np.arange(9), np.arange(9) + 1, np.ones(9))
    nodes = Nodes(table.src, table.dst)
    assert len(nodes) == 10
    np.testing.assert_array_equal(nodes.addresses[nodes.lookup(table.src)], table.src)
    assert nodes.lookup(from_packed([b"\t" * 16])).tolist() == [-1]


def test_failed_measurements_are_not_fitted():
    train = training_table(measurements([0, 0], [1, 1], [-1, 30]))
    assert train.rtt.tolist() == [30]
    with pytest.raises(DataError, match="no measurement to fit on was answered"):
        training_table(measurements([0], [1], [-1]))
