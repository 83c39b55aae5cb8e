"""The settings of `ping-llm predict`, `evaluate` and `generate`."""

from typing import TYPE_CHECKING, Literal

from ping_llm.errors import ConfigError
from ping_llm.prediction.baselines import ONLINE, STATIC
from ping_llm.settings import Settings, field

if TYPE_CHECKING:
    Baseline = str
else:
    Baseline = Literal["all", "none", *STATIC, *ONLINE]

RUN = "Run directory of the model."
HISTORY = "Measurements of the source, to be read first."


class PredictSettings(Settings):
    """Predict RTT distributions and failures.

    Give --src and --dst for one pair; --pairs and --output for a file of pairs, which goes on where
    it was stopped; --src and --rank to order many destinations by expected RTT.
    """

    run: str = field(location=True, help=RUN)
    src: str | None = field(default=None, metavar="A", help="Source address.")
    dst: str | None = field(default=None, metavar="B", help="Destination address.")
    time: str | None = field(
        default=None, metavar="T", help="When: ISO 8601 or seconds since 1970, UTC."
    )
    pairs: str | None = field(
        default=None,
        location=True,
        help="Parquet, Arrow or CSV with src_addr, dst_addr[, event_time].",
    )
    output: str | None = field(default=None, location=True, help="Parquet for --pairs.")
    rank: str | None = field(
        default=None, location=True, help="Destinations, one address a line, to put in order."
    )
    history: str | None = field(default=None, location=True, help=HISTORY)

    def check(self) -> None:
        """Raises a `ConfigError` unless the settings are those of one of the three forms."""
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


class EvaluateSettings(Settings):
    """Compare a model with classical methods.

    All methods are scored on the same measurements. On probe rows these are the test rows, by the
    protocol of the split; on a file of measurements all of them.
    """

    run: str = field(location=True, help=RUN)
    data: str = field(location=True, help="Directory of probe rows, or a file of measurements.")
    baselines: tuple[Baseline, ...] = field(
        default=("all",), help="Classical methods to compare the model with."
    )
    max_rows: int | None = field(
        default=10_000, ge=1, help="Measurements to score at most, drawn at random."
    )
    contexts: int = field(
        default=1,
        ge=1,
        help="Contexts drawn for each question, whose answers are averaged (split pair, or files).",
    )
    report: str | None = field(default=None, location=True, help="Write one HTML page.")

    def check(self) -> None:
        """Raises a `ConfigError` if `all` or `none` does not stand alone."""
        alone = {"all", "none"} & set(self.baselines)
        if alone and len(self.baselines) > 1:
            raise ConfigError(f"baselines: give {alone.pop()} alone, or names of methods")


class GenerateSettings(Settings):
    """Sample measurements from a model.

    Prints CSV as prepare-data reads it; a measurement that the model gives no time has none.
    """

    run: str = field(location=True, help=RUN)
    count: int = field(ge=1, help="How many measurements.")
    history: str | None = field(default=None, location=True, help="Measurements to go on from.")
    seed: int = field(default=0, ge=0, help="Seed of the samples.")
