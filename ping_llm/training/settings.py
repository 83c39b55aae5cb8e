"""The settings of `train`, `export` and `inspect-run`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ping_llm.errors import ConfigError
from ping_llm.models.config import PRESETS, DecoderConfig
from ping_llm.settings import Settings, field

_POSITIVE: dict[str, Any] = {"gt": 0, "flag": False}
_WEIGHT: dict[str, Any] = {"ge": 0, "flag": False}
_FRACTION: dict[str, Any] = {"ge": 0, "le": 1, "flag": False}
_COUNT: dict[str, Any] = {"gt": 0, "flag": False, "changeable": True}
_QUICK = {
    "seq_len": 208,  # two grids
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "warmup_steps": 20,
    "weight_decay": 0.0,
}


class TrainSettings(Settings):
    """Train a decoder on probe rows.

    Run it again with the same OUTPUT to continue from the newest checkpoint; give more --steps to
    train longer. Settings come from the preset, then --config, then --set, then the other flags.

    Attributes:
        data: Directory of probe rows, as prepare-data writes it; may be remote.
        output: Run directory: settings, metrics, checkpoints; may be remote.
        preset: Model and the training settings that go with it.
        steps: Optimizer steps of the whole run; the schedule ends there.
        batch_size: Sequences in a batch, over all devices.
        seq_len: Tokens in a sequence.
        mesh: Devices by axis; -1 stands for those that are left.
        seed: Seed of the initial parameters and of the order of the data.
        init: Parameters to start from: `pretrained`, the model in the box; `random`; those of a run
            or an export of the same shape; `auto`: the model in the box if it has the shape.
        wandb: Log the run to Weights & Biases.
        profile: Directory for XLA's trace of five steps, for TensorBoard or Perfetto.
        coordinator: Several processes: address of process 0, HOST:PORT.
        num_processes: Several processes: how many.
        process_id: Several processes: which one this is, from 0.
        model: Shape of the decoder; the preset sets its fields.
        grid_fraction: Fraction of the sequences of a batch that hold grids, what RTTs are predicted
            from; the others hold windows, which teach the whole language.
        simulated_fraction: Fraction of the grids that show simulated networks.
        loader_workers: Processes that make grids; 0: this one does. A fast accelerator needs some.
        result_last_fraction: Fraction of windows that end a measurement with its result; others
            shuffle it.
        untimed_fraction: Fraction of the windows that show no time.
        loss_weights: Weights of targets by field: structure, source, destination, time, RTT.
        z_loss: Weight of the mean squared log of the softmax's denominator.
        optimizer: AdamW, or Muon for the kernels and AdamW for the rest.
        learning_rate: Peak learning rate.
        embedding_learning_rate_factor: Factor on the learning rate of embeddings.
        norm_learning_rate_factor: Factor on the learning rate of norms and biases.
        schedule: Cosine, or `wsd`: at the peak until the last `decay_fraction` of the steps.
        decay_fraction: Fraction of the steps over which `wsd` decays.
        final_learning_rate_fraction: Fraction of the peak that is left at the last step.
        warmup_steps: Steps over which the learning rate rises to its peak.
        weight_decay: Decoupled weight decay.
        weight_decay_groups: Which parameters decay; norm includes biases.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        muon_beta: Decay of Muon's momentum.
        clip_norm: Largest global norm of a gradient; a longer one is scaled down.
        spike_factor: Skip gradients of this many times the mean norm; none: only if it is not
            finite.
        max_skipped_steps: Skipped steps in a row that end the run.
        accumulate_steps: Parts of a batch that are computed one after another, to save memory.
        log_every: Steps between lines of `metrics.jsonl`.
        eval_every: Steps between evaluations on the valid split; the last step has one too.
        eval_batches: Batches of the valid split in an evaluation.
        checkpoint_every: Steps between checkpoints; the last step and a new best one have one too.
        keep_checkpoints: Newest checkpoints to keep, besides the best on the valid split.
    """

    data: str = field(location=True, stored=False)
    output: str = field(location=True, stored=False)
    preset: Literal["tiny", "small", "base", "large"] = "tiny"
    steps: int = field(default=1000, gt=0, lt=2**31, changeable=True)
    batch_size: int = field(default=8, gt=0)
    seq_len: int = field(default=1024, gt=0)
    mesh: str = field(default="data=-1,fsdp=1,tensor=1", changeable=True)
    seed: int = field(default=0, ge=0, lt=2**63)
    init: str = "auto"
    wandb: Literal["disabled", "offline", "online"] = field(default="disabled", changeable=True)
    profile: str | None = field(default=None, location=True, stored=False)
    coordinator: str | None = field(default=None, stored=False)
    num_processes: int | None = field(default=None, stored=False)
    process_id: int | None = field(default=None, stored=False)
    model: DecoderConfig = field(default=PRESETS["tiny"], default_text="that of the preset")
    grid_fraction: float = field(default=0.875, **_FRACTION)
    simulated_fraction: float = field(default=0.1, **_FRACTION)
    loader_workers: int = field(default=0, ge=0, flag=False, stored=False)
    result_last_fraction: float = field(default=0.0, **_FRACTION)
    untimed_fraction: float = field(default=0.3, **_FRACTION)
    loss_weights: tuple[float, ...] = field(default=(1.0, 1.0, 1.0, 1.0, 1.0), **_WEIGHT)
    z_loss: float = field(default=0.0, **_WEIGHT)
    optimizer: Literal["adamw", "muon"] = field(default="adamw", flag=False)
    learning_rate: float = field(default=1e-3, **_POSITIVE)
    embedding_learning_rate_factor: float = field(default=1.0, **_POSITIVE)
    norm_learning_rate_factor: float = field(default=1.0, **_POSITIVE)
    schedule: Literal["cosine", "wsd"] = field(default="cosine", flag=False)
    decay_fraction: float = field(default=0.2, gt=0, le=1, flag=False)
    final_learning_rate_fraction: float = field(default=0.1, **_FRACTION)
    warmup_steps: int = field(default=100, **_WEIGHT)
    weight_decay: float = field(default=0.1, **_WEIGHT)
    weight_decay_groups: tuple[Literal["kernel", "embedding", "norm"], ...] = field(
        default=("kernel",), flag=False
    )
    beta1: float = field(default=0.9, **_FRACTION)
    beta2: float = field(default=0.95, **_FRACTION)
    muon_beta: float = field(default=0.95, **_FRACTION)
    clip_norm: float = field(default=1.0, **_POSITIVE)
    spike_factor: float | None = field(default=20.0, gt=1, flag=False)
    max_skipped_steps: int = field(default=10, **_COUNT)
    accumulate_steps: int = field(default=1, **_POSITIVE)
    log_every: int = field(default=10, **_COUNT)
    eval_every: int = field(default=200, **_COUNT)
    eval_batches: int = field(default=8, **_COUNT)
    checkpoint_every: int = field(default=200, **_COUNT)
    keep_checkpoints: int = field(default=3, **_COUNT)

    # The settings of `tiny` were measured on real data (docs/results.md); those of `base` and
    # `large` are usual for models of their size.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"model": PRESETS[name], **changes}
        for name, changes in {
            # Which starts from the model in the box.
            "tiny": _QUICK | {"learning_rate": 1e-3},
            "small": _QUICK,
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

    In the format ping-llm the directory can stand for the run in predict, evaluate, generate and
    extract-activations; in the format hf transformers loads it, and whatever builds on that.

    Attributes:
        run: Run directory of the model; may be remote.
        output: Directory to write; may be remote.
        step: The run's checkpoint of that step.
        format: Names of the weights: our own, or those of Llama, Mistral or Qwen, with a model
            card.
    """

    run: str = field(location=True)
    output: str = field(location=True)
    step: int | None = field(default=None, ge=0, default_text="the best")
    format: Literal["ping-llm", "hf"] = "ping-llm"


class InspectRunSettings(Settings):
    """Show how far a run is: steps, losses, checkpoints, settings, data.

    Attributes:
        run: Run directory or export; may be remote.
    """

    run: str = field(argument=True, location=True, metavar="RUN")
