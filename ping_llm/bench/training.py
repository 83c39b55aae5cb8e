"""How fast the training step is, by itself or beside other frameworks."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ping_llm import settings, sharding
from ping_llm.bench.settings import BenchTrainSettings
from ping_llm.packing import Batch
from ping_llm.training import flops
from ping_llm.training.optimizer import make_optimizer
from ping_llm.training.settings import TrainSettings
from ping_llm.training.step import init_state, make_train_step

WARM_UP_STEPS = 2


@settings.takes(BenchTrainSettings)
def bench_train(chosen: BenchTrainSettings) -> dict[str, Any]:
    """Returns how fast the training step of a decoder of this shape is.

    The tokens are random and fill every row. Compiling is not counted.

    Returns:
        By name:

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

        theirs = {
            "bare_jax": peers.bare_jax(cfg),
            "pytorch": peers.pytorch(cfg, compiled=False),
            "pytorch_compiled": peers.pytorch(cfg, compiled=True),
        }
        steps |= {k: functools.partial(v, inputs, targets, 1) for k, v in theirs.items()}
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
    ours = np.array(seconds.pop("ping_llm"))
    step_seconds = float(np.median(ours))
    flops_per_second = flops.training_flops(cfg, tokens, pairs) / step_seconds
    peak = flops.peak_of_devices()
    speedups = {name: float(np.median(theirs / ours)) for name, theirs in seconds.items()}
    return {
        "tokens_per_second": tokens / step_seconds,
        "real_tokens_per_second": tokens / step_seconds,
        "padding_fraction": 0.0,
        "tokens_per_cpu_second": chosen.steps * tokens / cpu_seconds,
        "step_seconds": step_seconds,
        "fastest_step_seconds": float(ours.min()),
        "flops_per_second": flops_per_second,
        "mfu": peak and flops_per_second / peak,
        "parameters": cfg.parameter_count(),
        **dict.fromkeys(("bare_jax", "pytorch", "pytorch_compiled")),
        **speedups,
        "peak_device_bytes": sharding.peak_device_bytes(),
    }


def _own_step(
    chosen: BenchTrainSettings, inputs: np.ndarray, targets: np.ndarray
) -> Callable[[], None]:
    shape: dict[str, Any] = {"batch_size": chosen.batch_size, "seq_len": chosen.seq_len}
    cfg = TrainSettings(data="random tokens", output="none", model=chosen.model, **shape)
    mesh, tx = sharding.make_mesh(), make_optimizer(cfg)
    sharding.batch_share(mesh, cfg.batch_size)  # refuses a batch that the devices cannot share
    graphdef, state = init_state(cfg.model, tx, seed=chosen.seed, mesh=mesh)
    ones = np.ones_like(inputs)
    positions = ones.cumsum(axis=1, dtype=np.int32) - 1
    batch = Batch(inputs, targets, ones, positions, mask=ones.astype(np.float32))
    placed = sharding.place_batch(mesh, vars(batch))
    step = make_train_step(graphdef, cfg, tx)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, placed)
        jax.block_until_ready(metrics["loss"])

    return run
