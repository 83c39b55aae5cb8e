"""The settings of an extraction, and what of them decides the content of a store."""

import dataclasses

from ping_llm.activations.store import array_name
from ping_llm.errors import ConfigError
from ping_llm.extraction import arc
from ping_llm.models.config import DTYPES, END_SITES, SITES

FORMATS = ("text", "chat", "tokens", "arc", "measurements")
OVERLONG = ("error", "truncate-left", "truncate-right", "split")
COMPRESSIONS = ("none", "zstd")
# Prompts are packed into rows of one width; longer ones go into rows of the next, and each width
# that occurs is one compiled program. Attention is computed over the whole row, so rows should not
# be wide, yet narrow ones are hard to fill: rows of 2,048 hold prompts of 200 to 1,500 tokens with
# 2 % padding.
ROW_WIDTHS = (2048, 8192, 32768)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """What to extract. Two stores with equal settings, model and input hold equal rows.

    Attributes:
        format: What a record of the input is, one of `FORMATS`.
        layers: The layers to keep, ascending.
        sites: The places in each layer to keep, in the order of the decoder.
        max_length: Tokens of the longest prompt.
        overlong: What becomes of longer ones, one of `OVERLONG`.
        batch_tokens: Tokens, with padding, that the device computes at once.
        dtype: Dtype of the stored activations.
        compute_dtype: Dtype of the forward pass.
        compression: Of the stored activations, one of `COMPRESSIONS`.
        unit_mb: Size of a work unit, in MB of input.
        limit: Number of records to take, the first ones; None: all.
        arc_encoder: How grids are written, as `arc.parse_encoder` takes it; None where `format` is
            not arc, like the next three.
        arc_augmentations: Number of prompts made of each test of a task.
        arc_colors: What permutations of colours move, one of `arc.COLORS`.
        arc_seed: Decides the augmentations, with the task.
    """

    format: str
    layers: tuple[int, ...]
    sites: tuple[str, ...]
    max_length: int
    overlong: str
    batch_tokens: int
    dtype: str
    compute_dtype: str
    compression: str
    unit_mb: float
    limit: int | None
    arc_encoder: str | None = None
    arc_augmentations: int | None = None
    arc_colors: str | None = None
    arc_seed: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("format", FORMATS),
            ("overlong", OVERLONG),
            ("dtype", DTYPES),
            ("compression", COMPRESSIONS),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(known)}")
        self._check_arc()
        for name in ("max_length", "unit_mb", "limit", "arc_augmentations"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0")
        if self.batch_tokens < self.max_length:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is less than max_length={self.max_length}, so "
                "the longest prompt does not fit a batch; raise the one or lower the other"
            )

    def _check_arc(self) -> None:
        names = ("arc_encoder", "arc_augmentations", "arc_colors", "arc_seed")
        given = {name: getattr(self, name) for name in names}
        for name, value in given.items():
            if (value is None) == (self.format == "arc"):
                raise ConfigError(f"{name}={value!r} does not go with format={self.format!r}")
        if self.arc_encoder is not None:
            arc.parse_encoder(self.arc_encoder)
        if self.arc_colors is not None and self.arc_colors not in arc.COLORS:
            known = ", ".join(arc.COLORS)
            raise ConfigError(f"arc_colors={self.arc_colors!r} is not one of {known}")

    @property
    def row_widths(self) -> tuple[int, ...]:
        """The widths of rows, ascending; the last holds `max_length`."""
        roomy = min(2 * self.max_length, ROW_WIDTHS[0], self.batch_tokens)
        widest = max(self.max_length, roomy)
        return (*(width for width in ROW_WIDTHS if width < widest), widest)

    @property
    def arrays(self) -> dict[str, tuple[str, int]]:
        """{name of a stored array: (site, place among the layers kept)}."""
        names = {}
        for site in self.sites:
            if site in END_SITES:
                names[site] = site, 0
            else:
                names |= {array_name(site, layer): (site, n) for n, layer in enumerate(self.layers)}
        return names


def parse_sites(text: str) -> tuple[str, ...]:
    """Returns the sites in `text`, such as `residual,mlp`, in the order of the decoder.

    Raises:
        ConfigError: One is unknown, or there is none.
    """
    order = ("embed", *SITES, "final_norm")
    given = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [site for site in given if site not in order]:
        raise ConfigError(f"sites: {unknown[0]!r} is not one of {', '.join(order)}")
    if not given:
        raise ConfigError(f"sites={text!r} names none; known are {', '.join(order)}")
    return tuple(site for site in order if site in given)


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Returns the layers in `text`, `all` or numbers such as `0,5`; -1 is the last one.

    Raises:
        ConfigError: One is not a number, or not a layer of the model.
    """
    if text.strip() == "all":
        return tuple(range(n_layers))
    try:
        given = {int(part) for part in text.split(",")}
    except ValueError:
        raise ConfigError(f"layers={text!r}: expected `all` or numbers such as 0,5") from None
    if wrong := sorted(layer for layer in given if not -n_layers <= layer < n_layers):
        raise ConfigError(
            f"layers: the model has {n_layers}, 0..{n_layers - 1}; {wrong[0]} is none"
        )
    return tuple(sorted({layer % n_layers for layer in given}))
