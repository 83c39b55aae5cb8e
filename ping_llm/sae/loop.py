"""Training sparse autoencoders from start to end, and on again after any stop."""

import contextlib
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ping_llm import __version__, outputs, settings, sharding
from ping_llm.activations import store
from ping_llm.activations.reader import ActivationReader
from ping_llm.errors import CheckpointError, ConfigError, Stopped, StorageError, TrainingError
from ping_llm.models.config import END_SITES
from ping_llm.outputs import publish_json
from ping_llm.progress import progress
from ping_llm.runs import whole_steps, with_checksum
from ping_llm.sae.architectures import DEFAULT_SPARSITY
from ping_llm.sae.autoencoder import CONFIG, SparseAutoencoder
from ping_llm.sae.evaluation import evaluate_rows, held_out_rows
from ping_llm.sae.settings import TrainSaeSettings
from ping_llm.sae.step import (
    AutoencoderState,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
)
from ping_llm.sae.tokens import TokenChoice, TokenStream
from ping_llm.settings import refuse_changes
from ping_llm.storage import Location
from ping_llm.training.directory import open_directory
from ping_llm.training.metrics import MAX_IN_FLIGHT, RunLog
from ping_llm.training.optimizer import learning_rate_at
from ping_llm.training.stopping import StopSignals
from ping_llm.training.tracking import Tracker

if TYPE_CHECKING:
    from ping_llm.checkpoints import Checkpoints

SCHEMA_VERSION = 1
CENTERED_TOKENS = 8192  # by which activations are centred and scaled
_TOTALS = ("tokens", "seconds", "skipped", "skipped_in_a_row")
_HOOKS = {  # TransformerLens's names
    "embed": "hook_embed",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "heads": "blocks.{}.attn.hook_z",
    "attn": "blocks.{}.hook_attn_out",
    "mlp_inner": "blocks.{}.mlp.hook_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "residual": "blocks.{}.hook_resid_post",
    "final_norm": "ln_final.hook_normalized",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSaeResult:
    """Where a training of autoencoders stands.

    Attributes:
        step: Steps taken.
        autoencoders: For each, by site and layer: `explained_variance`, `l0` and `never_active`
            (part of the features) on held-out tokens; `dead` features in training.
        tokens: Tokens trained on.
        tokens_per_second: Of each layer, over the whole training.
        features: Number of features of each.
        seconds: Time spent on training steps, compilation and evaluation aside.
        output: The directory.
    """

    step: int
    autoencoders: dict[str, dict[str, float]]
    tokens: int
    tokens_per_second: float
    features: int
    seconds: float
    output: str


@settings.takes(TrainSaeSettings)
def train_sae(chosen: TrainSaeSettings) -> TrainSaeResult:
    """Trains autoencoders on the store `activations`, from their newest checkpoint if any.

    A training that already has its steps is not touched, but for an autoencoder that is gone.

    Raises:
        ConfigError: A setting cannot be, or is not what `output` was begun with, or another
            process trains there.
        StorageError: The store cannot be read, or `output` not be written.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Too many steps in a row had to be skipped.
        Stopped: SIGINT or SIGTERM came; the training is saved.
    """
    readers = _open_readers(chosen)
    manifest = next(iter(readers.values())).manifest
    cfg = _filled_in(chosen, width=next(iter(readers.values())).shape[1])
    sharding.start_processes(cfg.coordinator, cfg.num_processes, cfg.process_id)
    mesh = sharding.make_mesh(**sharding.parse_mesh(cfg.mesh))
    sharding.batch_share(mesh, cfg.batch_size)
    config = _config(cfg, manifest)
    output = Location.of(cfg.output)
    own = ("config.json", "metrics.jsonl", "checkpoints", "wandb", *readers)
    with (
        open_directory(
            output, what="train-sae", settings=cfg, stored=lambda: _stored(output, config), own=own
        ) as (path, remote),
        _open_checkpoints(cfg, path, remote) as checkpoints,
    ):
        done = checkpoints.latest() or 0
        log = RunLog(path / "metrics.jsonl", last_step=done)
        is_first = jax.process_index() == 0
        lacking = [name for name in readers if not (output / name / CONFIG).is_file()]
        if done < cfg.steps or lacking:
            if is_first:
                publish_json(Location.of(path) / "config.json", with_checksum(config))
                log.cut()
            mode = cfg.wandb if is_first else "disabled"
            with Tracker(path, mode=mode, config=settings.to_json(cfg)) as tracker:
                trainer = _SaeTrainer(cfg, readers, checkpoints, log, tracker, mesh, output, config)
                if done < cfg.steps:
                    trainer.train()
                else:  # someone removed them
                    trainer.publish()
            if remote is not None:
                remote.push_files()
    return _result(cfg, readers, log)


def _open_readers(cfg: TrainSaeSettings) -> dict[str, ActivationReader]:
    """Returns the readers of each layer by the names of their arrays."""
    layers = [None] if cfg.site in END_SITES else cfg.layer
    return {
        store.array_name(cfg.site, layer): ActivationReader(
            cfg.activations, site=cfg.site, layer=layer
        )
        for layer in layers
    }


def _filled_in(cfg: TrainSaeSettings, *, width: int) -> TrainSaeSettings:
    features = cfg.features or 16 * width
    given = {"features": features, "learning_rate": cfg.learning_rate, "sparsity": cfg.sparsity}
    if cfg.learning_rate is None:
        given["learning_rate"] = 2e-4 * (2**14 / features) ** 0.5
    if cfg.sparsity is None and cfg.architecture not in ("topk", "batchtopk"):
        given["sparsity"] = DEFAULT_SPARSITY[cfg.architecture]
    return dataclasses.replace(cfg, **given)


def _config(cfg: TrainSaeSettings, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "train_sae": settings.to_json(cfg),
        "store": {"url": cfg.activations, "identity": store.identity(manifest)},
        "made_from": manifest["made_from"],
    }


def _stored(output: Location, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of the training in `output`, or None where no checkpoint binds to them.

    Raises:
        ConfigError: It holds something else, or was trained on another store.
        CheckpointError: Its config is damaged.
    """
    names = outputs.contents(output)
    if "config.json" not in names:
        # The only thing that a killed start leaves without it is an empty directory.
        if names and (names != ["checkpoints"] or (output / "checkpoints").names()):
            raise ConfigError(
                f"{output} is not empty and holds no training of autoencoders; choose another one"
            )
        return None
    before = _read_config(output)
    if not whole_steps(output):
        return None
    was, now = before["store"], config["store"]
    if was["identity"] != now["identity"]:
        names = (f"{each['url']} (identity {each['identity']})" for each in (was, now))
        stored, given = ({"activations": name} for name in names)
        refuse_changes(stored, given, output)
    return before["train_sae"]


def _read_config(output: Location) -> dict[str, Any]:
    path = output / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or "train_sae" not in config:
            raise ConfigError(f"{output} holds something else; choose another output")
        checksum = config.pop("checksum", None)
        if with_checksum(config)["checksum"] != checksum:
            raise ValueError("its checksum is another")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it") from None
    return config


def _open_checkpoints(cfg: TrainSaeSettings, path: Path, remote: Any) -> "Checkpoints":
    from ping_llm.checkpoints import Checkpoints  # Orbax takes a second to import

    known, push = (remote.objectives, remote.push) if remote else (None, None)
    keep = cfg.keep_checkpoints
    return Checkpoints(path / "checkpoints", keep=keep, elsewhere=known, on_saved=push)


@dataclasses.dataclass
class _SaeTrainer:
    """The parts of a training between its start and its end."""

    cfg: TrainSaeSettings
    readers: dict[str, ActivationReader]
    checkpoints: "Checkpoints"
    log: RunLog
    tracker: Tracker
    mesh: Mesh
    output: Location
    config: dict[str, Any]

    def __post_init__(self) -> None:
        cfg, mesh = self.cfg, self.mesh
        choice = TokenChoice(cfg.seed, cfg.held_out_tokens, cfg.min_position, cfg.special_tokens)
        readers = list(self.readers.values())
        self.stream = TokenStream(
            readers, choice, batch_size=cfg.batch_size, buffer_mb=cfg.buffer_mb
        )
        spans = choice.held_out(readers[0])
        self.held_out = [held_out_rows(reader, choice, spans) for reader in readers]
        self.schedule = learning_rate_at(cfg)
        tx = make_optimizer(cfg)
        abstract = abstract_state(cfg, tx, d_model=readers[0].shape[1], mesh=mesh)
        self.step, self.totals = self.checkpoints.latest() or 0, dict.fromkeys(_TOTALS, 0.0)
        with jax.set_mesh(mesh):
            if self.step:
                self._restore(abstract)
            else:
                self._begin(tx, abstract)
            # Compiled once, for one shape: another one is an error, not a silent recompilation.
            rows = jax.ShapeDtypeStruct(
                (cfg.batch_size, readers[0].shape[1]),
                readers[0].dtype,
                sharding=NamedSharding(mesh, sharding.BATCH_BT),
            )
            step = jax.jit(make_train_step(cfg, tx, abstract), donate_argnums=0)
            number = jax.ShapeDtypeStruct((), np.int32)
            self.train_step = step.lower(abstract, rows, number).compile()
        self.pending: deque[tuple[int, list[dict[str, jax.Array]]]] = deque()
        self.newest: dict[str, dict[str, float]] = {}
        self.clock, self.speed = time.monotonic(), 0.0

    def _begin(self, tx: Any, abstract: AutoencoderState) -> None:
        """Makes the states before the first step."""
        wanted = -(-CENTERED_TOKENS // self.cfg.batch_size)
        with contextlib.closing(self.stream.batches()) as batches:
            seen = [next(batches) for _ in range(min(wanted, self.stream.per_epoch))]
        init = jax.jit(
            lambda key, *facts: init_state(self.cfg, tx, key, *facts),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        )
        self.states: dict[str, AutoencoderState] = {}
        for index, name in enumerate(self.readers):
            center, scale = center_and_scale(np.concatenate([batch[index] for batch in seen]), name)
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), index)
            self.states[name] = init(key, center.astype(np.float32), np.float32(scale))

    def _restore(self, abstract: AutoencoderState) -> None:
        trees = {
            "params": dict.fromkeys(self.readers, abstract.params),
            "opt_state": dict.fromkeys(self.readers, (abstract.opt_state, abstract.rest)),
        }
        read, notes = self.checkpoints.restore(self.step, trees)
        self.totals = notes["totals"]
        self.states = {
            name: AutoencoderState(read["params"][name], *read["opt_state"][name])
            for name in self.readers
        }

    def train(self) -> None:
        """Takes the steps that are left; then saves the autoencoders."""
        cfg = self.cfg
        title = f"train-sae {cfg.architecture}, {cfg.features:,} features"
        with (
            StopSignals() as signals,
            progress(title, total=cfg.steps, unit="steps", initial=self.step) as bar,
            jax.set_mesh(self.mesh),
            contextlib.closing(self.stream.batches(self.step)) as batches,
        ):
            self.clock = time.monotonic()
            while self.step < cfg.steps:
                self._take_step(next(batches))
                last = self.step == cfg.steps
                log_now = last or self.step % cfg.log_every == 0
                evaluate = last or self.step % cfg.eval_every == 0
                stop = None if last else signals.agreed(at_log_point=log_now)
                if log_now or evaluate:
                    self._write_row(evaluate=evaluate)
                bar.update(done=self.step, note=self._note())
                if last:
                    self.publish()  # before there is a checkpoint: a killed end is done again
                if last or stop or self.step % cfg.checkpoint_every == 0:
                    self._save()
                if last or stop:
                    self.checkpoints.wait()
                if stop:
                    raise Stopped(stop)

    def _take_step(self, batch: list[np.ndarray]) -> None:
        index, count = sharding.batch_share(self.mesh, self.cfg.batch_size)
        own = self.cfg.batch_size // count
        number, metrics = np.int32(self.step), []
        for (name, state), rows in zip(self.states.items(), batch, strict=True):
            mine = {"rows": rows[index * own : (index + 1) * own]}
            placed = sharding.place_batch(self.mesh, mine)["rows"]
            self.states[name], measured = self.train_step(state, placed, number)
            metrics.append(measured)
        self.step += 1
        self.pending.append((self.step, metrics))
        if len(self.pending) >= MAX_IN_FLIGHT:
            self.pending[-MAX_IN_FLIGHT][1][-1]["loss"].block_until_ready()

    def _fetch(self) -> None:
        """Waits for every step so far, and takes note of what they gave.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        fetched, now = jax.device_get(list(self.pending)), time.monotonic()
        for step, metrics in fetched:
            if any(each["skipped"] for each in metrics):
                self.totals["skipped"] += 1
                self.totals["skipped_in_a_row"] += 1
                said = f"step {step}: a gradient is not finite; nothing was changed"
                print(said, file=sys.stderr, flush=True)
            else:
                self.totals["skipped_in_a_row"] = 0
            if self.totals["skipped_in_a_row"] >= self.cfg.max_skipped_steps:
                raise TrainingError(
                    f"step {step} is number {self.totals['skipped_in_a_row']:.0f} in a row that "
                    "was skipped, for its gradient is not finite; look for values that are not "
                    "finite in the store, or try a smaller learning_rate than "
                    f"{self.cfg.learning_rate:.3g}"
                )
            self.newest = {
                name: {key: float(value) for key, value in each.items()}
                for name, each in zip(self.states, metrics, strict=True)
            }
        if self.pending:
            tokens = len(self.pending) * self.cfg.batch_size
            self.totals["tokens"] += tokens
            self.totals["seconds"] += now - self.clock
            self.speed = tokens / max(now - self.clock, 1e-9)
        self.pending.clear()
        self.clock = now

    def _note(self) -> str:
        if not self.newest:
            return ""
        left = np.mean([each["unexplained"] for each in self.newest.values()])
        return f"unexplained {left:.4f}  {self.speed:,.0f} tokens/s"

    def _write_row(self, *, evaluate: bool) -> None:
        self._fetch()
        losses = [each["loss"] for each in self.newest.values()]
        row: dict[str, Any] = {
            "step": self.step,
            "loss": float(np.mean(losses)),
            "learning_rate": float(self.schedule(self.step - 1)),
            "tokens": int(self.totals["tokens"]),
            "epochs": self.step / self.stream.per_epoch,
            "tokens_per_second": self.speed,
            "skipped_steps": int(self.totals["skipped"]),
            "peak_device_bytes": sharding.peak_device_bytes(),
            "seconds": self.totals["seconds"],
        }
        for name, each in self.newest.items():
            kept = ("loss", "unexplained", "penalty", "aux_loss", "l0", "dead", "grad_norm")
            row |= {f"{name}/{key}": each[key] for key in kept}
        if evaluate:
            for name, rows in zip(self.states, self.held_out, strict=True):
                measured = evaluate_rows(self._finished(name), rows)
                row |= {f"{name}/held_out_{key}": value for key, value in measured.items()}
            self.clock = time.monotonic()
        self.log.append({key: _finite(value) for key, value in row.items()})
        self.tracker.log(row)

    def _save(self) -> None:
        self._fetch()
        states = self.states.items()
        trees = {
            "params": {name: state.params for name, state in states},
            "opt_state": {name: (state.opt_state, state.rest) for name, state in states},
        }
        self.checkpoints.save(self.step, trees, {"totals": self.totals})

    def _finished(self, name: str) -> SparseAutoencoder:
        cfg, state = self.cfg, self.states[name]
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            gathered = multihost_utils.process_allgather((state.params, state.rest), tiled=True)
            params, rest = gathered
        else:
            params, rest = jax.device_get((state.params, state.rest))
        site, _, layer = name.partition(".")
        metadata = {
            "ping_llm_version": __version__,
            "model_name": self.config["made_from"]["model"],
            "hook_name": _HOOKS[site].format(int(layer or 0)),
            "site": site,
            "layer": int(layer) if layer else None,
            "store": self.config["store"],
            "trained_as": cfg.architecture,
            "training_tokens": self.step * cfg.batch_size,
            "seed": cfg.seed,
            "held_out_tokens": cfg.held_out_tokens,
            "min_position": cfg.min_position,
            "special_tokens": cfg.special_tokens,
        }
        return SparseAutoencoder.of_training(cfg, params, rest, metadata)

    def publish(self) -> None:
        """Saves the autoencoders as they are now."""
        for name in self.states:
            finished = self._finished(name)
            if jax.process_index() == 0:
                finished.save(self.output / name)


def _finite(value: Any) -> Any:
    return value if isinstance(value, int) or np.isfinite(value) else None


def center_and_scale(rows: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """Returns the geometric median of rows [n, D], by Weiszfeld, and what makes their variance 1.

    Raises:
        ConfigError: All rows are equal, or a value is not finite.
    """
    rows = rows.astype(np.float64)
    center = rows.mean(axis=0)
    for _ in range(30):
        weights = 1 / np.maximum(np.linalg.norm(rows - center, axis=1), 1e-12)
        center = weights @ rows / weights.sum()
    variance = np.mean(np.sum((rows - rows.mean(axis=0)) ** 2, axis=1))
    if not np.isfinite(variance) or variance <= 0:
        raise ConfigError(f"{name}: its variance is {variance}; there is nothing to learn there")
    return center, float(variance**-0.5)


def _result(
    cfg: TrainSaeSettings, readers: Mapping[str, ActivationReader], log: RunLog
) -> TrainSaeResult:
    if not log.rows:
        raise StorageError(f"{cfg.output}/metrics.jsonl lacks the lines of this training's steps")
    row = log.rows[-1]
    measured = {
        name: {
            "explained_variance": row[f"{name}/held_out_explained_variance"],
            "l0": row[f"{name}/held_out_l0"],
            "never_active": row[f"{name}/held_out_never_active"],
            "dead": row[f"{name}/dead"],
        }
        for name in readers
    }
    assert cfg.features is not None
    return TrainSaeResult(
        step=row["step"],
        autoencoders=measured,
        tokens=row["tokens"],
        tokens_per_second=row["tokens"] / max(row["seconds"], 1e-9),
        features=cfg.features,
        seconds=row["seconds"],
        output=str(Location.of(cfg.output)),
    )
