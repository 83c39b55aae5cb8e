"""The settings of `train` and `export`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ping_llm.errors import ConfigError
from ping_llm.models.config import PRESETS, DecoderConfig
from ping_llm.settings import Settings, field

_POSITIVE: dict[str, Any] = {"gt": 0, "flag": False}
_WEIGHT: dict[str, Any] = {"ge": 0, "flag": False}
_FRACTION: dict[str, Any] = {"ge": 0, "le": 1, "flag": False}
_COUNT: dict[str, Any] = {"gt": 0, "flag": False, "changeable": True}


class TrainSettings(Settings):
    """Train a decoder on probe rows.

    Run it again with the same OUTPUT to continue from the newest checkpoint; give more --steps to
    train longer. Settings come from the preset, then --config, then --set, then the other flags.
    """

    data: str = field(
        help="Directory of probe rows, as prepare-data writes it; may be remote.",
        location=True,
        stored=False,
    )
    output: str = field(
        help="Run directory: settings, metrics, checkpoints; may be remote.",
        location=True,
        stored=False,
    )
    preset: Literal["tiny", "small", "base", "large"] = field(
        help="Model and the training settings that go with it.", default="tiny"
    )
    steps: int = field(
        help="Optimizer steps of the whole run; the schedule ends there.",
        default=1000,
        gt=0,
        changeable=True,
    )
    batch_size: int = field(help="Sequences in a batch, over all devices.", default=8, gt=0)
    seq_len: int = field(help="Tokens in a sequence.", default=1024, gt=0)
    mesh: str = field(
        help="Devices by axis; -1 stands for those that are left.",
        default="data=-1,fsdp=1,tensor=1",
        changeable=True,
    )
    seed: int = field(
        help="Seed of the initial parameters and of the order of the data.", default=0, ge=0
    )
    wandb: Literal["disabled", "offline", "online"] = field(
        help="Log the run to Weights & Biases.", default="disabled", changeable=True
    )
    profile: str | None = field(
        help="Directory for XLA's trace of five steps, for TensorBoard or Perfetto.",
        default=None,
        location=True,
        stored=False,
    )
    coordinator: str | None = field(
        help="Several processes: address of process 0, HOST:PORT.", default=None, stored=False
    )
    num_processes: int | None = field(
        help="Several processes: how many.", default=None, stored=False
    )
    process_id: int | None = field(
        help="Several processes: which one this is, from 0.", default=None, stored=False
    )
    model: DecoderConfig = field(
        help="Shape of the decoder; the preset sets its fields.",
        default=PRESETS["tiny"],
        default_text="that of the preset",
    )
    result_last_fraction: float = field(
        help="Fraction of windows that end a measurement with its result; others shuffle it.",
        default=0.0,
        **_FRACTION,
    )
    untimed_fraction: float = field(
        help="Fraction of the windows that show no time.", default=0.3, **_FRACTION
    )
    hidden_source_fraction: float = field(
        help="Fraction of windows that hide their source, to teach locating it.",
        default=0.0,
        **_FRACTION,
    )
    loss_weights: tuple[float, ...] = field(
        help="Weights of targets by field: structure, source, destination, time, RTT.",
        default=(1.0, 1.0, 1.0, 1.0, 1.0),
        **_WEIGHT,
    )
    z_loss: float = field(
        help="Weight of the mean squared log of the softmax's denominator.", default=0.0, **_WEIGHT
    )
    optimizer: Literal["adamw", "muon"] = field(
        help="AdamW, or Muon for the kernels and AdamW for the rest.", default="adamw", flag=False
    )
    learning_rate: float = field(help="Peak learning rate.", default=1e-3, **_POSITIVE)
    embedding_learning_rate_factor: float = field(
        help="Factor on the learning rate of embeddings.", default=1.0, **_POSITIVE
    )
    norm_learning_rate_factor: float = field(
        help="Factor on the learning rate of norms and biases.", default=1.0, **_POSITIVE
    )
    schedule: Literal["cosine", "wsd"] = field(
        help="Cosine, or `wsd`: at the peak until the last `decay_fraction` of the steps.",
        default="cosine",
        flag=False,
    )
    decay_fraction: float = field(
        help="Fraction of the steps over which `wsd` decays.", default=0.2, gt=0, le=1, flag=False
    )
    final_learning_rate_fraction: float = field(
        help="Fraction of the peak that is left at the last step.", default=0.1, **_FRACTION
    )
    warmup_steps: int = field(
        help="Steps over which the learning rate rises to its peak.", default=100, **_WEIGHT
    )
    weight_decay: float = field(help="Decoupled weight decay.", default=0.1, **_WEIGHT)
    weight_decay_groups: tuple[Literal["kernel", "embedding", "norm"], ...] = field(
        help="Which parameters decay; norm includes biases.", default=("kernel",), flag=False
    )
    beta1: float = field(help="Decay of Adam's first moment.", default=0.9, **_FRACTION)
    beta2: float = field(help="Decay of Adam's second moment.", default=0.95, **_FRACTION)
    muon_beta: float = field(help="Decay of Muon's momentum.", default=0.95, **_FRACTION)
    clip_norm: float = field(
        help="Largest global norm of a gradient; a longer one is scaled down.",
        default=1.0,
        **_POSITIVE,
    )
    spike_factor: float | None = field(
        help="Skip gradients of this many times the mean norm; none: only if it is not finite.",
        default=20.0,
        gt=1,
        flag=False,
    )
    max_skipped_steps: int = field(
        help="Skipped steps in a row that end the run.", default=10, **_COUNT
    )
    accumulate_steps: int = field(
        help="Parts of a batch that are computed one after another, to save memory.",
        default=1,
        **_POSITIVE,
    )
    log_every: int = field(help="Steps between lines of `metrics.jsonl`.", default=10, **_COUNT)
    eval_every: int = field(
        help="Steps between evaluations on the valid split; the last step has one too.",
        default=200,
        **_COUNT,
    )
    eval_batches: int = field(
        help="Batches of the valid split in an evaluation.", default=8, **_COUNT
    )
    checkpoint_every: int = field(
        help="Steps between checkpoints; the last step and a new best one have one too.",
        default=200,
        **_COUNT,
    )
    keep_checkpoints: int = field(
        help="Newest checkpoints to keep, besides the best on the valid split.", default=3, **_COUNT
    )

    # The settings of `small` were measured on real data (docs/results.md); those of `base` and
    # `large` are usual for models of their size.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"model": PRESETS[name], **changes}
        for name, changes in {
            "tiny": {"learning_rate": 3e-3, "warmup_steps": 20},
            "small": {"optimizer": "muon", "learning_rate": 5e-3, "warmup_steps": 20},
            "base": {"learning_rate": 6e-4, "batch_size": 64, "warmup_steps": 500},
            "large": {"learning_rate": 3e-4, "batch_size": 128, "warmup_steps": 1000},
        }.items()
    }

    def check(self) -> None:
        """Raises a `ConfigError` if fields do not fit together."""
        from ping_llm.sharding import parse_mesh

        parse_mesh(self.mesh)
        weights = self.loss_weights
        if len(weights) != 5 or not any(weights):
            raise ConfigError(
                f"loss_weights={weights} must be 5 numbers, not all 0: structure, source, "
                "destination, time, RTT"
            )
        batch_size, accumulate_steps = self.batch_size, self.accumulate_steps
        if batch_size % accumulate_steps:
            raise ConfigError(f"{accumulate_steps=} must divide {batch_size=}")


class ExportSettings(Settings):
    """Write a run's model as safetensors and a config.

    The directory can stand for the run in predict, evaluate, generate and extract-activations.
    """

    run: str = field(help="Run directory of the model; may be remote.", location=True)
    output: str = field(help="Directory to write; may be remote.", location=True)
