"""The settings of `ping-llm extract-activations` and `ping-llm verify-parity`."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from ping_llm.errors import ConfigError
from ping_llm.models.config import Dtype, Site
from ping_llm.settings import Settings, field

DEFAULT_BATCH_TOKENS = 8192
_ARC_DEFAULTS = {
    "arc_encoder": "minimal",
    "arc_augmentations": 1,
    "arc_colors": "foreground",
    "arc_seed": 0,
}


class ExtractSettings(Settings):
    """Write a model's activations over a data set into a store.

    Run it again with the same OUTPUT to go on where it stopped. Any number of workers may run the
    same command on one OUTPUT.

    Attributes:
        model: Checkpoint directory, hub id, or run directory.
        input: File, directory or glob; local, gs:// or s3://.
        output: The store; local, gs:// or s3://.
        format: What a record of the input is.
        layers: all, or numbers such as 0,5; -1 is the last layer.
        sites: Where to read activations.
        positions: Tokens of a prompt to store: all, last, or every-8 for the first and each eighth
            after it. All are computed.
        max_length: Tokens per prompt.
        overlong: What to do with longer prompts.
        batch_tokens: Tokens to compute at once, with padding.
        dtype: Dtype of the stored activations.
        compression: Compression of the stored activations.
        unit_mb: MB of input per work unit.
        lease_seconds: Seconds without a sign of life after which other workers may take over a
            unit. Equal for all workers of a store.
        worker_id: Name of this worker.
        arc_encoder: How to write grids: minimal or separated, with + and any of row-numbers,
            shape-header, code-block.
        arc_augmentations: Prompts per test of an ARC task.
        arc_colors: Colours that augmentations permute: none, all but 0, or all.
        arc_seed: Seed of the augmentations.
        mesh: Devices per axis, such as data=-1,fsdp=1,tensor=1.
        coordinator: One model in several processes: HOST:PORT of process 0.
        num_processes: One model in several processes: how many.
        process_id: One model in several processes: which one this is, from 0.
        limit: Take only so many records, the first ones.
        dry_run: Only say what would be done.
    """

    model: str = field(location=True, stored=False)
    input: str = field(location=True, stored=False)
    output: str = field(location=True, stored=False)
    format: Literal["text", "chat", "tokens", "arc", "measurements"] = "text"
    layers: str = "all"
    sites: tuple[Site, ...] = ("residual",)
    positions: str = "all"
    max_length: int | None = field(default=None, gt=0, default_text="2048, or that of the run")
    overlong: Literal["error", "truncate-left", "truncate-right", "split"] = "error"
    batch_tokens: int | None = field(default=None, gt=0, default_text="8192")
    dtype: Dtype | None = field(default=None, default_text="the model's")
    compression: Literal["none", "zstd"] = "none"
    unit_mb: float = field(default=1.0, gt=0)
    lease_seconds: float = field(default=60.0, gt=0, stored=False)
    worker_id: str | None = field(default=None, stored=False, default_text="made up")
    arc_encoder: str | None = field(default=None, default_text="minimal")
    arc_augmentations: int | None = field(default=None, gt=0, default_text="1")
    arc_colors: Literal["keep", "foreground", "all"] | None = field(
        default=None, default_text="foreground"
    )
    arc_seed: int | None = field(default=None, default_text="0")
    mesh: str = field(default="", default_text="data=-1", stored=False)
    coordinator: str | None = field(default=None, stored=False)
    num_processes: int | None = field(default=None, stored=False)
    process_id: int | None = field(default=None, stored=False)
    limit: int | None = field(default=None, gt=0)
    dry_run: bool = field(default=False, stored=False)

    def check(self) -> None:
        """Raises a `ConfigError` if a setting does not go with the format, or a batch is small."""
        given = [name for name in _ARC_DEFAULTS if getattr(self, name) is not None]
        if self.format != "arc" and given:
            value = getattr(self, given[0])
            raise ConfigError(f"{given[0]}={value!r} does not go with format={self.format!r}")
        if self.arc_encoder is not None:
            from ping_llm.extraction.arc import parse_encoder

            parse_encoder(self.arc_encoder)
        if not re.fullmatch(r"all|last|every-[1-9][0-9]{0,8}", self.positions):
            raise ConfigError(
                f"positions={self.positions!r}: expected all, last, or every- and a number, such "
                "as every-8"
            )
        if not self.sites:
            raise ConfigError(f"sites is empty; choose some of {', '.join(get_args(Site))}")
        if self.batch_tokens is not None and self.batch_tokens < (self.max_length or 0):
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is less than max_length={self.max_length}, so "
                "the longest prompt does not fit a batch; raise the one or lower the other"
            )

    def kept_tokens(self, positions: Any, is_last: Any) -> Any:
        """Returns which tokens are stored, bool, of arrays of NumPy or JAX of any one shape.

        Args:
            positions: Place of each in its prompt, from 0.
            is_last: Whether each is the last of its prompt.
        """
        if self.positions == "last":
            return is_last
        return positions % (1 if self.positions == "all" else int(self.positions[6:])) == 0

    def for_model(self, *, n_layers: int, max_length: int, dtype: str) -> "ExtractSettings":
        """Returns these settings with nothing left open.

        Args:
            n_layers: Number of layers of the model.
            max_length: What prompts of the model are limited to by default.
            dtype: The model's own dtype.

        Raises:
            ConfigError: `layers` are not layers of the model, or a prompt may not fit a batch.
        """
        max_length = self.max_length or max_length
        left_open = {
            "max_length": max_length,
            "batch_tokens": max(DEFAULT_BATCH_TOKENS, max_length),
            "dtype": dtype,
            **(_ARC_DEFAULTS if self.format == "arc" else {}),
        }
        filled = {name: value for name, value in left_open.items() if getattr(self, name) is None}
        layers = ",".join(map(str, layer_numbers(self.layers, n_layers)))
        return dataclasses.replace(self, layers=layers, sites=in_order(self.sites), **filled)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers to keep, ascending, once `for_model` has numbered them."""
        return tuple(map(int, self.layers.split(",")))


def in_order(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Returns the sites, each once, in the order of the decoder."""
    return tuple(site for site in get_args(Site) if site in sites)


def layer_numbers(text: str, n_layers: int) -> tuple[int, ...]:
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


class VerifyParitySettings(Settings):
    """Compare a checkpoint's activations with those of transformers.

    In float32, on prompts of random token ids, packed and alone. Needs the extra [parity].

    Attributes:
        model: Checkpoint directory or hub id.
        layers: all, or numbers such as 0,5; -1 is the last layer.
        sites: Sites to compare.
    """

    model: str = field(location=True)
    layers: str = "all"
    sites: tuple[Site, ...] = get_args(Site)
