import dataclasses

import numpy as np
import pytest

from ping_llm import addresses
from ping_llm.data import cells, grid_streams, history_grids, network_grids, worlds
from ping_llm.data.grid_streams import GridStreams
from ping_llm.data.history_grids import PairSeries
from ping_llm.data.network import Network, read_known, thinned, write_known
from ping_llm.data.pipeline import TrainLoader, eval_batches
from ping_llm.data.questions import question_grids
from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.estimators import wmedian
from ping_llm.estimators.pairs import pair_keys
from ping_llm.estimators.world import MeasuredWorld
from ping_llm.ingest.prepare import prepare_data
from ping_llm.measurements import MeasurementTable
from ping_llm.simulation.random_networks import random_network
from ping_llm.simulation.random_series import random_series
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location
from ping_llm.tokenizer import BYTE_0, GRID, VOCAB_SIZE


def measured(n=400, hosts=12, seed=0, scale=1.0) -> MeasurementTable:
    """Returns measurements between hosts on a line, the farther the slower, some failed."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(hosts, size=(n, 2))
    rtt = scale * (1 + np.abs(ends[:, 0] - ends[:, 1])) * np.exp(rng.normal(0, 0.02, n))
    rtt[rng.random(n) < 0.05] = -1
    src, dst = ([f"192.0.{i}.1" for i in end] for end in ends.T)
    time = 1_600_000_000 + np.sort(rng.integers(100_000, size=n))
    columns = {"src_addr": src, "dst_addr": dst, "event_time": time, "rtt": rtt}
    return MeasurementTable.from_arrow(columns)


def world_of(table: MeasurementTable) -> tuple[MeasuredWorld, Network]:
    network = Network.of(table)
    return MeasuredWorld(network.pairs, network.key, network.nodes.addresses), network


def test_differences_come_back_finest_near_nothing():
    difference = np.array([0.0, 1e-5, -3e-3, 0.2, -4.0])
    for scale in (cells.OVER_TIME, cells.BETWEEN_PAIRS):
        code = scale.encode(difference)
        error = np.abs(scale.decode(code) - difference)
        assert (error <= np.maximum(scale.unit, np.abs(difference)) / cells.STEPS).all()
        assert (code >> 8).min() > 0  # byte 0 stands for nothing


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_the_grids_of_a_network_do_not_change_with_the_unit_of_its_rtts(scale):
    # Away from the smallest RTT and with the same noise, only differences of logs are told.
    a, b = np.array([0, 3, 5]), np.array([7, 2, 11])
    grids = [
        network_grids.network_grids(world_of(measured(scale=each))[0], a, b)
        for each in (10.0, 10.0 * scale)
    ]
    apart = np.abs(grids[0].tokens.astype(int) - grids[1].tokens)
    assert (apart > 1).mean() < 0.01
    shift = grids[1].reference - grids[0].reference
    np.testing.assert_allclose(shift, np.log(scale), atol=1e-3)


def test_what_was_measured_of_the_pair_itself_is_not_told():
    world, network = world_of(measured())
    a, b = network.pairs.a[:5], network.pairs.b[:5]
    before = world.weighted_median(a, b)[0]
    for i in range(5):
        # One at a time: the others are neighbours.
        alone, _ = world_of(measured())
        alone.log_rtt[a[i], b[i]] = alone.log_rtt[b[i], a[i]] = 9.0
        after = alone.weighted_median(a[i : i + 1], b[i : i + 1])[0]
        np.testing.assert_array_equal(after, before[i : i + 1])


def test_how_differently_nodes_measure_is_the_mean_over_their_common_partners():
    table = measured()
    world, network = world_of(table)
    known = np.isfinite(world.log_rtt)
    for i, j in ((0, 1), (2, 9), (4, 5)):
        common = known[i] & known[j]
        assert world.common[i, j] == common.sum()
        total = np.abs(world.log_rtt[i] - world.log_rtt[j])[common].sum()
        others = 1 - common.sum() / min(known[i].sum(), known[j].sum())
        counted = common.sum() + wmedian.PRIOR_WEIGHT * others + wmedian.USUAL_WEIGHT
        expected = world.difference[i, j] * counted - total
        assert 0 < expected < 2 * (counted - common.sum())
    assert len(network.nodes) == world.n


def test_the_estimate_and_the_neighbours_know_a_line_of_hosts():
    table = measured(2000)
    world, network = world_of(table)
    a, b = network.pairs.a, network.pairs.b
    actual = np.nanmedian(
        np.where(np.isfinite(network.pairs.samples), network.pairs.samples, np.nan), 1
    )
    error = np.abs(world.estimate[a, b] - actual)
    assert np.median(error) < 0.15


def test_nothing_at_or_after_the_question_changes_a_history_grid():
    table = measured(600, hosts=3)
    asked = table.take(np.arange(300, 320))
    whole = list(question_grids(asked, table))
    before = table.take(table.time < asked.time.min())
    changed = MeasurementTable.concat(
        [before, dataclasses.replace(table, rtt=table.rtt * 7).take(table.time >= asked.time.max())]
    )
    first = asked.take(np.arange(1))
    (_, kind, one), (_, _, other) = (
        next(iter(question_grids(first, each))) for each in (table, changed)
    )
    assert kind == "history"
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert sum(len(rows) for rows, *_ in whole) == len(asked)


def test_a_history_grid_tells_the_median_of_three_and_the_last_value():
    rtt = np.array([10.0, 12, 11, -1, 13])
    series = PairSeries.of_series([(np.arange(5) * 60, rtt)])
    grids = history_grids.history_grids(series, np.zeros(1, int), np.array([5]), np.array([300]))
    assert grids.tokens.shape == (1, history_grids.HISTORY_TOKENS)
    assert grids.reference[0] == pytest.approx(np.log(12), abs=1e-6)  # of 12, 11 and 13
    row = grids.tokens[0, -(history_grids.ROW_TOKENS - cells.ANSWER_TOKENS) :].astype(int) - BYTE_0
    last = row[4 + history_grids.SHORT : 6 + history_grids.SHORT]
    told = cells.OVER_TIME.decode(last[0] * 256 + last[1])
    assert told == pytest.approx(np.log(13 / 12), rel=1e-3)
    assert row[3] == 1  # the newest was answered: none failed in a row


def test_short_and_empty_pasts_are_told_as_far_as_they_go():
    series = PairSeries.of_series([(np.arange(3) * 60, np.array([5.0, 6, 7]))])
    for stop in (1, 2, 3):
        grids = history_grids.history_grids(
            series, np.zeros(1, int), np.array([stop]), np.array([999])
        )
        assert np.isfinite(grids.reference).all()
        assert grids.tokens.min() >= GRID
        assert grids.tokens.max() < VOCAB_SIZE
    question = MeasurementTable.from_arrow(
        {"src_addr": ["1.2.3.4"], "dst_addr": ["4.3.2.1"]}, questions=True
    )
    assert history_grids.lookup(PairSeries.of(measured(50)), question)[0].tolist() == [-1]


def test_streams_are_a_pure_function_of_stream_and_number():
    table = measured(3000, hosts=40)
    one, other = (
        GridStreams(Network.of(table), streams=2, length=260, seed=3, simulated_fraction=0.1)
        for _ in range(2)
    )
    for stream, number in ((0, 0), (1, 2), (0, 1)):
        chunk = one.chunks([stream], number)[stream]
        again = other.chunks([0, 1], number)[stream]  # whatever is made with it
        for i in range(len(chunk)):
            for got, wanted in zip(chunk.segments(i), again.segments(i), strict=True):
                np.testing.assert_array_equal(got, wanted)
            tokens, weights = chunk.segments(i)
            assert all(len(t) == len(w) for t, w in zip(tokens, weights, strict=True))
            assert sum(map(len, tokens)) <= 260
            assert all(w[-3:].max() >= 1 for w in weights)


def test_networks_without_a_common_node_are_parts_and_small_ones_are_one():
    large, other = measured(2000, hosts=30), measured(900, hosts=20, seed=1)
    moved = {end: getattr(other, end).copy() for end in ("src", "dst")}
    for each in moved.values():
        addresses.as_bytes(each)[:, 12] = 10
    tiny = MeasurementTable.from_arrow(
        {
            "src_addr": [f"172.16.{i}.1" for i in range(30)],
            "dst_addr": [f"172.16.{i}.2" for i in range(30)],
            "rtt": np.arange(30) + 1.0,
        }
    )
    parts = MeasurementTable.concat([large, dataclasses.replace(other, **moved), tiny])
    found = sorted(len(part.measurements) for part in Network.of(parts).parts())
    assert found == [30, 900, 2000]
    alone = Network.of(large)
    assert alone.parts() == [alone]


def test_worlds_ask_only_about_pairs_that_they_do_not_know():
    table = measured(4000, hosts=60)
    network, rng = Network.of(table), np.random.default_rng(0)
    drawn = 0
    for _ in range(20):
        world = worlds.draw_world(network.pairs, network.key, network.nodes.addresses, rng)
        if world is not None:
            drawn += 1
            known, asked = world
            assert not (known.answered + known.failed)[asked.a, asked.b].any()
            a, b, log_rtt = worlds.draw_questions(known, asked, 10, rng)
            assert a.shape == b.shape == log_rtt.shape
            assert not np.isnan(log_rtt).any()
    assert drawn > 10


def test_what_a_run_keeps_comes_back_and_is_thinned_evenly(tmp_path):
    table = measured(3000, hosts=3)
    kept = thinned(table)
    counts = np.unique(pair_keys(kept), return_counts=True)[1]
    whole = np.unique(pair_keys(table), return_counts=True)[1]
    assert (counts <= 160 + 16).all()
    assert (counts >= np.minimum(whole, 160)).all()
    write_known(tmp_path / "known.arrow", kept)
    back = read_known(Location.of(tmp_path))
    order = [np.lexsort((t.rtt, t.time)) for t in (kept, back)]
    for name in ("time", "rtt", "src", "dst"):
        one, other = (getattr(t, name)[o] for t, o in zip((kept, back), order, strict=True))
        np.testing.assert_array_equal(one, other)


def test_random_networks_are_symmetric_finite_and_of_many_scales():
    medians = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        network = random_network(rng)
        assert 40 <= network.n <= 230
        np.testing.assert_allclose(network.level, network.level.T, atol=1e-9)
        a, b = np.triu_indices(network.n, 1)
        log_rtt = network.measure(a, b, 4, rng)
        assert not np.isnan(log_rtt).any()
        medians.append(np.median(log_rtt[np.isfinite(log_rtt)]))
    assert np.log(0.05) < min(medians) < max(medians) < np.log(5000)
    assert np.std(medians) > 0.5
    again = random_network(np.random.default_rng(29))
    np.testing.assert_array_equal(again.level, network.level)


def test_random_series_are_in_time_order_with_failures_below_zero():
    failed = 0
    for seed in range(30):
        time, rtt = random_series(np.random.default_rng(seed), 500)
        assert len(time) == len(rtt) > 300
        assert (np.diff(time) > 0).all()
        assert ((rtt > 0) | (rtt == -1)).all()
        failed += (rtt < 0).sum()
    assert failed > 0


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    pings = directory / "pings.parquet"
    simulate(str(pings), probes=12, days=2.0, measurements=3000)
    prepare_data([str(pings)], output=str(directory / "rows"))
    return directory / "rows"


def test_batches_with_grids_go_on_where_they_stopped_on_any_number_of_processes(rows):
    settings = {"batch_size": 4, "seq_len": 256, "seed": 3, "grid_fraction": 0.5}
    with TrainLoader(rows, **settings) as loader:
        whole = [next(loader) for _ in range(3)]
        state = loader.get_state()
        whole += [next(loader) for _ in range(3)]
    assert any((batch.inputs == GRID).any() for batch in whole)
    assert any((batch.mask == 2).any() for batch in whole)  # what tells most of an answer
    for process in range(2):
        with TrainLoader(rows, **settings, process_index=process, process_count=2) as loader:
            loader.set_state(state)
            for wanted in whole[3:]:
                got, own = next(loader), slice(2 * process, 2 * process + 2)
                for name in ("inputs", "segment_ids", "mask"):
                    np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name)[own])


@pytest.mark.slow
def test_other_processes_make_the_same_batches(rows):
    settings = {"batch_size": 4, "seq_len": 256, "seed": 3, "grid_fraction": 0.75}
    with TrainLoader(rows, **settings) as alone, TrainLoader(rows, **settings, workers=2) as helped:
        for _ in range(15):  # beyond the first chunk
            got, wanted = next(helped), next(alone)
            for name in ("inputs", "targets", "segment_ids", "mask"):
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


def test_fixed_batches_ask_about_a_split_from_the_train_rows(rows):
    settings = {"batch_size": 4, "seq_len": 256, "count": 2, "grid_fraction": 0.5}
    batches = eval_batches(rows, "test", **settings)
    again = eval_batches(rows, "test", **settings)
    assert len(batches) == 2
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        assert (one.inputs == GRID).any(axis=1).sum() == 2


def test_series_that_often_fail_have_something_to_tell_each_answer_against():
    rng = np.random.default_rng(0)
    drawn = [(np.arange(200) * 60, np.where(rng.random(200) < 0.8, -1, 5.0)) for _ in range(5)]
    series = PairSeries.of_series(drawn)
    position = history_grids.moments(series)
    for _ in range(5):
        forgotten = grid_streams._forgotten(position, series, rng)
        assert forgotten.any()
        grids, _ = history_grids.at_moments(series, position, forgotten)
        assert np.isfinite(grids.reference).all()


def test_a_pair_that_is_stored_from_both_ends_does_not_show_its_own_answer():
    table = measured(200, hosts=3)
    turned = dataclasses.replace(table, src=table.dst, dst=table.src)
    both = MeasurementTable.concat([table, turned])
    one, other = PairSeries.of(table), PairSeries.of(both)
    np.testing.assert_array_equal(one.log_rtt, other.log_rtt)
    positions = history_grids.moments(other)
    assert len(positions) > 100
    grids, answers = history_grids.at_moments(other, positions)
    alone = [np.isfinite(answers), np.abs(answers - grids.reference) > 0]
    assert np.all(alone, axis=0).mean() > 0.8


def test_measurements_of_the_same_second_are_not_known_before_each_other():
    rtt = np.array([10.0, 11, 12, 13])
    series = PairSeries.of_series([(np.array([0, 60, 60, 120]), rtt)])
    grids, _ = history_grids.at_moments(series, np.array([1, 2, 3]))
    np.testing.assert_allclose(np.exp(grids.reference), [10, 10, 11], rtol=1e-6)
    assert grids.shown.tolist() == [1, 1, 3]


def test_a_host_that_measured_only_itself_makes_a_world_of_which_nothing_is_known():
    table = MeasurementTable.from_arrow(
        {"src_addr": ["1.1.1.1"], "dst_addr": ["1.1.1.1"], "rtt": [1.0], "event_time": [5]}
    )
    question = MeasurementTable.from_arrow(
        {"src_addr": ["1.1.1.1"], "dst_addr": ["2.2.2.2"]}, questions=True
    )
    ((rows, kind, grids),) = question_grids(question, table)
    assert (rows.tolist(), kind, grids.shown.tolist()) == ([0], "network", [0])


def test_sequences_too_short_for_a_grid_are_refused(rows):
    with pytest.raises(ConfigError, match="seq_len=80 is too short for a grid; set it to 106"):
        TrainLoader(rows, batch_size=2, seq_len=80, seed=0, grid_fraction=0.5)


def test_a_damaged_file_of_what_a_run_knows_is_named(tmp_path):
    write_known(tmp_path / "known.arrow", measured(50))
    whole = (tmp_path / "known.arrow").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"ARROW1" + whole[6:40]):
        (tmp_path / "known.arrow").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"known\.arrow is damaged"):
            read_known(Location.of(tmp_path))
