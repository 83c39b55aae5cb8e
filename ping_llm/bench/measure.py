"""What `ping-llm bench` measures: honest throughput on this machine."""

import dataclasses
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from ping_llm.errors import ConfigError
from ping_llm.progress import progress


@dataclasses.dataclass(frozen=True)
class LoaderResult:
    """What the loader turned out, from opening the data set to the last batch.

    Attributes:
        tokens_per_second: Tokens of the batches, padding included, by the wall clock.
        real_tokens_per_second: The same without padding.
        padding_fraction: Padding among all tokens.
        tokens_per_cpu_second: Real tokens by the CPU time of this process and its workers.
        first_batch_seconds: How long the first batch took.
        batches: Batches taken.
        seconds: Wall time.
        cpu_seconds: CPU time of this process and its workers.
        peak_rss_bytes: Most memory at once, as seen ten times a second: this process and its
            workers, mapped files included.
    """

    tokens_per_second: float
    real_tokens_per_second: float
    padding_fraction: float
    tokens_per_cpu_second: float
    first_batch_seconds: float
    batches: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


class _Usage:
    """CPU time and memory of this process and its children."""

    def __init__(self) -> None:
        self._cpu: dict[int, float] = {}
        self._before = 0.0
        self.peak_rss_bytes = 0
        self.sample()
        self._before = self.cpu_seconds

    def sample(self) -> None:
        """Looks once; what children used after the last look is not seen."""
        own = psutil.Process(os.getpid())
        rss = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                rss += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self._cpu[process.pid] = times.user + times.system
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds used since this object was made, up to the last look."""
        return sum(self._cpu.values()) - self._before


@dataclasses.dataclass(frozen=True)
class PrepareBenchResult:
    """How fast `prepare_data` made probe rows.

    Attributes:
        measurements_per_second: Measurements in the rows, by the wall clock.
        measurements_per_cpu_second: The same by the CPU time of this process and its children.
        measurements: How many there were.
        rejected: How many records could not be used.
        input_bytes: Size of the inputs.
        seconds: Wall time.
        cpu_seconds: CPU time.
        peak_rss_bytes: Most memory at once, this process and its children.
    """

    measurements_per_second: float
    measurements_per_cpu_second: float
    measurements: int
    rejected: int
    input_bytes: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def bench_prepare(
    inputs: Sequence[str], *, memory_limit: str | int = "4GB", workers: int | None = None
) -> PrepareBenchResult:
    """Returns how fast `inputs` become probe rows, which are thrown away.

    Args:
        inputs: As `prepare_data` takes them.
        memory_limit: As there.
        workers: As there.

    Raises:
        DataError: An input is missing or broken, or holds no measurement.
    """
    from ping_llm.ingest.files import find_files
    from ping_llm.ingest.prepare import prepare_data

    size = sum(file.size for file in find_files(inputs))
    usage, start = _Usage(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ping-llm-bench-") as place:
        made = prepare_data(
            inputs, output=Path(place) / "rows", memory_limit=memory_limit, workers=workers
        )
        seconds = time.perf_counter() - start
        usage.sample()
    return PrepareBenchResult(
        measurements_per_second=made.measurements / seconds,
        measurements_per_cpu_second=made.measurements / usage.cpu_seconds,
        measurements=made.measurements,
        rejected=sum(made.rejected.values()),
        input_bytes=size,
        seconds=seconds,
        cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=made.peak_rss_bytes,
    )


def bench_loader(
    data: str | Path,
    *,
    batch_size: int = 32,
    seq_len: int = 1024,
    seconds: float = 10.0,
    num_workers: int = 0,
    seed: int = 0,
) -> LoaderResult:
    """Returns how fast the loader makes training batches when nobody else holds it up.

    Args:
        data: A directory of probe rows.
        batch_size: Sequences of a batch.
        seq_len: Tokens of a sequence.
        seconds: How long to take batches.
        num_workers: Worker processes; with 0, the loader is one thread of this process.
        seed: Seed of the order.

    Raises:
        ConfigError: A setting cannot be.
        DataError: `data` is not a data set, or has no train rows.
    """
    if not seconds > 0:
        raise ConfigError(f"{seconds=} must be above 0")
    # The time to import is not the loader's.
    from ping_llm.data.pipeline import TrainLoader

    usage, start = _Usage(), time.perf_counter()
    real = batches = 0
    first_batch_seconds = elapsed = looked = 0.0
    with (
        TrainLoader(
            data, batch_size=batch_size, seq_len=seq_len, seed=seed, num_workers=num_workers
        ) as loader,
        progress("loader", total=seconds, unit="s") as bar,
    ):
        for batch in loader:
            elapsed = time.perf_counter() - start
            first_batch_seconds = first_batch_seconds or elapsed
            batches += 1
            real += int(np.count_nonzero(batch.segment_ids))
            if elapsed - looked > 0.1:
                looked = elapsed
                usage.sample()
                bar.update(done=elapsed)
            if elapsed >= seconds:
                break
        usage.sample()
    tokens = batches * batch_size * seq_len
    return LoaderResult(
        tokens_per_second=tokens / elapsed,
        real_tokens_per_second=real / elapsed,
        padding_fraction=1 - real / tokens,
        tokens_per_cpu_second=real / max(usage.cpu_seconds, 1e-9),
        first_batch_seconds=first_batch_seconds,
        batches=batches,
        seconds=elapsed,
        cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=usage.peak_rss_bytes,
    )


@dataclasses.dataclass(frozen=True)
class TrainBenchResult:
    """How fast training steps are, on random tokens that fill every row; compiling is not counted.

    Attributes:
        tokens_per_second: By the median step.
        real_tokens_per_second: The same; there is no padding.
        padding_fraction: 0.
        tokens_per_cpu_second: By the CPU time of this process over the package's own steps.
        step_seconds: The median step.
        fastest_step_seconds: The fastest one.
        flops_per_second: FLOPs of forward and backward passes, as `training.flops` counts them.
        mfu: The same as a part of the devices' peak; None where no peak is known.
        parameters: Number of parameters.
        bare_jax: Our speed as a multiple of that of a plain JAX step of the same shape, the median
            over pairs of steps taken one after the other; None: not measured.
        pytorch: The same beside PyTorch in eager mode.
        pytorch_compiled: The same beside `torch.compile`.
        peak_device_bytes: Most memory used on one device; on a CPU, by the process.
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


def bench_train(
    *,
    n_layers: int = 4,
    d_model: int = 256,
    n_heads: int = 4,
    d_ff: int = 704,
    vocab_size: int = 267,
    seq_len: int = 512,
    batch_size: int = 8,
    steps: int = 10,
    dtype: str = "float32",
    compare: bool = False,
    seed: int = 0,
) -> TrainBenchResult:
    """Returns how fast the training step of a decoder of this shape is.

    Args:
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        n_heads: Number of heads, of `d_model / n_heads` each.
        d_ff: Width of the MLP.
        vocab_size: Number of token ids.
        seq_len: Tokens of a row.
        batch_size: Rows of a batch.
        steps: Steps that are timed, after two that are not.
        dtype: Dtype of activations.
        compare: Whether plain JAX and PyTorch steps of the same shape take turns with ours; needs
            the extra [parity].
        seed: Decides parameters and tokens.

    Raises:
        ConfigError: The shape cannot be, or PyTorch is missing.
    """
    from ping_llm import sharding
    from ping_llm.bench import training as throughput
    from ping_llm.training import flops

    if steps < 1:
        raise ConfigError(f"{steps=} must be at least 1")
    cfg = throughput.shape(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_ff=d_ff,
        vocab_size=vocab_size,
        dtype=dtype,
    )
    measured = throughput.measure(
        cfg, batch_size=batch_size, seq_len=seq_len, steps=steps, compare=compare, seed=seed
    )
    step = float(np.median(measured.seconds["ping_llm"]))
    rate = batch_size * seq_len / step
    per_second = measured.flops_per_step / step
    peak = flops.peak_of_devices()

    def beside(name: str) -> float | None:
        if name not in measured.seconds:
            return None
        ratios = np.divide(measured.seconds[name], measured.seconds["ping_llm"])
        return float(np.median(ratios))

    return TrainBenchResult(
        tokens_per_second=rate,
        real_tokens_per_second=rate,
        padding_fraction=0.0,
        tokens_per_cpu_second=steps * batch_size * seq_len / measured.cpu_seconds,
        step_seconds=step,
        fastest_step_seconds=min(measured.seconds["ping_llm"]),
        flops_per_second=per_second,
        mfu=peak and per_second / peak,
        parameters=cfg.parameter_count(),
        bare_jax=beside("bare_jax"),
        pytorch=beside("pytorch"),
        pytorch_compiled=beside("pytorch_compiled"),
        peak_device_bytes=sharding.peak_device_bytes(),
    )


@dataclasses.dataclass(frozen=True)
class ExtractBenchResult:
    """What an extraction turned out, on prompts of random token ids.

    Attributes:
        real_tokens_per_second: With storing, loading and compiling aside.
        tokens_per_second: The same, padding included.
        padding_fraction: Padding among all tokens.
        forward_tokens_per_second: Real tokens, of the forward pass alone.
        store_cost: What storing adds to the wall time of the forward pass, as a part of it.
        write_bytes_per_second: Of the store's writer alone.
        npy_bytes_per_second: Of `numpy.save` of the same rows to the same disk, to the disk's end.
        transformers_tokens_per_second: Real tokens, of transformers' backbone, in batches of 4
            padded to their longest, nothing stored; None: not measured.
        tokens: Real tokens extracted.
        bytes: Size of the store.
        peak_device_bytes: Most memory used on one device; on a CPU, by the process.
    """

    real_tokens_per_second: float
    tokens_per_second: float
    padding_fraction: float
    forward_tokens_per_second: float
    store_cost: float
    write_bytes_per_second: float
    npy_bytes_per_second: float
    transformers_tokens_per_second: float | None
    tokens: int
    bytes: int
    peak_device_bytes: int


def bench_extract(
    model: str | Path,
    *,
    tokens: int = 20_000,
    min_length: int = 200,
    max_length: int = 1500,
    layers: str = "all",
    sites: str = "residual",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    output: Path | None = None,
    compare: bool = False,
    seed: int = 0,
) -> ExtractBenchResult:
    """Returns how fast activations are extracted, and how fast they are stored.

    Args:
        model: Directory of a checkpoint, or a hub id.
        tokens: About how many tokens to extract.
        min_length: Tokens of the shortest prompt.
        max_length: Tokens of the longest one; lengths are uniform between.
        layers: `all`, or numbers with commas between.
        sites: Names with commas between.
        dtype: Dtype of the store; None: the model's own.
        batch_tokens: Tokens computed at once; None: the default of extract-activations.
        output: Where the store is put for a while; None: a temporary directory.
        compare: Whether transformers does the same in the same run; needs the extra [parity].
        seed: Decides the prompts.

    Raises:
        ConfigError: A setting cannot be.
        CheckpointError: The model cannot be read.
    """
    from ping_llm.bench import extraction as throughput
    from ping_llm.extraction import parity, run
    from ping_llm.models import qwen2

    if not 0 < min_length <= max_length:
        raise ConfigError(f"{min_length=} and {max_length=} must be above 0, in this order")
    directory = qwen2.resolve(model)
    rng = np.random.default_rng(seed)
    mean = (min_length + max_length) / 2
    lengths = rng.integers(min_length, max_length + 1, max(round(tokens / mean), 1))
    vocab_size = qwen2.read_config(directory).vocab_size
    prompts = [rng.integers(0, vocab_size, length) for length in lengths]
    settings = {
        "format": "tokens",
        "layers": layers,
        "sites": sites,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "max_length": max(max_length, 1),
        "unit_mb": 1e3,
    }
    with tempfile.TemporaryDirectory(dir=output) as place:
        path = Path(place) / "prompts.jsonl"
        with path.open("w") as file:
            for prompt in prompts:
                file.write(json.dumps({"tokens": prompt.tolist()}) + "\n")
        stored = run.extract_activations(directory, path, Path(place) / "store", **settings)
        assert isinstance(stored, run.ExtractResult)
        forward = throughput.forward_seconds(directory, path, settings)
        write, npy = throughput.write_speeds(Path(place), seed=seed)
    theirs = None
    if compare:
        parity.require_torch()
        theirs = stored.tokens / parity.padded_forward_seconds(
            directory, prompts, batch_size=4, dtype=dtype or "float32", threads=os.cpu_count() or 1
        )
    return ExtractBenchResult(
        real_tokens_per_second=stored.tokens_per_second,
        tokens_per_second=stored.tokens_per_second / (1 - stored.padding_fraction),
        padding_fraction=stored.padding_fraction,
        forward_tokens_per_second=stored.tokens / forward,
        store_cost=stored.seconds / forward - 1,
        write_bytes_per_second=write,
        npy_bytes_per_second=npy,
        transformers_tokens_per_second=theirs,
        tokens=stored.tokens,
        bytes=stored.bytes_written,
        peak_device_bytes=stored.peak_device_bytes,
    )


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """How fast a model answers questions; compiling is not counted.

    Attributes:
        pairs_per_second: Pairs without a history.
        pairs_per_second_with_history: Pairs after a history that fills the model's sequences.
        history_tokens: Tokens of that history.
        pairs: Pairs of each measurement.
        peak_rss_bytes: Most memory of this process.
    """

    pairs_per_second: float
    pairs_per_second_with_history: float
    history_tokens: int
    pairs: int
    peak_rss_bytes: int


def bench_predict(run: str | Path, *, pairs: int = 2048, seed: int = 0) -> PredictResult:
    """Returns how many pairs a second a run's model answers, with one source and many destinations.

    Args:
        run: A run directory.
        pairs: Pairs of each measurement, IPv4 at random.
        seed: Of the addresses.
    """
    from ping_llm.prediction.contexts import encode_prompts
    from ping_llm.prediction.rtt import Predictor, questions

    if pairs < 1:
        raise ConfigError(f"{pairs=} must be at least 1")
    predictor = Predictor.load(run)
    rng = np.random.default_rng(seed)

    def some(n: int):
        hosts = rng.integers(0, 256, (n, 3))
        return questions(["10.0.0.1"] * n, [f"10.{a}.{b}.{c}" for a, b, c in hosts])

    queries, history = some(pairs), some(predictor.max_tokens)
    history = dataclasses.replace(history, rtt=rng.uniform(1, 300, len(history)))
    contexts = predictor.contexts(history, queries)
    rates = []
    for given in (None, contexts):
        predictor.predict(queries, given)  # compiles
        started = time.monotonic()
        predictor.predict(queries, given)
        rates.append(pairs / (time.monotonic() - started))
    return PredictResult(
        pairs_per_second=rates[0],
        pairs_per_second_with_history=rates[1],
        history_tokens=int(encode_prompts(contexts, queries).context_offsets[-1]),
        pairs=pairs,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
