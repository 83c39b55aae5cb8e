"""One model in several processes, for real: each writes the columns it holds."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from emulators import free_port
from stores import everything

from ping_llm.activations.inspection import inspect_activations
from ping_llm.extraction import parity
from ping_llm.extraction.run import extract_activations

# Joined before the extraction does, for a shorter wait for the lost than JAX's 100 s.
SCRIPT = """
import json, sys, jax
settings = json.loads(sys.argv[4])
joined = [settings[name] for name in ("coordinator", "num_processes", "process_id")]
jax.distributed.initialize(*joined, heartbeat_timeout_seconds=10)
from ping_llm.extraction.run import extract_activations
result = extract_activations(*sys.argv[1:4], **settings)
open(sys.argv[5], "w").write(str(result.tokens))
"""


@pytest.fixture
def start(checkpoint, documents, small, tmp_path):
    """Starts the processes of a group on the store `tmp_path / "store"`."""

    def start(processes, mesh, **changes):
        flag = "--xla_force_host_platform_device_count=1"
        coordinator, running = f"127.0.0.1:{free_port()}", []
        for index in range(processes):
            joined = {
                "mesh": mesh,
                "coordinator": coordinator,
                "num_processes": processes,
                "process_id": index,
            }
            command = [
                checkpoint,
                documents,
                tmp_path / "store",
                json.dumps(small | joined | changes),
            ]
            command += [tmp_path / f"tokens.{index}"]
            with (tmp_path / f"log.{index}").open("w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", SCRIPT, *map(str, command)],
                        env=os.environ | {"XLA_FLAGS": flag},
                        stdout=log,
                        stderr=log,
                    )
                )
        return running

    return start


def assert_ended(running, tmp_path):
    codes = [process.wait(240) for process in running]
    logs = [(tmp_path / f"log.{index}").read_text()[-3000:] for index in range(len(running))]
    assert codes == [0] * len(running), logs


def assert_equal_to_rounding(store, finished):
    (ours, our_rows), (theirs, their_rows) = everything(store), everything(finished)
    np.testing.assert_array_equal(our_rows.tokens, their_rows.tokens)
    assert our_rows.samples == their_rows.samples
    for name in theirs:
        difference = parity.relative_l2(ours[name], theirs[name])
        print(name, difference)
        assert difference < 1e-6
    found = inspect_activations(str(store), verify=True)
    assert found.errors == []
    assert found.complete
    expected = inspect_activations(str(finished)).statistics["residual.00002"]
    for name, value in found.statistics["residual.00002"].items():
        assert value == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, "tensor=2"), (4, "fsdp=2,tensor=2")])
def test_a_model_in_several_processes_gives_the_same(processes, mesh, start, finished, tmp_path):
    running = start(processes, mesh)
    assert_ended(running, tmp_path)
    assert_equal_to_rounding(tmp_path / "store", finished)
    tokens = {(tmp_path / f"tokens.{index}").read_text() for index in range(processes)}
    assert len(tokens) == 1
    # Each process wrote the columns that it held, in files of its own.
    width = 32 // processes
    for path in (tmp_path / "store").glob("units/*/*/residual.00000"):
        shape = json.loads((path / "zarr.json").read_text())["chunk_grid"]
        assert shape["configuration"]["chunk_shape"][1] == width
        assert {int(file.name) for file in path.glob("c/*/*")} <= set(range(processes))


@pytest.mark.slow
def test_a_lost_process_fails_the_unit_and_not_the_store(
    start, finished, checkpoint, documents, small, tmp_path
):
    many_units = {"unit_mb": 0.0001}
    running = start(2, "tensor=2", **many_units)
    while not list((tmp_path / "store").glob("units/*/done.json")):
        time.sleep(0.01)
        assert running[1].poll() is None
    running[1].kill()
    running[1].wait()
    started = time.monotonic()
    assert running[0].wait(240) != 0
    print(f"the other ended after {time.monotonic() - started:.1f} s", running[0].returncode)
    found = inspect_activations(str(tmp_path / "store"), verify=True)
    assert found.errors == []
    assert 0 < found.units_done < found.units
    extract_activations(checkpoint, documents, tmp_path / "store", **small | many_units)
    assert_equal_to_rounding(tmp_path / "store", finished)
