import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_runs import write_run

from ping_llm.cli import cli
from ping_llm.serve.run import _service
from ping_llm.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("run") / "run"))


def test_it_answers_until_a_signal_and_what_is_under_way_is_answered_first(run, tmp_path):
    command = [sys.executable, "-m", "ping_llm", "serve", "--run", run, "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        url = server.stderr.readline().split()[0]
        pairs = [{"src": "10.0.0.1", "dst": f"10.0.1.{1 + i % 6}"} for i in range(1000)]
        request = urllib.request.Request(
            url + "predict",
            json.dumps({"pairs": pairs}).encode(),
            {"content-type": "application/json"},
        )
        answers = []

        def ask():
            with urllib.request.urlopen(request, timeout=120) as answer:
                answers.append(len(json.load(answer)["answers"]))

        def blocks():
            with urllib.request.urlopen(url + "metrics", timeout=120) as answer:
                return float(re.search(rb"ping_llm_blocks ([0-9.]+)", answer.read())[1])

        ask()  # compiles what the next one needs
        asking, before = threading.Thread(target=ask), blocks()
        asking.start()
        while blocks() == before:
            pass
        assert asking.is_alive()
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(60) == 143, rest
        asking.join()
    assert "Traceback" not in rest
    assert answers == [1000, 1000]
    assert not (tmp_path / "cache").exists()  # nothing is written


def refused(*words, **environment):
    result = CliRunner().invoke(cli, ["serve", *words], env=environment)
    assert result.exit_code == 1
    return result.stderr


def test_a_host_that_is_open_to_others_needs_a_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        error = refused("--pretrained", "--host", host, PING_LLM_SERVE_TOKEN="")
        assert "PING_LLM_SERVE_TOKEN" in error


def test_what_is_known_comes_from_the_run_the_rows_and_the_history(run, tmp_path, probe_rows):
    pings = "event_time,src_addr,dst_addr,ip_version,rtt\n1700000000,10.8.0.1,10.8.0.2,4,5\n"
    (tmp_path / "pings.csv").write_text(pings)
    counts = []
    for more in ({}, {"data": probe_rows}, {"history": tmp_path / "pings.csv"}):
        service = _service(ServeSettings(run=run, **more))
        service.engine.close()
        counts.append(len(service.engine.predictor.known))
    assert np.diff(counts).tolist() == [12 * 40, 1 - 12 * 40]
    assert "10.8.0.1" in service.texts


def test_without_the_extra_the_command_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is not installed; run pip install 'ping-llm[serve]'" in refused("--pretrained")


def test_what_cannot_be_served_is_told_in_one_line(tmp_path):
    assert "either --run or --pretrained" in refused()
    assert "nowhere" in refused("--run", str(tmp_path / "nowhere"), "--port", "0")
    places = tmp_path / "places.csv"
    places.write_text("a,b\n1,2\n")
    assert "lacks latitude" in refused("--pretrained", "--places", str(places), "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("--pretrained", "--port", port)
