"""The shape of a decoder. Two models may differ here and nowhere else."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ping_llm.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
Site = Literal["embed", "attn", "mlp", "residual", "final_norm"]  # in the order of the decoder
END_SITES = ("embed", "final_norm")  # once in the model
SITES = ("attn", "mlp", "residual")  # of each block


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: rotary frequencies stretched to contexts longer than those trained on.

    Attributes:
        factor: How many times longer the context becomes.
        original_max_positions: Context length the frequencies were trained for.
        beta_fast: Rotations over the original context above which a frequency stays as it is.
        beta_slow: Rotations below which a frequency is divided by `factor`.
        attention_factor: Scale of queries and keys; None: computed from the fields below.
        mscale: Numerator of the computed scale; None: 1, and no denominator.
        mscale_all_dim: Denominator of the computed scale; used only together with `mscale`.
        truncate: Whether the bounds of the ramp are rounded to whole dimensions.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_positive(
            factor=self.factor,
            original_max_positions=self.original_max_positions,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder-only Transformer.

    Attributes:
        vocab_size: Number of token ids, V.
        d_model: Width of the residual stream, D.
        n_layers: Number of blocks, L.
        n_heads: Number of query heads, N; a multiple of `n_kv_heads`.
        n_kv_heads: Number of key and value heads, K.
        head_dim: Width of a head, H; even; `n_heads * head_dim` may differ from `d_model`.
        d_ff: Width of the gated MLP, F.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: YaRN scaling of the rotary frequencies, or None.
        qkv_bias: Whether the query, key and value projections have a bias.
        qk_norm: Whether queries and keys are RMS-normalised per head, before the rotation.
        tie_embeddings: Whether the output projection is the token embedding.
        logit_softcap: Logits become `cap * tanh(logits / cap)`; None: they stay.
        sliding_window: Keys a query of a sliding layer sees, itself included; None: all.
        sliding_layers: Per layer, whether `sliding_window` applies; empty: to every layer.
        dtype: Dtype of activations.
        param_dtype: Dtype of parameters.
        remat: Whether the backward pass recomputes each block instead of storing its inside.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: YarnScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
        _check_positive(**{name: getattr(self, name) for name in sizes})
        _check_positive(rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta)
        n_heads, n_kv_heads, head_dim = self.n_heads, self.n_kv_heads, self.head_dim
        if n_heads % n_kv_heads:
            raise ConfigError(f"{n_kv_heads=} must divide {n_heads=}")
        if head_dim % 2:
            raise ConfigError(f"{head_dim=} must be even, for its halves are rotated")
        for name in ("logit_softcap", "sliding_window"):
            if getattr(self, name) is not None:
                _check_positive(**{name: getattr(self, name)})
        if self.sliding_layers and len(self.sliding_layers) != self.n_layers:
            given, n_layers = len(self.sliding_layers), self.n_layers
            raise ConfigError(f"sliding_layers has {given} flags for {n_layers=}: give one a layer")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                expected = ", ".join(DTYPES)
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {expected}")

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """Per layer, the number of keys a query sees, None for all; None if no layer slides."""
        if self.sliding_window is None:
            return None
        flags = self.sliding_layers or (True,) * self.n_layers
        return tuple(self.sliding_window if slides else None for slides in flags)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """Returns the config whose `dataclasses.asdict`, as JSON, is `fields`."""
        yarn = fields["rope_scaling"]
        given = {
            "rope_scaling": None if yarn is None else YarnScaling(**yarn),
            "sliding_layers": tuple(fields["sliding_layers"]),
        }
        return cls(**{**fields, **given})

    def parameter_count(self) -> int:
        """Returns the number of parameters, each counted once."""
        D, H, F = self.d_model, self.head_dim, self.d_ff
        q_width, kv_width = self.n_heads * H, self.n_kv_heads * H
        block = 2 * D * q_width + 2 * D * kv_width + 3 * D * F + 2 * D
        block += (q_width + 2 * kv_width) * self.qkv_bias + 2 * H * self.qk_norm
        heads = 1 if self.tie_embeddings else 2
        return self.n_layers * block + heads * self.vocab_size * D + D


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}={value} must be above 0")


def _preset(width: int, layers: int, heads: int, d_ff: int, dtype: str) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=267,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=d_ff,
        dtype=dtype,
    )


# Measurement models by name. `tiny` is for CPUs, which are faster in float32.
PRESETS = {
    "tiny": _preset(128, 4, 4, 352, "float32"),  # 838,144 parameters
    "small": _preset(256, 8, 4, 704, "bfloat16"),  # 6,495,232
    "base": _preset(640, 20, 10, 2048, "bfloat16"),  # 111,608,320
    "large": _preset(1536, 24, 12, 4096, "bfloat16"),  # 679,962,624
}
