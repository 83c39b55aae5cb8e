"""How fast the training step is, by itself or beside other frameworks."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from ping_llm import settings, sharding
from ping_llm.bench.settings import BenchTrainSettings
from ping_llm.training import flops
from ping_llm.training.optimizer import make_optimizer
from ping_llm.training.settings import TrainSettings
from ping_llm.training.step import init_state, make_train_step

WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class BenchTrainResult:
    """How fast training steps are, on random tokens that fill every row; compiling is not counted.

    Attributes:
        tokens_per_second: At the median step.
        real_tokens_per_second: The same; there is no padding.
        padding_fraction: 0.
        tokens_per_cpu_second: Tokens per second of this process's CPU time in our steps.
        step_seconds: The median step.
        fastest_step_seconds: The fastest step.
        flops_per_second: FLOPs of forward and backward passes, as `training.flops` counts them.
        mfu: The same as a fraction of the devices' peak; None where no peak is known.
        parameters: Number of parameters.
        bare_jax: Our speed as a multiple of that of a plain JAX step of the same shape, the median
            over pairs of steps that ran one after the other; None: not measured.
        pytorch: The same beside PyTorch in eager mode.
        pytorch_compiled: The same beside `torch.compile`.
        peak_device_bytes: The most memory used on one device; on a CPU, by the process.
    """

    tokens_per_second: float
    real_tokens_per_second: float
    padding_fraction: float
    tokens_per_cpu_second: float
    step_seconds: float
    fastest_step_seconds: float
    flops_per_second: float
    mfu: float | None
    parameters: int
    bare_jax: float | None
    pytorch: float | None
    pytorch_compiled: float | None
    peak_device_bytes: int


@settings.takes(BenchTrainSettings)
def bench_train(chosen: BenchTrainSettings) -> BenchTrainResult:
    """Returns how fast the training step of a decoder of this shape is.

    Raises:
        ConfigError: A setting cannot be, or PyTorch is missing.
    """
    cfg, tokens = chosen.model, chosen.batch_size * chosen.seq_len
    rng = np.random.default_rng(chosen.seed)
    ids = rng.integers(0, cfg.vocab_size, (chosen.batch_size, chosen.seq_len + 1), np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    steps: dict[str, Callable[[], object]] = {"ping_llm": _own_step(chosen, inputs, targets)}
    if chosen.compare:
        from ping_llm.bench import peers

        plain = peers.bare_jax(cfg)
        eager, compiled = peers.pytorch(cfg, compiled=False), peers.pytorch(cfg, compiled=True)
        steps["bare_jax"] = lambda: plain(inputs, targets, 1)
        steps["pytorch"] = lambda: eager(inputs, targets, 1)
        steps["pytorch_compiled"] = lambda: compiled(inputs, targets, 1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu_seconds = 0.0
    for i in range(-WARM_UP_STEPS, chosen.steps):
        for name, step in steps.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            step()
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds += (name == "ping_llm") * (time.process_time() - cpu_started)
    # A token attends to itself and to all before it in its row.
    pairs = tokens * cfg.n_layers * (chosen.seq_len + 1) / 2
    ours = np.array(seconds["ping_llm"])
    step_seconds = float(np.median(ours))
    flops_per_second = flops.training_flops(cfg, tokens, pairs) / step_seconds
    peak = flops.peak_of_devices()
    speedups = {name: float(np.median(seconds[name] / ours)) for name in steps}
    return BenchTrainResult(
        tokens_per_second=tokens / step_seconds,
        real_tokens_per_second=tokens / step_seconds,
        padding_fraction=0.0,
        tokens_per_cpu_second=chosen.steps * tokens / cpu_seconds,
        step_seconds=step_seconds,
        fastest_step_seconds=float(ours.min()),
        flops_per_second=flops_per_second,
        mfu=peak and flops_per_second / peak,
        parameters=cfg.parameter_count(),
        bare_jax=speedups.get("bare_jax"),
        pytorch=speedups.get("pytorch"),
        pytorch_compiled=speedups.get("pytorch_compiled"),
        peak_device_bytes=sharding.peak_device_bytes(),
    )


def _own_step(
    chosen: BenchTrainSettings, inputs: np.ndarray, targets: np.ndarray
) -> Callable[[], None]:
    cfg = TrainSettings(
        data="random tokens",
        output="none",
        model=chosen.model,
        batch_size=chosen.batch_size,
        seq_len=chosen.seq_len,
    )
    mesh, tx = sharding.make_mesh(), make_optimizer(cfg)
    sharding.batch_share(mesh, cfg.batch_size)  # refuses a batch that the devices cannot share
    graphdef, state = init_state(cfg.model, tx, seed=chosen.seed, mesh=mesh)
    positions = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), inputs.shape)
    arrays = {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": np.ones_like(inputs),
        "positions": np.ascontiguousarray(positions),
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
