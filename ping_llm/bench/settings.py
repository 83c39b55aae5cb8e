"""The settings of `ping-llm bench`, by what is measured."""

from typing import Literal

from ping_llm.errors import ConfigError
from ping_llm.models.config import DecoderConfig
from ping_llm.settings import Settings, field

Site = Literal["residual", "attn", "mlp", "embed", "final_norm"]


class BenchPrepareSettings(Settings):
    """Measure how fast INPUT becomes probe rows, which are thrown away.

    The rows are written to the temporary directory ($TMPDIR) and removed at the end.
    """

    inputs: tuple[str, ...] = field(
        argument=True, location=True, metavar="INPUT...", help="Files, directories or globs."
    )
    memory_limit: str = field(default="4GB", help="Memory to use at most, such as 512MiB.")
    workers: int | None = field(default=None, gt=0, default_text="one per CPU", help="Threads.")


class BenchLoaderSettings(Settings):
    """Measure how fast training batches are made from probe rows.

    The clock runs from opening the rows to the last batch. Real tokens are those that are not
    padding.
    """

    data: str = field(location=True, help="Directory of probe rows, as prepare-data writes it.")
    batch_size: int = field(default=32, gt=0, help="Sequences per batch.")
    seq_len: int = field(default=1024, gt=0, help="Tokens per sequence.")
    seconds: float = field(default=10.0, gt=0, help="How long to measure.")
    seed: int = field(default=0, ge=0, help="Seed of the order.")


class BenchTrainSettings(Settings):
    """Measure how fast the training step of a decoder is.

    The tokens are random and fill every row. Compiling and loading data are not counted.
    """

    n_layers: int = field(default=4, gt=0, help="Blocks.")
    d_model: int = field(default=256, gt=0, help="Width of the residual stream.")
    n_heads: int = field(default=4, gt=0, help="Heads, each of width d_model / n_heads.")
    d_ff: int = field(default=704, gt=0, help="Width of the MLP.")
    vocab_size: int = field(default=267, gt=0, help="Number of token ids.")
    seq_len: int = field(default=512, gt=0, help="Tokens per row.")
    batch_size: int = field(default=8, gt=0, help="Rows per batch.")
    steps: int = field(default=10, gt=0, help="Steps to time, after two that are not timed.")
    dtype: Literal["float32", "bfloat16"] = field(default="float32", help="Dtype of activations.")
    compare: bool = field(
        default=False,
        help="Time plain JAX and PyTorch too, in turns with ours. Needs the extra [parity].",
    )
    seed: int = field(default=0, ge=0, help="Seed of parameters and tokens.")

    def check(self) -> None:
        """Raises a `ConfigError` if the heads do not divide the width."""
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")

    @property
    def model(self) -> DecoderConfig:
        """The decoder; each of its heads has keys and values of its own."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=self.d_model // self.n_heads,
            d_ff=self.d_ff,
            dtype=self.dtype,
        )


class BenchPredictSettings(Settings):
    """Measure how fast a model predicts RTT distributions.

    All pairs have one source, once without and once with a history. Compiling is not counted.
    """

    run: str = field(location=True, help="Run directory of the model.")
    pairs: int = field(default=2048, gt=0, help="Pairs to predict.")
    seed: int = field(default=0, ge=0, help="Seed of the addresses.")


class BenchExtractSettings(Settings):
    """Measure how fast a model's activations are extracted and stored.

    The prompts are random token ids. Loading and compiling are not counted.
    """

    model: str = field(location=True, help="Directory of a checkpoint, or a hub id.")
    tokens: int = field(default=20_000, gt=0, help="About how many tokens to extract.")
    min_length: int = field(default=200, gt=0, help="Tokens of the shortest prompt.")
    max_length: int = field(
        default=1500, gt=0, help="Tokens of the longest prompt. Lengths are uniform in between."
    )
    layers: str = field(default="all", help="all, or numbers such as 0,5.")
    sites: tuple[Site, ...] = field(default=("residual",), help="Where to read activations.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, default_text="the model's", help="Dtype of the store."
    )
    batch_tokens: int | None = field(
        default=None, gt=0, default_text="8192", help="Tokens to compute at once."
    )
    output: str | None = field(
        default=None,
        location=True,
        default_text="the temporary directory",
        help="Local directory to write in. What is written is removed at the end.",
    )
    compare: bool = field(
        default=False, help="Run transformers on the prompts too. Needs the extra [parity]."
    )
    seed: int = field(default=0, ge=0, help="Seed of the prompts.")

    def check(self) -> None:
        """Raises a `ConfigError` if the shortest prompt is longer than the longest one."""
        if self.min_length > self.max_length:
            raise ConfigError(
                f"min_length={self.min_length} must be at most max_length={self.max_length}"
            )
