"""The learning-rate schedules and the optimizer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ping_llm.training.settings import TrainSettings

GROUPS = ("kernel", "embedding", "norm")  # "norm" includes biases

# The root mean square of Muon's updates of a kernel, near that of Adam's, so that one learning rate
# serves both: Liu et al., Muon is Scalable for LLM Training, 2025, section 2.2.
MUON_RMS = 0.2

NORM_DECAY = 0.98  # of the running mean of gradient norms
NORMS_TO_TRUST = 20  # steps before that mean is trusted


def learning_rate_at(cfg: Any) -> Callable[[Any], Any]:
    """Returns the schedule: a linear warm-up, then down to its floor at step `steps`.

    `cosine` goes down half a cosine; `wsd` (warm-up, stable, decay: Hu et al., MiniCPM, 2024) stays
    at the peak, and goes down in a line over the last `decay_fraction` of the steps. The schedule
    takes the number of steps already taken; the first step has a rate above 0.
    """

    def schedule(taken):
        warm = jnp.minimum((taken + 1) / max(cfg.warmup_steps, 1), 1.0)
        if cfg.schedule == "cosine":
            done = (taken - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
            left = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(done, 0.0, 1.0)))
        else:
            left = jnp.clip((cfg.steps - taken) / max(cfg.decay_fraction * cfg.steps, 1), 0.0, 1.0)
        floor = cfg.final_learning_rate_fraction
        return cfg.learning_rate * warm * (floor + (1 - floor) * left)

    return schedule


def groups(params: Any) -> Any:
    """Returns a tree like `params`: which of `GROUPS` each parameter is in."""

    def group(path, _):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "kernel" if "kernel" in names else "embedding" if "embedding" in names else "norm"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(cfg: TrainSettings) -> optax.GradientTransformation:
    """Returns AdamW or Muon after clipping by the global norm, under a `guard`.

    Muon (Jordan et al., 2024) is for the kernels of the blocks, each matrix of a stack by itself;
    AdamW does the rest.
    """

    def decays(params):
        return jax.tree.map(lambda group: group in cfg.weight_decay_groups, groups(params))

    directions = optax.scale_by_adam(cfg.beta1, cfg.beta2)
    if cfg.optimizer == "muon":
        directions = optax.partition({"adam": directions, "muon": _muon(cfg.muon_beta)}, _method)
    inner = optax.chain(
        directions,
        optax.add_decayed_weights(cfg.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate_at(cfg)),
    )
    factors = {
        "kernel": 1.0,
        "embedding": cfg.embedding_learning_rate_factor,
        "norm": cfg.norm_learning_rate_factor,
    }
    if set(factors.values()) != {1.0}:
        inner = optax.chain(inner, _scaled_by_group(factors))
    clipped = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), inner)
    return guard(clipped, spike_factor=cfg.spike_factor)


def _method(params: Any) -> Any:
    """Returns a tree like `params`: "muon" for a stack of matrices [L, in, out], else "adam"."""

    def method(group, leaf):
        return "muon" if group == "kernel" and leaf.ndim == 3 else "adam"

    return jax.tree.map(method, groups(params), params)


def _muon(beta: float) -> optax.GradientTransformation:
    def matrices(params):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), params)

    def scale(updates, _):
        return jax.tree.map(lambda u: u * (MUON_RMS * max(u.shape[1:]) ** 0.5), updates)

    orthogonal = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=matrices)
    return optax.chain(orthogonal, optax.stateless(scale))


def _scaled_by_group(factors: dict[str, float]) -> optax.GradientTransformation:
    def scale(updates, _):
        return jax.tree.map(lambda group, update: factors[group] * update, groups(updates), updates)

    return optax.stateless(scale)


class GuardState(NamedTuple):
    """What a guarded optimizer keeps.

    Attributes:
        inner: State of the optimizer itself.
        mean_norm: Running mean of the gradient's norm over the steps that were taken.
        taken: How many were taken.
        skipped: Whether the newest step was skipped.
    """

    inner: Any
    mean_norm: Float[Array, ""]
    taken: Int[Array, ""]
    skipped: Bool[Array, ""]


def guard(
    inner: optax.GradientTransformation, *, spike_factor: float | None
) -> optax.GradientTransformation:
    """Returns `inner`, except that a bad gradient changes nothing: no parameter, no moment.

    A gradient is bad when its norm is not finite, or is `spike_factor` times the running mean of
    those before it. The schedule of `inner` counts the steps that were taken.

    Args:
        inner: The optimizer.
        spike_factor: None: only norms that are not finite are bad.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), jnp.zeros(()), zero, jnp.zeros((), bool))

    def update(updates, state, params=None):
        norm = optax.tree.norm(updates).astype(jnp.float32)
        bad = ~jnp.isfinite(norm)
        if spike_factor is not None:
            trusted = state.taken >= NORMS_TO_TRUST
            bad |= trusted & (norm > spike_factor * state.mean_norm)
        new_updates, new_inner = inner.update(updates, state.inner, params)

        def unless_bad(new, old):
            return jnp.where(bad, old, new)

        # A mean of all norms at first, of about the last 50 later.
        weight = jnp.maximum(1 - NORM_DECAY, 1 / (state.taken + 1.0))
        mean = unless_bad(state.mean_norm + weight * (norm - state.mean_norm), state.mean_norm)
        kept_inner = jax.tree.map(unless_bad, new_inner, state.inner)
        kept_updates = jax.tree.map(lambda new: unless_bad(new, jnp.zeros_like(new)), new_updates)
        return kept_updates, GuardState(kept_inner, mean, state.taken + ~bad, bad)

    return optax.GradientTransformation(init, update)
