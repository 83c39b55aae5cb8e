"""From settings to a server that runs until it is told to stop."""

import asyncio
import dataclasses
import ipaddress
import os
import socket
import sys
import time

import uvicorn

from ping_llm import settings
from ping_llm.data.rows import ProbeRows
from ping_llm.errors import ConfigError, DataError
from ping_llm.ingest.sources import read_table
from ping_llm.measurements import MeasurementTable
from ping_llm.places import Places
from ping_llm.prediction.predictor import Predictor
from ping_llm.serve.app import Service, create_app
from ping_llm.serve.guard import LOOPBACK
from ping_llm.serve.settings import ServeSettings

TOKEN = "PING_LLM_SERVE_TOKEN"
MOST_CONNECTIONS = 512
STOP_SECONDS = 20  # that what is being answered has when the server is told to stop


@dataclasses.dataclass(frozen=True)
class ServeResult:
    """What was served.

    Attributes:
        questions: Pairs that were answered.
        seconds: How long the server ran.
    """

    questions: int
    seconds: float


@settings.takes(ServeSettings)
def serve(chosen: ServeSettings) -> ServeResult:
    """Answers questions over HTTP until a signal stops it.

    Raises:
        ConfigError: The port is taken, or the host is open to others and there is no token.
        DataError: A file cannot be read.
        StorageError: A file is absent.
        CheckpointError: `run` is no run.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(chosen.host):
        raise ConfigError(
            f"host {chosen.host} is open to others; put a token, which every request must carry, "
            f"into the environment variable {TOKEN}"
        )
    with _listen(chosen.host, chosen.port) as listening:
        started = time.monotonic()
        service = _service(chosen)
        app = create_app(service, host=chosen.host, token=token)
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        port = listening.getsockname()[1]
        print(f"http://{host}:{port}/  (Ctrl-C stops)", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=STOP_SECONDS,
            h11_max_incomplete_event_size=16_384,
        )
        asyncio.run(uvicorn.Server(config).serve([listening]))
        return ServeResult(service.engine.questions, round(time.monotonic() - started, 1))


def _is_loopback(host: str) -> bool:
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=kind, backlog=MOST_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on host {host}, port {port}: {error}; choose another --port or --host"
        ) from None


def _service(chosen: ServeSettings) -> Service:
    places = None if chosen.places is None else Places.read(chosen.places)
    if places is not None and not places.located:
        raise DataError(f"{chosen.places} lacks latitude and longitude, which a map is made of")
    predictor = Predictor.pretrained() if chosen.run is None else Predictor.load(chosen.run)
    known = [predictor.known]
    if chosen.data is not None:
        known.append(ProbeRows(chosen.data, "train").to_table())
    if chosen.history is not None:
        known.append(read_table([chosen.history]))
    if len(known) > 1:
        predictor = predictor.knowing(MeasurementTable.concat(known))
    return Service(predictor, model="pretrained" if chosen.run is None else "run", places=places)
