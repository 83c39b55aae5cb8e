import importlib.util
import re
import subprocess
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import write_run

from ping_llm.cli import cli
from ping_llm.data.simulate import simulate

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("examples")
    simulate(place / "pings.parquet", probes=4, days=1.0, measurements=20, seed=0)
    write_run(place / "run")
    return place


def test_the_nearest_peer_is_found_among_those_given(made, capsys):
    rows = pq.read_table(made / "pings.parquet").to_pylist()
    source, version = rows[0]["src_addr"], rows[0]["ip_version"]
    peers = sorted({row["dst_addr"] for row in rows if row["ip_version"] == version})[:4]
    (made / "peers.txt").write_text("\n".join(peers))
    given = (str(made / "run"), source, str(made / "peers.txt"), str(made / "pings.parquet"))
    assert sorted(load("nearest_peer").main(*given)) == peers
    assert " ms " in capsys.readouterr().out


def test_every_measurement_gets_a_score(made):
    scores = load("anomaly_scores").main(str(made / "run"), str(made / "pings.parquet"))
    assert scores.shape == (20,)
    assert np.all(scores > 0)


LAUNCHERS = sorted((EXAMPLES / "launch").iterdir())


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_every_launcher_starts_the_command_with_flags_that_it_has(path):
    text = path.read_text()
    assert "extract-activations" in text
    assert "not run by us" in text.lower()
    command = cli.get_command(click.Context(cli), "extract-activations")
    known = {flag for option in command.params for flag in option.opts}
    own = {"--worker", "--zone", "--command", "--quiet"}  # gcloud's and pip's
    shell = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    used = set(re.findall(r"--[a-z][a-z-]*", "\n".join(shell)))
    assert {"--model", "--input", "--output"} <= used
    assert used - own <= known
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
    if path.suffix == ".py":
        compile(text, path, "exec")
