"""The settings of `train-sae` and `inspect-sae`."""

from typing import Any, Literal

from ping_llm.errors import ConfigError
from ping_llm.models.config import END_SITES, Site
from ping_llm.settings import Settings, field

Architecture = Literal["topk", "batchtopk", "jumprelu", "gated", "l1"]

_POSITIVE: dict[str, Any] = {"gt": 0, "flag": False}
_WEIGHT: dict[str, Any] = {"ge": 0, "flag": False}
_FRACTION: dict[str, Any] = {"ge": 0, "lt": 1, "flag": False}
_COUNT: dict[str, Any] = {"gt": 0, "flag": False, "changeable": True}


class TrainSaeSettings(Settings):
    """Train sparse autoencoders on the activations in a store.

    One for each layer, in one pass over the store, all of one kind. Run it again with the same
    OUTPUT to continue from the newest checkpoint; give more --steps to train longer. Each is saved
    as SAELens saves, in OUTPUT/<site>.<layer>/.

    Attributes:
        activations: The store, as extract-activations writes it; may be remote.
        output: Directory to write: checkpoints, metrics, autoencoders; may be remote.
        site: Where in the model.
        layer: Layers, such as 3 or 3,7; none for `embed` and `final_norm`.
        architecture: Kind of autoencoder.
        features: Number of features, F.
        k: Features active on a token: exactly so many at most with `topk`, on average with
            `batchtopk`, and what `jumprelu` is drawn to; the others go by `sparsity`.
        sparsity: Weight of the penalty on active features, where the activations' variance is 1.
        steps: Optimizer steps of the whole training; the schedule ends there.
        batch_size: Tokens in a batch, over all devices.
        mesh: Devices by axis; -1 stands for those that are left.
        seed: Seed of the initial parameters, of the order of the tokens, and of the held-out ones.
        wandb: Log the training to Weights & Biases.
        coordinator: Several processes: address of process 0, HOST:PORT.
        num_processes: Several processes: how many.
        process_id: Several processes: which one this is, from 0.
        min_position: Leave out tokens before this position in their prompts: first ones, on which
            language models have outliers.
        special_tokens: Train on special tokens too.
        held_out_tokens: Tokens of whole prompts, at most a tenth of them, that are evaluated on and
            never trained on.
        buffer_mb: Size of the buffer in which tokens are shuffled, over all layers; twice that is
            held.
        learning_rate: Peak learning rate.
        schedule: Cosine, or `wsd`: at the peak until the last `decay_fraction` of the steps.
        decay_fraction: Fraction of the steps over which `wsd` decays.
        final_learning_rate_fraction: Fraction of the peak that is left at the last step.
        warmup_steps: Steps over which the learning rate rises to its peak.
        sparsity_warmup_steps: Steps over which the penalty rises to its weight.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        clip_norm: Largest global norm of a gradient; a longer one is scaled down.
        max_skipped_steps: Steps in a row with a gradient that is not finite, which end the
            training.
        aux_weight: Weight of the loss by which dead features learn what the others leave.
        dead_tokens: A feature is dead when it was not active on so many tokens in a row.
        bandwidth: Width of the kernel that estimates the gradient of `jumprelu`'s thresholds.
        initial_threshold: What these thresholds begin with.
        log_every: Steps between lines of `metrics.jsonl`.
        eval_every: Steps between evaluations on held-out tokens; the last step has one too.
        checkpoint_every: Steps between checkpoints; the last step has one too.
        keep_checkpoints: Newest checkpoints to keep.
    """

    activations: str = field(location=True, stored=False)
    output: str = field(location=True, stored=False)
    site: Site = "residual"
    layer: tuple[int, ...] = field(default=(), ge=0)
    architecture: Architecture = "batchtopk"
    features: int | None = field(default=None, gt=0, default_text="16 for each dimension")
    k: int = field(default=32, gt=0)
    sparsity: float | None = field(
        default=None, ge=0, default_text="1 for jumprelu, 0.2 for gated, 0.1 for l1"
    )
    steps: int = field(default=5000, gt=0, lt=2**31, changeable=True)
    batch_size: int = field(default=4096, gt=0)
    mesh: str = field(default="data=-1,fsdp=1,tensor=1", changeable=True)
    seed: int = field(default=0, ge=0, lt=2**63)
    wandb: Literal["disabled", "offline", "online"] = field(default="disabled", changeable=True)
    coordinator: str | None = field(default=None, stored=False)
    num_processes: int | None = field(default=None, stored=False)
    process_id: int | None = field(default=None, stored=False)
    min_position: int = field(default=1, **_WEIGHT)
    special_tokens: bool = field(default=False, flag=False)
    held_out_tokens: int = field(default=16384, **_POSITIVE)
    buffer_mb: float = field(default=256.0, **_POSITIVE)
    learning_rate: float | None = field(
        default=None, default_text="2e-4 * (2^14 / features)^0.5", **_POSITIVE
    )
    schedule: Literal["cosine", "wsd"] = field(default="wsd", flag=False)
    decay_fraction: float = field(default=0.2, gt=0, le=1, flag=False)
    final_learning_rate_fraction: float = field(default=0.0, **_FRACTION)
    warmup_steps: int = field(default=100, **_WEIGHT)
    sparsity_warmup_steps: int = field(default=500, **_WEIGHT)
    beta1: float = field(default=0.9, **_FRACTION)
    beta2: float = field(default=0.999, **_FRACTION)
    clip_norm: float = field(default=1.0, **_POSITIVE)
    max_skipped_steps: int = field(default=10, **_COUNT)
    aux_weight: float = field(default=1 / 32, default_text="1/32", **_WEIGHT)
    dead_tokens: int = field(default=1_000_000, **_POSITIVE)
    bandwidth: float = field(default=0.05, **_POSITIVE)
    initial_threshold: float = field(default=0.05, **_POSITIVE)
    log_every: int = field(default=10, **_COUNT)
    eval_every: int = field(default=500, **_COUNT)
    checkpoint_every: int = field(default=500, **_COUNT)
    keep_checkpoints: int = field(default=2, **_COUNT)

    def check(self) -> None:
        """Raises a `ConfigError` if fields do not fit together."""
        from ping_llm.sharding import parse_mesh

        parse_mesh(self.mesh)
        site, layer = self.site, self.layer
        if site in END_SITES and layer:
            raise ConfigError(f"{site=} has no layers: leave out layer={','.join(map(str, layer))}")
        if site not in END_SITES and (not layer or len(set(layer)) < len(layer)):
            raise ConfigError(f"{layer=}: give layers, each once, of {site=}")
        if self.features is not None and self.k > self.features:
            raise ConfigError(f"k={self.k} is more than features={self.features}")
        if self.sparsity is not None and self.architecture in ("topk", "batchtopk"):
            raise ConfigError(
                f"sparsity={self.sparsity} does not go with architecture={self.architecture!r}, "
                "which has k active features whatever it costs"
            )


class InspectSaeSettings(Settings):
    """Show how good a sparse autoencoder is, and what its features go with.

    For a latency model, features are named by what their tokens are about.

    Attributes:
        sae: Directory of one autoencoder, as train-sae or SAELens saves it; may be remote.
        activations: The store to look at; may be remote.
        model: The model of the store, to measure its loss with the autoencoder in it and to show
            its tokens as text.
        site: Where in the model.
        layer: Which layer.
        tokens: Tokens of the store to look at, those of whole prompts.
        features: Features to show with their contexts: of a latency model those that go closest
            with a property of measurements, else those that rebuild most.
        contexts: Contexts of each, from different prompts.
        report: Write one self-contained HTML page here; may be remote.
    """

    sae: str = field(argument=True, location=True)
    activations: str | None = field(
        default=None, location=True, default_text="the store it was trained on"
    )
    model: str | None = field(default=None, location=True, default_text="that of the store")
    site: Site | None = field(default=None, default_text="that of the training")
    layer: int | None = field(default=None, ge=0, default_text="that of the training")
    tokens: int = field(default=200_000, gt=0)
    features: int = field(default=50, gt=0)
    contexts: int = field(default=5, gt=0)
    report: str | None = field(default=None, location=True)
