import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import write_run

from ping_llm import settings
from ping_llm.cli import cli
from ping_llm.simulation.simulate import simulate

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


def test_ripe_atlas_results_become_a_report(tmp_path, capsys):
    lines = []
    for minute in range(600):
        for probe in range(3):
            lost = minute % 7 == probe
            rtt = {"x": "*"} if lost else {"rtt": 20.0 + 5 * probe + minute % 3}
            line = {"type": "ping", "fw": 5020, "af": 4, "timestamp": 1_600_000_000 + 60 * minute}
            line |= {"prb_id": probe, "from": f"192.0.2.{probe + 1}", "dst_addr": "198.51.100.1"}
            line |= {"sent": 1, "rcvd": int(not lost), "min": rtt.get("rtt", -1), "result": [rtt]}
            lines.append(json.dumps(line))
    (tmp_path / "results.ndjson").write_text("\n".join(lines))
    example = load("ripe_atlas")
    small = ("seq_len=128", "model.n_layers=1", "model.d_model=32", "model.n_heads=2")
    small += ("model.n_kv_heads=2", "model.head_dim=16", "model.d_ff=32")
    given = str(tmp_path / "out"), str(tmp_path / "results.ndjson")
    result = example.main(*given, steps=2, settings=small)
    assert result.protocol == "time"
    assert {"model", "model_online", "last_value", "median9"} <= set(result.methods)
    assert result.n + result.n_failed == 180
    assert (tmp_path / "out" / "evaluation.html").exists()
    assert "median9" in capsys.readouterr().out


class Anything:
    """Stands for the package `modal`, which tests do without: takes whatever it is given."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *given, **named):
        # A decorator gives back the function.
        return given[0] if given and callable(given[0]) and not named else Anything()


def load_modal_app(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "modal", Anything())
    app = load("modal_app")
    monkeypatch.setattr(app, "ROOT", tmp_path)
    return app


def test_the_modal_app_gives_every_command_what_it_takes(monkeypatch, tmp_path):
    app, called = load_modal_app(monkeypatch, tmp_path), []
    monkeypatch.setattr(app, "run", lambda *given, seconds=None: called.append(given) or True)
    app.prepare("a.parquet,b.parquet", "time")
    app.inspect()
    assert app.train(30)
    app.evaluate()
    app.extract("Qwen/Qwen2.5-0.5B", "texts.parquet")
    names = ["prepare-data", "inspect-data", "train", "evaluate", "extract-activations"]
    assert [name for name, *_ in called] == names
    for name, *given in called:
        command = cli.get_command(click.Context(cli), name)
        values = command.make_context(name, list(given)).params
        assert values
        settings.load(command.settings_class, flags={k: v for k, v in values.items() if v})


def test_the_modal_app_stops_a_training_at_its_time_limit_and_tells_failures(monkeypatch, tmp_path):
    """`sh` stands in for ping-llm: it is ended by the signal, as a training is with code 143."""
    app, popen = load_modal_app(monkeypatch, tmp_path), subprocess.Popen
    script = "trap 'kill $!; exit 143' TERM; $0 & wait $!"
    monkeypatch.setattr(app.subprocess, "Popen", lambda words, cwd: popen(words[1:], cwd=cwd))
    assert app.run("sh", "-c", script, "sleep 60", seconds=0.3) is False
    assert app.run("sh", "-c", "pwd > here", seconds=60) is True
    assert (tmp_path / "here").read_text().strip() == str(tmp_path)
    with pytest.raises(RuntimeError, match="ended with 3"):
        app.run("sh", "-c", "exit 3")


def test_the_real_modal_takes_the_app():
    modal = pytest.importorskip("modal")
    app = load("modal_app")
    for name in ("prepare", "inspect", "train", "evaluate", "extract"):
        assert isinstance(getattr(app, name), modal.Function)


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
