import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_runs import write_run

from ping_llm import outputs
from ping_llm.cli import cli
from ping_llm.errors import DataError
from ping_llm.ingest.prepare import prepare_data
from ping_llm.prediction import predict as predict_module
from ping_llm.prediction.predict import predict
from ping_llm.prediction.predictor import Predictor
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with measurements, a run, and what the commands read."""
    place = tmp_path_factory.mktemp("predict")
    simulate(place / "pings.parquet", probes=8, days=1.0, measurements=400, seed=0)
    prepare_data([str(place / "pings.parquet")], output=place / "rows", workers=1)
    write_run(place / "run", place / "rows")
    table = pq.read_table(place / "pings.parquet").slice(0, 50)
    pq.write_table(table.select(["src_addr", "dst_addr", "event_time"]), place / "pairs.parquet")
    return place


def invoke(*arguments):
    return CliRunner().invoke(cli, ["predict", *map(str, arguments)])


def first_pair(made):
    row = pq.read_table(made / "pings.parquet").slice(0, 1).to_pylist()[0]
    return row["src_addr"], row["dst_addr"]


def test_one_pair_gives_quantiles_in_order(made):
    src, dst = first_pair(made)
    result = invoke(
        "--run", made / "run", "--src", src, "--dst", dst, "--time", "2024-05-01T10:00Z", "--json"
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    quantiles = [answer["rtt_ms"][name] for name in ("p5", "p25", "p50", "p75", "p95")]
    assert quantiles == sorted(quantiles)
    assert 0 < answer["p_failed"] < 1
    assert answer["rtt_ms"]["mean"] > 0
    assert answer["unseen"] == []
    assert answer["calibrated_on"]["history"] > 20
    assert answer["time"] == 1714557600


def test_history_is_read_and_new_addresses_are_flagged(made):
    src, _ = first_pair(made)
    dst = "192.0.2.7" if "." in src else "2001:db8::7"
    given = ["--run", made / "run", "--src", src, "--dst", dst]
    answer = json.loads(invoke(*given, "--history", made / "pings.parquet", "--json").stdout)
    assert answer["history"] > 0
    assert answer["unseen"] == ["dst"]
    assert "nothing known of: dst" in invoke(*given).stdout


def test_an_answer_names_the_measurements_that_counted_most(made):
    src, _ = first_pair(made)
    dst = "192.0.2.7" if "." in src else "2001:db8::7"
    given = ["--run", made / "run", "--src", src, "--dst", dst, "--explain"]
    evidence = json.loads(invoke(*given, "--json").stdout)["explained"]
    table = pq.read_table(made / "pings.parquet").to_pylist()
    measured = {frozenset((row["src_addr"], row["dst_addr"])) for row in table}
    for each in evidence:
        assert src in (each["src"], each["dst"])
        assert frozenset((each["src"], each["dst"])) in measured
        assert each["rtt_ms"] > 0
    shares = [each["share"] for each in evidence]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1.0001
    assert invoke(*given).stdout.count(" by ") == len(evidence)


def test_of_a_measured_pair_its_newest_measurements_count(made):
    src, dst = first_pair(made)
    given = ["--run", made / "run", "--src", src, "--dst", dst, "--explain", "--json"]
    evidence = json.loads(invoke(*given, "--history", made / "pings.parquet").stdout)["explained"]
    assert {(each["src"], each["dst"]) for each in evidence} == {(src, dst)}


def test_destinations_are_ranked_by_expected_rtt(made):
    src, dst = first_pair(made)
    names = [dst, "192.0.2.7", "192.0.2.8"] if "." in src else [dst, "2001:db8::7", "2001:db8::8"]
    (made / "peers.txt").write_text("\n".join(names) + "\n\n")
    result = invoke("--run", made / "run", "--src", src, "--rank", made / "peers.txt", "--json")
    ranked = json.loads(result.stdout)["ranked"]
    assert sorted(each["dst"] for each in ranked) == sorted(names)
    means = [each["rtt_ms"]["mean"] for each in ranked]
    assert means == sorted(means)


def test_a_file_of_pairs_stopped_and_started_again_gives_what_one_call_gives(made, monkeypatch):
    monkeypatch.setattr(predict_module, "BLOCK_PAIRS", 16)
    given = {"run": made / "run", "pairs": made / "pairs.parquet"}
    whole = predict(**given, output=made / "whole.parquet")
    assert whole.pairs == 50
    ask, calls = Predictor.ask, []

    def stop_at_the_third(*questions):
        calls.append(questions)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*questions)

    output = made / "stopped.parquet"
    monkeypatch.setattr(Predictor, "ask", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict(**given, output=output)
    assert not output.exists()
    predict(**given, output=output)
    assert len(calls) == 5  # two kept, one stopped, two more
    assert pq.read_table(output).equals(pq.read_table(made / "whole.parquet"))
    assert not (made / "stopped.parquet.parts").exists()
    monkeypatch.undo()


def test_a_block_that_was_damaged_is_named_and_answered_again_once_it_is_removed(
    made, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict_module, "BLOCK_PAIRS", 16)
    given = {"run": made / "run", "pairs": made / "pairs.parquet"}
    output = tmp_path / "answers.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(**given, output=output)
    (block,) = (tmp_path / "answers.parquet.parts").glob("000001-*.parquet")
    whole, rng = block.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(len(whole), size=200):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        assert predict_module._digest(bytes(flipped)) not in block.name
        block.write_bytes(flipped)
    with pytest.raises(DataError, match=r"000001-.*parquet is damaged; remove it and run the same"):
        predict(**given, output=output)
    block.unlink()
    assert predict(**given, output=output).pairs == 50
    assert len(pq.read_table(output)) == 50


def test_a_finished_file_is_left_alone_and_other_pairs_are_refused_by_name(made):
    given = ["--run", made / "run", "--output", made / "again.parquet", "--json"]
    first = invoke(*given, "--pairs", made / "pairs.parquet")
    assert first.exit_code == 0, first.output
    before = (made / "again.parquet").stat().st_mtime_ns
    assert invoke(*given, "--pairs", made / "pairs.parquet").stdout == first.stdout
    assert (made / "again.parquet").stat().st_mtime_ns == before
    other = pq.read_table(made / "pairs.parquet").slice(1)
    pq.write_table(other, made / "other.parquet")
    refused = invoke(*given, "--pairs", made / "other.parquet")
    assert refused.exit_code == 1
    assert "again.parquet was begun with other settings: pairs='" in refused.stderr


def test_blocks_that_a_killed_process_had_joined_are_not_taken_for_answers(made, tmp_path):
    output = tmp_path / "answers.parquet"
    blocks = tmp_path / "answers.parquet.parts"
    given = ["--run", made / "run", "--output", output]
    assert invoke(*given, "--pairs", made / "pairs.parquet").exit_code == 0
    whole = output.read_bytes()
    blocks.mkdir()  # killed while it removed them: the settings are gone, a block is not
    (blocks / f"000000-{predict_module._digest(whole)}.parquet").write_bytes(whole)
    other = pq.read_table(made / "pairs.parquet").slice(10, 5)
    pq.write_table(other, tmp_path / "other.parquet")
    output.unlink()
    assert invoke(*given, "--pairs", tmp_path / "other.parquet").exit_code == 0
    assert len(pq.read_table(output)) == 5
    assert not blocks.exists()


def test_what_is_left_of_joined_blocks_goes_with_the_next_call(made, tmp_path):
    given = ["--run", made / "run", "--pairs", made / "pairs.parquet"]
    given += ["--output", tmp_path / "answers.parquet"]
    assert invoke(*given).exit_code == 0
    blocks = tmp_path / "answers.parquet.parts"
    blocks.mkdir()
    (blocks / "000000.parquet").write_text("left")
    assert invoke(*given).exit_code == 0
    assert not blocks.exists()


def test_a_second_process_on_one_output_is_refused_at_once_in_one_line(made):
    output = made / "contended.parquet"
    given = ["--run", made / "run", "--pairs", made / "pairs.parquet", "--output", output]
    with outputs.claim(Location.of(output), what="predict"):  # as another process would
        refused = invoke(*given)
    assert refused.exit_code == 1
    assert "contended.parquet is being written by another process (predict, pid" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert invoke(*given).exit_code == 0
    assert pq.read_table(output).num_rows == 50


def test_pairs_history_ranks_and_answers_may_be_remote(made, bucket, tmp_path):
    src, dst = first_pair(made)
    (made / "remote.txt").write_text(f"{dst}\n")
    for name in ("pairs.parquet", "pings.parquet", "remote.txt"):
        (bucket / name).upload(made / name)
    answers = []
    for place in (bucket, Location.of(made)):
        given = {"run": made / "run", "history": str(place / "pings.parquet")}
        output = bucket / "out.parquet" if place is bucket else Location.of(tmp_path / "o.parquet")
        predict(**given, pairs=str(place / "pairs.parquet"), output=str(output))
        assert not (output.parent / f"{output.name}.parts").exists()
        with output.open_input() as source:
            answers.append(pq.read_table(source).replace_schema_metadata())
    assert answers[0].equals(answers[1])
    assert len(predict(**given, src=src, rank=str(bucket / "remote.txt")).ranked) == 1


def test_csv_pairs_are_those_of_parquet(made):
    table = pq.read_table(made / "pairs.parquet").slice(0, 3)
    seconds = table["event_time"].cast(pa.timestamp("s")).cast(pa.int64()).to_pylist()
    lines = [
        f"{row['src_addr']},{row['dst_addr']},{time if i else ''}"
        for i, (row, time) in enumerate(zip(table.to_pylist(), seconds, strict=True))
    ]
    (made / "pairs.csv").write_text("src_addr,dst_addr,event_time\n" + "\n".join(lines) + "\n")
    predict(made / "run", pairs=made / "pairs.csv", output=made / "csv.parquet")
    predict(made / "run", pairs=made / "pairs.parquet", output=made / "all.parquet")
    by_csv, by_parquet = (
        pq.read_table(made / f"{n}.parquet")["rtt_p50"].to_numpy() for n in ("csv", "all")
    )
    np.testing.assert_allclose(by_csv[1:], by_parquet[1:3], rtol=1e-5)


BAD = {
    "no form": (["--src", "10.0.0.1"], "give --src and --dst for one pair"),
    "two models": (
        ["--pretrained", "--src", "10.0.0.1", "--dst", "10.0.0.2"],
        "give either --run or --pretrained",
    ),
    "nothing to explain": (
        ["--src", "10.0.0.1", "--rank", "empty.txt", "--explain"],
        "--explain is for one pair",
    ),
    "two forms": (["--src", "10.0.0.1", "--dst", "10.0.0.2", "--rank", "empty.txt"], "give --src"),
    "pairs without output": (["--pairs", "empty.txt"], "--pairs and --output"),
    "bad address": (
        ["--src", "10.0.0.300", "--dst", "10.0.0.1"],
        "error: src_addr is '10.0.0.300'; expected an address like 192.0.2.1 or 2001:db8::1",
    ),
    "families": (["--src", "10.0.0.1", "--dst", "::1"], "of different families"),
    "bad time": (["--src", "10.0.0.1", "--dst", "10.0.0.2", "--time", "soon"], "time is 'soon'"),
    "empty rank": (["--src", "10.0.0.1", "--rank", "empty.txt"], "empty.txt is empty"),
    "rank line": (
        ["--src", "10.0.0.1", "--rank", "words.txt"],
        "words.txt, row 1: dst_addr is 'hello'",
    ),
    "empty history": (
        ["--src", "10.0.0.1", "--dst", "10.0.0.2", "--history", "empty.csv"],
        "empty.csv",
    ),
    "pairs of no format": (["--pairs", "words.parquet", "--output", "o.parquet"], "words.parquet"),
    "pairs without a column": (
        ["--pairs", "src.csv", "--output", "o.parquet"],
        "has no column dst_addr",
    ),
    "pairs with a bad row": (
        ["--pairs", "bad.csv", "--output", "o.parquet"],
        "bad.csv, row 2: dst_addr is '10.0.0'; expected an address",
    ),
    "pairs of mixed families": (
        ["--pairs", "mixed.csv", "--output", "o.parquet"],
        "row 1: 10.0.0.1, ::1 and ip_version 4 are of different families",
    ),
    "pairs with a bad time": (
        ["--pairs", "time.csv", "--output", "o.parquet"],
        "row 1: event_time is 'noon'; expected ISO 8601 or seconds since 1970",
    ),
    "no pairs": (["--pairs", "none.csv", "--output", "o.parquet"], "holds no pairs"),
    "output of another kind": (
        ["--pairs", "pairs.parquet", "--output", "o.csv"],
        "must be a .parquet file",
    ),
    "output of others": (
        ["--pairs", "pairs.parquet", "--output", "pings.parquet"],
        "is not ours",
    ),
}
FILES = {
    "empty.txt": "",
    "words.txt": "hello\n",
    "words.parquet": "hello",
    "empty.csv": "",
    "src.csv": "src_addr\n10.0.0.1\n",
    "bad.csv": "src_addr,dst_addr\n10.0.0.1,10.0.0.2\n10.0.0.1,10.0.0\n",
    "mixed.csv": "src_addr,dst_addr\n10.0.0.1,::1\n",
    "time.csv": "src_addr,dst_addr,event_time\n10.0.0.1,10.0.0.2,noon\n",
    "none.csv": "src_addr,dst_addr\n",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_message(made, case, monkeypatch):
    monkeypatch.chdir(made)
    for name, text in FILES.items():
        (made / name).write_text(text)
    arguments, words = BAD[case]
    result = invoke("--run", "run", *arguments)
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("damage", ["absent", "no config", "broken config", "no checkpoint"])
def test_a_run_that_is_none_is_named(tmp_path, damage):
    run = tmp_path / "run"
    if damage != "absent":
        run.mkdir()
    if damage == "broken config":
        (run / "config.json").write_text("{")
    if damage == "no checkpoint":
        write_run(tmp_path / "other")
        (run / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    result = invoke("--run", run, "--src", "10.0.0.1", "--dst", "10.0.0.2")
    assert result.exit_code == 1
    assert str(run) in result.stderr
    assert "Traceback" not in result.stderr
