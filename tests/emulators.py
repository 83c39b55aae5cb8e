"""Object stores on this machine, for tests: S3 by moto, Google Cloud Storage by its emulator."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def _server(command: list[str], url: str, log) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command} ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


# One request at a time: moto looks for a condition and writes in two steps, where S3 takes one.
_MOTO = """
import sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple
WSGIRequestHandler.disable_nagle_algorithm = True  # or every answer takes 40 ms
application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
def one_at_a_time(environ, start_response):
    with lock:
        return [b"".join(application(environ, start_response))]
run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""


@contextlib.contextmanager
def s3(log) -> Iterator[dict[str, str]]:
    """Yields the environment that leads to an empty S3 with a bucket named `bucket`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _server([sys.executable, "-c", _MOTO, str(port)], url, log):
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def gcs(log) -> Iterator[dict[str, str]]:
    """Yields the environment that leads to an empty GCS with a bucket named `bucket`.

    Without credentials Arrow wants the user `anonymous`: `gs://anonymous@bucket/...`.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Path(__file__).with_name("gcs_server.py")
    with _server([sys.executable, str(server), str(port)], f"{url}/storage/v1/b/bucket", log):
        yield {"CLOUD_STORAGE_EMULATOR_ENDPOINT": url, "TENSORSTORE_GCS_HTTP_URL": url}
