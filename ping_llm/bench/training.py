"""The training step by itself, for `ping-llm bench train`."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from ping_llm import sharding
from ping_llm.bench import peers as yardsticks
from ping_llm.errors import ConfigError
from ping_llm.models.config import DecoderConfig, Dtype
from ping_llm.training import flops
from ping_llm.training.optimizer import make_optimizer
from ping_llm.training.settings import TrainSettings
from ping_llm.training.step import init_state, make_train_step

WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of steps.

    Attributes:
        seconds: Wall time of each step, by whose step it is; step i of all of them came together.
        cpu_seconds: CPU time of our steps.
        flops_per_step: FLOPs of one step.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: float
    flops_per_step: float


def shape(
    *, n_layers: int, d_model: int, n_heads: int, d_ff: int, vocab_size: int, dtype: Dtype
) -> DecoderConfig:
    """Returns a decoder with heads of `d_model / n_heads`, each with keys of its own."""
    if n_heads < 1 or d_model % n_heads:
        raise ConfigError(f"{n_heads=} must divide {d_model=}")
    return DecoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=d_ff,
        dtype=dtype,
    )


def measure(
    cfg: DecoderConfig, *, batch_size: int, seq_len: int, steps: int, compare: bool, seed: int
) -> Measured:
    """Returns times of `steps` steps on random tokens, after a warm-up.

    Args:
        cfg: Shape of the decoder.
        batch_size: Rows of a batch.
        seq_len: Tokens of a row; each row is one segment.
        steps: Number of steps timed.
        compare: Whether the yardsticks take turns with our step.
        seed: Decides parameters and tokens.
    """
    settings = TrainSettings(
        data="random", output="none", model=cfg, batch_size=batch_size, seq_len=seq_len
    )
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (batch_size, seq_len + 1), np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    runs: dict[str, Callable[[], object]] = {"ping_llm": _own(settings, inputs, targets, seed)}
    if compare:
        steppers = {
            "bare_jax": yardsticks.bare_jax(cfg),
            "pytorch": yardsticks.pytorch(cfg, compiled=False),
            "pytorch_compiled": yardsticks.pytorch(cfg, compiled=True),
        }
        for name, stepper in steppers.items():
            runs[name] = _once(stepper, inputs, targets)
    for run in runs.values():
        for _ in range(WARM_UP_STEPS):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu = 0.0
    for _ in range(steps):
        for name, run in runs.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - started)
            cpu += time.process_time() - used if name == "ping_llm" else 0.0
    pairs = batch_size * cfg.n_layers * seq_len * (seq_len + 1) / 2
    return Measured(seconds, cpu, flops.training_flops(cfg, batch_size * seq_len, pairs))


def _once(stepper: yardsticks.Steps, inputs: np.ndarray, targets: np.ndarray):
    return lambda: stepper(inputs, targets, 1)


def _own(
    cfg: TrainSettings, inputs: np.ndarray, targets: np.ndarray, seed: int
) -> Callable[[], None]:
    mesh, tx = sharding.make_mesh(), make_optimizer(cfg)
    sharding.batch_share(mesh, cfg.batch_size)  # for its error, where the batch cannot be shared
    graphdef, state = init_state(cfg.model, tx, seed=seed, mesh=mesh)
    places = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), inputs.shape)
    arrays = {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": np.ones_like(inputs),
        "positions": np.ascontiguousarray(places),
        "mask": np.ones(inputs.shape, np.float32),
    }
    batch = sharding.place_batch(mesh, arrays)
    step = make_train_step(graphdef, cfg, tx)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])

    return run
