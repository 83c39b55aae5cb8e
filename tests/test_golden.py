"""What the same input and settings have always given: bytes of rows and batches, numbers of models.

`python tests/test_golden.py` makes `golden.json` anew, for a change that is meant to change them.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from ping_llm.cli import cli
from ping_llm.data.pipeline import TrainLoader

GOLDEN = Path(__file__).with_name("golden.json")
MODEL = ["--set", "model.d_model=32", "--set", "model.n_layers=2", "--set", "model.d_ff=64"]
RIPE = (
    '{"type":"ping","timestamp":%d,"af":4,"from":"192.0.2.%d","dst_addr":"198.51.100.%d",'
    '"min":%s,"rcvd":3,"result":[{"rtt":%s}]}\n'
)


def run(*words: object) -> None:
    cli.main([str(word) for word in words], standalone_mode=False)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def make(directory: Path) -> dict:
    """Returns everything that is compared, made in `directory`."""
    pings, table, ripe = (directory / n for n in ("pings.parquet", "pings.csv", "ripe.ndjson"))
    run("simulate", "--output", pings, "--probes", 12, "--days", 2, "--measurements", 3000)
    pa_csv.write_csv(pq.read_table(pings).slice(0, 500), table)
    ripe.write_text("".join(RIPE % (1.6e9 + i, i % 7, i % 11, i / 8, i / 8) for i in range(200)))
    made: dict = {"rows": {}}
    for name, inputs, options in (
        ("pair", [pings], ["--both-ends", "--valid-fraction", "0.2"]),
        ("probe", [table], ["--split", "probe"]),
        ("time", [ripe, table], ["--split", "time", "--test-fraction", "0.3"]),
    ):
        rows = directory / name
        run("prepare-data", *inputs, "--output", rows, *options)
        files = sorted(rows.glob("*.arrow"))
        made["rows"][name] = {file.name: digest(file.read_bytes()) for file in files}
    rows, trained = directory / "pair", directory / "run"
    with TrainLoader(rows, batch_size=4, seq_len=256, seed=3) as loader:
        batches = [next(loader) for _ in range(3)]
    made["batches"] = [
        digest(np.stack([batch.inputs, batch.targets, batch.segment_ids]).tobytes())
        for batch in batches
    ]
    small = ["--steps", 3, "--batch-size", 4, "--seq-len", 256, "--set", "log_every=1", *MODEL]
    run("train", "--data", rows, "--output", trained, *small, "--set", "eval_batches=1")
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    made["loss"] = [json.loads(line)["loss"] for line in lines]
    made["valid_loss"] = json.loads(lines[-1])["valid_loss"]
    pairs, answers = directory / "pairs.parquet", directory / "answers.parquet"
    asked = pq.read_table(pings, columns=["src_addr", "dst_addr", "event_time"])
    pq.write_table(asked.slice(0, 8), pairs)
    run("predict", "--run", trained, "--pairs", pairs, "--output", answers)
    answered = pq.read_table(answers)
    made["predictions"] = {
        name: answered[name].to_pylist()
        for name in answered.column_names
        if name.startswith(("rtt", "p_failed"))
    }
    store = directory / "store"
    options = ["--format", "measurements", "--limit", 4, "--sites", "residual,mlp"]
    run("extract-activations", "--model", trained, "--input", rows, "--output", store, *options)
    from ping_llm.activations.reader import ActivationReader

    reader = ActivationReader(store, site="mlp", layer=1)
    made["activations"] = {"shape": list(reader.shape), "head": reader[:4].ravel().tolist()[::8]}
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return json.loads(json.dumps(make(tmp_path_factory.mktemp("golden"))))


@pytest.mark.parametrize("name", ["rows", "batches"])
def test_the_bytes_of_rows_and_batches_are_what_they_were(made, name):
    assert made[name] == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", ["loss", "valid_loss", "predictions", "activations"])
def test_the_numbers_of_a_model_are_what_they_were(made, name):
    def numbers(value):
        return [x for each in value.values() for x in each] if isinstance(value, dict) else value

    was = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(numbers(made[name]), numbers(was), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(make(Path(temporary)), indent=1) + "\n")
    sys.stdout.write(f"{GOLDEN} is made anew\n")
