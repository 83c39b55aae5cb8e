"""What requests and answers hold; the OpenAPI document is made of it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_PAIRS, MOST_HISTORY, MOST_NODES = 1000, 5000, 1000

Address = Annotated[str, Field(min_length=2, max_length=45, examples=["10.0.0.1"])]
_Text = Annotated[str, Field(min_length=4, max_length=40)]
_Seconds = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Time = Annotated[
    _Text | _Seconds | None,
    Field(description="ISO 8601 or seconds since 1970, UTC", examples=["2024-01-02T12:00:00Z"]),
]
Share = Annotated[float, Field(ge=0, le=1)]


class Asked(BaseModel):
    """What a request holds; names that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AskedPair(Asked):
    """A source, a destination and, where it matters, a time."""

    src: Address
    dst: Address
    time: Time = None


class Measured(AskedPair):
    """A measurement."""

    rtt_ms: float = Field(ge=-1, le=1e7, description="below 0: no answer came")


class WithHistory(Asked):
    """What every request may bring: measurements that count for its own answers alone."""

    history: list[Measured] = Field(default=[], max_length=MOST_HISTORY)


class PredictRequest(WithHistory):
    """Pairs to predict."""

    pairs: list[AskedPair] = Field(min_length=1, max_length=MOST_PAIRS)
    curve: bool = Field(default=False, description="with 99 quantiles and what was measured")


class RankRequest(WithHistory):
    """Destinations to put in order."""

    src: Address
    dst: list[Address] | None = Field(
        default=None, min_length=1, max_length=MOST_NODES, description="null: all known nodes"
    )
    time: Time = None


class WithinRequest(WithHistory):
    """How near nodes should be."""

    src: Address
    ms: float = Field(gt=0, le=1e7)
    probability: Share = Field(default=0.5, description="at least so likely")
    time: Time = None


class ScoreRequest(WithHistory):
    """Measurements to judge, each by itself."""

    measurements: list[Measured] = Field(min_length=1, max_length=MOST_PAIRS)


class Shown(BaseModel):
    """A measurement of a pair."""

    time: int | None = Field(description="seconds since 1970")
    rtt_ms: float | None = Field(description="null: no answer came")


class Prediction(BaseModel):
    """What the model says about one pair."""

    src: str
    dst: str
    rtt_ms: dict[str, float] = Field(
        description="given an answer: quantiles p5 to p95, mode and mean"
    )
    p_failed: Share
    unseen: list[str] = Field(description="of which of src and dst nothing is known")
    history: int = Field(description="measurements that the answer was drawn from")
    later: int = Field(description="of the history, left out as later than the question")
    curve_ms: list[float] | None = Field(default=None, description="quantiles 0.01 to 0.99")
    measured: list[Shown] | None = Field(default=None, description="of the pair, the newest")


class Predictions(BaseModel):
    """Answers in the order of the pairs."""

    answers: list[Prediction]


class Ranked(BaseModel):
    """Answers, shortest expected RTT first."""

    ranked: list[Prediction]
    nodes: int = Field(description="how many are known; the most measured are asked about")


class Near(Prediction):
    """A node that is near."""

    probability: Share = Field(description="of an answer within the time")


class Within(BaseModel):
    """Nodes near enough, the likeliest first."""

    within: list[Near]
    asked: int = Field(description="of how many nodes")
    nodes: int = Field(description="how many are known; the most measured are asked about")


class Strangeness(BaseModel):
    """How strange a measurement is."""

    src: str
    dst: str
    surprise: float = Field(description="-log of the probability of what came within 1 %, in nats")
    level: Share | None = Field(
        description="probability of a shorter RTT than came; null where none came"
    )
    rtt_ms: dict[str, float] = Field(description="what was expected")
    p_failed: Share


class ScoreList(BaseModel):
    """Scores in the order of the measurements."""

    scores: list[Strangeness]


class NodeAt(BaseModel):
    """A node that is known."""

    address: str
    measurements: int
    name: str | None
    latitude: float | None
    longitude: float | None
    x: float | None = Field(description="on the latency map, in ms of RTT; null: not placed yet")
    y: float | None


class NodeList(BaseModel):
    """The known nodes, the most measured first."""

    nodes: list[NodeAt]
    of: int = Field(description="how many are known")
    map_done: bool


class Health(BaseModel):
    """What is served."""

    status: str
    model: str
    nodes: int
    measurements: int
    waiting: int
    map_done: bool


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str
