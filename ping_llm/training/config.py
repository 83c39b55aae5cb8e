"""The settings of a training run: presets, TOML, `--set`, and what a resumed run may change."""

import contextlib
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ping_llm import sharding
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError
from ping_llm.models.config import PRESETS, DecoderConfig, YarnScaling
from ping_llm.tokenizer import FIELDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on, apart from its data.

    Attributes:
        preset: Name of the model the settings started from.
        model: Shape of the decoder; single fields are set as `model.<field>`.
        steps: Number of optimizer steps of the whole run; the schedule ends there.
        batch_size: Sequences in a global batch, B.
        seq_len: Tokens in a sequence, T.
        seed: Seed of the initial parameters and of the order of the data.
        result_last_fraction: Part of the windows in which the result of a measurement stands last,
            as in a question; in the others the fields stand in a random order.
        untimed_fraction: Part of the windows that show no time.
        hidden_source_fraction: Part of the windows that show 0.0.0.0 or :: for their source, to
            learn to place a source by its measurements alone.
        mesh: Sizes of the mesh axes, such as `data=-1,fsdp=1,tensor=1`; -1 is what is left.
        loss_weights: Weight of a target in the objective, by its field: structure, source,
            destination, time, RTT. What is reported as loss has no weights.
        z_loss: Weight of the mean squared log of the softmax's denominator in the objective.
        optimizer: `adamw`, or `muon` for the kernels and AdamW for the rest.
        learning_rate: Peak learning rate.
        embedding_learning_rate_factor: What the rate is multiplied with for embeddings.
        norm_learning_rate_factor: The same for norms and biases.
        schedule: `cosine`, or `wsd`: at the peak until the last `decay_fraction` of the steps.
        decay_fraction: Part of the steps over which `wsd` goes down.
        final_learning_rate_fraction: Part of the peak that is left at the last step.
        warmup_steps: Steps over which the learning rate rises to its peak.
        weight_decay: Decoupled weight decay.
        weight_decay_groups: What decays, of kernel, embedding and norm (biases too).
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        muon_beta: Decay of Muon's momentum.
        clip_norm: Largest global norm of a gradient; a longer one is shortened to it.
        spike_factor: A step whose gradient is so many times the running mean's norm is skipped;
            None: only one that is not finite.
        max_skipped_steps: So many skipped steps in a row end the run.
        accumulate_steps: Parts a batch is cut into, one after the other, to save memory.
        log_every: Steps between lines of `metrics.jsonl`.
        eval_every: Steps between evaluations on the valid split; the last step has one too.
        eval_batches: Batches of the valid split in an evaluation.
        checkpoint_every: Steps between checkpoints; the last step has one too, and each evaluation
            that is the best so far.
        keep_checkpoints: Number of newest checkpoints kept, besides the best on the valid split.
        wandb: Whether Weights & Biases follows the run: `disabled`, `offline` or `online`.
    """

    preset: str
    model: DecoderConfig
    steps: int = 1000
    batch_size: int = 8
    seq_len: int = 1024
    seed: int = 0
    result_last_fraction: float = 0.0
    untimed_fraction: float = 0.3
    hidden_source_fraction: float = 0.0
    mesh: str = "data=-1,fsdp=1,tensor=1"
    loss_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    z_loss: float = 0.0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    embedding_learning_rate_factor: float = 1.0
    norm_learning_rate_factor: float = 1.0
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    weight_decay_groups: tuple[str, ...] = ("kernel",)
    beta1: float = 0.9
    beta2: float = 0.95
    muon_beta: float = 0.95
    clip_norm: float = 1.0
    spike_factor: float | None = 20.0
    max_skipped_steps: int = 10
    accumulate_steps: int = 1
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    wandb: str = "disabled"

    def __post_init__(self) -> None:
        sharding.parse_mesh(self.mesh)
        _ = self.law  # checks its own fields
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("seed", "warmup_steps", "weight_decay", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2", "muon_beta", "final_learning_rate_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction={self.decay_fraction} must be in (0, 1]")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            for chosen in (value,) if isinstance(value, str) else value:
                if chosen not in known:
                    raise ConfigError(f"{name}={chosen!r} is not one of {', '.join(known)}")
        weights = self.loss_weights
        if len(weights) != len(FIELDS) or min(weights) < 0 or not any(weights):
            raise ConfigError(
                f"loss_weights={weights} must be {len(FIELDS)} numbers, none negative and not all "
                f"0: {', '.join(FIELDS)}"
            )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(f"spike_factor={self.spike_factor} must be above 1, or none")
        batch_size, accumulate_steps = self.batch_size, self.accumulate_steps
        if batch_size % accumulate_steps:
            raise ConfigError(f"{accumulate_steps=} must divide {batch_size=}")

    @property
    def law(self) -> WindowConfig:
        """What the windows of the train split are like."""
        return WindowConfig.of(vars(self))


_POSITIVE = (
    "steps",
    "batch_size",
    "seq_len",
    "learning_rate",
    "embedding_learning_rate_factor",
    "norm_learning_rate_factor",
    "clip_norm",
    "max_skipped_steps",
    "accumulate_steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
)

_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "wsd"),
    "weight_decay_groups": ("kernel", "embedding", "norm"),
    "wandb": ("disabled", "offline", "online"),
}

# What a resumed run may change: none of these alters what a step computes but `steps`, whose
# schedule it is.
CHANGEABLE = (
    "steps",
    "mesh",
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "wandb",
)

# Training settings that differ from the defaults above, by preset. Those of `small` were measured
# on real data (docs/results.md); those of `base` and `large` are usual for models of their size.
PRESET_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": {"learning_rate": 3e-3, "warmup_steps": 20},
    "small": {"optimizer": "muon", "learning_rate": 5e-3, "warmup_steps": 20},
    "base": {"learning_rate": 6e-4, "batch_size": 64, "warmup_steps": 500},
    "large": {"learning_rate": 3e-4, "batch_size": 128, "warmup_steps": 1000},
}


def load_config(
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Returns the settings of a run. Later sources win: preset, TOML file, `overrides`, `flags`.

    Args:
        preset: Name in `PRESETS`; None: what the file or an override says, else `tiny`.
        config_file: TOML with the fields of `TrainConfig`, those of the model under `[model]`.
        overrides: `key=value` each; fields of the model are `model.<field>`.
        flags: Values by field of `TrainConfig`; None stands for not given.
    """
    settings: dict[str, Any] = {}
    if config_file is not None:
        _merge(settings, _read_toml(config_file), source=str(config_file))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value")
        nested: Any = value.strip()
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(settings, nested, source=f"--set {text}")
    given = {"preset": preset, **(flags or {})}
    settings |= {name: value for name, value in given.items() if value is not None}
    name = settings.setdefault("preset", "tiny")
    if name not in PRESETS:
        hint = _close(str(name), PRESETS)
        raise ConfigError(f"preset={name!r} is not one of {', '.join(PRESETS)}{hint}")
    model = dataclasses.replace(PRESETS[name], **settings.pop("model", {}))
    return TrainConfig(model=model, **{**PRESET_SETTINGS[name], **settings})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text, which TOML must be") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def _merge(settings: dict[str, Any], new: Mapping[str, Any], *, source: str) -> None:
    """Adds checked values of `new` to `settings`, table by table."""
    for key, value in _checked(TrainConfig, new, prefix="", source=source).items():
        if key == "model":
            settings.setdefault("model", {}).update(value)
        else:
            settings[key] = value


def _checked(cls: type, values: Mapping[str, Any], *, prefix: str, source: str) -> dict[str, Any]:
    known = typing.get_type_hints(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if key not in known:
            hint = _close(key, known, prefix)
            where = f"table [{prefix[:-1]}]" if prefix else "training"
            raise ConfigError(f"{source}: {name!r} is not a setting of {where}{hint}")
        kind = known[key]
        if kind is DecoderConfig:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {name} is a table: set its fields, {name}.<field>")
            checked[key] = _checked(kind, value, prefix=f"{name}.", source=source)
        else:
            checked[key] = _convert(value, kind, name=name, source=source)
    return checked


def _convert(value: Any, kind: Any, *, name: str, source: str) -> Any:
    """Returns `value`, a TOML value or the text of one, as the type `kind`."""
    if isinstance(kind, types.UnionType):  # `X | None`
        if value in (None, "none"):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is YarnScaling and isinstance(value, Mapping):
        fields = _checked(kind, value, prefix=f"{name}.", source=source)
        for required in ("factor", "original_max_positions"):
            if required not in fields:
                raise ConfigError(f"{source}: the table {name} needs {required}")
        return YarnScaling(**fields)
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list):
            item = typing.get_args(kind)[0]
            return tuple(_convert(one, item, name=name, source=source) for one in items)
    elif kind in _PARSERS:
        with contextlib.suppress(TypeError, ValueError):
            return _PARSERS[kind](value)
    raise ConfigError(f"{source}: {name}={value!r} is not {_EXPECTED.get(kind, 'a valid value')}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value not in ("true", "false"):
        raise ValueError
    return value == "true"


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_PARSERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
}


def _close(word: str, known: Iterable[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(prefix + match for match in matches)}?" if matches else ""


def to_json(cfg: TrainConfig) -> dict[str, Any]:
    """Returns the settings as JSON values, those of the model in a table of their own."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def check_unchanged(stored: Mapping[str, Any], cfg: TrainConfig, *, output: Path) -> None:
    """Raises a `ConfigError` that names every setting in which `cfg` may not differ but does.

    Args:
        stored: The settings of the run so far, as `to_json` gave them.
        cfg: The settings asked for now.
        output: The run directory, for the message.
    """
    before, now = _flat(stored), _flat(to_json(cfg))
    names = [name for name in {**before, **now} if name not in CHANGEABLE]
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        differences = ", ".join(
            f"{name}={now.get(name)!r}, was {before.get(name)!r}" for name in changed
        )
        raise ConfigError(
            f"{output} holds a run with other settings: {differences}; "
            "give these their old values, or choose another output"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            named |= _flat(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named
