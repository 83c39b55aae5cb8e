"""The same work in other frameworks, for `ping-llm bench ... --compare`.

The training steps, in plain JAX and in PyTorch, do what a good first version does and no more:
causal attention over whole rows, no segments, no losses by field.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ping_llm.extraction.parity import require_torch
from ping_llm.models.config import DecoderConfig

# Takes (inputs, targets) [B, T] and a number of steps; returns the loss of the last one.
Steps = Callable[[np.ndarray, np.ndarray, int], float]

BETAS, WEIGHT_DECAY, LEARNING_RATE, CLIP_NORM = (0.9, 0.95), 0.1, 1e-3, 1.0


def _kernels(cfg: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns the (input, output) widths of the kernels of a block."""
    D, F, N, K = cfg.d_model, cfg.d_ff, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    attention = {"q": (D, N), "k": (D, K), "v": (D, K), "out": (N, D)}
    return attention | {"gate": (D, F), "up": (D, F), "down": (F, D)}


def bare_jax(cfg: DecoderConfig) -> Steps:
    """Returns steps in JAX and Optax alone: a dict of weights and a Python loop over the layers."""
    import optax

    D, H = cfg.d_model, cfg.head_dim
    dtype = jnp.dtype(cfg.dtype)
    rng = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, columns)) / rows**0.5, jnp.float32)

    params: dict[str, Any] = {"embed": weight(cfg.vocab_size, D), "norm": jnp.ones(D)}
    for layer in range(cfg.n_layers):
        kernels = {name: weight(*shape) for name, shape in _kernels(cfg).items()}
        params[f"layer{layer}"] = kernels | {"norm1": jnp.ones(D), "norm2": jnp.ones(D)}

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + cfg.rms_norm_eps)
        return (unit * scale).astype(dtype)

    def rotate(x):
        angles = jnp.arange(x.shape[1])[:, None] * cfg.rope_theta ** -(jnp.arange(0, H, 2) / H)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    def loss_fn(params, inputs, targets):
        x = params["embed"].astype(dtype)[inputs]
        for layer in range(cfg.n_layers):
            weights = {name: value.astype(dtype) for name, value in params[f"layer{layer}"].items()}
            normed = norm(x, params[f"layer{layer}"]["norm1"])
            q, k, v = ((normed @ weights[n]).reshape(*x.shape[:2], -1, H) for n in "qkv")
            attended = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + attended.reshape(*x.shape[:2], -1) @ weights["out"]
            normed = norm(x, params[f"layer{layer}"]["norm2"])
            gated = jax.nn.silu(normed @ weights["gate"]) * (normed @ weights["up"])
            x = x + gated @ weights["down"]
        logits = (norm(x, params["norm"]) @ params["embed"].astype(dtype).T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    adamw = optax.adamw(LEARNING_RATE, *BETAS, weight_decay=WEIGHT_DECAY)
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, inputs, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)

    def run(inputs: np.ndarray, targets: np.ndarray, steps: int) -> float:
        nonlocal params, opt_state
        loss = jnp.zeros(())
        for _ in range(steps):
            params, opt_state, loss = step(params, opt_state, inputs, targets)
        return float(loss)

    return run


def pytorch(cfg: DecoderConfig, *, compiled: bool) -> Steps:
    """Returns steps in PyTorch on its CPU or GPU, with as many threads as this machine has CPUs.

    Args:
        cfg: Shape of the model.
        compiled: Whether `torch.compile` is used.

    Raises:
        ConfigError: PyTorch or transformers is not installed.
    """
    require_torch()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    H, dtype = cfg.head_dim, getattr(torch, cfg.dtype)
    functional = torch.nn.functional

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = torch.nn.RMSNorm(cfg.d_model, cfg.rms_norm_eps)
            self.norm2 = torch.nn.RMSNorm(cfg.d_model, cfg.rms_norm_eps)
            shapes = _kernels(cfg).items()
            linear = {name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes}
            self.kernels = torch.nn.ModuleDict(linear)

        def forward(self, x, cos, sin):
            def rotate(x):
                a, b = x.chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            normed = self.norm1(x)
            kernels = self.kernels
            heads = (kernels[name](normed).unflatten(-1, (-1, H)) for name in "qkv")
            q, k, v = (each.transpose(1, 2) for each in heads)
            attended = functional.scaled_dot_product_attention(
                rotate(q), rotate(k), v, is_causal=True, enable_gqa=cfg.n_heads != cfg.n_kv_heads
            )
            x = x + kernels["out"](attended.transpose(1, 2).flatten(2))
            normed = self.norm2(x)
            gated = functional.silu(kernels["gate"](normed)) * kernels["up"](normed)
            return x + kernels["down"](gated)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(cfg.vocab_size, cfg.d_model)
            torch.nn.init.normal_(self.embed.weight, std=cfg.d_model**-0.5)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(cfg.n_layers))
            self.norm = torch.nn.RMSNorm(cfg.d_model, cfg.rms_norm_eps)

        def forward(self, inputs, targets):
            positions = torch.arange(inputs.shape[1], device=inputs.device)[:, None]
            exponents = torch.arange(0, H, 2, device=inputs.device) / H
            angles = positions * cfg.rope_theta**-exponents
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            x = self.embed(inputs)
            for layer in self.layers:
                x = layer(x, cos, sin)
            logits = functional.linear(self.norm(x), self.embed.weight)
            return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model: Any = Model().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    forward = torch.compile(model) if compiled else model

    def run(inputs: np.ndarray, targets: np.ndarray, steps: int) -> float:
        ids, wanted = (
            torch.as_tensor(a, device=device, dtype=torch.long) for a in (inputs, targets)
        )
        loss = torch.zeros(())
        for _ in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = forward(ids, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return run


def transformers_seconds(directory: Path, prompts: Sequence[np.ndarray], *, dtype: str) -> float:
    """Returns the time of transformers' backbone, in batches of 4 padded to their longest.

    Args:
        directory: The model.
        prompts: Token ids of each prompt.
        dtype: Dtype of parameters and activations.

    Raises:
        ConfigError: PyTorch or transformers is not installed.
    """
    require_torch()
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def forward(batch: Sequence[np.ndarray]) -> None:
        rows = [torch.from_numpy(np.asarray(prompt, np.int64)) for prompt in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        ids, mask = pad(rows, True), pad([torch.ones_like(row) for row in rows], True)
        model(ids, attention_mask=mask, use_cache=False)

    with torch.inference_mode():
        forward([prompt[:32] for prompt in prompts[:4]])  # warms up
        started = time.perf_counter()
        for first in range(0, len(prompts), 4):
            forward(prompts[first : first + 4])
        return time.perf_counter() - started
