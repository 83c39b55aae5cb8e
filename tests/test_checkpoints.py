import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_runs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from ping_llm import sharding
from ping_llm.checkpoints import Checkpoints
from ping_llm.data.network import read_known
from ping_llm.errors import CheckpointError, ConfigError, Stopped
from ping_llm.runs import load_run
from ping_llm.storage import Location
from ping_llm.training.export import export_run

ROWS = 512


def tree(value=0.0, **mesh_axes):
    mesh = sharding.make_mesh(**(mesh_axes or dict(data=4)))
    where = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    kernel = jax.device_put(jnp.full((ROWS, 64), value), where)
    return {"kernel": kernel, "count": jnp.asarray(3, jnp.int32)}


def shapes(of):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def save_and_wait(checkpoints, kernel):
    checkpoints.save(2, {"params": {"kernel": kernel}}, {})
    checkpoints.wait()


def save_one(directory, step=1, value=1.0):
    with Checkpoints(directory, keep=3) as checkpoints:
        checkpoints.save(step, {"params": tree(value)}, {"note": [1, "two", 0.1]})


def test_what_is_saved_comes_back(tmp_path):
    save_one(tmp_path, value=0.1)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 1
        trees, notes = checkpoints.restore(1, {"params": shapes(tree())})
    np.testing.assert_array_equal(trees["params"]["kernel"], np.full((ROWS, 64), np.float32(0.1)))
    assert trees["params"]["count"] == 3
    assert notes == {"note": [1, "two", 0.1]}


def test_a_save_holds_the_state_of_its_step_though_later_steps_reuse_its_memory(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state, copies = tree(), []
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for number in range(6):
            copies.append(jax.tree.map(np.array, step(jax.tree.map(jnp.copy, state))))
            state = step(state)
            checkpoints.save(number, {"params": state}, {})
            # The memory of `state` is free for the next step while it is still being written.
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        for number, copy in enumerate(copies):
            trees, _ = checkpoints.restore(number, {"params": shapes(tree())})
            jax.tree.map(np.testing.assert_array_equal, trees["params"], copy)


@pytest.mark.parametrize("axes", [dict(data=1, fsdp=4), dict(data=1, fsdp=2, tensor=2)])
def test_a_checkpoint_is_read_onto_another_mesh(tmp_path, axes):
    save_one(tmp_path, value=7.0)
    wanted = shapes(tree(**axes))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        kernel = checkpoints.restore(1, {"params": wanted})[0]["params"]["kernel"]
    assert kernel.sharding == wanted["kernel"].sharding
    np.testing.assert_array_equal(kernel, np.full((ROWS, 64), 7.0))


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, {"params": tree()}, {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "5"]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["2", "5"]


def test_what_a_killed_process_left_is_removed_and_not_taken_for_a_checkpoint(tmp_path):
    save_one(tmp_path)
    stale = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", stale)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 1
    assert not stale.exists()


def test_a_model_of_another_shape_is_refused_by_the_name_of_the_array(tmp_path):
    save_one(tmp_path)
    wanted = shapes(tree())
    wider = wanted | {"kernel": jax.ShapeDtypeStruct((ROWS, 128), jnp.float32)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"kernel has shape \(512, 64\).*\(512, 128\)"):
            checkpoints.restore(1, {"params": wider})
        with pytest.raises(CheckpointError, match="lacks bias"):
            checkpoints.restore(1, {"params": wanted | {"bias": wanted["count"]}})
        with pytest.raises(CheckpointError, match="holds count, which this model does not have"):
            checkpoints.restore(1, {"params": {"kernel": wanted["kernel"]}})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "no metadata", "no notes", "emptied"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    save_one(tmp_path)
    params = tmp_path / "1" / "params"
    if damage == "truncated":
        for path in [*params.rglob("d/*"), *params.rglob("*.ocdbt")]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "no metadata":
        (params / "_METADATA").unlink()
    elif damage == "no notes":
        shutil.rmtree(tmp_path / "1" / "notes")
    else:
        shutil.rmtree(params)
    damaged = pytest.raises(CheckpointError, match=f"{tmp_path}/1")
    with Checkpoints(tmp_path, keep=3) as checkpoints, damaged:
        checkpoints.restore(1, {"params": shapes(tree())})


def test_a_directory_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/checkpoints: cannot be opened") as error:
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)
    assert "\n" not in str(error.value)


def test_a_failed_write_is_an_error_and_leaves_the_checkpoint_before(tmp_path):
    save_one(tmp_path)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 64)), jnp.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=3)
    # As on a full disk, a write is cut short: no file may grow beyond 50 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: .*step 1 is intact"):
            save_and_wait(checkpoints, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save_one(tmp_path, step=2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest() == 2


def test_no_flipped_byte_of_a_checkpoint_is_read(tmp_path):
    save_one(tmp_path)
    assert (tmp_path / "1.json").is_file()
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file() and path.stat().st_size]
    rng = np.random.default_rng(0)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for path in (files * 200)[:200]:
            sound = path.read_bytes()
            flipped = bytearray(sound)
            flipped[rng.integers(len(sound))] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=f"{path} is damaged.*; remove {tmp_path}/1"):
                checkpoints.restore(1, {"params": shapes(tree())})
            path.write_bytes(sound)
        checkpoints.restore(1, {"params": shapes(tree())})


@pytest.mark.parametrize("at", ["restore", "wait_until_finished", "close"])
def test_a_signal_waits_for_a_restore_and_a_save_and_is_no_damage(tmp_path, at, monkeypatch):
    def stop(signum, _):
        raise Stopped(signum)

    def interrupted(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    save_one(tmp_path)
    original = getattr(ocp.CheckpointManager, at)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        checkpoints = Checkpoints(tmp_path, keep=3)
        monkeypatch.setattr(ocp.CheckpointManager, at, interrupted)
        with pytest.raises(Stopped), checkpoints:  # noqa: PT012
            checkpoints.restore(1, {"params": shapes(tree())})
            checkpoints.save(2, {"params": tree()}, {})
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        step = 1 if at != "close" else 2
        assert checkpoints.latest() == step
        checkpoints.restore(step, {"params": shapes(tree())})


# --- exports ------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    run = tiny_runs.write_run(tmp_path / "run")
    return run, tmp_path / "export", export_run(run, tmp_path / "export")


def test_an_export_loads_like_the_run_bit_for_bit(exported):
    run, output, result = exported
    assert result.parameters == tiny_runs.CONFIG.parameter_count()
    files = ["config.json", "known.arrow", "model.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == files
    of_run, of_export = load_run(run), load_run(output)
    assert of_run.config == of_export.config
    assert of_run.graphdef == of_export.graphdef
    jax.tree.map(np.testing.assert_array_equal, of_run.params, of_export.params)


def test_an_export_is_read_by_the_safetensors_library_under_plain_names(exported):
    tensors = load_file(exported[1] / "model.safetensors")
    assert tensors["blocks.mlp.up.kernel"].shape == (2, 32, 64)
    assert sum(tensor.size for tensor in tensors.values()) == exported[2].parameters


def test_exporting_again_changes_nothing_and_onto_something_else_is_refused(exported):
    run, output, result = exported
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert export_run(run, output) == result
    assert export_run(output, output) == result
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another output"):
        export_run(run, output)


def test_a_damaged_export_is_named(exported):
    path = exported[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a sound"):
        load_run(exported[1])


def test_no_flipped_byte_of_an_export_is_read(exported):
    output = exported[1]
    names, rng = ("model.safetensors", "known.arrow", "config.json"), np.random.default_rng(0)

    def content():
        run, known = load_run(output), read_known(Location.of(output))
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.params)]
        # A flip in the name `checksum` leaves a key that means nothing.
        used = {name: run.config.get(name) for name in ("model", "train", "data")}
        return used, leaves, [getattr(known, name).tolist() for name in ("time", "rtt")]

    sound, refused = content(), 0
    for path in [output / name for name in names * 20]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            assert content() == sound  # what was flipped says nothing, such as white space
        except CheckpointError as error:
            refused += str(path) in str(error)
        path.write_bytes(whole)
    assert refused > 50
