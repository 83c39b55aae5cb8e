"""An object store's bad days: a proxy that fails requests at random, for tests."""

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

RATES = {
    "error": 0.03,  # 500 or 503, nothing was done
    "error after": 0.02,  # 500, yet it was done
    "reset": 0.02,  # the connection breaks, nothing was done
    "reset after": 0.02,  # the connection breaks, yet it was done
    "slow": 0.03,
    "refused": 0.03,  # a condition is said not to hold, and nothing was done
}
SLOW_S = 0.4


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a server, but for some of them.

    Attributes:
        away: While set, every connection breaks.
        counts: How often each fault happened.
    """

    daemon_threads = True

    def __init__(self, upstream: str, *, seed: int = 0, rates: dict[str, float] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.rates = RATES if rates is None else rates
        self.rng, self.away, self.counts = random.Random(seed), threading.Event(), Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that broke the connection


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms
    server: FaultyProxy

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def fault(self) -> str:
        at = self.server.rng.random()
        for name, rate in self.server.rates.items():
            if at < rate:
                return name
            at -= rate
        return ""

    def reply(self, status: int, headers, body: bytes) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in {"transfer-encoding", "connection", "content-length", "date"}:
                self.send_header(key, value)
        length = {key.lower(): value for key, value in headers}.get("content-length")
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", length if is_head and length else str(len(body)))
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def answer(self) -> None:
        body, fault = self.body(), self.fault()
        conditional = "ifGenerationMatch" in self.path or any(
            name in self.headers for name in ("If-Match", "If-None-Match")
        )
        writes = self.command in {"PUT", "POST"}
        if fault == "refused" and not (conditional and writes):
            fault = ""
        if self.server.away.is_set():
            fault = "reset"
        if fault:
            self.server.counts[fault] += 1
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "error":
            self.reply(self.server.rng.choice([500, 503]), [], b"")
            return
        if fault == "refused":
            self.reply(412, [], b"")
            return
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        with contextlib.closing(connection):
            headers = {
                key: value
                for key, value in self.headers.items()
                if key.lower() not in {"transfer-encoding", "content-length", "connection"}
            }
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
        if fault == "reset after":
            self.close_connection = True
        elif fault == "error after":
            self.reply(500, [], b"")
        else:
            self.reply(response.status, response.getheaders(), content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815


@contextlib.contextmanager
def faulty(environment: dict[str, str], **settings) -> Iterator[tuple[FaultyProxy, dict[str, str]]]:
    """Yields (the proxy, the environment that leads through it) of an emulator's environment."""
    upstream = next(value for value in environment.values() if value.startswith("http://"))
    with FaultyProxy(upstream, **settings) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            through = {
                key: proxy.url if value == upstream else value for key, value in environment.items()
            }
            yield proxy, through
        finally:
            proxy.shutdown()
            thread.join()
