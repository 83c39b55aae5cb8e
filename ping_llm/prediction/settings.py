"""The settings of `ping-llm predict`, `evaluate` and `generate`."""

from typing import TYPE_CHECKING, Literal

from ping_llm.errors import ConfigError
from ping_llm.prediction.baselines import ONLINE, STATIC
from ping_llm.settings import Settings, field

if TYPE_CHECKING:
    Baseline = str
else:
    Baseline = Literal["all", "none", *STATIC, *ONLINE]


class PredictSettings(Settings):
    """Predict RTT distributions and failures.

    Give --src and --dst for one pair; --pairs and --output for a file of pairs, which goes on where
    it was stopped; --src and --rank to order many destinations by expected RTT.

    Attributes:
        run: Run directory of the model.
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
        pretrained: Compare the model in the box, too, or alone without --run.
        data: Directory of probe rows, or a file of measurements.
        baselines: Classical methods to compare the model with.
        max_rows: Measurements to score at most, drawn at random.
        report: Write one HTML page.
    """

    run: str | None = field(default=None, location=True, positional=True)
    data: str = field(location=True)
    pretrained: bool = False
    baselines: tuple[Baseline, ...] = ("all",)
    max_rows: int | None = field(default=10_000, ge=1)
    report: str | None = field(default=None, location=True)

    def check(self) -> None:
        """Raises a `ConfigError` without a model, or if `all` or `none` does not stand alone."""
        if self.run is None and not self.pretrained:
            raise ConfigError("give --run, --pretrained, or both")
        alone = {"all", "none"} & set(self.baselines)
        if alone and len(self.baselines) > 1:
            raise ConfigError(f"baselines: give {alone.pop()} alone, or names of methods")


class GenerateSettings(Settings):
    """Sample measurements from a model.

    Prints CSV as prepare-data reads it; a measurement that the model gives no time has none.

    Attributes:
        run: Run directory of the model.
        count: How many measurements.
        history: Measurements to go on from.
        seed: Seed of the samples.
    """

    run: str = field(location=True)
    count: int = field(ge=1)
    history: str | None = field(default=None, location=True)
    seed: int = field(default=0, ge=0, lt=2**63)
