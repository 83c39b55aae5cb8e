"""The settings of `ping-llm bench`, by what is measured."""

from typing import Literal

from ping_llm.errors import ConfigError
from ping_llm.models.config import DecoderConfig, Dtype, Site
from ping_llm.settings import Settings, field


class BenchPrepareSettings(Settings):
    """Measure how fast INPUT becomes probe rows, which are thrown away.

    The rows are written to the temporary directory ($TMPDIR) and removed at the end.

    Attributes:
        inputs: Files, directories or globs.
        memory_limit: Memory to use at most, such as 512MiB.
        workers: Threads.
    """

    inputs: tuple[str, ...] = field(argument=True, location=True, metavar="INPUT...")
    memory_limit: str = "4GB"
    workers: int | None = field(default=None, gt=0, default_text="one per CPU")


class BenchLoaderSettings(Settings):
    """Measure how fast training batches are made from probe rows.

    The clock runs from opening the rows to the last batch. Real tokens are those that are not
    padding.

    Attributes:
        data: Directory of probe rows, as prepare-data writes it.
        batch_size: Sequences per batch.
        seq_len: Tokens per sequence.
        seconds: How long to measure.
        seed: Seed of the order.
    """

    data: str = field(location=True)
    batch_size: int = field(default=32, gt=0)
    seq_len: int = field(default=1024, gt=0)
    seconds: float = field(default=10.0, gt=0)
    seed: int = field(default=0, ge=0, lt=2**63)


class BenchTrainSettings(Settings):
    """Measure how fast the training step of a decoder is.

    The tokens are random and fill every row. Compiling and loading data are not counted.

    Attributes:
        n_layers: Blocks.
        d_model: Width of the residual stream.
        n_heads: Heads, each of width d_model / n_heads.
        d_ff: Width of the MLP.
        vocab_size: Number of token ids.
        seq_len: Tokens per row.
        batch_size: Rows per batch.
        steps: Steps to time, after two that are not timed.
        dtype: Dtype of activations.
        compare: Time plain JAX and PyTorch too, in turns with ours. Needs the extra [parity].
        seed: Seed of parameters and tokens.
    """

    n_layers: int = field(default=4, gt=0)
    d_model: int = field(default=256, gt=0)
    n_heads: int = field(default=4, gt=0)
    d_ff: int = field(default=704, gt=0)
    vocab_size: int = field(default=267, gt=0)
    seq_len: int = field(default=512, gt=0)
    batch_size: int = field(default=8, gt=0)
    steps: int = field(default=10, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compare: bool = False
    seed: int = field(default=0, ge=0, lt=2**63)

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

    Attributes:
        run: Run directory of the model.
        pairs: Pairs to predict.
        seed: Seed of the addresses.
    """

    run: str = field(location=True)
    pairs: int = field(default=2048, gt=0)
    seed: int = field(default=0, ge=0, lt=2**63)


class BenchExtractSettings(Settings):
    """Measure how fast a model's activations are extracted and stored.

    The prompts are random token ids. Loading and compiling are not counted.

    Attributes:
        model: Directory of a checkpoint, or a hub id.
        tokens: About how many tokens to extract.
        min_length: Tokens of the shortest prompt.
        max_length: Tokens of the longest prompt. Lengths are uniform in between.
        layers: all, or numbers such as 0,5.
        sites: Where to read activations.
        dtype: Dtype of the store.
        batch_tokens: Tokens to compute at once.
        output: Local directory to write in. What is written is removed at the end.
        compare: Run transformers on the prompts too. Needs the extra [parity].
        seed: Seed of the prompts.
    """

    model: str = field(location=True)
    tokens: int = field(default=20_000, gt=0)
    min_length: int = field(default=200, gt=0)
    max_length: int = field(default=1500, gt=0)
    layers: str = "all"
    sites: tuple[Site, ...] = ("residual",)
    dtype: Dtype | None = field(default=None, default_text="the model's")
    batch_tokens: int | None = field(default=None, gt=0, default_text="8192")
    output: str | None = field(default=None, location=True, default_text="the temporary directory")
    compare: bool = False
    seed: int = field(default=0, ge=0, lt=2**63)

    def check(self) -> None:
        """Raises a `ConfigError` if the shortest prompt is longer than the longest one."""
        if self.min_length > self.max_length:
            raise ConfigError(
                f"min_length={self.min_length} must be at most max_length={self.max_length}"
            )
