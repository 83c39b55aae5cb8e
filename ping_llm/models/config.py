"""The shape of a decoder. Two models may differ here and nowhere else."""

from typing import Literal, get_args

from ping_llm.errors import ConfigError
from ping_llm.settings import Settings, field

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
Site = Literal["embed", "attn", "mlp", "residual", "final_norm"]  # in the order of the decoder
SITES = ("attn", "mlp", "residual")  # of each block
END_SITES = ("embed", "final_norm")  # once in the model


class YarnScaling(Settings):
    """YaRN: rotary frequencies stretched to contexts longer than those trained on."""

    factor: float = field(help="How many times longer the context becomes.", gt=0)
    original_max_positions: int = field(
        help="Context length that the frequencies were trained for.", gt=0
    )
    beta_fast: float = field(
        help="Rotations over the original context above which a frequency stays as it is.",
        default=32.0,
        gt=0,
    )
    beta_slow: float = field(
        help="Rotations below which a frequency is divided by `factor`.", default=1.0, gt=0
    )
    attention_factor: float | None = field(
        help="Scale of queries and keys; none: computed from the fields below.", default=None
    )
    mscale: float | None = field(
        help="Numerator of the computed scale; none: 1, and no denominator.", default=None
    )
    mscale_all_dim: float | None = field(
        help="Denominator of the computed scale; used only together with `mscale`.", default=None
    )
    truncate: bool = field(help="Round the bounds of the ramp to whole dimensions.", default=True)


class DecoderConfig(Settings):
    """Shape of a decoder-only Transformer."""

    vocab_size: int = field(help="Number of token ids, V.", gt=0)
    d_model: int = field(help="Width of the residual stream, D.", gt=0)
    n_layers: int = field(help="Number of blocks, L.", gt=0)
    n_heads: int = field(help="Number of query heads, N; a multiple of `n_kv_heads`.", gt=0)
    n_kv_heads: int = field(help="Number of key and value heads, K.", gt=0)
    head_dim: int = field(
        help="Width of a head, H; even; `n_heads * head_dim` may differ from `d_model`.", gt=0
    )
    d_ff: int = field(help="Width of the gated MLP, F.", gt=0)
    rms_norm_eps: float = field(
        help="Added to the mean square in every RMSNorm.", default=1e-6, gt=0
    )
    rope_theta: float = field(help="Base of the rotary frequencies.", default=10_000.0, gt=0)
    rope_scaling: YarnScaling | None = field(
        help="YaRN scaling of the rotary frequencies.", default=None
    )
    qkv_bias: bool = field(help="Give the query, key and value projections a bias.", default=False)
    qk_norm: bool = field(
        help="RMS-normalise queries and keys per head, before the rotation.", default=False
    )
    tie_embeddings: bool = field(
        help="Use the token embedding as the output projection.", default=True
    )
    logit_softcap: float | None = field(
        help="Turn logits into `cap * tanh(logits / cap)`; none: leave them.", default=None, gt=0
    )
    sliding_window: int | None = field(
        help="Keys a query of a sliding layer sees, itself included; none: all.", default=None, gt=0
    )
    sliding_layers: tuple[bool, ...] = field(
        help="Per layer, whether `sliding_window` applies; empty: to every layer.", default=()
    )
    dtype: Dtype = field(help="Dtype of activations.", default="bfloat16")
    param_dtype: Dtype = field(help="Dtype of parameters.", default="float32")
    remat: bool = field(
        help="Recompute each block in the backward pass instead of storing its inside.",
        default=False,
    )

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
