"""The shape of a decoder. Two models may differ here and nowhere else."""

from typing import Literal, get_args

from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
# Places where activations are read, in the order of the decoder.
Site = Literal[
    "embed", "q", "k", "v", "heads", "attn", "mlp_inner", "mlp", "residual", "final_norm"
]
SITES = ("q", "k", "v", "heads", "attn", "mlp_inner", "mlp", "residual")  # of each block
END_SITES = ("embed", "final_norm")  # once in the model


class RopeScaling(Settings):
    """Rotary frequencies stretched to contexts longer than those trained on.

    `linear` divides all of them. The others keep a frequency that turns often over the original
    context, divide one that hardly turns, and mix between: `yarn` linearly in the dimension,
    `llama3`, as Llama 3.1 does, in the number of rotations.

    Attributes:
        kind: Which of these.
        factor: How many times longer the context becomes.
        original_max_positions: Context length that the frequencies were trained for; `linear` does
            not need it.
        beta_fast: Rotations over the original context above which a frequency stays as it is.
        beta_slow: Rotations below which a frequency is divided by `factor`.
        attention_factor: Of YaRN, the scale of queries and keys; none: computed from the fields
            below.
        mscale: Numerator of the computed scale; none: 1, and no denominator.
        mscale_all_dim: Denominator of the computed scale; used only together with `mscale`.
        truncate: Round the bounds of YaRN's ramp to whole dimensions.
    """

    kind: Literal["yarn", "llama3", "linear"] = "yarn"
    factor: float = field(gt=0)
    original_max_positions: int | None = field(default=None, gt=0)
    beta_fast: float = field(default=32.0, gt=0)
    beta_slow: float = field(default=1.0, gt=0)
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def check(self) -> None:
        """Raises a `ConfigError` if fields do not fit together."""
        kind, beta_fast, beta_slow = self.kind, self.beta_fast, self.beta_slow
        if kind != "linear" and self.original_max_positions is None:
            raise ConfigError(f"rope_scaling needs original_max_positions for {kind=}")
        if kind == "llama3" and beta_slow >= beta_fast:
            raise ConfigError(f"rope_scaling: {beta_slow=} must be below {beta_fast=}")


class DecoderConfig(Settings):
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
        rope_scaling: Scaling of the rotary frequencies.
        qkv_bias: Give the query, key and value projections a bias.
        qk_norm: RMS-normalise queries and keys per head, before the rotation.
        tie_embeddings: Use the token embedding as the output projection.
        logit_softcap: Turn logits into `cap * tanh(logits / cap)`; none: leave them.
        sliding_window: Keys a query of a sliding layer sees, itself included; none: all.
        sliding_layers: Per layer, whether `sliding_window` applies; empty: to every layer.
        dtype: Dtype of activations.
        param_dtype: Dtype of parameters.
        remat: Recompute each block in the backward pass instead of storing its inside.
    """

    vocab_size: int = field(gt=0)
    d_model: int = field(gt=0)
    n_layers: int = field(gt=0)
    n_heads: int = field(gt=0)
    n_kv_heads: int = field(gt=0)
    head_dim: int = field(gt=0)
    d_ff: int = field(gt=0)
    rms_norm_eps: float = field(default=1e-6, gt=0)
    rope_theta: float = field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    logit_softcap: float | None = field(default=None, gt=0)
    sliding_window: int | None = field(default=None, gt=0)
    sliding_layers: tuple[bool, ...] = ()
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    remat: bool = False

    def check(self) -> None:
        """Raises a `ConfigError` if fields do not fit together."""
        n_heads, n_kv_heads, head_dim = self.n_heads, self.n_kv_heads, self.head_dim
        if n_heads % n_kv_heads:
            raise ConfigError(f"{n_kv_heads=} must divide {n_heads=}")
        if head_dim % 2:
            raise ConfigError(f"{head_dim=} must be even, for its halves are rotated")
        if self.sliding_layers and len(self.sliding_layers) != self.n_layers:
            given, n_layers = len(self.sliding_layers), self.n_layers
            raise ConfigError(f"sliding_layers has {given} flags for {n_layers=}: give one a layer")

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """Per layer, the number of keys a query sees, None for all; None if no layer slides."""
        if self.sliding_window is None:
            return None
        flags = self.sliding_layers or (True,) * self.n_layers
        return tuple(self.sliding_window if slides else None for slides in flags)

    def width_of(self, site: str) -> int:
        """Returns how many numbers a site holds for a token."""
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        widths = {"q": q_width, "k": kv_width, "v": kv_width, "heads": q_width}
        return (widths | {"mlp_inner": self.d_ff}).get(site, self.d_model)

    def parameter_count(self) -> int:
        """Returns the number of parameters, each counted once."""
        D, H, F = self.d_model, self.head_dim, self.d_ff
        q_width, kv_width = self.n_heads * H, self.n_kv_heads * H
        block = 2 * D * q_width + 2 * D * kv_width + 3 * D * F + 2 * D
        block += (q_width + 2 * kv_width) * self.qkv_bias + 2 * H * self.qk_norm
        heads = 1 if self.tie_embeddings else 2
        return self.n_layers * block + heads * self.vocab_size * D + D


def _preset(width: int, layers: int, heads: int, d_ff: int, dtype: Dtype) -> DecoderConfig:
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
