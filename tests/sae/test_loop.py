import json
import shutil
import signal
import subprocess
import sys
import time

import emulators
import numpy as np
import pytest
from safetensors.numpy import load_file

from ping_llm.checkpoints import Checkpoints
from ping_llm.errors import CheckpointError, ConfigError, StorageError, TrainingError
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.loop import train_sae

SMALL = ["held_out_tokens=150", "log_every=2", "checkpoint_every=4", "learning_rate=3e-3"]


def run(store, output, *overrides, **flags):
    given = {"layer": (1, 4), "features": 48, "k": 3, "batch_size": 64, "steps": 10}
    return train_sae(store, output, overrides=[*SMALL, *overrides], **given | flags)


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def timeless(output):
    """Returns what a run has measured of its autoencoders."""
    return [{k: v for k, v in row.items() if "/" in k or k == "step"} for row in lines(output)]


def weights(output):
    return {
        path.parent.name: load_file(path)
        for path in sorted(output.glob("*/sae_weights.safetensors"))
    }


def assert_equal_runs(left, right):
    assert timeless(left) == timeless(right)
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys() == {"residual.00001", "residual.00004"}
    for name in ours:
        for key in ours[name]:
            np.testing.assert_array_equal(ours[name][key], theirs[name][key])


@pytest.fixture(scope="module")
def finished(planted_store, tmp_path_factory):
    output = tmp_path_factory.mktemp("saes") / "finished"
    return output, run(planted_store, output)


def test_a_training_leaves_what_is_documented(finished):
    output, result = finished
    names = sorted(path.name for path in output.iterdir())
    assert names == ["checkpoints", "config.json", "metrics.jsonl", *result.autoencoders]
    assert [row["step"] for row in lines(output)] == [2, 4, 6, 8, 10]
    assert result.tokens == 640
    last = lines(output)[-1]
    for name, measured in result.autoencoders.items():
        sae = SparseAutoencoder.load(output / name)
        assert sae.metadata["hook_name"] == f"blocks.{int(name[-1])}.hook_resid_post"
        assert sae.metadata["trained_as"] == "batchtopk"
        np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=1), 1, rtol=1e-5)
        assert measured["explained_variance"] == last[f"{name}/held_out_explained_variance"] < 1
        assert 0 < measured["l0"] < 48


def test_a_finished_training_is_not_touched(finished, planted_store):
    output, result = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run(planted_store, output) == result
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}


def test_an_autoencoder_that_is_gone_is_saved_again(finished, planted_store, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "again")
    (again / "residual.00004" / "cfg.json").unlink()
    assert run(planted_store, again).autoencoders == finished[1].autoencoders
    assert_equal_runs(again, finished[0])
    ours, theirs = (path / "residual.00004" / "cfg.json" for path in (again, finished[0]))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_resumed_from_a_checkpoint_it_is_the_same_bit_for_bit(finished, planted_store, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "again")
    for step in (8, 10):
        shutil.rmtree(again / "checkpoints" / str(step), ignore_errors=True)
    for name in finished[1].autoencoders:
        shutil.rmtree(again / name)
    with Checkpoints(again / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest() is None  # keep_checkpoints is 2: it begins anew
    run(planted_store, again)
    assert_equal_runs(again, finished[0])
    shutil.rmtree(again / "checkpoints" / "10")
    run(planted_store, again)
    assert_equal_runs(again, finished[0])


@pytest.mark.slow
def test_killed_at_any_moment_it_is_the_same_bit_for_bit(planted_store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "ping_llm", "train-sae", "--activations", planted_store]
    command += ["--layer", "1,4", "--features", "48", "--k", "3", "--batch-size", "64"]
    command += ["--steps", "400", *(word for each in SMALL for word in ("--set", each))]
    subprocess.run([*command, "--output", whole], check=True, capture_output=True)
    kills = 0
    for steps in (20, 110, 250):
        process = subprocess.Popen([*command, "--output", killed], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            rows = killed / "metrics.jsonl"
            if rows.exists() and rows.read_text().count("\n") * 2 >= steps:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert kills == 3
    subprocess.run([*command, "--output", killed], check=True, capture_output=True)
    assert_equal_runs(killed, whole)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "fsdp=2,tensor=2"])
def test_the_losses_do_not_depend_on_the_mesh(finished, planted_store, tmp_path, mesh):
    run(planted_store, tmp_path / "sae", mesh=mesh, steps=4)
    ours, theirs = lines(tmp_path / "sae")[0], lines(finished[0])[0]
    for name in finished[1].autoencoders:
        assert ours[f"{name}/loss"] == pytest.approx(theirs[f"{name}/loss"], rel=1e-5)
        assert ours[f"{name}/grad_norm"] == pytest.approx(theirs[f"{name}/grad_norm"], rel=1e-4)


def test_a_layer_beside_others_is_the_layer_alone(finished, planted_store, tmp_path):
    run(planted_store, tmp_path / "alone", layer=(1,))
    (alone,) = weights(tmp_path / "alone").values()
    together = weights(finished[0])["residual.00001"]
    for name in alone:
        np.testing.assert_array_equal(alone[name], together[name])


def test_other_settings_and_other_stores_are_refused_by_name(finished, planted_store, tmp_path):
    with pytest.raises(ConfigError, match="k=4, was 3"):
        run(planted_store, finished[0], k=4)
    config = json.loads((finished[0] / "config.json").read_text())
    assert config["store"]["url"] == str(planted_store)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no training of autoencoders"):
        run(planted_store, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"train": {}}))
    with pytest.raises(ConfigError, match="holds something else"):
        run(planted_store, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"train_sae": {}}))
    with pytest.raises(CheckpointError, match="its checksum is another"):
        run(planted_store, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layer": (2,)}, "layer=2; it has residual.00001, residual.00004"),
        ({"layer": ()}, "give layers, each once"),
        ({"layer": (1, 1)}, "give layers, each once"),
        ({"site": "embed"}, "has no layers: leave out layer=1,4"),
        ({"k": 49}, "k=49 is more than features=48"),
        ({"sparsity": 1.0}, "has k active features whatever it costs"),
        ({"batch_size": 66}, "batch_size=66 must be a multiple of 4"),
        ({"features": 50, "mesh": "fsdp=4"}, "features=50 must be a multiple of 4"),
    ],
)
def test_settings_that_do_not_fit_leave_no_output(planted_store, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(planted_store, tmp_path / "sae", **flags)
    assert not (tmp_path / "sae").exists()


def test_a_store_that_is_none_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is no activation store"):
        run(tmp_path, tmp_path / "sae")


def test_gradients_that_are_not_finite_end_it_with_a_way_out(planted_store, tmp_path):
    with pytest.raises(TrainingError, match="try a smaller learning_rate"):
        run(planted_store, tmp_path / "sae", "learning_rate=1e38", "max_skipped_steps=2")


@pytest.mark.slow
def test_in_an_object_store_it_is_the_same(finished, planted_store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (tmp_path / "log").open("w") as log, emulators.s3(log) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run(planted_store, "s3://bucket/saes", steps=4)
        shutil.rmtree(tmp_path / "cache")  # as on another machine
        result = run(planted_store, "s3://bucket/saes")
        assert result.autoencoders == finished[1].autoencoders
        there = SparseAutoencoder.load("s3://bucket/saes/residual.00004")
    here = SparseAutoencoder.load(finished[0] / "residual.00004")
    assert there.metadata == here.metadata
    assert there.identity == here.identity
