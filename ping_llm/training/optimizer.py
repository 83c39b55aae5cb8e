"""The learning-rate schedule and the optimizer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ping_llm.training.config import TrainConfig


def learning_rate_at(cfg: TrainConfig) -> Callable[[Any], Any]:
    """Returns the schedule: a linear warm-up, then half a cosine to its floor at step `steps`.

    The schedule takes the number of steps already taken; the first step has a rate above 0.
    """

    def schedule(taken):
        warm = jnp.minimum((taken + 1) / max(cfg.warmup_steps, 1), 1.0)
        done = (taken - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(done, 0.0, 1.0)))
        floor = cfg.final_learning_rate_fraction
        return cfg.learning_rate * warm * (floor + (1 - floor) * cosine)

    return schedule


def decays(params: Any) -> Any:
    """Returns a tree like `params`: whether weight decay applies, which it does to kernels only."""

    def is_kernel(path, leaf):
        del leaf
        return "kernel" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW after clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate_at(cfg),
        b1=cfg.beta1,
        b2=cfg.beta2,
        weight_decay=cfg.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)
