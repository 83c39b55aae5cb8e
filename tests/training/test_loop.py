import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from wandb.proto import wandb_internal_pb2

from ping_llm import sharding
from ping_llm.checkpoints import Checkpoints
from ping_llm.data import pipeline
from ping_llm.errors import CheckpointError, ConfigError, DataError, Stopped, TrainingError
from ping_llm.outputs import claim
from ping_llm.runs import load_run, whole_steps
from ping_llm.storage import Location
from ping_llm.training.loop import train
from ping_llm.training.step import make_eval_step

SMALL = [
    "model.n_layers=1",
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.head_dim=8",
    "model.d_ff=16",
    "batch_size=4",
    "seq_len=64",
    "grid_fraction=0",
    "learning_rate=1e-2",
    "eval_batches=1",
    "log_every=1",
]


def run(data, output, *overrides, steps=6):
    return train(data, output, overrides=[*SMALL, *overrides], steps=steps)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(probe_rows, tmp_path_factory):
    """A run of 6 steps that was never interrupted, and its result."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    return output, run(probe_rows, output, "checkpoint_every=2")


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_leaves_what_the_design_says(finished):
    output, result = finished
    config = json.loads((output / "config.json").read_text())
    assert config["model"]["d_model"] == 16
    assert config["train"]["steps"] == 6
    assert config["parameters"] == result.parameters
    assert (output / "loss.png").stat().st_size > 1000
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        *("2", "2.json", "4", "4.json", "6", "6.json")
    ]
    rows = lines(output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["valid_loss"] == result.valid_loss
    assert {"loss_rtt", "valid_loss_rtt", "grad_norm", "learning_rate"} <= rows[-1].keys()
    assert result.step == 6
    assert result.loss == rows[-1]["loss"]
    assert 0 <= result.padding_fraction < 0.5
    assert result.real_tokens_per_second > 0
    assert result.mfu is None


def test_a_finished_run_is_not_touched_and_gives_the_same_result(finished, probe_rows):
    output, result = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run(probe_rows, output, "checkpoint_every=2") == result
    assert run(probe_rows, output, "checkpoint_every=2", steps=3) == result
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert before == after


def test_a_run_of_another_version_of_the_token_language_is_refused(copy_of_finished, probe_rows):
    path = copy_of_finished / "config.json"
    config = json.loads(path.read_text())
    del config["language_version"], config["checksum"]  # as the first version wrote it
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="on version 1 of the token language, this is ver"):
        run(probe_rows, copy_of_finished, "checkpoint_every=2")
    with pytest.raises(CheckpointError, match="train it again"):
        load_run(copy_of_finished)


def test_more_steps_go_on_where_the_run_ended_on_another_mesh(copy_of_finished, probe_rows):
    before = lines(copy_of_finished)
    result = run(probe_rows, copy_of_finished, "mesh=data=2,fsdp=2", steps=8)
    after = lines(copy_of_finished)
    assert [row["step"] for row in after] == list(range(1, 9))
    assert after[:6] == before
    assert result.step == 8


def test_a_resumed_run_equals_one_that_never_stopped(finished, probe_rows, copy_of_finished):
    shutil.rmtree(copy_of_finished / "checkpoints" / "6")
    with (copy_of_finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # as a killed process leaves it
    result = run(probe_rows, copy_of_finished, "checkpoint_every=2")
    assert [row["loss"] for row in lines(copy_of_finished)] == [
        row["loss"] for row in lines(finished[0])
    ]
    assert result.valid_loss == finished[1].valid_loss


def test_other_settings_on_the_same_output_are_refused_by_name(finished, probe_rows):
    with pytest.raises(ConfigError, match="seed=1, was 0"):
        run(probe_rows, finished[0], "seed=1")
    with pytest.raises(ConfigError, match=r"model\.d_ff=8, was 16"):
        run(probe_rows, finished[0], "model.d_ff=8")


def test_other_data_on_the_same_output_are_refused(finished, probe_rows, tmp_path):
    other = shutil.copytree(probe_rows, tmp_path / "rows")
    metadata = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(metadata | {"seed": 5}))
    with pytest.raises(
        ConfigError, match=r"was begun with other settings: data='.*rows \(fingerprint"
    ):
        run(other, finished[0])


def test_an_output_that_holds_something_else_is_refused(probe_rows, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run(probe_rows, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        run(probe_rows, tmp_path)


@pytest.mark.parametrize("name", ["wandb/run-1/log", "checkpoints/mine/model.bin", "loss.png"])
def test_files_of_a_user_are_refused_and_stay(probe_rows, tmp_path, name):
    file = tmp_path / "own" / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run(probe_rows, tmp_path / "own")
    assert file.read_text() == "years of work"


def test_a_start_that_fails_removes_only_what_it_made(probe_rows, tmp_path, monkeypatch):
    def fail(*_):
        raise TrainingError("no")

    output = tmp_path / "run"
    output.mkdir()
    (output / ".notes").write_text("mine")
    monkeypatch.setattr("ping_llm.training.loop._valid_batches", fail)
    with pytest.raises(TrainingError):
        run(probe_rows, output)
    assert [path.name for path in output.iterdir()] == [".notes"]


def test_data_that_are_not_prepared_are_refused(tmp_path):
    with pytest.raises(DataError, match="prepare-data"):
        run(tmp_path / "absent", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh=data=3", "needs 3 devices; JAX sees 4"),
        ("batch_size=6", "batch_size=6 must be a multiple of 4"),
        ("model.vocab_size=200", "model.vocab_size=200 is too small"),
        ("seq_len=8", "seq_len"),
    ],
)
def test_settings_that_do_not_fit_leave_no_output(probe_rows, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(probe_rows, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_second_training_on_one_output_is_refused_and_the_first_one_is_not_touched(
    finished, probe_rows
):
    output, result = finished
    with claim(Location.of(output), what="train"):
        code = "from ping_llm.cli import main; main()"
        flags = ["train", "--data", probe_rows, "--output", output, "--set", "seed=5"]
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is being written by another process (train, pid" in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1
    assert run(probe_rows, output, "checkpoint_every=2") == result


def test_a_start_that_fails_leaves_nothing(probe_rows, tmp_path, monkeypatch):
    def fail(*args):
        raise DataError("the first batch cannot be made")

    monkeypatch.setattr(pipeline.TrainLoader, "__next__", fail)
    with pytest.raises(DataError, match="first batch"):
        run(probe_rows, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_first_checkpoint_does_not_bind_the_next_one(
    copy_of_finished, probe_rows
):
    shutil.rmtree(copy_of_finished / "checkpoints")
    (copy_of_finished / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert run(probe_rows, copy_of_finished, "seed=7", steps=2).step == 2
    assert [row["step"] for row in lines(copy_of_finished)] == [1, 2]


def test_a_damaged_checkpoint_says_what_to_do(copy_of_finished, probe_rows):
    shutil.rmtree(copy_of_finished / "checkpoints" / "6" / "params")
    with pytest.raises(CheckpointError, match=r"checkpoints/6/params.* is damaged.*; remove "):
        run(probe_rows, copy_of_finished, steps=8)


def test_a_loss_that_stays_no_number_ends_the_run_and_keeps_the_checkpoints(probe_rows, tmp_path):
    overrides = ["learning_rate=1e30", "clip_norm=1e30", "checkpoint_every=1", "warmup_steps=0"]
    with pytest.raises(TrainingError, match=r"in a row that was skipped: .*=nan"):
        run(probe_rows, tmp_path / "run", *overrides, "max_skipped_steps=2", "eval_every=1000")
    assert "1" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


def test_the_best_on_valid_is_kept_and_is_what_is_loaded(probe_rows, tmp_path):
    output = tmp_path / "run"
    settings = ["keep_checkpoints=1", "checkpoint_every=100", "eval_every=1", "warmup_steps=3"]
    settings += ["loss_weights=0,0,0,0,1"]
    # At this rate the loss falls at first and then goes wild.
    run(probe_rows, output, *settings, "learning_rate=3", steps=12)
    losses = {row["step"]: row["valid_objective"] for row in lines(output)}
    rtt = {row["step"]: row["valid_loss_rtt"] for row in lines(output)}
    assert losses == pytest.approx(rtt, rel=1e-6)  # it has all the weight
    best = min(losses, key=losses.__getitem__)
    assert best != 12, "choose other settings: the last step is the best one"
    kept = whole_steps(Location.of(output))
    assert kept == [best, 12]
    with Checkpoints(output / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.best() == best
    loaded = load_run(output)
    evaluate = make_eval_step(loaded.graphdef)
    (batch,) = pipeline.eval_batches(probe_rows, "valid", batch_size=4, seq_len=64, count=1)
    with jax.set_mesh(sharding.make_mesh()):
        params = jax.device_put(loaded.params, NamedSharding(jax.sharding.get_mesh(), P()))
        nll, count = evaluate(params, dataclasses.asdict(batch))
    assert float(nll[-1] / count[-1]) == pytest.approx(losses[best], rel=1e-5)
    # A resumed run knows the best one of before, and goes on from the newest.
    assert run(probe_rows, output, *settings, "learning_rate=3", steps=13).step == 13
    assert best in whole_steps(Location.of(output))


def test_a_trace_of_some_steps_is_written(probe_rows, tmp_path):
    train(probe_rows, tmp_path / "run", overrides=SMALL, steps=9, profile=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_weights_and_biases_follows_offline_as_one_run_over_a_resume(probe_rows, tmp_path):
    output = tmp_path / "run"
    for steps in (2, 4):
        run(probe_rows, output, "wandb=offline", steps=steps)
    ids = {path.name.split("-", 3)[-1] for path in (output / "wandb").glob("offline-run-*")}
    assert ids == {(output / "wandb" / "id.txt").read_text().strip()}
    steps = []
    for file in sorted((output / "wandb").glob("offline-run-*/*.wandb")):
        steps += logged_steps(file)
    assert steps == [1, 2, 3, 4]


def logged_steps(path):
    """Returns the steps in a file of Weights & Biases that a later sync would send.

    It is a log of LevelDB's form: blocks of 32 KiB of records, each with a checksum, a length and
    whether it is whole (1), or the first (2), a middle (3) or the last part (4).
    """
    data, at, record, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record.FromString(record)
            for item in message.history.item:
                if item.key == "_step" or list(item.nested_key) == ["_step"]:
                    steps.append(int(item.value_json))
            record = b""
    return steps


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_once_and_the_run_can_go_on(finished, probe_rows, tmp_path, signum):
    output = tmp_path / "run"
    before = signal.getsignal(signum)

    class SignalAtStep2:
        def __init__(self, schedule):
            self.schedule = schedule

        def __call__(self, taken):
            if taken == 1:  # called for the line of step 2
                os.kill(os.getpid(), signum)
            return self.schedule(taken)

    with pytest.MonkeyPatch.context() as patch:
        from ping_llm.training import loop

        patch.setattr(
            loop, "learning_rate_at", lambda cfg: SignalAtStep2(lambda taken: 0.0 * taken)
        )
        with pytest.raises(Stopped) as stopped:
            run(probe_rows, output, "checkpoint_every=100")
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) == before
    assert whole_steps(Location.of(output)) == [3]
    if signum == signal.SIGTERM:
        run(probe_rows, output)
        assert [row["loss"] for row in lines(output)] == [row["loss"] for row in lines(finished[0])]


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_bit_for_bit_as_if_it_had_not_been(probe_rows, tmp_path):
    """Five times kill -9, at a random moment between and inside saves."""
    overrides = [f"--set={text}" for text in [*SMALL, "checkpoint_every=2", "eval_every=7"]]
    script = "from ping_llm.cli import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def command(output):
        flags = ["--data", str(probe_rows), "--output", str(output), "--steps", "60"]
        return [sys.executable, "-c", script, "train", *flags, *overrides]

    def start(output):
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(command(output), env=environment, stdout=log, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    rng = random.Random(0)
    for wanted in sorted(rng.sample(range(3, 55), 5)):
        process = start(killed)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= wanted:
                time.sleep(rng.uniform(0.0, 0.02))
                process.kill()
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert start(killed).wait() == 0, (tmp_path / "log").read_text()
    timed = ("seconds", "real_tokens_per_second", "peak_device_bytes")
    for one, other in zip(lines(killed), lines(whole), strict=True):
        for name in timed:
            del one[name], other[name]
        assert one == other
