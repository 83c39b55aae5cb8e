import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.errors import DataError
from ping_llm.extraction.records import Records


def read_all(records):
    return [one for unit in records.units for one in records.read(unit)]


def open_records(path, *, unit_bytes=1000, limit=None):
    return Records(str(path), columns=("text", "id"), unit_bytes=unit_bytes, limit=limit)


@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=20),
    unit_bytes=st.integers(1, 300),
    end=st.sampled_from(["\n", ""]),
    blank=st.booleans(),
)
def test_units_of_any_size_hold_every_line_once_and_in_order(
    texts, unit_bytes, end, blank, tmp_path_factory
):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(
        (("\n\n" if blank else "\n").join(lines) + end).encode("utf-8", "surrogatepass")
    )
    records = open_records(path, unit_bytes=unit_bytes)
    found = read_all(records)
    assert [record["text"] for _, record in found] == texts
    assert len({sample for sample, _ in found}) == len(texts)


@given(
    rows=st.integers(1, 60),
    group=st.integers(1, 25),
    unit_bytes=st.integers(10, 2000),
    limit=st.none() | st.integers(1, 70),
)
def test_units_of_parquet_hold_every_row_once_and_in_order(
    rows, group, unit_bytes, limit, tmp_path_factory
):
    path = tmp_path_factory.mktemp("rows") / "x.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(rows)], "other": range(rows)})
    pq.write_table(table, path, row_group_size=group)
    found = read_all(open_records(path, unit_bytes=unit_bytes, limit=limit))
    expected = range(min(rows, limit or rows))
    assert found == [(f"x.parquet#{i}", {"text": f"row {i}"}) for i in expected]


@pytest.mark.parametrize("limit", [1, 7, 10, 11, 25, 40])
def test_a_limit_counts_records_over_all_files(limit, tmp_path):
    for name, count in (("a.jsonl", 10), ("b.jsonl", 15)):
        lines = [json.dumps({"text": f"{name}{i}"}) for i in range(count)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    everything = read_all(open_records(tmp_path, unit_bytes=40))
    assert read_all(open_records(tmp_path, unit_bytes=40, limit=limit)) == everything[:limit]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress)])
@pytest.mark.parametrize("limit", [None, 5])
def test_a_compressed_file_is_one_unit(ending, compress, limit, tmp_path):
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100))))
    records = open_records(path, unit_bytes=10, limit=limit)
    assert len(records.units) == 1
    assert [record["text"] for _, record in read_all(records)] == [
        str(i) for i in range(limit or 100)
    ]


def test_a_record_keeps_its_own_id_and_else_gets_its_place(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "id": 7}\n{"text": "b"}\n')
    assert [sample for sample, _ in read_all(open_records(path))] == ["7", "x.jsonl@23"]


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense", '"text"'])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, byte 14"):
        read_all(open_records(path))


CUT = rb"ok \ud83d bad"  # an emoji cut in half


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + CUT + b'"}',
        b'{"text": "' + CUT.replace(rb"\ud83d", rb"\UDE00".lower()) + b'"}',
        b'{"text": {"deep": ["' + CUT + b'"]}}',
        b'{"text": "ok \xed\xa0\xbd bad"}',
        b'{"text": "ok \xff bad"}',
        b'{"text": "a", "id": "' + CUT + b'"}',
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["high", "low", "nested", "bytes", "not utf-8", "id", "deep"],
)
def test_half_a_character_is_named_with_file_and_place(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "whole \\ud83d\\ude00 \xf0\x9f\x98\x80"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"x\.jsonl, byte 36[: ]|x\.jsonl@36") as error:
        read_all(open_records(path))
    assert len(str(error.value).splitlines()) == 1


def test_half_a_character_in_a_value_that_is_not_read_does_no_harm(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "title": "' + CUT + b'"}\n')
    assert [record["text"] for _, record in read_all(open_records(path))] == ["a"]


@given(flips=st.dictionaries(st.integers(0, 5000), st.integers(0, 255), min_size=1, max_size=4))
def test_any_damage_to_parquet_is_refused_in_one_line_or_does_no_harm(flips, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "x.parquet"
    table = pa.table({"text": ["the \u00e9", None, "a"] * 9, "id": ["b"] * 27})
    pq.write_table(table, path, row_group_size=20)
    content = bytearray(path.read_bytes())
    for place, value in flips.items():
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        read_all(open_records(path))
    except DataError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("column", ["text", "id"])
def test_parquet_that_is_not_utf_8_is_named(column, tmp_path):
    columns = {"text": ["a"] * 3, "id": ["b"] * 3} | {column: [b"a", b"ok \xed\xa0\xbd", b"b"]}
    arrays = {
        name: pa.array(values, pa.binary()).view(pa.string()) if name == column else values
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read after row 0: .*index 1"):
        read_all(open_records(tmp_path / "x.parquet"))


def test_parquet_without_the_column_says_which_it_has(tmp_path):
    table = pa.table({"content": ["a"], "url": ["b"], "id": ["c"]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column text; its columns are content, url, id; ren"):
        Records(
            str(tmp_path / "x.parquet"), columns=("text",), also=("id",), unit_bytes=9, limit=None
        )


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ping_llm.extraction.records.LONGEST_LINE", 1000)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"a" * 100_000))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz, byte 14: the line has over"):
        read_all(open_records(path))


def test_a_damaged_parquet_file_and_an_unknown_ending_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet is not a readable Parquet file"):
        open_records(tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(DataError, match="names no known format"):
        open_records(tmp_path / "x.txt")


def test_a_truncated_gzip_file_is_an_error_and_not_its_first_half(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(10_000)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read after byte"):
        read_all(open_records(path))
