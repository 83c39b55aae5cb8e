import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm import sharding
from ping_llm.errors import ConfigError


def test_one_axis_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(data=-1, fsdp=2).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert dict(sharding.make_mesh(data=1, fsdp=1, tensor=-1).shape)["tensor"] == 4


@given(st.permutations(["data", "fsdp", "tensor"]), st.lists(st.integers(1, 64), min_size=3))
def test_the_axes_of_a_mesh_may_stand_in_any_order(names, sizes):
    text = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=False))
    assert sharding.parse_mesh(text) == dict(zip(names, sizes, strict=False))


def test_axes_left_out_have_size_one_and_data_takes_the_rest():
    assert sharding.parse_mesh("fsdp=2") == {"data": -1, "fsdp": 2, "tensor": 1}
    assert sharding.parse_mesh("tensor=-1") == {"data": 1, "fsdp": 1, "tensor": -1}
    assert sharding.parse_mesh("") == {"data": -1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "mesh axis 'model' in 'model=2' is not one of data, fsdp, tensor"),
        ("data", "data='' is not a whole number"),
        ("data=two", "data='two' is not a whole number"),
        ("data=2,data=2", "gives data twice"),
    ],
)
def test_a_mesh_that_is_not_one_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        sharding.parse_mesh(text)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3), "data=3 x fsdp=1 x tensor=1 needs 3 devices; JAX sees 4"),
        (dict(fsdp=3), "3 does not divide the 4 devices"),
        (dict(fsdp=-1), "only one may be -1"),
        (dict(data=0), "sizes are at least 1"),
        (dict(data=-2), "sizes are at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_names_its_sizes_and_the_devices(sizes, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(**sizes)


def test_one_process_holds_all_rows_of_a_batch():
    mesh = sharding.make_mesh(data=2, fsdp=2)
    assert sharding.batch_share(mesh, 8) == (0, 1)
    with pytest.raises(ConfigError, match="batch_size=6 must be a multiple of 4"):
        sharding.batch_share(mesh, 6)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
    rows = np.arange(8).reshape(4, 2)
    placed = sharding.place_batch(mesh, {"inputs": rows})["inputs"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


def test_a_constraint_is_nothing_where_no_mesh_is_set():
    x = jnp.ones((4, 2, 3))
    assert sharding.constrain(x, sharding.RESIDUAL_BTD) is x
    with jax.set_mesh(sharding.make_mesh(data=4)):
        laid_out = jax.jit(lambda x: sharding.constrain(x, sharding.RESIDUAL_BTD))(x)
    assert laid_out.addressable_shards[0].data.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1", None, None), "go together: give all or none"),
        ((None, 2, 0), "go together: give all or none"),
        (("localhost:1", 2, 2), "process_id=2 must be in 0..1"),
    ],
)
def test_flags_of_several_processes_are_checked_before_anything_is_contacted(flags, message):
    with pytest.raises(ConfigError, match=message):
        sharding.start_processes(*flags)


def test_outside_a_cluster_nothing_is_started(monkeypatch):
    for name in sharding._CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    sharding.start_processes()
    assert jax.process_count() == 1
