"""Training from start to end: data in, a run directory out, and on again after any stop."""

import dataclasses
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ping_llm import report, settings, sharding, tokenizer
from ping_llm.data import pipeline
from ping_llm.data.network import KNOWN, thinned, write_known
from ping_llm.data.rows import ProbeRows
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError, Stopped, StorageError
from ping_llm.outputs import publish_file, publish_json
from ping_llm.packing import Batch
from ping_llm.progress import progress
from ping_llm.runs import PRETRAINED, load_run, with_checksum
from ping_llm.storage import Location
from ping_llm.training.directory import RunDirectory, open_run
from ping_llm.training.metrics import Meter, RunLog, by_field
from ping_llm.training.optimizer import learning_rate_at, make_optimizer
from ping_llm.training.settings import TrainSettings
from ping_llm.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)
from ping_llm.training.stopping import StopSignals
from ping_llm.training.tracking import Tracker

if TYPE_CHECKING:
    from ping_llm.checkpoints import Checkpoints

# Which steps `profile` traces: some after the first ones, whose allocations are not typical.
UNTRACED_STEPS, TRACED_STEPS = 2, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run stands.

    Attributes:
        step: Steps taken.
        loss: Training loss, nats a token, mean over the last `log_every` steps.
        valid_loss: Loss on the valid split; None where the data have none.
        real_tokens_per_second: Tokens that are not padding, over the whole run's training time.
        padding_fraction: Fraction of the tokens in the batches that is padding.
        mfu: Fraction of the devices' peak FLOP/s used for real tokens; None if it is unknown.
        peak_device_bytes: Most memory used on one device; on a CPU, by the process.
        parameters: Number of parameters.
        seconds: Time spent on training steps, compilation and evaluation aside.
        output: The run directory.
    """

    step: int
    loss: float
    valid_loss: float | None
    real_tokens_per_second: float
    padding_fraction: float
    mfu: float | None
    peak_device_bytes: int
    parameters: int
    seconds: float
    output: str


@settings.takes(TrainSettings)
def train(cfg: TrainSettings) -> TrainResult:
    """Trains the run in `output`, from its newest checkpoint if it has one; returns its state.

    A run that already has its steps is not touched.

    Raises:
        ConfigError: A setting cannot be, or is not what `output` was begun with, or another
            process trains there.
        DataError: `data` is not a data set.
        StorageError: `output` cannot be written.
        CheckpointError: A checkpoint cannot be written or read.
        TrainingError: Too many steps in a row had to be skipped.
        Stopped: SIGINT or SIGTERM came; the run is saved.
    """
    if cfg.model.vocab_size < tokenizer.VOCAB_SIZE:
        size, needed = cfg.model.vocab_size, tokenizer.VOCAB_SIZE
        raise ConfigError(f"model.vocab_size={size} is too small for the {needed} token ids")
    data = Location.of(cfg.data).local_copy(identity="dataset.json")
    fingerprint = pipeline.data_fingerprint(data)
    sharding.start_processes(cfg.coordinator, cfg.num_processes, cfg.process_id)
    mesh = sharding.make_mesh(**sharding.parse_mesh(cfg.mesh))
    with (
        _open_loader(cfg, data, mesh) as loader,
        open_run(cfg, data, fingerprint) as run,
        _open_checkpoints(cfg, run) as checkpoints,
    ):
        done = checkpoints.latest() or 0
        log = RunLog(run.path / "metrics.jsonl", last_step=done)
        if done < cfg.steps:
            is_first = jax.process_index() == 0
            if is_first:
                publish_json(Location.of(run.path) / "config.json", with_checksum(run.config))
                if not (run.path / KNOWN).is_file():
                    with publish_file(Location.of(run.path) / KNOWN) as path:
                        write_known(path, thinned(ProbeRows(data, "train").to_table()))
                log.cut()
            valid = _valid_batches(cfg, data, mesh)
            mode = cfg.wandb if is_first else "disabled"
            with Tracker(run.path, mode=mode, config=settings.to_json(cfg)) as tracker:
                trainer = _Trainer(cfg, loader, valid, checkpoints, log, tracker, mesh)
                trainer.train()
            if is_first:
                with publish_file(Location.of(run.path) / "loss.png") as path:
                    report.loss_plot(log.rows, path)
            if run.remote is not None:
                run.remote.push_files()
    return _result(cfg, log)


def _open_loader(cfg: TrainSettings, data: Path, mesh: Mesh) -> pipeline.TrainLoader:
    index, count = sharding.batch_share(mesh, cfg.batch_size)
    return pipeline.TrainLoader(
        data,
        batch_size=cfg.batch_size,
        seq_len=cfg.seq_len,
        seed=cfg.seed,
        window_config=WindowConfig.of(vars(cfg)),
        grid_fraction=cfg.grid_fraction,
        simulated_fraction=cfg.simulated_fraction,
        workers=cfg.loader_workers,
        process_index=index,
        process_count=count,
    )


def _open_checkpoints(cfg: TrainSettings, run: RunDirectory) -> "Checkpoints":
    from ping_llm.checkpoints import Checkpoints  # Orbax takes a second to import

    directory, keep, remote = run.path / "checkpoints", cfg.keep_checkpoints, run.remote
    known, push = (remote.objectives, remote.push) if remote else (None, None)
    return Checkpoints(directory, keep=keep, elsewhere=known, on_saved=push)


def _valid_batches(cfg: TrainSettings, data: Path, mesh: Mesh) -> list[Batch]:
    """Returns this process's rows of the batches of the valid split."""
    index, count = sharding.batch_share(mesh, cfg.batch_size)
    rows = cfg.batch_size // count
    own = slice(index * rows, (index + 1) * rows)
    batches = pipeline.eval_batches(
        data,
        "valid",
        batch_size=cfg.batch_size,
        seq_len=cfg.seq_len,
        count=cfg.eval_batches,
        grid_fraction=cfg.grid_fraction,
    )
    return [Batch(**{name: each[own] for name, each in vars(b).items()}) for b in batches]


@dataclasses.dataclass
class _Trainer:
    """The parts of a run between its start and its end."""

    cfg: TrainSettings
    loader: pipeline.TrainLoader
    valid_batches: list[Batch]
    checkpoints: "Checkpoints"
    log: RunLog
    tracker: Tracker
    mesh: Mesh

    def __post_init__(self) -> None:
        cfg, mesh, checkpoints = self.cfg, self.mesh, self.checkpoints
        objectives = (row.get("valid_objective", inf) for row in self.log.rows)
        self.best = min(objectives, default=inf)
        self.valid = [self._place(batch) for batch in self.valid_batches]
        self.schedule = learning_rate_at(cfg)
        tx = make_optimizer(cfg)
        graphdef, abstract = abstract_state(cfg.model, tx, mesh=mesh)
        self.step = checkpoints.latest() or 0
        if self.step:
            trees = {"params": abstract.params, "opt_state": abstract.opt_state}
            trees, notes = checkpoints.restore(self.step, trees)
            step = jax.device_put(np.int32(self.step), abstract.step.sharding)
            self.state = TrainState(step, **trees)
            self.meter = Meter(cfg, notes["meter"])
            self.loader.set_state(notes["loader"])
        else:
            _, self.state = init_state(cfg.model, tx, seed=cfg.seed, mesh=mesh)
            if (params := _initial(cfg, abstract.params)) is not None:
                self.state = dataclasses.replace(self.state, params=params)
            self.meter = Meter(cfg)
        self.eval_step = make_eval_step(graphdef)
        train_step = make_train_step(graphdef, cfg, tx)
        with jax.set_mesh(mesh):
            # Compiled once, for one shape: another one is an error, not a silent recompilation.
            self.train_step = train_step.lower(abstract, self._batch_shapes()).compile()

    def train(self) -> None:
        """Takes the steps that are left."""
        cfg = self.cfg
        title = f"train {cfg.preset}, {cfg.model.parameter_count():,} parameters"
        with (
            StopSignals() as signals,
            progress(title, total=cfg.steps, unit="steps", initial=self.step) as bar,
            jax.set_mesh(self.mesh),
            _Trace(cfg.profile, first=self.step + 1 + UNTRACED_STEPS) as trace,
        ):
            self.meter.start_clock()
            while self.step < cfg.steps:
                trace.before(self.step + 1, self.meter)
                batch = self._place(next(self.loader))
                self.state, metrics = self.train_step(self.state, batch)
                self.step += 1
                self.meter.add(self.step, metrics)
                last = self.step == cfg.steps
                log_now = last or self.step % cfg.log_every == 0
                evaluate = last or self.step % cfg.eval_every == 0
                stop = None if last else signals.agreed(at_log_point=log_now)
                # Infinity where it is not measured.
                objective = self._write_row(evaluate=evaluate) if log_now or evaluate else inf
                bar.update(done=self.step, note=self.meter.note)
                is_best = objective < self.best
                if last or stop or is_best or self.step % cfg.checkpoint_every == 0:
                    self._save(objective)
                if is_best:
                    self.best = objective
                if last or stop:
                    self.checkpoints.wait()
                if stop:
                    raise Stopped(stop)

    def _write_row(self, *, evaluate: bool) -> float:
        """Writes a line about the newest steps; returns the valid objective, or infinity."""
        self.meter.fetch()
        row = self.meter.row(self.step, float(self.schedule(self.step - 1)))
        if evaluate and self.valid:
            sums = [self.eval_step(self.state.params, batch) for batch in self.valid]
            nll, count = np.sum(jax.device_get(sums), axis=0)
            row["valid_loss"] = float(nll.sum() / count.sum())
            weights = np.array(self.cfg.loss_weights)
            row["valid_objective"] = float(weights @ nll / max(weights @ count, 1.0))
            row |= by_field("valid_loss_", nll, count)
            self.meter.start_clock()
        self.log.append(row)
        self.tracker.log(row)
        return row.get("valid_objective", inf)

    def _save(self, objective: float) -> None:
        self.meter.fetch()
        trees = {"params": self.state.params, "opt_state": self.state.opt_state}
        notes = {"loader": _merged_state(self.loader), "meter": self.meter.state()}
        measured = None if objective == inf else objective
        self.checkpoints.save(self.step, trees, notes, objective=measured)

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.cfg.batch_size, self.cfg.seq_len)
        where = NamedSharding(self.mesh, sharding.BATCH_BT)
        ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
        shapes = {field.name: ids for field in dataclasses.fields(Batch)}
        return shapes | {"mask": ids.update(dtype=np.dtype(np.float32))}

    def _place(self, batch: Batch) -> dict[str, jax.Array]:
        return sharding.place_batch(self.mesh, vars(batch))


def _initial(cfg: TrainSettings, abstract: Any) -> Any:
    """Returns the parameters that `cfg.init` names, laid out like `abstract`; None: random ones.

    Raises:
        ConfigError: They are of another shape.
        CheckpointError: It names no run.
    """
    if cfg.init == "random":
        return None
    in_the_box = cfg.init in ("auto", "pretrained")
    loaded = load_run(PRETRAINED if in_the_box else cfg.init)
    theirs = loaded.config["model"]
    for name, value in settings.to_json(cfg.model).items():
        if name not in ("dtype", "remat") and theirs[name] != value:
            if cfg.init == "auto":
                return None
            raise ConfigError(
                f"init={cfg.init} has model.{name}={theirs[name]!r}, this run {value!r}; they must "
                "agree, or give --init random"
            )
    place = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.device_put(loaded.params, place)


def _merged_state(loader: pipeline.TrainLoader) -> dict[str, Any]:
    """Returns the state of the loaders of all processes, as one."""
    state = loader.get_state()
    if jax.process_count() == 1:
        return state
    own = np.array([state["first_lane"], *state["positions"]])
    gathered = np.unique(multihost_utils.process_allgather(own), axis=0).tolist()
    states = [{**state, "first_lane": row[0], "positions": row[1:]} for row in gathered]
    return pipeline.merge_states(states)


class _Trace:
    """XLA's trace of a few steps, in `directory`; a context manager. None: of none."""

    def __init__(self, directory: str | None, *, first: int):
        self._directory, self._first, self._running = directory, first, False

    def before(self, step: int, meter: Meter) -> None:
        """Begins or ends the trace where `step` is the first of it, or the first after it."""
        if self._directory is None or step not in (self._first, self._first + TRACED_STEPS):
            return
        meter.fetch()  # no step is half done where the trace begins or ends
        if step > self._first:
            self.__exit__()
        else:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def __enter__(self) -> "_Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _result(cfg: TrainSettings, log: RunLog) -> TrainResult:
    if not log.rows or "padding_fraction" not in log.rows[-1]:
        raise StorageError(f"{cfg.output}/metrics.jsonl lacks the lines of this run's steps")
    row = log.rows[-1]
    names = (field.name for field in dataclasses.fields(TrainResult))
    values: dict[str, Any] = {name: row.get(name) for name in names} | {
        "real_tokens_per_second": row["tokens"] / row["seconds"],
        "parameters": cfg.model.parameter_count(),
        "output": str(Location.of(cfg.output)),
    }
    return TrainResult(**values)
