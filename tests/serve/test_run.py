import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from click.testing import CliRunner
from tiny_runs import write_run

from ping_llm.cli import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("run") / "run"))


def test_it_answers_until_a_signal_and_what_is_under_way_is_answered_first(run, tmp_path):
    command = [sys.executable, "-m", "ping_llm", "serve", "--run", run, "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        url = server.stderr.readline().split()[0]
        asked = {"pairs": [{"src": "10.0.0.1", "dst": "10.0.1.1"}]}
        request = urllib.request.Request(
            url + "predict", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        answers = []

        def ask():
            with urllib.request.urlopen(request, timeout=60) as answer:
                answers.append(json.load(answer))

        asking = threading.Thread(target=ask)  # the first one waits for a compiler
        asking.start()
        metrics = url + "metrics"
        while True:
            with urllib.request.urlopen(metrics, timeout=60) as answer:
                if b"ping_llm_blocks 0.0" in answer.read() and asking.is_alive():
                    break
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(60) == 143, rest
        asking.join()
    assert "Traceback" not in rest
    assert answers[0]["answers"][0]["src"] == "10.0.0.1"
    assert not (tmp_path / "cache").exists()  # nothing is written


def refused(*words, **environment):
    result = CliRunner().invoke(cli, ["serve", *words], env=environment)
    assert result.exit_code == 1
    return result.stderr


def test_a_host_that_is_open_to_others_needs_a_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        error = refused("--pretrained", "--host", host, PING_LLM_SERVE_TOKEN="")
        assert "PING_LLM_SERVE_TOKEN" in error


def test_what_cannot_be_served_is_told_in_one_line(tmp_path):
    assert "either --run or --pretrained" in refused()
    assert "nowhere" in refused("--run", str(tmp_path / "nowhere"), "--port", "0")
    places = tmp_path / "places.csv"
    places.write_text("prefix,name\n10.0.0.0/8,Here\n")
    assert "lacks latitude" in refused("--pretrained", "--places", str(places), "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("--pretrained", "--port", port)
