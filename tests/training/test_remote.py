"""Runs in object stores: killed at any moment, they go on bit for bit, on any machine."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import emulators
import jax
import numpy as np
import pytest
from tiny_runs import write_run

from ping_llm.checkpoints import Checkpoints
from ping_llm.cli import cli
from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.outputs import claim
from ping_llm.runs import RemoteRun, load_run, whole_steps
from ping_llm.storage import Location
from ping_llm.training.export import export_run

SETTINGS = [
    *("model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.n_kv_heads=1"),
    *("model.head_dim=8", "model.d_ff=16", "batch_size=4", "seq_len=144", "log_every=1"),
    "grid_fraction=0.5",
    *("eval_batches=1", "eval_every=7", "checkpoint_every=2", "keep_checkpoints=2"),
]
# A killed training's claim runs out sooner than it does for users.
SCRIPT = "from ping_llm import outputs; outputs.LEASE_S = 6; from ping_llm.cli import main; main()"


@pytest.fixture(scope="module", params=["s3", "gcs"])
def bucket(request, tmp_path_factory):
    """The URL of an empty bucket, and the environment that leads to it."""
    directory = tmp_path_factory.mktemp(request.param)
    with (
        (directory / "log").open("w") as log,
        getattr(emulators, request.param)(log) as variables,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        for name, value in variables.items():
            patch.setenv(name, value)
        yield "s3://bucket" if request.param == "s3" else "gs://anonymous@bucket"


@pytest.fixture
def run(bucket, tmp_path):
    """A local run of one checkpoint, and its copy in the bucket."""
    local, remote = write_run(tmp_path / "run"), Location(f"{bucket}/{tmp_path.name}")
    with claim(remote, what="test") as claimed:
        RemoteRun(remote, tmp_path / "other", claimed)  # of an empty place: nothing
        copied = RemoteRun(remote, tmp_path / "empty", claimed)
        copied._directory = local
        copied.push(1, {1: None})
    return local, remote


def test_a_remote_run_and_its_export_load_like_the_local_one(run):
    local, remote = run
    assert whole_steps(remote) == [1]
    export_run(str(remote), f"{remote}-exported")
    expected = load_run(local)
    for loaded in (load_run(remote), load_run(f"{remote}-exported")):
        assert loaded.config == expected.config
        jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    before = [file.location.read_bytes() for file in Location(f"{remote}-exported").find()]
    export_run(str(remote), f"{remote}-exported")
    assert before == [file.location.read_bytes() for file in Location(f"{remote}-exported").find()]


def test_a_damaged_file_of_a_remote_checkpoint_is_named_with_the_way_out(run, tmp_path):
    remote = run[1]
    (tmp_path / "bad").write_bytes(b"something else")
    (remote / "checkpoints" / "1" / "params" / "_METADATA").upload(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"params/_METADATA is damaged.*checkpoints/1\.json"):
        load_run(remote)
    listed = remote / "checkpoints" / "1.json"
    (tmp_path / "bad").write_text(json.dumps({"objective": None, "files": {"../../x": "0"}}))
    listed.upload(tmp_path / "bad")
    with claim(remote, what="test") as claimed, pytest.raises(Exception, match="not the name"):
        RemoteRun(remote, tmp_path / "cache", claimed)
    (remote / "checkpoints" / "1.json").remove()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_run(remote)


def test_checkpoints_elsewhere_count_for_which_are_kept(tmp_path):
    kept = []
    elsewhere = {3: 0.5, 6: None, 7: None}  # the best of all is not here
    with Checkpoints(
        tmp_path, keep=2, elsewhere=elsewhere, on_saved=lambda step, of: kept.append((step, of))
    ) as checkpoints:
        for step, objective in ((8, 0.7), (9, None), (10, 0.4), (11, None)):
            tree = {"kernel": np.full(3, step)}
            checkpoints.save(step, {"params": tree}, {}, objective=objective)
        checkpoints.wait()
    assert kept == [
        (8, {3: 0.5, 7: None, 8: 0.7}),
        (9, {3: 0.5, 8: 0.7, 9: None}),
        (10, {9: None, 10: 0.4}),
        (11, {10: 0.4, 11: None}),
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["10", "11"]


def command(data, output, log, steps):
    flags = ["--data", data, "--output", output, "--steps", steps]
    flags += [f"--set={text}" for text in SETTINGS]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-c", SCRIPT, "train", *map(str, flags)]
    with log.open("w") as sink:
        return subprocess.Popen(words, env=environment, stdout=sink, stderr=sink)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    pings, rows = directory / "pings.parquet", directory / "rows"
    simulated = ["--probes", 12, "--days", 2, "--measurements", 3000]
    for words in (
        ["simulate", "--output", pings, *simulated],
        ["prepare-data", pings, "--output", rows, "--valid-fraction", 0.2],
    ):
        cli.main([str(word) for word in words], standalone_mode=False)
    return rows


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit_and_is_read_from_there(bucket, rows, tmp_path, monkeypatch):
    """Three times kill -9; one time the cache is another, as on another machine."""
    whole, killed, log = tmp_path / "whole", Location(f"{bucket}/deep/killed"), tmp_path / "log"
    assert command(rows, whole, log, 20).wait() == 0
    rng = random.Random(0)
    for attempt, wanted in enumerate((3, 9, 15)):
        if attempt == 2:
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
        process = command(rows, killed, log, 20)
        while process.poll() is None:
            if max(whole_steps(killed), default=0) >= wanted:
                time.sleep(rng.uniform(0, 0.5))
                process.kill()
            time.sleep(0.05)
        assert process.wait() == -signal.SIGKILL, log.read_text()
        time.sleep(6)
    assert command(rows, killed, log, 20).wait() == 0, log.read_text()
    timed = ("seconds", "real_tokens_per_second", "peak_device_bytes")
    logs = [(Location.of(run) / "metrics.jsonl").read_text() for run in (killed, whole)]
    for lines in zip(*(text.splitlines() for text in logs), strict=True):
        one, other = map(json.loads, lines)
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    assert whole_steps(killed) == whole_steps(Location.of(whole))
    one, other = load_run(killed), load_run(whole)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    check_readers(str(killed), rows)
    with pytest.raises(ConfigError, match="was begun with other settings: seed=5, was 0"):
        train_here(rows, str(killed), "seed=5")


def train_here(data, output, *overrides):
    from ping_llm.training.loop import train

    return train(data, output, overrides=[*SETTINGS, *overrides], steps=20)


def check_readers(run, data):
    from ping_llm import Predictor
    from ping_llm.prediction.evaluate import evaluate

    exported = f"{run}-exported"
    export_run(run, exported)
    assert Predictor.load(run).max_tokens == Predictor.load(exported).max_tokens == 144
    scores = [evaluate(each, data, max_rows=20, baselines="none") for each in (run, exported)]
    assert scores[0].methods == scores[1].methods
