"""Devices: the mesh, where each kind of array lives, how several processes join, peak memory."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ping_llm.errors import ConfigError, PingLLMError
from ping_llm.resources import peak_rss_bytes

MESH_AXES = ("data", "fsdp", "tensor")

# The last letters are the dimensions. The vocabulary is not split: 267 is odd.
EMBED_VD = P(None, "tensor")
HEAD_DV = P("tensor", None)
UP_DF = P("fsdp", "tensor")  # and D to heads
DOWN_FD = P("tensor", "fsdp")  # and heads to D
BIAS_F = P("tensor")
NORM_D = P()
BATCH_BT = P(("data", "fsdp"))
RESIDUAL_BTD = P(("data", "fsdp"), None, None)
FEATURES_DF = P(None, ("fsdp", "tensor"))  # of sparse autoencoders: F features
FEATURES_FD = P(("fsdp", "tensor"))
FEATURES_F = P(("fsdp", "tensor"))
HEADS_BTNH = P(("data", "fsdp"), None, "tensor", None)

# What JAX's own detection goes by: any of these means that a launcher started several processes.
_CLUSTER_VARIABLES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TPU_WORKER_HOSTNAMES")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axis sizes in `text`, such as `data=-1,fsdp=2`; axes left out have size 1.

    When no axis is -1 and `data` is left out, `data` is -1: it takes the devices that are left.
    """
    sizes: dict[str, int] = {}
    for each in filter(None, map(str.strip, text.split(","))):
        name, _, value = each.partition("=")
        if name not in MESH_AXES:
            axes = ", ".join(MESH_AXES)
            raise ConfigError(f"mesh axis {name!r} in {text!r} is not one of {axes}")
        if name in sizes:
            raise ConfigError(f"mesh {text!r} gives {name} twice")
        try:
            sizes[name] = int(value)
        except ValueError:
            raise ConfigError(f"mesh {text!r}: {name}={value!r} is not a whole number") from None
    if -1 not in sizes.values():
        sizes.setdefault("data", -1)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh over every device, with axes `MESH_AXES`; one -1 stands for what is left."""
    sizes, present = [data, fsdp, tensor], jax.device_count()
    shown = f"{data=} x {fsdp=} x {tensor=}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError(f"mesh {shown}: sizes are at least 1, and only one may be -1")
    if -1 in sizes:
        given = -int(np.prod(sizes))
        if present % given:
            raise ConfigError(f"mesh {shown}: {given} does not divide the {present} devices")
        sizes[sizes.index(-1)] = present // given
    elif (needed := int(np.prod(sizes))) != present:
        raise ConfigError(f"mesh {shown} needs {needed} devices; JAX sees {present}")
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto)


def metadata(spec: P) -> dict[str, Any]:
    """Returns what an `nnx.Param` is told, so that `nnx.get_named_sharding` finds `spec`.

    Values are placed when a whole state is made, not one by one: without a mesh a model works too.
    """
    return {"out_sharding": spec, "eager_sharding": False}


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Returns `x`, laid out by `spec` where a mesh is set, untouched where none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def batch_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Returns (index, count): this process holds part `index` of `count` of a batch's rows.

    Processes that differ along `tensor` only hold the same part.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % groups:
        shape = f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
        raise ConfigError(f"{batch_size=} must be a multiple of {groups}, the mesh's {shape}")
    rows = NamedSharding(mesh, BATCH_BT).addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in rows if index is not None}
    start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
    held = sum(end - begin for begin, end in spans)
    if held != stop - start or batch_size % held or start % held:
        raise ConfigError(
            f"{batch_size=}: this mesh gives process {jax.process_index()} rows that are not one "
            "equal run; make data x fsdp a multiple or a divisor of the number of processes"
        )
    return start // held, batch_size // held


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns global arrays [B, ...] made of every process's own rows."""
    sharding = NamedSharding(mesh, BATCH_BT)
    make = jax.make_array_from_process_local_data
    return {name: make(sharding, rows) for name, rows in batch.items()}


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others: by the three flags, or by the cluster's own variables.

    Without flags and outside a cluster this does nothing. It must come before any other use of
    JAX's devices.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"{process_id=} must be in 0..{num_processes - 1}, {num_processes=}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif (coordinator, num_processes, process_id) != (None, None, None):
        raise ConfigError(
            f"{coordinator=}, {num_processes=} and {process_id=} go together: give all or none"
        )
    elif _in_cluster():
        jax.distributed.initialize()


def _in_cluster() -> bool:
    values = (os.environ.get(name, "") for name in _CLUSTER_VARIABLES)
    return any(value not in ("", "1", "localhost") for value in values)


@contextlib.contextmanager
def by_first_process() -> Iterator[bool]:
    """Yields whether this is the first process, which alone acts; its error is raised in all."""
    error: PingLLMError | None = None
    try:
        yield jax.process_index() == 0
    except PingLLMError as raised:
        error = raised
    if jax.process_count() > 1:
        said = np.frombuffer(str(error or "").encode()[:2000].ljust(2000, b"\0"), np.uint8)
        text = multihost_utils.broadcast_one_to_all(said).tobytes().rstrip(b"\0")
        if text and error is None:
            error = ConfigError(text.decode(errors="replace"))
    if error is not None:
        raise error


def check_shared(directory: Path) -> None:
    """Raises a `ConfigError` unless all processes see the files that the first one writes there."""
    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    path = directory / f".shared-{token}"
    if jax.process_index() == 0:
        path.touch()
    multihost_utils.sync_global_devices("shared")
    sees = multihost_utils.process_allgather(np.int32(path.exists()))
    if jax.process_index() == 0:
        path.unlink()
    if not np.all(sees):
        raise ConfigError(
            f"the processes do not share {directory}; set XDG_CACHE_HOME to a directory that all "
            "of them see, or choose an output on a file system that all of them see"
        )


def peak_device_bytes() -> int:
    """Returns the most memory used on one device so far; on a CPU, by this process."""
    stats = filter(None, (device.memory_stats() for device in jax.local_devices()))
    return max((each["peak_bytes_in_use"] for each in stats), default=0) or peak_rss_bytes()
