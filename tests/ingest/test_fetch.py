"""Inputs from a web server and standard input are read as the same bytes in a file are."""

import http.server
import io
import json
import random
import re
import sys
import threading

import pytest

from ping_llm.errors import PingLLMError
from ping_llm.ingest import fetch
from ping_llm.ingest.prepare import prepare_data
from ping_llm.ingest.sources import read_measurements
from ping_llm.measurements import MeasurementTable

LINES = b"".join(
    json.dumps(
        {"type": "ping", "af": 4, "from": f"193.0.0.{i % 200}", "dst_addr": "198.51.100.7"}
        | {"timestamp": 1_700_000_000 + i, "min": i + 1}
    ).encode()
    + b"\n"
    for i in range(500)
)


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, badly as it is told."""

    daemon_threads = True

    def __init__(self, content, **behaviour):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.behaviour, self.requests = content, behaviour, 0
        self.rng = random.Random(0)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def url(self, name):
        return f"http://user:secret@127.0.0.1:{self.server_address[1]}/{name}?token=secret"

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, content = self.server, self.server.content
        server.requests += 1
        how = server.behaviour
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/real.ndjson")
            self.end_headers()
            return
        if "status" in how and (how.get("always") or server.rng.random() < 0.3):
            self.send_error(how["status"])
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if asked and how.get("ranges", True):
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        version = server.requests if how.get("changes") else 1
        self.send_header("ETag", f'"{version}"')
        if how.get("length", True):
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        body = content[start:stop]
        breaks = how.get("breaks", 0)
        if breaks and server.rng.random() < breaks:
            body = body[: server.rng.randrange(len(body))]
        self.wfile.write(body)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(fetch, "RANGE_BYTES", 7000)
    monkeypatch.setattr(fetch.time, "sleep", lambda s: None)
    monkeypatch.setattr(fetch, "ATTEMPTS", 12)


def read(*inputs):
    return MeasurementTable.concat(list(read_measurements([str(i) for i in inputs]))).to_arrow()


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "x.ndjson").write_bytes(LINES)
    return read(tmp_path / "x.ndjson")


@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"ranges": False},
        {"ranges": False, "length": False},
        {"breaks": 0.4},
        {"ranges": False, "breaks": 0.4},
        {"status": 503},
        {"status": 429, "ranges": False},
    ],
)
@pytest.mark.parametrize("name", ["x.ndjson", "moved", "no-ending"])
def test_what_a_server_gives_in_the_end_is_what_a_file_gives(expected, behaviour, name, capfd):
    with Server(LINES, **behaviour) as server:
        assert read(server.url(name)) == expected
    told = capfd.readouterr().err
    assert f"{len(LINES):,} bytes, SHA-256 " in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"status": 404, "always": True}, "the server answers 404"),
        ({"status": 500, "always": True}, "the server answers 500"),
        ({"changes": True}, "changed while it was fetched"),
        ({"breaks": 1.0, "ranges": False}, "cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_is_one_error_without_secrets(behaviour, message):
    with Server(LINES, **behaviour) as server, pytest.raises(PingLLMError, match=message) as caught:
        read(server.url("x.ndjson"))
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_error():
    with Server(LINES) as server:
        url = server.url("x.ndjson")
    with pytest.raises(PingLLMError, match="cannot be fetched"):
        read(url)


def test_standard_input_is_read_to_its_end(expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert read("-") == expected


def test_what_was_rejected_says_where_it_came_from(tmp_path):
    with Server(LINES + b"broken\n") as server:
        result = prepare_data([server.url("x.ndjson")], tmp_path / "rows")
        assert result.rejected == {"not a JSON object": 1}
        # The same again is known by its content.
        assert prepare_data([server.url("x.ndjson")], tmp_path / "rows") == result
    import pyarrow.parquet as pq

    (rejected,) = pq.read_table(tmp_path / "rows" / "rejected.parquet").to_pylist()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/x\.ndjson", rejected["file"])
    assert rejected["line"] == 501
