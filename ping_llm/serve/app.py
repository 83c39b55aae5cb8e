"""The application: from requests to questions, from answers to JSON."""

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

import numpy as np
import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.process_collector import ProcessCollector

from ping_llm import __version__, addresses
from ping_llm.errors import DataError
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.predictor import LEVELS, Predictor
from ping_llm.serve import api
from ping_llm.serve.engine import Answered, AnswerQueue, BusyError
from ping_llm.serve.guard import Guard
from ping_llm.serve.places import Places
from ping_llm.serve.scaling import classical_scaling

LANDMARKS, MAPPED = 16, 500  # nodes that the others are placed by, and all that are placed
MEASURED_SHOWN = 200  # measurements of a pair
PAGE = ("index.html", "page.js", "charts.js", "land.js", "page.css")
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": api.Refusal, "description": text}
    for status, text in {
        400: "A value cannot be, or nothing is known to answer from.",
        401: "The token is absent or wrong.",
        403: "A page of another server asks.",
        408: "The request comes too slowly.",
        413: "The request is too large.",
        421: "The Host header has another name.",
        429: "Too many requests wait.",
        503: "The answer takes too long.",
    }.items()
}


class Service:
    """What is served: a predictor, its nodes and where they are."""

    def __init__(self, predictor: Predictor, *, model: str, places: Places | None = None):
        """Takes what is known apart; the map comes in time.

        Args:
            predictor: Who answers.
            model: What to call it.
            places: Where nodes are.
        """
        self.engine, self.model = AnswerQueue(predictor), model
        known, nodes = predictor.known, predictor.network.nodes
        ends = np.concatenate([nodes.lookup(end) for end in (known.src, known.dst)])
        counts = np.bincount(ends, minlength=len(nodes))
        order = np.argsort(-counts, kind="stable")[: api.MOST_NODES]
        self.count = len(nodes)
        self.addresses = nodes.addresses[order]
        self.texts, self.measurements = addresses.to_text(self.addresses), counts[order]
        self.places = (places or Places({})).of(self.addresses)
        self.map: np.ndarray | None = None if len(order) else np.zeros((0, 2))

    async def place(self) -> None:
        """Makes the latency map, from predictions that wait until nothing else does."""
        n = min(len(self.texts), MAPPED)
        landmarks = min(n, LANDMARKS)
        src, dst = np.divmod(np.arange(landmarks * n), n)
        family = addresses.family(self.addresses)
        # Between families there is no round trip: such nodes are as far apart as any.
        asked = np.flatnonzero((family[src] == family[dst]) & (src != dst))
        table = _questions(self.addresses[src[asked]], self.addresses[dst[asked]])
        apart = np.full(landmarks * n, np.nan)
        answered = await asyncio.wrap_future(self.engine.submit(table, idle=True))
        apart[asked] = answered.columns["rtt_p50"].to_numpy()
        apart[src == dst] = 0
        apart = np.where(np.isnan(apart), np.nanmax(apart, initial=0), apart).reshape(-1, n)
        among = (apart[:, :landmarks] + apart[:, :landmarks].T) / 2
        self.map = classical_scaling(among, apart[:, landmarks:].T)

    async def ask(
        self, questions: MeasurementTable, history: MeasurementTable | None, **more: Any
    ) -> Answered:
        """Returns the answers of the engine."""
        return await asyncio.wrap_future(self.engine.submit(questions, history, **more))

    def measured(self, src: bytes, dst: bytes) -> list[api.Shown]:
        """Returns the newest measurements between two addresses, either way, oldest first."""
        known = self.engine.predictor.known
        one, other = (addresses.from_packed([each]) for each in (src, dst))
        there = (known.src == one) & (known.dst == other)
        rows = np.flatnonzero(there | ((known.src == other) & (known.dst == one)))
        rows = rows[np.argsort(known.time[rows], kind="stable")][-MEASURED_SHOWN:]
        return [
            api.Shown(time=None if t == NO_TIME else t, rtt_ms=None if rtt < 0 else rtt)
            for t, rtt in zip(known.time[rows].tolist(), known.rtt[rows].tolist(), strict=True)
        ]


def _questions(src: np.ndarray, dst: np.ndarray) -> MeasurementTable:
    n = len(src)
    return MeasurementTable(
        time=np.full(n, NO_TIME),
        src=src,
        dst=dst,
        family=addresses.family(src),
        rtt=np.full(n, -1, np.float32),
    )


def _table(rows: Sequence[api.AskedPair], what: str) -> MeasurementTable:
    columns: dict[str, list] = {
        "src_addr": [row.src for row in rows],
        "dst_addr": [row.dst for row in rows],
        "event_time": [None if row.time is None else str(row.time) for row in rows],
    }
    measured = [row for row in rows if isinstance(row, api.Measured)]
    if measured:
        columns["rtt"] = [row.rtt_ms for row in measured]
    try:
        return MeasurementTable.from_arrow(columns, questions=not measured)
    except DataError as error:
        raise DataError(f"{what}, {error}") from None


def _history(asked: api.WithHistory) -> MeasurementTable | None:
    return _table(asked.history, "history") if asked.history else None


def _predictions(questions: MeasurementTable, answered: Answered) -> list[dict[str, Any]]:
    src, dst = addresses.to_text(questions.src), addresses.to_text(questions.dst)
    return [
        {
            "src": src[i],
            "dst": dst[i],
            "rtt_ms": {name: row[f"rtt_{name}"] for name in (*LEVELS, "mode", "mean")},
            "p_failed": row["p_failed"],
            "unseen": [end for end in ("src", "dst") if row[f"unseen_{end}"]],
            "history": row["history"],
            "later": row["later"],
        }
        for i, row in enumerate(answered.columns.to_pylist())
    ]


def create_app(service: Service, *, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """Returns the ASGI application of a service.

    Args:
        service: What is served; it ends with the application.
        host: Address that is listened on.
        token: What every request must carry; None: nothing.
    """
    engine = service.engine
    registry = prometheus_client.CollectorRegistry()
    ProcessCollector(registry=registry)
    requests = prometheus_client.Counter(
        "ping_llm_requests", "Requests.", ["route", "status"], registry=registry
    )
    seconds = prometheus_client.Histogram(
        "ping_llm_request_seconds", "Seconds to the answer.", ["route"], registry=registry
    )
    for name, text, value in [
        ("waiting", "Requests not answered yet.", lambda: engine.waiting),
        ("questions", "Questions answered.", lambda: engine.questions),
        ("blocks", "Blocks of questions answered together.", lambda: engine.blocks),
    ]:
        prometheus_client.Gauge(f"ping_llm_{name}", text, registry=registry).set_function(value)

    def told(route: str, status: int, taken: float) -> None:
        requests.labels(route, status).inc()
        seconds.labels(route).observe(taken)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        placing = asyncio.create_task(service.place()) if service.map is None else None
        yield
        engine.close()
        if placing is not None:
            placing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await placing

    app = FastAPI(
        title="ping-llm",
        version=__version__,
        description="Round-trip times and failures between internet nodes, as distributions.",
        docs_url=None,  # their pages fetch from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    app.add_middleware(Guard, host=host, token=token, told=told)

    @app.exception_handler(DataError)
    async def bad(_: Request, error: DataError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 429, {"retry-after": "1"})

    def chosen(asked: api.WithHistory, src: str, dst: list[str] | None, time: Any):
        """Returns the questions of one source: to some destinations, or to all nodes there are."""
        history = _history(asked)
        if dst is None:
            source = _table([api.AskedPair(src=src, dst=src)], "src")
            nodes = service.addresses
            if history is not None:
                nodes = np.unique(np.concatenate([nodes, history.src, history.dst]))
            there = (addresses.family(nodes) == source.family) & (nodes != source.src)
            dst = addresses.to_text(nodes[there][: api.MOST_NODES])
            if not dst:
                raise DataError("no other node is known; give a history")
        pairs = [api.AskedPair(src=src, dst=each, time=time) for each in dst]
        return _table(pairs, "question"), history

    @app.post("/predict")
    async def predict(asked: api.PredictRequest) -> api.Predictions:
        """RTT distributions and failures of pairs."""
        questions = _table(asked.pairs, "pairs")
        answered = await service.ask(questions, _history(asked))
        answers = _predictions(questions, answered)
        if asked.curve:
            for i, answer in enumerate(answers):
                answer["curve_ms"] = answered.curve[i].tolist()
                ends = (end[i].tobytes() for end in (questions.src, questions.dst))
                answer["measured"] = service.measured(*ends)
        return api.Predictions(answers=[api.Prediction(**each) for each in answers])

    @app.post("/rank")
    async def rank(asked: api.RankRequest) -> api.Ranked:
        """Destinations in the order of their expected RTT."""
        questions, history = chosen(asked, asked.src, asked.dst, asked.time)
        answers = _predictions(questions, await service.ask(questions, history))
        answers.sort(key=lambda each: each["rtt_ms"]["mean"])
        return api.Ranked(ranked=[api.Prediction(**each) for each in answers], nodes=service.count)

    @app.post("/within")
    async def within(asked: api.WithinRequest) -> api.Within:
        """Nodes that answer within a time, as likely as is asked."""
        questions, history = chosen(asked, asked.src, None, asked.time)
        answered = await service.ask(questions, history, limit=asked.ms)
        answers = _predictions(questions, answered)
        near = []
        for answer, below in zip(answers, answered.below.tolist(), strict=True):
            probability = min((1 - answer["p_failed"]) * below, 1.0)
            if probability >= asked.probability:
                near.append(api.Near(**answer, probability=probability))
        near.sort(key=lambda each: -each.probability)
        return api.Within(within=near, asked=len(answers), nodes=service.count)

    @app.post("/score")
    async def score(asked: api.ScoreRequest) -> api.ScoreList:
        """How strange measurements are, each judged by what was known before it."""
        questions = _table(asked.measurements, "measurements")
        limit = questions.rtt.astype(float)
        answered = await service.ask(questions, _history(asked), limit=limit)
        answers = _predictions(questions, answered)
        columns = answered.surprise.tolist(), answered.below.tolist(), questions.rtt.tolist()
        return api.ScoreList(
            scores=[
                api.Strangeness(
                    **{key: answer[key] for key in ("src", "dst", "rtt_ms", "p_failed")},
                    surprise=surprise,
                    level=None if rtt < 0 else min(below, 1.0),
                )
                for answer, surprise, below, rtt in zip(answers, *columns, strict=True)
            ]
        )

    @app.get("/nodes")
    async def nodes() -> api.NodeList:
        """The known nodes, and where they are."""
        placed = [] if service.map is None else service.map.tolist()
        placed += [(None, None)] * (len(service.texts) - len(placed))
        columns = service.texts, service.measurements.tolist(), service.places, placed
        listed = [
            api.NodeAt(
                address=text,
                measurements=count,
                name=place and place.name,
                latitude=place and place.latitude,
                longitude=place and place.longitude,
                x=x,
                y=y,
            )
            for text, count, place, (x, y) in zip(*columns, strict=True)
        ]
        return api.NodeList(nodes=listed, of=service.count, map_done=service.map is not None)

    @app.get("/health")
    async def health() -> api.Health:
        """What is served, and how busy it is."""
        return api.Health(
            status="ok",
            model=service.model,
            nodes=service.count,
            measurements=len(engine.predictor.known),
            waiting=engine.waiting,
            map_done=service.map is not None,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        content = prometheus_client.generate_latest(registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    for name in PAGE:
        content = (resources.files("ping_llm.serve") / "page" / name).read_bytes()
        route = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(route, _file(content, name), include_in_schema=False)
    return app


def _file(content: bytes, name: str):
    kind = mimetypes.guess_type(name)[0]

    async def file() -> Response:
        return Response(content, media_type=kind)

    return file
