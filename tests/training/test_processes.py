"""Training by two processes, for real: each with its own rows and its own devices."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ping_llm.outputs import claim
from ping_llm.storage import Location

SETTINGS = [
    "model.n_layers=1",
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_kv_heads=2",
    "model.head_dim=8",
    "model.d_ff=16",
    "batch_size=4",
    "seq_len=64",
    "grid_fraction=0",
    "optimizer=adamw",
    "schedule=cosine",
    "learning_rate=3e-3",
    "log_every=1",
    "eval_batches=1",
]
SCRIPT = "from ping_llm.cli import main; main()"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(data, output, *, processes, steps, mesh, devices=2):
    """Runs `ping-llm train` in so many processes of so many devices each."""
    codes, logs = run(data, output, processes=processes, steps=steps, mesh=mesh, devices=devices)
    assert codes == [0] * processes, logs


def run(data, output, *, processes, steps, mesh, devices=2):
    """Returns the exit code and what was said by each process."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    flags = ["--data", str(data), "--output", str(output), "--steps", str(steps), "--mesh", mesh]
    flags += [f"--set={text}" for text in SETTINGS]
    coordinator = f"127.0.0.1:{free_port()}"
    running = []
    for index in range(processes):
        joined = ["--coordinator", coordinator, "--num-processes", str(processes)]
        joined += ["--process-id", str(index)]
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            "train",
            *flags,
            *(joined if processes > 1 else []),
        ]
        log = (output.parent / f"{output.name}.{index}.log").open("w")
        with log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    codes = [process.wait(timeout=240) for process in running]
    names = [f"{output.name}.{index}.log" for index in range(processes)]
    return codes, [(output.parent / name).read_text() for name in names]


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], lines[-1]["valid_loss"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_any_number(probe_rows, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(probe_rows, one, processes=1, steps=6, mesh="data=2")
    train(probe_rows, two, processes=2, steps=3, mesh="data=2,fsdp=2")
    train(probe_rows, two, processes=2, steps=5, mesh="data=1,tensor=4")  # all rows in both
    train(probe_rows, two, processes=1, steps=6, mesh="fsdp=2")
    expected, expected_valid = losses(one)
    got, got_valid = losses(two)
    # The cosine's end moves with `steps`; at these few steps of warm-up it has not begun.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got_valid, expected_valid, rtol=1e-4)


@pytest.mark.slow
def test_what_refuses_the_first_process_ends_all_of_them(probe_rows, tmp_path):
    output = tmp_path / "run"
    with claim(Location.of(output), what="another training"):
        codes, logs = run(probe_rows, output, processes=2, steps=1, mesh="data=2", devices=1)
    assert codes == [1, 1]
    for log in logs:
        assert "is being written by another process (another training, pid" in log
        assert "Traceback" not in log
    assert not output.exists()


@pytest.mark.slow
def test_four_processes_train_as_one(probe_rows, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    train(probe_rows, one, processes=1, steps=5, mesh="data=2")
    train(probe_rows, four, processes=4, steps=5, mesh="data=2,tensor=2", devices=1)
    np.testing.assert_allclose(losses(four)[0], losses(one)[0], rtol=1e-5)


@pytest.mark.slow
def test_saved_on_four_devices_it_goes_on_on_one_and_on_two_by_two(probe_rows, tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    train(probe_rows, one, processes=1, steps=6, mesh="data=1", devices=1)
    train(probe_rows, moved, processes=1, steps=2, mesh="data=4", devices=4)
    train(probe_rows, moved, processes=1, steps=4, mesh="data=1", devices=1)
    train(probe_rows, moved, processes=1, steps=6, mesh="fsdp=2,tensor=2", devices=4)
    np.testing.assert_allclose(losses(moved)[0], losses(one)[0], rtol=1e-5)
