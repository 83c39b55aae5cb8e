import hashlib
import itertools
import json
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import numpy as np
import pytest

from ping_llm import addresses, tokenizer
from ping_llm.data import pipeline, windows
from ping_llm.data.pipeline import TrainLoader, eval_batches, merge_states
from ping_llm.data.rows import ProbeRows, RowBatch, RowWriter
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError, DataError
from ping_llm.ingest.prepare import prepare_data
from ping_llm.simulation.simulate import simulate

SETTINGS = {"batch_size": 4, "seq_len": 256, "seed": 11}
FIELDS = ("inputs", "targets", "segment_ids", "positions", "mask")


@pytest.fixture(scope="module")
def mixed(write_rows):
    """Rows of very different sizes: many small ones, a few large."""
    sizes = np.random.default_rng(2).lognormal(3.5, 1.5, 120).astype(int) + 1
    return write_rows(sizes.tolist(), sizes[:40].tolist())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # So that a test of some dozen steps passes many chunk boundaries.
    monkeypatch.setattr(pipeline, "CHUNK_SEQUENCES", (4, 4))


def take(loader, n):
    return [next(loader) for _ in range(n)]


def batches_of(data, n, **settings):
    with TrainLoader(data, **{**SETTINGS, **settings}) as loader:
        return take(loader, n)


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def segments_of(batches, stream):
    """Returns the token strings of all whole segments of one stream."""
    found = []
    for batch in batches:
        ids = batch.segment_ids[stream]
        for segment in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == segment)
            # The last token of a segment that ends the sequence is a target only.
            last = [batch.targets[stream, at[-1]]] if batch.mask[stream, at[-1]] else []
            found.append(bytes(np.array([*batch.inputs[stream, at], *last], np.uint16)))
    return found


# --- what is in a batch -------------------------------------------------------------------------


def test_each_stream_reads_every_batch_size_th_window_each_once(mixed):
    n_streams, steps = SETTINGS["batch_size"], 60
    batches = batches_of(mixed, steps)
    rows = ProbeRows(mixed, "train")
    order = windows.WindowOrder(rows.n_measurements, SETTINGS["seed"])
    for stream in range(n_streams):
        found = segments_of(batches, stream)
        drawn = order[stream + n_streams * np.arange(len(found) + 200)]
        length = SETTINGS["seq_len"] + 1
        tokens, offsets = windows.encode_windows(rows, drawn, seed=SETTINGS["seed"], length=length)
        expected = [bytes(tokens[a:b]) for a, b in itertools.pairwise(offsets)]
        missing = Counter(found) - Counter(expected)
        assert not missing
        # Only of the chunk that is being read, some dozen windows, some are still to come.
        behind = Counter(expected[: len(found)]) - Counter(found)
        assert sum(behind.values()) < 16 < len(found) // 4


def test_all_windows_of_an_epoch_come_before_much_of_the_next(write_rows):
    data = write_rows([40, 7, 90, 33])  # 2 + 1 + 3 + 2 windows
    sources = Counter()
    for batch in batches_of(data, 12, batch_size=1):
        for segment in segments_of([batch], 0):
            decoded, problems = tokenizer.decode(np.frombuffer(segment, np.uint16))
            assert not problems
            sources[bytes(decoded.src[0])] += 1
    ranked = sorted(sources.values())
    epochs = ranked[0]
    assert all(abs(n - k * epochs) <= 2 * k for n, k in zip(ranked, (1, 2, 2, 3), strict=True))


def test_no_measurement_is_cut_and_segments_do_not_mix(mixed):
    for batch in batches_of(mixed, 30):
        for stream in range(SETTINGS["batch_size"]):
            for segment in segments_of([batch], stream):
                decoded, problems = tokenizer.decode(np.frombuffer(segment, np.uint16))
                assert not problems
                assert len(set(decoded.src.tolist())) == 1


def test_a_batch_mixes_many_probes(mixed):
    for batch in batches_of(mixed, 10, batch_size=16):
        sources = set()
        for stream in range(16):
            for segment in segments_of([batch], stream):
                decoded, _ = tokenizer.decode(np.frombuffer(segment, np.uint16))
                sources.add(bytes(decoded.src[0]))
        assert len(sources) >= 12


def test_padding_of_mixed_rows_is_below_two_percent(mixed, monkeypatch):
    monkeypatch.undo()
    padding = [
        np.mean(batch.segment_ids == 0)
        for batch in batches_of(mixed, 300, batch_size=8, seq_len=1024)
    ]
    assert np.mean(padding) < 0.005


# --- what batches depend on ---------------------------------------------------------------------


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(mixed):
    batches = batches_of(mixed, 8)
    assert_equal(batches, batches_of(mixed, 8))
    others = batches_of(mixed, 8, seed=12)
    assert not np.array_equal(batches[0].inputs, others[0].inputs)


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_parts_of_several_processes_make_the_batch_of_one(mixed, process_count):
    parts = [
        batches_of(mixed, 20, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for name in FIELDS:
        whole = [np.concatenate([getattr(p, name) for p in part]) for part in zip(*parts)]  # noqa: B905
        np.testing.assert_array_equal(
            np.stack(whole), np.stack([getattr(b, name) for b in batches_of(mixed, 20)])
        )


# --- stopping and going on ----------------------------------------------------------------------


def test_going_on_at_any_of_20_random_steps_gives_the_stream_of_an_unbroken_run(mixed):
    batches = batches_of(mixed, 90)
    states = {}
    with TrainLoader(mixed, **SETTINGS) as loader:
        for step in range(81):
            states[step] = json.loads(json.dumps(loader.get_state()))
            next(loader)
    for step in np.random.default_rng(0).choice(81, 20, replace=False).tolist():
        with TrainLoader(mixed, **SETTINGS) as loader:
            loader.set_state(states[step])
            assert_equal(take(loader, 5), batches[step : step + 5])


def test_going_back_while_reading_ahead_is_exact(mixed):
    with TrainLoader(mixed, **SETTINGS) as loader:
        take(loader, 3)
        state = loader.get_state()
        ahead = take(loader, 5)
        loader.set_state(state)
        assert_equal(take(loader, 5), ahead)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (2, 4), (1, 2)])
def test_merged_states_go_on_in_another_number_of_processes(mixed, before, after):
    states = []
    for i in range(before):
        with TrainLoader(mixed, **SETTINGS, process_index=i, process_count=before) as loader:
            take(loader, 13)
            states.append(loader.get_state())
    merged = merge_states(states[::-1])
    parts = []
    for i in range(after):
        with TrainLoader(mixed, **SETTINGS, process_index=i, process_count=after) as loader:
            loader.set_state(merged)
            parts.append(next(loader).inputs)
    np.testing.assert_array_equal(np.concatenate(parts), batches_of(mixed, 14)[13].inputs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 12}, "seed was 11, now it is 12"),
        ({"batch_size": 8}, "batch_size was 4, now it is 8"),
        ({"seq_len": 300}, "seq_len was 256, now it is 300"),
        (
            {"window_config": WindowConfig(result_last_fraction=1.0)},
            "result_last_fraction was 0.0, now it is 1.0",
        ),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(mixed, change, named):
    with TrainLoader(mixed, **SETTINGS) as loader:
        state = loader.get_state()
    with (
        TrainLoader(mixed, **{**SETTINGS, **change}) as loader,
        pytest.raises(ConfigError, match=named),
    ):
        loader.set_state(state)


def test_a_state_of_other_data_is_refused(mixed, write_rows):
    with TrainLoader(mixed, **SETTINGS) as loader:
        state = loader.get_state()
    with (
        TrainLoader(write_rows([50, 60]), **SETTINGS) as loader,
        pytest.raises(ConfigError, match="its data was"),
    ):
        loader.set_state(state)


def test_the_fingerprint_does_not_depend_on_how_long_the_data_took_to_make(write_rows):
    data = write_rows([50])
    before = pipeline.data_fingerprint(data)
    metadata = json.loads((data / "dataset.json").read_text())
    metadata |= {"seconds": 12.5, "peak_rss_bytes": 10**9}
    (data / "dataset.json").write_text(json.dumps(metadata))
    assert pipeline.data_fingerprint(data) == before
    (data / "dataset.json").write_text(json.dumps(metadata | {"seed": 1}))
    assert pipeline.data_fingerprint(data) != before


def test_a_data_set_of_an_earlier_version_keeps_the_name_that_runs_know_it_by(write_rows):
    data = write_rows([50])
    metadata = json.loads((data / "dataset.json").read_text()) | {"fingerprint": "0" * 64}
    (data / "dataset.json").write_text(json.dumps(metadata | {"seconds": 1.5}))
    hashed = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    assert pipeline.data_fingerprint(data) == hashed[:16]


def test_the_state_of_one_process_of_two_is_refused_by_the_other(mixed):
    with TrainLoader(mixed, **SETTINGS, process_index=0, process_count=2) as loader:
        state = loader.get_state()
    with (
        TrainLoader(mixed, **SETTINGS, process_index=1, process_count=2) as loader,
        pytest.raises(ConfigError, match=r"holds 2 streams from 0; .* needs 2 from 2"),
    ):
        loader.set_state(state)


# --- small, odd and bad data --------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1, 1], [31], [5, 700]])
def test_data_of_few_measurements_fill_any_number_of_streams(write_rows, sizes):
    data = write_rows(sizes)
    with TrainLoader(data, batch_size=8, seq_len=64, seed=0) as loader:
        batches = take(loader, 40)
        state = loader.get_state()
        after = next(loader)
        loader.set_state(state)
        assert_equal([next(loader)], [after])
    assert all((batch.mask.sum(axis=1) > 0).all() for batch in batches)


def test_no_train_rows_is_an_error(write_rows):
    with pytest.raises(DataError, match="has no train rows"):
        TrainLoader(write_rows([], [30]), **SETTINGS)


def test_a_directory_without_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no dataset\.json"):
        TrainLoader(tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3, "process_count": 2}, "batch_size=3 .* process_count=2"),
        ({"seq_len": 45}, "seq_len=45 .* 46 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_values(mixed, change, named):
    with pytest.raises(ConfigError, match=named):
        TrainLoader(mixed, **{**SETTINGS, **change})


def test_rows_out_of_time_order_that_overfill_a_sequence_are_an_error(tmp_path):
    n, writer = 400, RowWriter(tmp_path, "train")
    address = addresses.from_bytes(np.full((n, 16), 7, np.uint8))
    writer.append(
        RowBatch(
            src=address[:1],
            family=np.array([4], np.int8),
            offsets=np.array([0, n]),
            time=np.arange(n)[::-1] * 3600,
            dst=address,
            rtt=np.ones(n, np.float32),
        )
    )
    writer.close()
    metadata = {"schema_version": 1, "rows": {"train": 1, "valid": 0, "test": 0}}
    (tmp_path / "dataset.json").write_text(json.dumps(metadata))
    with (
        pytest.raises(DataError, match="row 0 is not in time order"),
        TrainLoader(tmp_path, **SETTINGS) as loader,
    ):
        take(loader, 20)


# --- the thread ----------------------------------------------------------------------


def test_closing_ends_the_background_thread(mixed):
    before = threading.active_count()
    with TrainLoader(mixed, **SETTINGS) as loader:
        next(loader)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.slow
def test_leaving_without_closing_is_silent(mixed):
    script = f"""
        from pathlib import Path
        from ping_llm.data.pipeline import TrainLoader
        if __name__ == "__main__":
            loader = TrainLoader(Path({str(mixed)!r}), batch_size=4, seq_len=128, seed=0)
            next(loader)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_batches_are_fixed_and_cover_every_probe(mixed):
    settings = {"batch_size": 8, "seq_len": 256, "count": 5}
    batches = eval_batches(mixed, "valid", **settings)
    assert_equal(batches, eval_batches(mixed, "valid", **settings))
    assert [batch.inputs.shape for batch in batches] == [(8, 256)] * 5
    sources = set()
    for stream in range(8):
        for segment in segments_of(batches, stream):
            decoded, problems = tokenizer.decode(np.frombuffer(segment, np.uint16))
            assert not problems
            sources.add(bytes(decoded.src[0]))
    assert len(sources) >= 38  # of 40; the last windows may miss the cut


def test_of_data_split_by_probe_evaluation_shows_new_sources(tmp_path):
    simulate(tmp_path / "p.parquet", probes=30, days=1.0, measurements=3000, seed=0)
    prepare_data([str(tmp_path / "p.parquet")], output=tmp_path / "rows", split="probe", workers=1)

    def sources(part):
        settings = {"batch_size": 4, "seq_len": 256, "count": 12}
        batches = eval_batches(tmp_path / "rows", part, **settings)
        assert len(batches) == 12
        decoded = [
            tokenizer.decode(np.frombuffer(segment, np.uint16))[0].src
            for stream in range(4)
            for segment in segments_of(batches, stream)
        ]
        return {bytes(address) for part in decoded for address in part}

    trained = {bytes(row) for b in ProbeRows(tmp_path / "rows", "train").batches for row in b.src}
    held_out = {bytes(row) for b in ProbeRows(tmp_path / "rows", "test").batches for row in b.src}
    assert held_out & trained  # they measured to destinations that were held out
    assert sources("test") == held_out - trained


def ends_with_the_result(segment):
    """Returns whether every measurement of a segment has its RTT or failure last."""
    text = tokenizer.format_tokens(np.frombuffer(segment, np.uint16))
    fields = [line.split() for line in text.splitlines()]
    return all(line[-1] == "FAILED" or line[-3] == "RTT_START" for line in fields)


def test_results_stand_last_in_evaluation_and_as_asked_in_training(mixed):
    batches = eval_batches(mixed, "valid", batch_size=4, seq_len=256, count=3)
    assert all(ends_with_the_result(s) for stream in range(4) for s in segments_of(batches, stream))
    for fraction in (0.0, 1.0):
        batches = batches_of(mixed, 5, window_config=WindowConfig(result_last_fraction=fraction))
        found = [
            ends_with_the_result(s) for stream in range(4) for s in segments_of(batches, stream)
        ]
        assert all(found) == (fraction == 1.0)


def test_a_split_without_rows_has_no_evaluation_batches(mixed):
    assert eval_batches(mixed, "test", batch_size=2, seq_len=64, count=2) == []


def test_evaluation_batches_of_one_tiny_row_are_still_full_in_number(write_rows):
    batches = eval_batches(write_rows([3], [2]), "valid", batch_size=2, seq_len=64, count=3)
    assert [batch.inputs.shape for batch in batches] == [(2, 64)] * 3
