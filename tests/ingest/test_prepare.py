import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import emulators
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tables import T0, files_of, make_table

from ping_llm import addresses
from ping_llm.data.pipeline import TrainLoader
from ping_llm.data.rows import SPLITS, ProbeRows, data_fingerprint
from ping_llm.errors import ConfigError, DataError, PingLLMError, StorageError
from ping_llm.ingest import local, sources
from ping_llm.ingest.formats import parquet as parquet_format
from ping_llm.ingest.prepare import prepare_data
from ping_llm.ingest.settings import PrepareSettings
from ping_llm.inspection.dataset import inspect_data
from ping_llm.outputs import claim
from ping_llm.storage import Location


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(make_table(5000), path, row_group_size=700)
    return path


def records(directory, split):
    """Returns (source, time, destination, rtt) of every measurement of a split, in order."""
    rows = ProbeRows(directory, split)
    if not len(rows):
        return []
    table = rows.to_table()
    return [
        (s.tobytes(), int(t), d.tobytes(), float(r))
        for s, t, d, r in zip(table.src, table.time, table.dst, table.rtt, strict=True)
    ]


def expected_records(*tables):
    found = []
    for batch in sources.read_measurements([str(t) for t in tables]):
        columns = (getattr(batch, c).tolist() for c in ("src", "time", "dst", "rtt"))
        found.extend(zip(*columns, strict=True))
    prefix = bytes(10) + b"\xff\xff"
    return sorted(found, key=lambda r: (not r[0].startswith(prefix), r))


def test_every_measurement_is_in_one_split_in_order_of_source_time_destination(parquet, tmp_path):
    result = prepare_data([str(parquet)], output=tmp_path / "rows")
    every = [records(tmp_path / "rows", split) for split in SPLITS]
    assert sum(map(len, every)) == result.measurements == 5000
    expected = expected_records(parquet)
    order = {record: i for i, record in enumerate(expected)}
    for split in every:
        places = [order[record] for record in split]
        assert places == sorted(places)
    assert sorted(itertools.chain(*every)) == sorted(expected)
    assert result.failed == sum(r[3] < 0 for r in expected)
    assert result.probes == len({r[0] for r in expected})
    assert result.split_measurements == {s: len(e) for s, e in zip(SPLITS, every, strict=True)}


def test_rows_hold_one_source_sorted_by_time_within_the_cap(parquet, tmp_path):
    result = prepare_data([str(parquet)], output=tmp_path / "rows", row_cap_mb=0.001)
    rows = ProbeRows(tmp_path / "rows", "train")
    assert len(rows) == result.rows["train"] > 40
    assert rows.n_measurements.max() == 1000 // 28
    for batch in rows.batches:
        np.testing.assert_array_equal(batch.family, addresses.family(batch.src))
        for a, b in itertools.pairwise(batch.offsets):
            assert (np.diff(batch.time[a:b]) >= 0).all()


@pytest.mark.parametrize(
    ("split", "both_ends"),
    [("pair", False), ("time", False), ("probe", False), ("pair", True), ("time", True)],
)
def test_the_files_do_not_depend_on_workers_memory_units_or_order_of_inputs(
    tmp_path, monkeypatch, split, both_ends
):
    settings, paths = {"split": split, "both_ends": both_ends}, []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.parquet"))
        pq.write_table(make_table(3000, seed=i, days=1 + i), paths[-1], row_group_size=500)
    plain = tmp_path / "plain"
    prepare_data(paths, output=plain, workers=1, **settings)
    monkeypatch.setattr(parquet_format, "UNIT_ROWS", 300)
    monkeypatch.setattr(parquet_format, "BATCH_ROWS", 97)
    monkeypatch.setattr(local, "_BYTES_PER_MEASUREMENT", 10**9)  # many runs and ranges
    for workers, order in ((1, [2, 0, 1]), (4, [1, 2, 0])):
        other = tmp_path / f"other-{workers}"
        inputs = [paths[i] for i in order]
        prepare_data(inputs, output=other, workers=workers, **settings)
        assert files_of(other) == files_of(plain)
    a, b = (json.loads((d / "dataset.json").read_text()) for d in (plain, other))
    assert a["fingerprint"] == b["fingerprint"] == data_fingerprint(plain)
    prepare_data(paths, output=tmp_path / "seed", seed=1, **settings)
    assert data_fingerprint(tmp_path / "seed") != a["fingerprint"]


def test_pairs_of_train_are_never_in_test_from_either_end(parquet, tmp_path):
    prepare_data([str(parquet)], output=tmp_path / "rows", test_fraction=0.3)
    pairs = [{frozenset((r[0], r[2])) for r in records(tmp_path / "rows", s)} for s in SPLITS]
    assert all(pairs)
    for one, other in itertools.combinations(pairs, 2):
        assert not one & other


def test_a_held_out_probe_is_nowhere_in_train(tmp_path):
    table = make_table(4000, sources_=30)
    swapped = table.rename_columns({"src_addr": "dst_addr", "dst_addr": "src_addr"})
    pq.write_table(pa.concat_tables([table, swapped.select(table.column_names)]), tmp_path / "m.pq")
    prepare_data([str(tmp_path / "m.pq")], output=tmp_path / "rows", split="probe", seed=3)
    train, valid, test = (records(tmp_path / "rows", split) for split in SPLITS)
    assert train
    in_train = {r[0] for r in train} | {r[2] for r in train}
    held_out = {r[0] for r in valid + test} - in_train
    assert held_out
    assert not {r[2] for r in train} & held_out


def test_time_holds_out_the_end_of_each_input_by_itself(tmp_path):
    for i, days in enumerate((1, 10)):
        pq.write_table(make_table(2000, seed=i, days=days), tmp_path / f"{i}.parquet")
    inputs = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    prepare_data(inputs, output=tmp_path / "rows", split="time", test_fraction=0.2)
    expected = []
    for path in inputs:
        mine = expected_records(path)
        first, last = (f(r[1] for r in mine) for f in (min, max))
        expected += [r for r in mine if r[1] > last - int(0.2 * (last - first))]
    assert sorted(records(tmp_path / "rows", "test")) == sorted(expected)


@pytest.mark.parametrize("split", ["pair", "time", "probe"])
def test_with_both_ends_train_has_each_measurement_from_its_destination_too(tmp_path, split):
    table = make_table(3000)
    of_itself = {"src_addr": "10.0.1.1", "dst_addr": "10.0.1.1", "ip_version": 4, "rtt": 0.1}
    itself = pa.Table.from_pylist([of_itself | {"event_time": T0 + 5}], table.schema)
    pq.write_table(pa.concat_tables([table, itself]), tmp_path / "m.parquet")
    made = {}
    for both_ends in (False, True):
        output = tmp_path / str(both_ends)
        inputs = [str(tmp_path / "m.parquet")]
        made[both_ends] = prepare_data(inputs, output=output, split=split, both_ends=both_ends)
    one, both = (records(tmp_path / name, "train") for name in ("False", "True"))
    mirrored = [(d, t, s, r) for s, t, d, r in one if s != d]
    assert sorted(both) == sorted(one + mirrored)
    for held in ("valid", "test"):
        name = f"{held}-00000-of-00001.arrow"
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()
    everything = [r for s in SPLITS for r in records(tmp_path / "True", s)]
    assert made[True].measurements == len(everything)
    assert made[True].failed == sum(r[3] < 0 for r in everything)
    assert made[True].probes == len({r[0] for r in everything})
    assert made[True].split_measurements["train"] == len(one) + len(mirrored)
    assert all(
        check.ok for check in inspect_data(tmp_path / "True").checks if "splits" in check.name
    )


def test_rejected_records_are_counted_and_kept_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    good = {"type": "ping", "af": 4, "from": "1.2.3.4", "dst_addr": "5.6.7.8", "min": 3}
    lines = [json.dumps(good | {"timestamp": T0 + i}) for i in range(60)]
    for i in (0, 13, 14, 40, 59):
        lines[i] = f"broken {i}"
    lines[20] = json.dumps(good | {"timestamp": "never"})
    (tmp_path / "a.ndjson").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.ndjson").write_text("\n\n" + lines[13])
    result = prepare_data([str(tmp_path)], output=tmp_path / "rows", workers=3)
    assert result.measurements == 54
    assert result.rejected == {"invalid event_time": 1, "not a JSON object": 6}
    kept = pq.read_table(tmp_path / "rows" / "rejected.parquet").to_pylist()
    assert [r["line"] for r in kept] == [1, 14, 15, 21, 41, 60, 3]
    assert [r["record"] for r in kept] == [*(lines[i] for i in (0, 13, 14, 20, 40, 59)), lines[13]]
    assert {r["file"] for r in kept[:6]} == {str(tmp_path / "a.ndjson")}


def test_run_again_it_does_nothing_and_returns_the_same(parquet, tmp_path, monkeypatch):
    output = tmp_path / "rows"
    first = prepare_data([str(parquet)], output=output)
    before = {p: p.stat().st_mtime_ns for p in output.iterdir()}
    monkeypatch.chdir(tmp_path)
    again = prepare_data(["m.parquet"], output="rows", workers=1, memory_limit="1GB")
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in output.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "time"}, "split='time', was 'pair'"),
        ({"seed": 1}, "seed=1, was 0"),
        ({"valid_fraction": 0.2}, "valid_fraction=0.2, was 0.05"),
        ({"test_fraction": 0.2}, "test_fraction=0.2, was 0.1"),
        ({"row_cap_mb": 4}, "row_cap_mb=4.0, was 8.0"),
        ({"both_ends": True}, "both_ends=True, was False"),
    ],
)
def test_other_settings_on_the_same_output_are_refused_by_name(parquet, tmp_path, changes, message):
    prepare_data([str(parquet)], output=tmp_path / "rows")
    before = files_of(tmp_path / "rows")
    with pytest.raises(ConfigError, match=message):
        prepare_data([str(parquet)], output=tmp_path / "rows", **changes)
    assert files_of(tmp_path / "rows") == before


def test_other_inputs_on_the_same_output_are_refused(parquet, tmp_path):
    prepare_data([str(parquet)], output=tmp_path / "rows")
    table = pq.read_table(parquet)
    one_bit = table.set_column(4, "rtt", pa.array(np.nextafter(table["rtt"].to_numpy(), 0)))
    pq.write_table(one_bit, parquet, row_group_size=700)
    with pytest.raises(ConfigError, match=r"inputs='m.parquet \(hash \w+\)', was 'm.parquet"):
        prepare_data([str(parquet)], output=tmp_path / "rows")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "source"}, "split='source' is not one of pair, time, probe"),
        ({"engine": "dask"}, "engine='dask' is not one of"),
        ({"valid_fraction": -1}, "valid_fraction=-1"),
        ({"test_fraction": 1.5}, "test_fraction=1.5"),
        ({"test_fraction": 0.96}, "leave nothing to train on"),
        ({"row_cap_mb": 0}, "row_cap_mb=0"),
        ({"row_cap_mb": 1e9}, "row_cap_mb=1000000000.0"),
        ({"row_cap_mb": float("nan")}, "row_cap_mb=nan"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -3}, "seed=-3"),
        ({"memory_limit": "lots"}, "memory_limit='lots' is not a size"),
        ({"memory_limit": "4XB"}, "memory_limit='4XB' is not a size"),
        ({"memory_limit": "-4GB"}, "memory_limit='-4GB' is not a size"),
        ({"memory_limit": "1MB"}, "memory_limit=1MB must be at least"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(parquet, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare_data([str(parquet)], output=tmp_path / "rows", **changes)
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4e9),
        ("512MiB", 2**29),
        ("1.5gb", 1.5e9),
        ("2 G", 2e9),
        ("500000000", 5e8),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_decimal_unless_binary_is_said(text, size):
    chosen = PrepareSettings(inputs=("in",), output="out", memory_limit=text)
    assert chosen.memory_bytes == int(size)


def only_bad(tmp_path):
    (tmp_path / "x.ndjson").write_text('{"type":"ping"}\nx\ny\n')


def only_blank(tmp_path):
    (tmp_path / "x.ndjson").write_text("\n\n")


def occupied(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.tex").write_text("precious")


def other_version(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "dataset.json").write_text('{"schema_version": 0}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (only_bad, r"every record was rejected \(2 x not a JSON object, 1 x missing event_time\)"),
        (only_blank, "there is no record"),
        (occupied, "exists and is not empty"),
        (lambda p: (p / "rows").write_text("a file"), "exists and is not a directory"),
        (other_version, "schema_version 0; expected 1"),
    ],
)
def test_nothing_usable_or_no_place_for_it_is_one_clear_error(tmp_path, damage, message):
    (tmp_path / "x.ndjson").write_text("x\n")
    damage(tmp_path)
    with pytest.raises(PingLLMError, match=message) as caught:
        prepare_data([str(tmp_path / "x.ndjson")], output=tmp_path / "rows")
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_output_that_cannot_be_made_is_a_storage_error(parquet):
    with pytest.raises(StorageError, match="cannot be written"):
        prepare_data([str(parquet)], output="/proc/rows")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(parquet, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local, "Run", no_space)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        prepare_data([str(parquet)], output=tmp_path / "rows")
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]


def test_a_file_that_breaks_midway_is_an_error_and_leaves_nothing(parquet, tmp_path):
    data = bytearray(parquet.read_bytes())
    data[20:200] = bytes(180)
    (tmp_path / "broken.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read as parquet"):
        prepare_data([str(tmp_path / "*.parquet")], output=tmp_path / "rows", workers=4)
    assert not (tmp_path / "rows").exists()


def test_a_second_process_on_the_same_output_is_refused_while_the_first_lives(parquet, tmp_path):
    with (
        claim(Location.of(tmp_path / "rows"), what="prepare-data"),
        pytest.raises(ConfigError, match="is being written by another process"),
    ):
        prepare_data([str(parquet)], output=tmp_path / "rows")


def test_a_link_planted_where_the_work_could_go_leads_nowhere(parquet, tmp_path):
    victim = tmp_path / "victim"
    (victim / "rows").mkdir(parents=True)
    for path in (victim / "rows" / "thesis.txt", victim / "lock"):
        path.write_text("precious")
    (tmp_path / ".rows.preparing").symlink_to(victim)
    prepare_data([str(parquet)], output=tmp_path / "rows")
    assert (victim / "rows" / "thesis.txt").read_text() == (victim / "lock").read_text()
    (tmp_path / ".other.lock").symlink_to(victim / "lock")
    with pytest.raises(StorageError, match="other cannot be written"):
        prepare_data([str(parquet)], output=tmp_path / "other")
    assert (victim / "lock").read_text() == "precious"


COMMAND = "from ping_llm.cli import main; main()"


def start(parquet, output, more=()):
    command = [sys.executable, "-c", COMMAND, "prepare-data", str(parquet), "--output", str(output)]
    return subprocess.Popen(
        [*command, *more, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_nothing_or_all_and_the_next_run_succeeds(tmp_path):
    """PING_LLM_KILLS sets how many moments are tried."""
    parquet = tmp_path / "m.parquet"
    pq.write_table(make_table(600_000, sources_=200), parquet, row_group_size=20_000)
    began = time.monotonic()
    with start(parquet, tmp_path / "whole") as process:
        whole, _ = process.communicate()
    seconds = time.monotonic() - began
    expected = files_of(tmp_path / "whole")
    output, rng = tmp_path / "rows", np.random.default_rng(0)
    complete = 0
    kills = int(os.environ.get("PING_LLM_KILLS", "8"))
    for moment in rng.uniform(0.15, 1.02, kills) * seconds:
        with start(parquet, output) as process:
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        if output.exists():
            assert files_of(output) == expected
            complete += 1
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
    assert complete < kills
    with start(parquet, output) as process:
        again, _ = process.communicate()
    assert process.returncode == 0
    assert files_of(output) == expected
    drop = ("seconds", "peak_rss_bytes")
    a, b = ({k: v for k, v in json.loads(x).items() if k not in drop} for x in (whole, again))
    assert a == b
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"m.parquet", "whole", "rows"}


def test_sigterm_stops_it_and_leaves_nothing(tmp_path):
    fifo = tmp_path / "m.ndjson"
    line = json.dumps(
        {"type": "ping", "timestamp": T0, "from": "1.2.3.4", "dst_addr": "5.6.7.8", "min": 1}
    )
    fifo.write_text((line + "\n") * 400_000)
    with start(fifo, tmp_path / "rows") as process:
        while process.poll() is None and not list(tmp_path.glob(".ping-llm-*")):
            time.sleep(0.01)
        process.terminate()
        process.communicate()
    assert process.returncode == 143
    assert [p.name for p in tmp_path.iterdir()] == ["m.ndjson"]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0, 86400])
def test_memory_stays_within_the_limit_for_one_source_also_at_one_time(tmp_path, spread):
    table = make_table(6_000_000, sources_=1)
    times = np.random.default_rng(0).integers(0, spread + 1, len(table)) + T0
    table = table.set_column(0, "event_time", pa.array(times, pa.timestamp("s")))
    pq.write_table(table, tmp_path / "m.parquet")
    limit = ["--memory-limit", "600MB", "--workers", "2"]
    with start(tmp_path / "m.parquet", tmp_path / "rows", more=limit) as process:
        result, _ = process.communicate()
    result = json.loads(result)
    assert result["measurements"] == 6_000_000
    assert result["peak_rss_bytes"] < 600e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("emulator", "bucket"),
    [(emulators.s3, "s3://bucket"), (emulators.gcs, "gs://anonymous@bucket")],
)
def test_inputs_and_outputs_may_be_in_an_object_store(
    parquet, tmp_path, monkeypatch, emulator, bucket
):
    plain = tmp_path / "rows"
    prepare_data([str(parquet)], output=plain)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (tmp_path / "log").open("w") as log, emulator(log) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        Location(f"{bucket}/in/m.parquet").upload(parquet)
        first = prepare_data([f"{bucket}/in/*.parquet"], output=f"{bucket}/out")
        assert prepare_data([f"{bucket}/in"], output=f"{bucket}/out") == first
        copy = tmp_path / "copy"
        for file in Location(f"{bucket}/out").find():
            file.location.download(copy / file.location.name)
        assert files_of(copy) == files_of(plain)
        with pytest.raises(ConfigError, match="seed=1, was 0"):
            prepare_data([f"{bucket}/in"], output=f"{bucket}/out", seed=1)
        with pytest.raises(ConfigError, match="exists and is not empty"):
            prepare_data([f"{bucket}/in"], output=f"{bucket}/in")
        # What reads rows and measurements finds them there too.
        assert inspect_data(f"{bucket}/in").measurements == first.measurements
        assert inspect_data(f"{bucket}/out").measurements == first.measurements
        settings = dict(batch_size=2, seq_len=256, seed=0)
        firsts = []
        for rows in (plain, f"{bucket}/out"):
            with TrainLoader(rows, **settings) as loader:
                firsts.append(next(loader).inputs)
        np.testing.assert_array_equal(*firsts)


def test_threads_end_with_the_work(parquet, tmp_path):
    before = threading.active_count()
    prepare_data([str(parquet)], output=tmp_path / "rows", workers=4)
    assert threading.active_count() == before
