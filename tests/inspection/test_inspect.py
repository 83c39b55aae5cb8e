import contextlib
import dataclasses
import html
import json
import re
from pathlib import Path

import emulators
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ping_llm import addresses, tokenizer
from ping_llm.data.rows import SPLITS, RowBatch, RowWriter
from ping_llm.errors import ConfigError, PingLLMError, StorageError
from ping_llm.ingest.prepare import prepare_data
from ping_llm.inspection.dataset import inspect_data
from ping_llm.inspection.page import html_page
from ping_llm.inspection.terminal import bars, terminal_text
from ping_llm.simulation.simulate import SCHEMA, simulate
from ping_llm.storage import Location

N = 20_000
T0 = 1_700_000_000


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "s.parquet"
    simulate(path, probes=40, days=2.0, measurements=N, seed=3)
    return path


@pytest.fixture(scope="module")
def rows(raw):
    directory = raw.parent / "rows"
    prepare_data([str(raw)], output=directory, workers=1)
    return directory


def check(result, name):
    (found,) = [c for c in result.checks if c.name == name]
    return found


def table_of(path):
    return pq.read_table(path).to_pydict()


# --- numbers ---


def test_the_figures_are_those_of_a_plain_count(raw):
    result, table = inspect_data(raw), table_of(raw)
    src, dst, rtt = table["src_addr"], table["dst_addr"], np.array(table["rtt"])
    version = np.array(table["ip_version"])
    assert result.kind == "measurements"
    assert result.measurements == N
    assert result.failed_fraction == pytest.approx(np.mean(rtt < 0))
    assert result.ipv6_fraction == pytest.approx(np.mean(version == 6))
    assert result.probes == len(set(src))
    assert result.destinations == len(set(dst))
    assert result.pairs == len({frozenset(pair) for pair in zip(src, dst, strict=True)})
    assert result.time_first == f"{min(table['event_time']):%Y-%m-%dT%H:%M:%S}Z"
    assert result.time_last == f"{max(table['event_time']):%Y-%m-%dT%H:%M:%S}Z"
    assert result.estimated == []
    assert result.rejected == {}
    for name, chosen in (("ipv4", version == 4), ("ipv6", version == 6)):
        family = result.families[name]
        assert family["measurements"] == np.count_nonzero(chosen)
        answered = rtt[chosen & (rtt >= 0)]
        for q in (5, 25, 50, 75, 95):
            expected = np.percentile(answered, q, method="inverted_cdf")
            assert family["rtt_ms"][f"p{q}"] == pytest.approx(expected, rel=3e-4)
    assert all(c.ok for c in result.checks)


def test_distributions_add_up_to_what_there_is(raw):
    result, table = inspect_data(raw), table_of(raw)
    rtt, over_time = result.distributions["rtt_ms"], result.distributions["time"]
    n_failed = sum(value < 0 for value in table["rtt"])
    assert sum(rtt["ipv4"]) + sum(rtt["ipv6"]) == N - n_failed
    assert len(rtt["edges"]) == len(rtt["ipv4"]) + 1
    assert sum(over_time["ipv4"]) + sum(over_time["ipv6"]) == N
    assert sum(over_time["failed"]) == n_failed
    assert sum(result.distributions["measurements_per_probe"]["probes"]) == result.probes
    top = result.top_sources[0]
    mine = [r for a, r in zip(table["src_addr"], table["rtt"], strict=True) if a == top["address"]]
    assert (
        top["measurements"]
        == len(mine)
        == max(table["src_addr"].count(a) for a in set(table["src_addr"]))
    )
    assert top["failed_fraction"] == pytest.approx(np.mean(np.array(mine) < 0))
    assert top["mean_rtt_ms"] == pytest.approx(np.mean([r for r in mine if r >= 0]), rel=1e-5)


def test_rows_and_the_file_they_are_from_have_the_same_figures(raw, rows):
    of_raw, of_rows = inspect_data(raw), inspect_data(rows)
    assert of_rows.kind == "rows"
    names = "measurements failed_fraction ipv6_fraction probes destinations pairs duplicates"
    for name in f"{names} time_first time_last rtt_ms families distributions".split(" "):
        assert getattr(of_raw, name) == getattr(of_rows, name), name
    assert sum(of_rows.measurements_by_split.values()) == N
    assert set(of_rows.rows) == set(SPLITS)
    assert all(c.ok for c in of_rows.checks)


def test_windows_are_counted_as_training_packs_them(rows):
    found = inspect_data(rows).windows
    assert 0 <= found["padding_fraction"] < 0.05
    assert found["windows_per_sequence"] >= 1
    assert found["tokens"]["p95"] <= found["seq_len"] + 1
    assert found["measurements"]["p5"] >= 1


def test_every_check_is_explained_in_the_documents(rows):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "troubleshooting" / "data-inspection.md").read_text()
    for c in inspect_data(rows).checks:
        assert f"| {c.name} |" in page


def test_the_result_is_json(raw, rows):
    for path in (raw, rows):
        text = json.dumps(dataclasses.asdict(inspect_data(path, samples=1)), allow_nan=False)
        keys = (
            "measurements failed_fraction ipv6_fraction probes time_first time_last rtt_ms checks"
        )
        assert set(keys.split()) <= set(json.loads(text))


# --- sample contexts ---


def test_samples_hold_measurements_of_their_source_that_exist(raw, rows):
    table = table_of(raw)
    known = {
        (s, d, None if r < 0 else int(tokenizer.encode_rtt(np.array([r]))[0]))
        for s, d, r in zip(table["src_addr"], table["dst_addr"], table["rtt"], strict=True)
    }
    for path in (raw, rows):
        samples = inspect_data(path, samples=5).samples
        assert len(samples) == 5
        for sample in samples:
            found, problems = tokenizer.decode(sample.tokens)
            assert problems == []
            assert len(found) >= 1
            assert len(sample.tokens) <= 1025
            assert set(addresses.to_text(found.src)) == {sample.source}
            for destination, rtt in zip(addresses.to_text(found.dst), found.rtt, strict=True):
                code = None if rtt < 0 else int(tokenizer.encode_rtt(np.array([rtt]))[0])
                assert (sample.source, destination, code) in known


def test_there_are_no_more_samples_than_sources(tmp_path):
    path = tmp_path / "s.parquet"
    write_raw(path, [("10.0.0.1", "10.0.0.2", 4, 5.0, T0)])
    assert len(inspect_data(path, samples=7).samples) == 1


# --- what is wrong with measurements ---


def write_raw(path, records):
    src, dst, version, rtt, time = zip(*records, strict=True)
    columns = [pa.array([t * 1_000_000 for t in time]).cast(SCHEMA[0].type), src, dst]
    pq.write_table(pa.table([*columns, version, pa.array(rtt)], names=SCHEMA.names), path)


GOOD = [(f"10.0.0.{i}", "10.0.1.1", 4, 5.0 + i, T0 + i) for i in range(5)]
A, B = "10.0.0.1", "10.0.1.1"


@pytest.mark.parametrize(
    ("records", "name", "count"),
    [
        ([*GOOD, GOOD[2], GOOD[2]], "no duplicates", 2),
        ([*GOOD, (A, B, 4, 0.0, T0 + 9)], "RTTs plausible", 1),
        ([*GOOD, (A, B, 4, 61_000.0, T0 + 9)], "RTTs plausible", 1),
        ([*GOOD, (A, B, 4, 5.0, 3)], "times plausible", 1),
        ([*GOOD, (A, B, 4, 5.0, 4_102_444_800)], "times plausible", 1),
        ([*GOOD, *((A, B, 4, 5.0, 631_152_000 - t) for t in range(3))], "times plausible", 2),
        ([*GOOD, (A, B, 4, 5.0, T0 - 10**8)], "no clock jumps", 1),
        ([*GOOD, (A, A, 4, 5.0, T0 + 9)], "no self-pings", 1),
        ([*GOOD, (A, "fd00::1", 4, 5.0, T0 + 9)], "records usable", 1),
        ([*GOOD, ("nonsense", B, 4, 5.0, T0 + 9)], "records usable", 1),
        ([*GOOD, (A, B, 4, float("nan"), T0 + 9)], "records usable", 1),
        ([*GOOD, (A, B, 5, 5.0, T0 + 9)], "records usable", 1),
    ],
)
def test_each_fault_of_measurements_fails_its_check(tmp_path, records, name, count):
    path = tmp_path / "s.parquet"
    write_raw(path, records)
    result = inspect_data(path)
    found = check(result, name)
    assert (found.ok, found.count) == (False, count)
    assert all(c.ok for c in inspect_good(tmp_path).checks)
    assert "✗" in terminal_text(result, width=80, colour=False)


def inspect_good(tmp_path):
    path = tmp_path / "good.parquet"
    write_raw(path, GOOD)
    return inspect_data(path)


def test_measurements_out_of_order_are_counted_but_no_fault_before_preparation(tmp_path):
    path = tmp_path / "s.parquet"
    write_raw(path, [*GOOD, (A, B, 4, 5.0, T0)])
    found = check(inspect_data(path), "time order")
    assert (found.ok, found.count) == (True, 1)


def test_rejected_records_are_counted_by_reason(tmp_path):
    path = tmp_path / "s.csv"
    lines = [",".join(SCHEMA.names), f"{T0},{A},{B},4,5.0", f"{T0},{A},,4,5.0", f"{T0},{A},x,4,5"]
    path.write_text("\n".join(lines) + "\n")
    result = inspect_data(path)
    assert result.measurements == 1
    assert result.rejected == {"missing dst_addr": 1, "invalid dst_addr": 1}
    assert "invalid dst_addr" in terminal_text(result, width=80, colour=False)


def test_a_file_without_a_usable_record_has_no_figures_and_fails_only_its_checks(tmp_path):
    path = tmp_path / "s.parquet"
    pq.write_table(SCHEMA.empty_table(), path)
    result = inspect_data(path, samples=3, report=tmp_path / "r.html")
    assert result.measurements == 0
    assert result.failed_fraction is None
    assert result.time_first is None
    assert result.rtt_ms == dict.fromkeys(("p5", "p25", "p50", "p75", "p95"))
    assert [c.name for c in result.checks if not c.ok] == ["not empty"]
    assert terminal_text(result, width=80, colour=True)
    assert (tmp_path / "r.html").exists()


# --- what is wrong with rows ---


def address(last, *, version=4):
    head = b"\0" * 10 + b"\xff\xff\n\0\0" if version == 4 else b"\xfd" + b"\0" * 14
    return addresses.from_packed([head + bytes([last])])


def row(source=1, times=(1, 2, 3), *, dst=9, version=4, rtt=5.0, src_version=None):
    n = len(times)
    return RowBatch(
        src=address(source, version=src_version or version),
        family=np.array([version], np.int8),
        offsets=np.array([0, n]),
        time=np.array([T0 + t for t in times], np.int64),
        dst=np.repeat(address(dst, version=version), n),
        rtt=np.full(n, rtt, np.float32),
    )


def write_rows(directory, train, valid=(), test=(), **metadata):
    directory.mkdir(exist_ok=True)
    counts, total = {}, 0
    for split, parts in zip(SPLITS, (train, valid, test), strict=True):
        writer = RowWriter(directory, split)
        for part in parts:
            writer.append(part)
        writer.close()
        counts[split] = writer.rows
        total += writer.measurements
    settings = {"inputs": [["one"]]}
    defaults = {"schema_version": 1, "split": "pair", "measurements": total, "rows": counts}
    content = {**defaults, "settings": settings, "rejected": {}, **metadata}
    (directory / "dataset.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("splits", "metadata", "name", "count"),
    [
        ([[row(times=(1, 3, 2))]], {}, "time order", 1),
        ([[row(times=(4, 5)), row(times=(1, 2))]], {}, "time order", 1),
        ([[row(times=(1, 1, 1))]], {}, "no duplicates", 2),
        ([[row(times=(1, 10**8))]], {}, "no clock jumps", 1),
        ([[row(times=(1, 2, 10**9 + 10**8 * 8))]], {}, "times plausible", 1),
        ([[row(rtt=0.0)]], {}, "RTTs plausible", 3),
        ([[row(rtt=float("nan"))]], {}, "RTTs plausible", 3),
        ([[row(rtt=float("inf"))]], {}, "RTTs plausible", 3),
        ([[row(2), row(1)]], {}, "rows in order", 1),
        ([[row(version=6), row()]], {}, "rows in order", 1),
        ([[row(1), row(2), row(1)]], {}, "one source a row", 1),
        ([[row(times=()), row(2)]], {}, "rows not empty", 1),
        ([[row(src_version=6)]], {}, "families agree", 3),
        ([[row(version=5, src_version=4)]], {}, "families agree", 3),
        ([[row(9)]], {}, "no self-pings", 3),
        ([[row()]], {"measurements": 4}, "counts match", 1),
        ([[row()]], {"rejected": {"invalid rtt": 3, "missing rtt": 1}}, "records usable", 4),
        ([[row()]], {"split": "guess"}, "splits apart", 0),
        ([[row()], [row()]], {}, "splits apart", 1),
        ([[row(1)], [], [row(9, dst=1)]], {}, "splits apart", 1),
        ([[row(1), row(2, dst=8)], [row(1, dst=8)]], {"split": "probe"}, "splits apart", 3),
        ([[row(times=(5,))], [], [row(2, (3,))]], {"split": "time"}, "splits apart", 1),
    ],
)
def test_each_fault_of_rows_fails_its_check(tmp_path, splits, metadata, name, count):
    directory = write_rows(tmp_path / "rows", *splits, **metadata)
    result = inspect_data(directory, samples=2, report=tmp_path / "r.html")
    found = check(result, name)
    assert (found.ok, found.count) == (False, count)
    assert name in terminal_text(result, width=80, colour=False)


@pytest.mark.parametrize(
    ("splits", "metadata"),
    [
        ([[row(1), row(2)], [row(1, dst=8)]], {}),
        ([[row(1, (1, 2)), row(1, (3, 4)), row(version=6)]], {}),
        ([[row(1)], [row(7)], [row(8, dst=1)]], {"split": "probe"}),
        ([[row(1, (1,))], [row(1, (2,))], [row(1, (3,))]], {"split": "time"}),
    ],
)
def test_good_rows_pass_every_check(tmp_path, splits, metadata):
    result = inspect_data(write_rows(tmp_path / "rows", *splits, **metadata))
    assert [c for c in result.checks if not c.ok] == []


def test_rows_longer_than_a_chunk_are_read_in_pieces(tmp_path, monkeypatch):
    directory = write_rows(tmp_path / "rows", [row(1, range(50)), row(2, range(3)), row(3, (7,))])
    whole = inspect_data(directory)
    monkeypatch.setattr("ping_llm.inspection.dataset.CHUNK", 7)
    assert inspect_data(directory) == whole


# --- broken inputs ---


def bytes_file(name, content):
    def make(tmp_path, raw, rows):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


def cut_parquet(tmp_path, raw, rows):
    return bytes_file("s.parquet", raw.read_bytes()[:-100])(tmp_path, raw, rows)


def flipped_parquet(tmp_path, raw, rows):
    content = bytearray(raw.read_bytes())
    content[100:4000] = b"\xff" * 3900
    return bytes_file("s.parquet", bytes(content))(tmp_path, raw, rows)


def other_columns(tmp_path, raw, rows):
    pq.write_table(pa.table({"src": ["a"]}), tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


def other_type(tmp_path, raw, rows):
    table = SCHEMA.empty_table()
    table = table.set_column(4, "rtt", pa.array([], pa.list_(pa.int8())))
    pq.write_table(table, tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


def changed_rows(change):
    def make(tmp_path, raw, rows):
        directory = tmp_path / "rows"
        directory.mkdir()
        for path in rows.iterdir():
            if path.is_file():
                (directory / path.name).write_bytes(path.read_bytes())
        change(directory)
        return directory

    return make


def train_file(directory):
    return next(directory.glob("train-*.arrow"))


def metadata_is(text):
    return changed_rows(lambda d: (d / "dataset.json").write_bytes(text))


def cut_train(directory):
    train_file(directory).write_bytes(train_file(directory).read_bytes()[:-50])


def wrong_schema(directory):
    table = pa.table({"x": [1]})
    with pa.ipc.new_file(str(train_file(directory)), table.schema) as writer:
        writer.write_table(table)


def fewer_files(directory):
    path = train_file(directory)
    path.rename(path.with_name("train-00000-of-00002.arrow"))


def one_split_less(directory):
    metadata = json.loads((directory / "dataset.json").read_text())
    metadata["rows"]["train"] += 1
    (directory / "dataset.json").write_text(json.dumps(metadata))


BROKEN = {
    "absent": (lambda tmp_path, raw, rows: tmp_path / "no.parquet", "does not exist"),
    "no match": (lambda tmp_path, raw, rows: tmp_path / "*.parquet", "no file|matches no"),
    "empty directory": (lambda tmp_path, raw, rows: tmp_path, "no file|holds no"),
    "empty file": (bytes_file("s.parquet", b""), "s.parquet.*empty"),
    "unknown ending": (bytes_file("s.xyz", b"hello"), "no known format"),
    "not Parquet": (bytes_file("s.parquet", b"hello" * 50), r"s\.parquet"),
    "cut Parquet": (cut_parquet, r"s\.parquet"),
    "damaged Parquet": (flipped_parquet, r"s\.parquet"),
    "other columns": (other_columns, "event_time"),
    "other type": (other_type, "rtt"),
    "not Arrow": (bytes_file("s.arrow", b"ARROW1 no"), r"s\.arrow"),
    "not gzip": (bytes_file("s.ndjson.gz", b"hello"), r"s\.ndjson\.gz"),
    "not bz2": (bytes_file("s.bz2", b"hello"), r"s\.bz2"),
    "not xz": (bytes_file("s.ndjson.xz", b"hello"), r"s\.ndjson\.xz"),
    "CSV without columns": (bytes_file("s.csv", b"a,b\n1,2\n"), "event_time"),
    "dataset.json empty": (metadata_is(b""), r"dataset\.json cannot be read as JSON"),
    "dataset.json not JSON": (metadata_is(b"{"), r"dataset\.json cannot be read as JSON"),
    "dataset.json not UTF-8": (metadata_is(b"\xff\xfe\0"), r"dataset\.json cannot be read as JSON"),
    "dataset.json a list": (metadata_is(b"[]"), "schema_version None"),
    "dataset.json of the future": (metadata_is(b'{"schema_version": 99}'), "schema_version 99"),
    "dataset.json without counts": (metadata_is(b'{"schema_version": 1}'), "rows"),
    "cut rows": (changed_rows(cut_train), r"train-.*arrow is damaged: it is not what was"),
    "no rows": (changed_rows(lambda d: train_file(d).write_bytes(b"")), "arrow is damaged"),
    "rows of another kind": (changed_rows(wrong_schema), "arrow is damaged"),
    "rows missing": (changed_rows(lambda d: train_file(d).unlink()), "train"),
    "a file missing": (changed_rows(fewer_files), "names say"),
    "rows miscounted": (changed_rows(one_split_less), "dataset.json is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_input_has_one_clear_line_that_names_it(tmp_path, raw, rows, case):
    make, message = BROKEN[case]
    path = make(tmp_path, raw, rows)
    with pytest.raises(PingLLMError, match=message) as caught:
        inspect_data(path)
    assert "\n" not in str(caught.value)
    assert tmp_path.name in str(caught.value)


def test_rows_damaged_anywhere_give_figures_or_an_error_but_never_a_crash(tmp_path, raw, rows):
    source = train_file(rows).read_bytes()
    rng = np.random.default_rng(5)
    directory = changed_rows(lambda d: None)(tmp_path, raw, rows)
    for _ in range(60):
        content = bytearray(source)
        for at in rng.integers(0, len(content), 3):
            content[at] = rng.integers(256)
        train_file(directory).write_bytes(content)
        with contextlib.suppress(PingLLMError):
            json.dumps(dataclasses.asdict(inspect_data(directory)), allow_nan=False)


def test_impossible_arguments_are_refused_before_reading(raw, tmp_path):
    with pytest.raises(ConfigError, match="samples=-1 must be at least 0"):
        inspect_data(raw, samples=-1)
    with pytest.raises(ConfigError, match="is a directory; name a file"):
        inspect_data("nowhere at all", report=tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        inspect_data("nowhere at all")


# --- terminal and page ---


@pytest.mark.parametrize("kind", ["raw", "rows"])
def test_terminal_text_keeps_to_its_width_and_has_colours_only_when_asked(raw, rows, kind):
    result = inspect_data(raw if kind == "raw" else rows, samples=3)
    plain = terminal_text(result, width=80, colour=False)
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    coloured = terminal_text(result, width=80, colour=True)
    assert "\x1b[" in coloured
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in stripped.splitlines()] == plain.splitlines()
    for word in ("measurements", "RTT, log scale", "top sources", "context 3", "MEASUREMENT_START"):
        assert word in plain


def test_bars_stand_as_high_as_their_values():
    assert bars([0, 1, 2, 4], width=10, height=1) == [" ▂▄█"]
    assert bars([8, 16], width=10, height=2) == [" █", "██"]
    assert bars([], width=10, height=1) == [""]
    assert bars([0, 0], width=10, height=1) == ["  "]
    assert bars([1] * 100, width=10, height=1) == ["█" * 10]


def test_the_page_holds_everything_and_fetches_nothing(rows, tmp_path):
    path = tmp_path / "r.html"
    result = inspect_data(rows, samples=2, report=path)
    text = path.read_text()
    assert text.count("data:image/svg+xml;base64,") == 3
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "url(" not in text
    assert "<script" not in text
    for word in ("Checks", "Round-trip times", "Over time", "Spread", "Sample contexts"):
        assert word in text
    assert result.top_sources[0]["address"] in text
    assert list(tmp_path.iterdir()) == [path]


def test_data_and_report_may_be_in_an_object_store(raw, tmp_path, monkeypatch):
    with (tmp_path / "log").open("wb") as log, emulators.s3(log) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        Location("s3://bucket/in.parquet").upload(raw)
        result = inspect_data("s3://bucket/in.parquet", report="s3://bucket/new/r.html")
        page = Location("s3://bucket/new/r.html").read_text()
    assert result == dataclasses.replace(inspect_data(raw), path="s3://bucket/in.parquet")
    assert page == html_page(result)


MARKUP = "<img src=x onerror=alert(1)>"
CONTROLS = "\x1b]0;owned\x07\r\u202e\x9b31m"


def shown_both_ways(path):
    """Returns the terminal text, without colours, and the page of what `path` holds."""
    result = inspect_data(path, samples=1)
    return terminal_text(result, width=120, colour=False), html_page(result)


@pytest.mark.parametrize("hostile", [MARKUP, CONTROLS], ids=["markup", "control characters"])
@pytest.mark.parametrize("place", ["file name", "rejected", "split", "measurements"])
def test_text_from_files_is_shown_and_never_obeyed(tmp_path, hostile, place):
    if place == "file name":
        path = tmp_path / f"{hostile}.csv"
        lines = [",".join(SCHEMA.names), f"{T0},{A},{hostile},4,5.0", f"{T0},{A},{B},4,5"]
        path.write_text("\n".join(lines) + "\n", newline="")
    else:
        content = {hostile: 1} if place == "rejected" else hostile
        path = write_rows(tmp_path / "rows", [row()], **{place: content})
    text, page = shown_both_ways(path)
    assert "<img src=x" not in page
    for shown in (text, page):
        assert not set(shown) & set("\x1b\x07\r\u202e\x9b")
    if hostile == MARKUP:
        assert html.escape(MARKUP) in page
        assert MARKUP in text.replace("\n", "")
    else:
        assert r"\x1b]0;owned\x07\r\u202e\x9b31m" in page
