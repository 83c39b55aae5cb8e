"""The settings of `ping-llm predict`, `evaluate` and `generate`."""

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

    Give --run and --count for measurements of a run: prints CSV as prepare-data reads it; a
    measurement that the model gives no time has none. Give --model and --prompt for the text of a
    language model, to check that its checkpoint is read right.

    Attributes:
        run: Run directory of the model.
        count: How many measurements.
        history: Measurements to go on from.
        model: Checkpoint directory or hub id of a language model.
        prompt: Text to go on from.
        max_tokens: Tokens to write after the prompt, at most.
        temperature: Draw tokens, the more evenly the higher; 0: take the likeliest.
        seed: Seed of the samples.
    """

    run: str | None = field(default=None, location=True, positional=True)
    count: int | None = field(default=None, ge=1, positional=True)
    history: str | None = field(default=None, location=True)
    model: str | None = field(default=None, location=True)
    prompt: str | None = None
    max_tokens: int | None = field(default=None, ge=1, default_text=str(DEFAULT_MAX_TOKENS))
    temperature: float | None = field(default=None, ge=0, default_text="0")
    seed: int = field(default=0, ge=0, lt=2**63)

    def check(self) -> None:
        """Raises a `ConfigError` unless the settings are those of one of the two forms."""
        forms = {"run": ("count", "history"), "model": ("prompt", "max_tokens", "temperature")}
        if (self.run is None) == (self.model is None):
            raise ConfigError("give either --run and --count, or --model and --prompt")
        form, other = ("run", "model") if self.model is None else ("model", "run")
        if wrong := [name for name in forms[other] if getattr(self, name) is not None]:
            flag = wrong[0].replace("_", "-")
            raise ConfigError(f"--{flag} belongs to --{other}, not to --{form}")
        if getattr(self, needed := forms[form][0]) is None:
            raise ConfigError(f"--{form} needs --{needed}")
