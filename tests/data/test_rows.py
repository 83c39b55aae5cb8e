import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.addresses import as_bytes, from_bytes
from ping_llm.data import rows as rows_module
from ping_llm.data.rows import (
    BYTES_PER_MEASUREMENT,
    FlatRows,
    ProbeRows,
    RowBuilder,
    RowWriter,
    concat_rows,
    from_record_batch,
    read_metadata,
    slice_rows,
    split_files,
    to_record_batch,
)
from ping_llm.errors import DataError


def make_rows(counts, first_source=0):
    """Returns rows of distinct sources with `counts` distinguishable measurements."""
    n, m = len(counts), int(np.sum(counts))
    src = np.zeros((n, 16), np.uint8)
    src[:, 15] = np.arange(n) + first_source
    dst = np.zeros((m, 16), np.uint8)
    dst[:, 12:] = np.arange(m, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return FlatRows(
        src_addr=from_bytes(src),
        ip_version=np.full(n, 6, np.int8),
        offsets=np.append(0, np.cumsum(counts)),
        event_time=np.arange(m),
        dst_addr=from_bytes(dst),
        rtt=np.arange(m, dtype=np.float32),
    )


def assert_equal(a, b):
    for name in FlatRows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def finish(directory, **rows):
    counts = dict.fromkeys(("train", "valid", "test"), 0) | rows
    (directory / "dataset.json").write_text(json.dumps({"schema_version": 1, "rows": counts}))


COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=8)


@given(COUNTS, st.data())
def test_rows_go_through_arrow_unchanged_also_sliced(counts, data):
    rows = make_rows(counts)
    batch = to_record_batch(rows)
    assert_equal(from_record_batch(batch), rows)
    start = data.draw(st.integers(0, len(counts)))
    stop = data.draw(st.integers(start, len(counts)))
    assert_equal(from_record_batch(batch.slice(start, stop - start)), slice_rows(rows, start, stop))


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, cuts=st.lists(st.integers(0, 8)), limit=st.integers(1, 400))
def test_files_and_batches_depend_on_the_rows_alone(counts, cuts, limit, tmp_path_factory):
    rows, contents = make_rows(counts), []
    for bounds in ([0, len(counts)], sorted({0, len(counts), *(c % len(counts) for c in cuts)})):
        directory = tmp_path_factory.mktemp("rows")
        whole, rows_module.BATCH_BYTES = rows_module.BATCH_BYTES, limit
        writer = RowWriter(directory, "train", file_bytes=3 * limit)
        for start, stop in itertools.pairwise(bounds):
            writer.append(slice_rows(rows, start, stop))
        files = writer.close()
        rows_module.BATCH_BYTES = whole
        assert (writer.rows, writer.measurements) == (len(counts), sum(counts))
        contents.append({file.name: file.read_bytes() for file in files})
        finish(directory, train=len(counts))
        read = ProbeRows(directory, "train")
        assert_equal(concat_rows(read.batches), rows)
        np.testing.assert_array_equal(read.n_measurements, counts)
    assert contents[0] == contents[1]


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 100)),
    cap=st.integers(1, 12),
)
def test_a_source_becomes_full_rows_and_a_rest_however_it_is_fed(
    counts, cuts, cap, tmp_path_factory
):
    directory = tmp_path_factory.mktemp("rows")
    rows, total = make_rows(counts), sum(counts)
    source = np.repeat(np.arange(len(counts)), counts)
    writer = RowWriter(directory, "train")
    builder = RowBuilder(writer, row_cap_bytes=cap * BYTES_PER_MEASUREMENT)
    bounds = sorted({0, total, *(c % total for c in cuts)})
    for start, stop in itertools.pairwise(bounds):
        mine = source[start:stop]
        starts = np.flatnonzero(np.append(True, mine[1:] != mine[:-1]))
        builder.append(
            FlatRows(
                src_addr=rows.src_addr[mine[starts]],
                ip_version=rows.ip_version[mine[starts]],
                offsets=np.append(starts, len(mine)),
                event_time=rows.event_time[start:stop],
                dst_addr=rows.dst_addr[start:stop],
                rtt=rows.rtt[start:stop],
            )
        )
    builder.close()
    writer.close()
    finish(directory, train=writer.rows)
    read = ProbeRows(directory, "train")
    expected = [min(cap, count - i) for count in counts for i in range(0, count, cap)]
    assert read.n_measurements.tolist() == expected
    found = concat_rows(read.batches)
    np.testing.assert_array_equal(found.event_time, rows.event_time)
    np.testing.assert_array_equal(np.repeat(as_bytes(found.src_addr)[:, 15], expected), source)


def test_a_split_without_rows_has_no_file_and_reads_as_empty(tmp_path):
    assert RowWriter(tmp_path, "valid").close() == []
    finish(tmp_path)
    assert len(ProbeRows(tmp_path, "valid")) == 0


def test_rows_are_views_of_the_mapped_file(tmp_path):
    writer = RowWriter(tmp_path, "train")
    writer.append(make_rows([1000, 1000]))
    writer.close()
    finish(tmp_path, train=2)
    (batch,) = ProbeRows(tmp_path, "train").batches
    assert not any(getattr(batch, name).flags.owndata for name in ("event_time", "dst_addr", "rtt"))


@pytest.fixture
def dataset(tmp_path):
    writer = RowWriter(tmp_path, "train", file_bytes=1)
    for i in range(3):
        writer.append(make_rows([40_000], i))
    writer.close()
    finish(tmp_path, train=3)
    assert len(split_files(tmp_path, "train")) == 3
    return tmp_path


def other_schema(directory):
    with pa.ipc.new_file(directory / "train-00001-of-00003.arrow", pa.schema([])):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "dataset.json").unlink(), "has no dataset.json"),
        (lambda d: (d / "dataset.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "dataset.json").write_bytes(b"\xff"), "cannot be read as JSON"),
        (lambda d: (d / "dataset.json").write_text("[]"), "schema_version None"),
        (lambda d: (d / "dataset.json").write_text('{"schema_version": 9}'), "schema_version 9"),
        (lambda d: (d / "train-00001-of-00003.arrow").unlink(), "has 2 train files"),
        (lambda d: (d / "train-00001-of-00003.arrow").write_bytes(b"x"), "not a readable Arrow"),
        (
            lambda d: (d / "train-00002-of-00003.arrow").write_bytes(
                (d / "train-00001-of-00003.arrow").read_bytes()[:-20]
            ),
            "not a readable Arrow file",
        ),
        (other_schema, "does not hold probe rows"),
        (lambda d: finish(d, train=4), "hold 3 rows, dataset.json says 4"),
    ],
)
def test_a_damaged_data_set_is_one_clear_error(dataset, damage, message):
    damage(dataset)
    with pytest.raises(DataError, match=message) as caught:
        ProbeRows(dataset, "train")
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_refused(dataset):
    assert read_metadata(dataset)["rows"]["train"] == 3
    with pytest.raises(DataError, match="split 'tests' is not one of train, valid, test"):
        ProbeRows(dataset, "tests")
