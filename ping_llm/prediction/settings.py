"""The settings of `ping-llm predict`, `query`, `evaluate` and `generate`."""

import math
from typing import TYPE_CHECKING, Literal

from ping_llm.errors import ConfigError
from ping_llm.prediction.baselines import ONLINE, STATIC
from ping_llm.settings import Settings, field

if TYPE_CHECKING:
    Baseline = str
else:
    Baseline = Literal["all", "none", *STATIC, *ONLINE]


DEFAULT_MAX_TOKENS = 64  # that a language model writes


class PredictSettings(Settings):
    """Predict RTT distributions and failures.

    Give --src and --dst for one pair; --pairs and --output for a file of pairs, which goes on where
    it was stopped; --src and --rank to order many destinations by expected RTT.

    Attributes:
        run: Run directory of the model.
        step: Its checkpoint of that step.
        pretrained: Ask the model in the box, which needs no training but a --history.
        src: Source address.
        dst: Destination address.
        time: When: ISO 8601 or seconds since 1970, UTC.
        pairs: Parquet, Arrow or CSV with src_addr, dst_addr[, event_time].
        output: Parquet for --pairs.
        rank: Destinations, one address a line, to put in order.
        history: Further measurements of the network, to be known first.
        explain: Say which measurements an answer to one pair was drawn from.
    """

    run: str | None = field(default=None, location=True, positional=True)
    step: int | None = field(default=None, ge=0, default_text="the best")
    pretrained: bool = False
    src: str | None = field(default=None, metavar="A")
    dst: str | None = field(default=None, metavar="B")
    time: str | None = field(default=None, metavar="T")
    pairs: str | None = field(default=None, location=True)
    output: str | None = field(default=None, location=True)
    rank: str | None = field(default=None, location=True)
    history: str | None = field(default=None, location=True)
    explain: bool = False

    def check(self) -> None:
        """Raises a `ConfigError` unless the settings are those of one of the three forms."""
        if (self.run is None) != self.pretrained:
            raise ConfigError("give either --run or --pretrained")
        if self.pretrained and self.step is not None:
            raise ConfigError("--step is for a --run; the model in the box has one state")
        if self.pretrained and self.history is None:
            raise ConfigError("--pretrained knows no network; give --history with measurements")
        if self.explain and self.dst is None:
            raise ConfigError("--explain is for one pair; give --src and --dst")
        asked = ("src", "dst", "time", "pairs", "output", "rank")
        given = {name for name in asked if getattr(self, name) is not None}
        if given - {"time"} not in ({"src", "dst"}, {"src", "rank"}) and given != {
            "pairs",
            "output",
        }:
            raise ConfigError(
                "give --src and --dst for one pair, --pairs and --output for a file of pairs, or "
                "--src and --rank for destinations in order"
            )
        if self.output is not None and not self.output.endswith(".parquet"):
            raise ConfigError(f"output {self.output} must be a .parquet file")


class QuerySettings(Settings):
    """Complete a measurement: any fields given, any asked.

    An end of which nothing is given is one of those that the run knows, or of --candidates; one
    given by a prefix is any address under it.

    Attributes:
        run: Run directory of the model.
        step: Its checkpoint of that step.
        ask: What is asked: an end, both, the RTT, or the hour of the day.
        src: Source: an address, or a prefix such as 198.51.100.0/24.
        dst: Destination, likewise.
        time: When: ISO 8601 or seconds since 1970, UTC.
        rtt: RTT in ms: a band such as 20..30; a number, which stands for 1 % around it; or failed.
        candidates: Addresses to choose from, one a line; of pairs two.
        history: Further measurements of the network, to be known first.
        beam: Beginnings of addresses that are followed; of addresses, how many have their RTT
            predicted.
        top: Completions to show.
    """

    run: str = field(location=True)
    step: int | None = field(default=None, ge=0, default_text="the best")
    ask: Literal["dst", "src", "pair", "rtt", "time"]
    src: str | None = field(default=None, metavar="A")
    dst: str | None = field(default=None, metavar="B")
    time: str | None = field(default=None, metavar="T")
    rtt: str | None = field(default=None, metavar="R")
    candidates: str | None = field(default=None, location=True)
    history: str | None = field(default=None, location=True)
    beam: int = field(default=256, gt=0)
    top: int = field(default=10, gt=0)

    def check(self) -> None:
        """Raises a `ConfigError` if what is asked is given, or the RTT is none."""
        if self.ask in ("rtt", "time") and getattr(self, self.ask) is not None:
            raise ConfigError(f"--ask {self.ask} and --{self.ask} exclude each other")
        if self.rtt is not None:
            rtt_band(self.rtt)


def rtt_band(text: str) -> tuple[float, float] | None:
    """Returns the least and the largest RTT in ms that are meant; None: a failure.

    Raises:
        ConfigError: The text is no RTT.
    """
    if text == "failed":
        return None
    low, dots, high = text.partition("..")
    try:
        ends = (float(low), float(high)) if dots else (float(low) * 0.99, float(low) * 1.01)
    except ValueError:
        ends = (math.nan, math.nan)
    if not 0 <= ends[0] <= ends[1] < math.inf:
        raise ConfigError(f"rtt={text!r} is no RTT; give ms like 25, a band like 20..30, or failed")
    return ends


class DetectSettings(Settings):
    """Find what is strange in a stream of measurements.

    Each is judged by what was known before it, in time order. What belongs together is one event:
    when, from where, to where, how much slower or failing.

    Attributes:
        input: Measurements with times: a file, directory or glob.
        run: Run directory of the model.
        pretrained: Ask the model in the box, which needs a --history.
        history: Measurements from before, to be known first.
        false_alarms: Alarms a day and source to expect where nothing happens.
    """

    input: str = field(location=True, argument=True)
    run: str | None = field(default=None, location=True)
    pretrained: bool = False
    history: str | None = field(default=None, location=True)
    false_alarms: float = field(default=1.0, gt=0)

    def check(self) -> None:
        """Raises a `ConfigError` without one model, or without what the one in the box needs."""
        if (self.run is None) != self.pretrained:
            raise ConfigError("give either --run or --pretrained")
        if self.pretrained and self.history is None:
            raise ConfigError("--pretrained knows no network; give --history with measurements")


class EvaluateSettings(Settings):
    """Compare a model with classical methods.

    All methods are scored on the same measurements. On probe rows these are the test rows, by the
    protocol of the split; on a file of measurements all of them.

    Attributes:
        run: Run directory of the model.
        step: Its checkpoint of that step.
        pretrained: Compare the model in the box, too, or alone without --run.
        data: Directory of probe rows, or a file of measurements.
        baselines: Classical methods to compare the model with.
        max_rows: Measurements to score at most, drawn at random.
        report: Write one HTML page.
        field_orders: Also the loss of each field asked last, beside the best without the others.
        tokens: Also that many tokens of a window, actual and expected.
        prefixes: Also by autonomous system, country and distance: CSV with the columns prefix and
            some of asn, country, latitude, longitude; or pyasn's text.
    """

    run: str | None = field(default=None, location=True, positional=True)
    step: int | None = field(default=None, ge=0, default_text="the best")
    data: str = field(location=True)
    pretrained: bool = False
    baselines: tuple[Baseline, ...] = ("all",)
    max_rows: int | None = field(default=10_000, ge=1)
    report: str | None = field(default=None, location=True)
    field_orders: bool = False
    tokens: int | None = field(default=None, gt=0, default_text="none")
    prefixes: str | None = field(default=None, location=True)

    def check(self) -> None:
        """Raises a `ConfigError` without a model, or if `all` or `none` does not stand alone."""
        if self.run is None and not self.pretrained:
            raise ConfigError("give --run, --pretrained, or both")
        if self.run is None and self.step is not None:
            raise ConfigError("--step is for a --run; the model in the box has one state")
        if self.run is None and (self.field_orders or self.tokens):
            raise ConfigError("--field-orders and --tokens are for a --run, which knows all fields")
        alone = {"all", "none"} & set(self.baselines)
        if alone and len(self.baselines) > 1:
            raise ConfigError(f"baselines: give {alone.pop()} alone, or names of methods")


class GenerateSettings(Settings):
    """Sample measurements from a model.

    Give --run and --count for measurements of a run: prints CSV as prepare-data reads it; a
    measurement that the model gives no time has none. Give --model and --prompt for the text of a
    language model, to check that its checkpoint is read right.

    Attributes:
        run: Run directory of the model.
        step: Its checkpoint of that step.
        count: How many measurements.
        history: Measurements to go on from.
        model: Checkpoint directory or hub id of a language model.
        prompt: Text to go on from.
        max_tokens: Tokens to write after the prompt, at most.
        temperature: Draw tokens, the more evenly the higher; 0: take the likeliest.
        seed: Seed of the samples.
    """

    run: str | None = field(default=None, location=True, positional=True)
    step: int | None = field(default=None, ge=0, default_text="the best")
    count: int | None = field(default=None, ge=1, positional=True)
    history: str | None = field(default=None, location=True)
    model: str | None = field(default=None, location=True)
    prompt: str | None = None
    max_tokens: int | None = field(default=None, ge=1, default_text=str(DEFAULT_MAX_TOKENS))
    temperature: float | None = field(default=None, ge=0, default_text="0")
    seed: int = field(default=0, ge=0, lt=2**63)

    def check(self) -> None:
        """Raises a `ConfigError` unless the settings are those of one of the two forms."""
        forms = {
            "run": ("count", "history", "step"),
            "model": ("prompt", "max_tokens", "temperature"),
        }
        if (self.run is None) == (self.model is None):
            raise ConfigError("give either --run and --count, or --model and --prompt")
        form, other = ("run", "model") if self.model is None else ("model", "run")
        if wrong := [name for name in forms[other] if getattr(self, name) is not None]:
            flag = wrong[0].replace("_", "-")
            raise ConfigError(f"--{flag} belongs to --{other}, not to --{form}")
        if getattr(self, needed := forms[form][0]) is None:
            raise ConfigError(f"--{form} needs --{needed}")
